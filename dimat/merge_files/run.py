"""Merges model files by a recipe: checks everything, then merges and writes each tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimat.config import MergeConfig
from dimat.device import resolve_device
from dimat.errors import ConfigError
from dimat.merge.registry import CONTEXT
from dimat.merge.settled import merge_checked
from dimat.merge.shared_statistics import check_statistics
from dimat.merge.stages import Weights
from dimat.merge.weight_views import WeightsView, open_weights
from dimat.merge_files.adapters import MergedAdapter, fit_together, names_of, open_adapters
from dimat.merge_files.architecture import Network, open_network, runs
from dimat.merge_files.card import config_of, model_card, provenance
from dimat.merge_files.files import ADAPTER_CONFIG, ModelFiles, adapter_notes, check_alike, check_factors, check_formats
from dimat.merge_files.folders import open_model
from dimat.merge_files.into_base import IntoBase, target
from dimat.merge_files.memory import peak_memory, whole_memory
from dimat.merge_files.model_config import check_configs, check_whole
from dimat.merge_files.recipe import DTYPES, Recipe, TensorGroup
from dimat.merge_files.tied import Together, bring_together
from dimat.merge_files.vocabulary import align_vocabularies, check_vocabularies
from dimat.merge_files.whole import WholeMerge, merge_whole
from dimat.merge_files.write import Output, Scratch, check_apart, check_output, is_file_name, lay_out, weights_name
from dimat.weights.header import TensorInfo

Progress = Callable[[int, int], None]
"""Called after each tensor: (bytes merged, total bytes)."""


@dataclass(frozen=True)
class Job:
    """A merge that is checked and ready to run. `infos`: the tensors to write; `layout`: their files; `network`:
    architecture and data for running the models, None if tensors are merged one by one; `adapters`: PEFT adapters whose
    products are merged; `into`: the base into which they are merged; `own`: the first model as stored; `kept`: its
    tensors that are written unchanged; `tied`: those that are written as the merged tensor of another name; `carrier`:
    the model whose config and tokenizer are written; `notes`: for the user."""

    recipe: Recipe
    models: tuple[ModelFiles, ...]
    base: ModelFiles | None
    statistics: tuple[Weights, ...] | None
    parts: tuple[TensorGroup, ...]
    own: ModelFiles
    infos: dict[str, TensorInfo]
    layout: dict[str, list[str]]
    out: Path
    device: torch.device
    network: Network | None = None
    adapters: MergedAdapter | None = None
    into: IntoBase | None = None
    kept: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    carrier: ModelFiles | None = None
    notes: tuple[str, ...] = ()

    @property
    def views(self) -> tuple[Weights, ...]:
        """The models as the methods see them, in order."""
        return self.models if self.adapters is None else self.adapters.views

    @property
    def merged(self) -> dict[str, TensorInfo]:
        """The tensors that the methods make, in the first model's types."""
        return self.models[0].infos if self.adapters is None else self.adapters.infos

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.infos.values())

    def peak_memory(self) -> int:
        """Return the approximate memory in bytes that the merge needs, without mapped files."""
        models = len(self.models)
        if self.into is not None:
            return self.into.peak_memory(self.merged)
        if self.network is not None:
            methods = [part.method for part in self.parts]
            infos = [*self.models[0].infos.values()]
            return whole_memory(methods, infos, models, self.base is not None, self.network.dtype.itemsize)
        return max(
            peak_memory(part.method, [self.merged_as(name) for name in part.names], models, self.base is not None)
            for part in self.parts
        )

    def plan(self) -> dict[str, Any]:
        """Return the plan of the merge, as plain values."""
        return {
            "method": self.recipe.method,
            "options": self.recipe.options,
            "models": [
                {"path": str(model.path), "weight": weight} for model, weight in zip(self.models, self.recipe.mixing)
            ],
            "base": None if self.base is None else str(self.base.path),
            "into_base": self.into is not None,
            "rules": [
                {
                    "method": part.method.name,
                    "options": part.method.options,
                    "weights": part.mixing,
                    "tensors": len(part.names),
                }
                for part in self.parts
            ],
            **({} if self.network is None else self._run_with(self.network)),
            "out": str(self.out),
            "files": [*self.layout],
            "tensors": len(self.infos),
            "bytes": self.bytes,
            "peak_memory": self.peak_memory(),
            **({"notes": [*self.notes]} if self.notes else {}),
        }

    def merged_as(self, name: str) -> TensorInfo:
        """Return a tensor in the type in which the method sees the first model's: never narrower than the output's, and
        wide if it is added to a base."""
        own = self.merged[name]
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        if self.into is None:
            written = self.infos[name].dtype
        else:
            written = wide if own.dtype.is_floating_point else own.dtype
        return replace(own, dtype=torch.promote_types(own.dtype, written)) if own.dtype != written else own

    def _run_with(self, network: Network) -> dict[str, Any]:
        return {
            "model": self.recipe.model,
            "data": self.recipe.data,
            "align": self.recipe.align.model_dump() | ({"finds": network.coverage} if network.spec else {}),
            "repair": self.recipe.repair.model_dump(),
        }


@dataclass(frozen=True)
class Report:
    """The report of a merge: its plan, the blake3 of each input file by model, and, if it ran the models, the share of
    units that moved by model, and notes."""

    plan: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        more = {"moved": self.moved, "notes": self.notes} if self.moved or self.notes else {}
        return {**self.plan, "inputs": self.inputs, **more}


class View(WeightsView):
    """Some tensors of a model, on a device, the first model's in the type in which they are merged."""

    def __init__(
        self,
        weights: Weights,
        names: Sequence[str],
        device: torch.device,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        super().__init__(dict.fromkeys(names))
        self._weights = weights
        self._device = device
        self._dtypes = dtypes or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights[name].to(self._device, self._dtypes.get(name))


def prepare(recipe: Recipe, *, overwrite: bool = False) -> Job:
    """Open and check everything that a recipe names.

    Raises ConfigError (an incomplete recipe, an existing output), DataError (models that cannot be read or do not fit
    together); nothing is written.
    """
    if recipe.out is None:
        raise ConfigError("where to? give an output with -o, a name in .safetensors or a folder")
    out = Path(recipe.out)
    check_output(out, overwrite)
    device = resolve_device(recipe.device, "device")
    models = tuple(open_model(Path(model.path)) for model in recipe.models)
    base = None if recipe.base is None else open_model(Path(recipe.base))
    inputs = [*models, *([] if base is None else [base])]
    check_apart(out, [path for model in inputs for path in (model.path, *model.files)])
    check_apart(out, [Path(model.statistics) for model in recipe.models if model.statistics is not None])
    if recipe.input_dtype is not None:
        models = tuple(model.read_in(DTYPES[recipe.input_dtype]) for model in models)
        base = None if base is None else base.read_in(DTYPES[recipe.input_dtype])
    inputs = [*models, *([] if base is None else [base])]
    for model in inputs:  # a base that adapters are merged into says itself where a tensor takes no addition
        check_whole(model, codes=not (model.adapter or (recipe.into_base and model is base)))
    check_formats(inputs)
    carrier = next((model for model in [*inputs[len(models) :], *models] if model.carried()), None)
    notes = check_configs(inputs)
    if recipe.align_vocabulary:
        aligned = align_vocabularies(inputs, carrier)
        models, base = tuple(aligned[: len(models)]), None if base is None else aligned[-1]
    else:
        notes += check_vocabularies(inputs, carrier)
    opened = open_adapters(recipe, models)
    own, together = models[0], Together(models, base)
    if opened is None:
        check_factors([*models, *([] if base is None else [base])])
        together = bring_together(models, base)
        models, base = together.models, together.base
        check_alike([*models, *([] if base is None else [base])])
    lora = recipe.method_of(None).traits["lora_products"]
    notes += adapter_notes(models, products=opened is not None or lora)
    names = models[0].infos if opened is None else names_of(recipe, opened)
    statistics = _open_statistics(recipe, models)
    parts = _parts(recipe, names)
    methods = [part.method for part in parts]
    for part in parts:
        _check_needs(part, base, statistics)
        if len(parts) > 1 and runs(part.method):
            raise ConfigError(
                f"method {part.method.name!r} runs the whole model: it cannot merge some tensors by a rule"
            )
    network = open_network(recipe, methods, models[0], together.tied, device)
    if network is not None and models[0].adapter:
        raise ConfigError("adapters are not models that can be run: merge them without model, align and repair")
    adapters = None if opened is None else fit_together(opened, names, parts, device)
    into = target(recipe, adapters, base, out)
    infos = _written(recipe, base if into and base else own if adapters is None else adapters)
    single, adapter = is_file_name(out), models[0].adapter and into is None
    name = out.name if single else weights_name(adapter, base if into and base else own)
    layout = lay_out(infos, None if single or adapter else recipe.shard_size, name)
    return Job(
        recipe,
        models,
        base,
        statistics,
        parts,
        own,
        infos,
        layout,
        out,
        device,
        network,
        adapters,
        into,
        together.kept,
        together.tied,
        carrier,
        tuple(notes),
    )


def merge_files(job: Job, *, version: str, overwrite: bool = False, progress: Progress | None = None) -> Report:
    """Merge and write; the output appears under its name when it is complete. `version`: dimat's, for the record.

    Raises MergeError (the method cannot merge these), DataError (values that are not finite, a full disk); then nothing
    is left under the output's name.
    """
    inputs = {str(model.path): model.hashes() for model in (*job.models, *([job.base] if job.base else []))}
    if job.network is not None:
        inputs |= {source: dict(files) for source, files in job.network.sources.items()}
    record = provenance(version, job.recipe, inputs)
    report = Report(job.plan(), inputs, notes=job.notes)
    merged = None if job.network is None else _merge_whole(job, job.network)
    done = 0
    finite = not job.recipe.keep_not_finite
    metadata = {"format": check_formats([*job.models, *([job.base] if job.base else [])]), "dimat": record}
    with Output(job.out, job.layout, job.infos, metadata, overwrite=overwrite, finite=finite) as output:

        def receive(name: str, tensor: Tensor) -> None:
            nonlocal done
            output.put(name, tensor)
            done += job.infos[name].bytes
            if progress is not None:
                progress(done, job.bytes)

        twins: dict[str, list[str]] = {}
        for name, twin in job.tied.items():
            twins.setdefault(twin, []).append(name)

        def receive_tied(name: str, tensor: Tensor) -> None:
            for each in (name, *twins.get(name, ())):
                receive(each, tensor)

        added: dict[str, Tensor] = {}
        take = receive_tied if job.into is None else added.__setitem__
        for part in job.parts if merged is None else ():
            with torch.no_grad():
                combined = _combine(job, part)
                for name in combined:  # merged one at a time, as they are asked for
                    take(name, combined[name])
        for name in job.kept:
            receive(name, job.own[name])
        if job.into is not None:
            for name in job.infos:
                receive(name, job.into.tensor(name, added, job.device))
        if merged is not None:
            for name in job.merged:
                receive_tied(name, merged.weights.pop(name))
            moved = {str(model.path): share for model, share in zip(job.models[1:], merged.moved) if share is not None}
            report = replace(report, moved=moved, notes=(*job.notes, *merged.notes))
        if not output.single:
            for file in () if job.carrier is None else job.carrier.carried():
                output.add(file.name, config_of(file, job.recipe.dtype or job.recipe.input_dtype))
            if job.adapters is not None and job.into is None:
                output.add(ADAPTER_CONFIG, job.adapters.config())
            output.add("README.md", model_card(job.out.name, report.plan, inputs, record))
    return report


def _merge_whole(job: Job, network: Network) -> WholeMerge:
    with torch.no_grad():
        return merge_whole(job.recipe, network, job.models, job.base, job.statistics, job.parts, job.device)


def _combine(job: Job, part: TensorGroup) -> Weights:
    """Return some merged tensors, each computed when accessed."""
    seen = {name: job.merged_as(name).dtype for name in part.names}
    dtypes = {name: dtype for name, dtype in seen.items() if dtype != job.merged[name].dtype}
    own, *peers = (View(model, part.names, job.device, None if i else dtypes) for i, model in enumerate(job.views))
    context: dict[str, Any] = {
        "aux": job.statistics,
        "generator": torch.Generator().manual_seed(job.recipe.seed),
        "names": [str(model.path) for model in job.models[1:]],
        "put_away": Scratch(job.out.parent),
    }
    base = None if job.base is None else View(job.base, part.names, job.device)

    def method(own: Weights, peers: Sequence[Weights], base: Weights | None) -> Weights:
        # what is not here (a model, data, a state) is None, for methods that can do without
        return part.method(own, peers, part.mixing, **(dict.fromkeys(CONTEXT) | context | {"base": base}))

    names = [str(model.path) for model in job.models[1:]]
    return merge_checked(method, own, peers, part.mixing, base, names, finite=not job.recipe.keep_not_finite)


def _parts(recipe: Recipe, own: Collection[str]) -> tuple[TensorGroup, ...]:
    """Return the groups of tensors with their methods; ConfigError if a rule matches no tensor."""
    names: dict[int, list[str]] = {}
    limit_s = recipe.regex_s
    for name in own:
        names.setdefault(next((i for i, rule in enumerate(recipe.rules) if rule.fits(name, limit_s)), -1), []).append(
            name
        )
    for i, rule in enumerate(recipe.rules):
        if i not in names:
            earlier = any(rule.fits(name, limit_s) for name in own)
            why = "earlier rules take all that it matches" if earlier else f"names are like {next(iter(own))!r}"
            raise ConfigError(f"rule {i + 1} ({rule.pattern!r}) applies to no tensor: {why}")
    rules = {i: None if i < 0 else recipe.rules[i] for i in sorted(names)}
    return tuple(
        TensorGroup(tuple(names[i]), recipe.method_of(rule), recipe.mixing_of(rule)) for i, rule in rules.items()
    )


def _check_needs(part: TensorGroup, base: ModelFiles | None, statistics: Sequence[Weights] | None) -> None:
    """Raise ConfigError if a method lacks the base or the statistics that it needs."""
    method, option = part.method, part.method.traits["base_with"]
    wanted = "base" in method.asks and (option is None or method.settings[option])
    if wanted and base is None:
        raise ConfigError(f"method {method.name!r} merges deltas from a base, and there is none: give one with --base")
    if "aux" in method.asks and statistics is None:
        raise ConfigError(
            f"method {method.name!r} needs statistics of every model: write them as statistics = FILE "
            "in the recipe's [[models]]"
        )


def _open_statistics(recipe: Recipe, models: Sequence[ModelFiles]) -> tuple[Weights, ...] | None:
    given = [model.statistics for model in recipe.models]
    paths = [path for path in given if path is not None]
    if not paths:
        return None
    if len(paths) < len(given):
        raise ConfigError(f"model {given.index(None) + 1} has no statistics: give every model some, or none of them")
    opened = tuple(open_weights(path) for path in paths)
    for path, found in zip(paths, opened):
        check_statistics(path, found, models[0], None, MergeConfig().statistics_samples)
    return opened


def _written(recipe: Recipe, own: ModelFiles | MergedAdapter) -> dict[str, TensorInfo]:
    """Return the tensors to write: the first model's, floating-point ones in the recipe's type."""
    if recipe.dtype is None:
        return dict(own.infos)
    dtype = DTYPES[recipe.dtype]
    return {
        name: replace(info, dtype=dtype) if info.dtype.is_floating_point else info for name, info in own.infos.items()
    }
