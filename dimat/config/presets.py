"""The merge methods by name: the stages of each one's merge, and its other traits.

A method that is more than a merge says so here by a trait. The simulator and the agents read only the traits, so that
their behaviour depends on no method's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel

from dimat.config.tree import NamedConfig
from dimat.errors import ConfigError, unknown_name

PUSH_SUM = "push-sum"
"""Name of the mixing rule, as `dimat.topology.mixing` registers it; the configuration knows it only by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A merge method. `align`, `combine` and `repair` name the stages of its merge; the rest are its traits."""

    align: str = "none"
    align_to: Literal["shared", "self"] = "shared"
    combine: str = "average"
    on_data: str = ""
    """The combine method of agents, which take statistics on their own data, in the place of `combine`; where it has
    nothing to work on in a model, or costs too many bytes, and where files are merged, it is `combine`."""
    repair: str = "none"
    exchanges: bool = True
    """Whether agents exchange weights at all."""
    ceiling: bool = False
    """Whether it trains one model on all data instead of agents: the upper bound for networks. One method does."""
    every_step: bool = False
    """Whether agents merge after every optimizer step, unless the configuration sets the length of a round."""
    push_sum: bool = False
    """Whether the method needs push-sum mixing."""
    moments: bool = False
    """Whether optimizer moments are merged too, unless the configuration says otherwise or sets a combine method that
    is not in `WITH_MOMENTS`."""
    shares: Literal["weights", "logits"] = "weights"
    """The content of a snapshot: an agent's weights, or its model's logits on the probe set."""
    probe_samples: int = 100
    """Size of the probe set, unless the configuration sets it."""


PRESETS: Mapping[str, Preset] = {
    "isolated": Preset(exchanges=False),
    "centralised": Preset(exchanges=False, ceiling=True),
    "average": Preset(),
    "dpsgd": Preset(every_step=True),
    "sgp": Preset(every_step=True, push_sum=True),
    "opcm": Preset(combine="opcm"),
    "dimat": Preset(align="activations", on_data="regmean", repair="batchnorm", moments=True),
    "dimat-paper": Preset(align="activations", repair="batchnorm", align_to="self"),
    "zipit": Preset(repair="batchnorm", combine="zipit"),
    "pleas": Preset(align="activations", repair="batchnorm", combine="pleas"),
    "distil": Preset(combine="distil", shares="logits", probe_samples=1000),
}
"""Method name → preset. `average` is the paper's baseline WA, whole state dicts; `dimat` merges linear layers by
RegMean and averages the rest, optimizer moments too, in a basis that agents come to share (basis gossip); `dimat-paper`
aligns peers to self at every merge and averages, as published; `opcm` (Tang et al. 2025, arXiv 2501.09522) folds deltas
from a common base; `zipit` (Stoica et al. 2024, arXiv 2305.03053) pairs units anew at every merge, also within a model;
`pleas` (Nasery et al. 2025, arXiv 2407.02447) is `dimat` with layers fitted to the models' mean activations; `distil`
learns from peers' logits on a public probe set, whatever their architectures (Li & Wang 2019, FedMD, arXiv 1910.03581;
with an average in each neighbourhood in the server's place); `dpsgd` (Lian et al. 2017, arXiv 1705.09056) averages
after every optimizer step, `sgp` (Assran et al. 2019, arXiv 1811.10792) with push-sum; `isolated` never merges, and
`centralised` is one model on all data."""

WITH_MOMENTS = frozenset({"average", "regmean"})
"""Combine methods beside which averaged optimizer moments are merged by default: with both they did better than kept
ones (benchmarks/accuracy_cifar.py, benchmarks/default_combine.py). With `pleas` too, but on a very small network its
fitted layers, and the same moments for all, made a merge over three times as large as training had made the weights."""

CEILING = next(name for name, preset in PRESETS.items() if preset.ceiling)
"""Name of the method that trains one model on all data."""
FLOOR = next(name for name, preset in PRESETS.items() if not preset.exchanges and not preset.ceiling)
"""Name of the method whose agents train alone."""


def preset_of(method: str) -> Preset:
    """Return the preset of a merge method, or raise ConfigError with the nearest known name."""
    if method not in PRESETS:
        raise ConfigError(unknown_name("merge method", method, PRESETS))
    return PRESETS[method]


def apply_preset(values: Any) -> Any:
    """Return an experiment's values, with the settings that its merge method makes in other tables.

    Settings that are given there are kept. A method that merges every step trains one step per round, and one that
    needs push-sum mixing sets it; raises ValueError if another mixing is given. `preset_of` refuses unknown methods.
    """
    if not isinstance(values, Mapping):
        return values
    tree: dict[str, Any] = dict(cast("Mapping[str, Any]", values))
    method = _get(tree.get("merge"), "method")
    preset = PRESETS.get(method) if isinstance(method, str) else None
    if preset is None:
        return tree
    train = tree.get("train")
    if preset.every_step and all(_get(train, key) is None for key in ("steps_per_round", "epochs_per_round")):
        tree["train"] = _with(train, "steps_per_round", 1)
    if preset.push_sum:
        tree["topology"] = _push_sum(method, tree.get("topology"), "topology.mixing")
        changes = _get(tree.get("schedule"), "changes")
        if isinstance(changes, list | tuple) and changes:
            entries = [
                _with(change, "topology", _push_sum(method, _get(change, "topology"), f"{where}.topology.mixing"))
                for where, change in ((f"schedule.changes[{i}]", c) for i, c in enumerate(cast("list[Any]", changes)))
            ]
            tree["schedule"] = _with(tree["schedule"], "changes", tuple(entries))
    return tree


def _push_sum(method: str, topology: Any, where: str) -> Any:
    if _get(topology, "map") is not None:  # the map says how weights are mixed
        return topology
    if _given(topology, "mixing"):
        mixing = _get(topology, "mixing")
        name = mixing if isinstance(mixing, str) else _get(mixing, "name")
        if name != PUSH_SUM:
            raise ValueError(f'method "{method}" mixes by push-sum, but {where} is {name!r}; leave it out')
        return topology
    return _with(topology, "mixing", NamedConfig(name=PUSH_SUM))


def _get(table: Any, key: str) -> Any:
    if isinstance(table, BaseModel):
        return getattr(table, key, None)
    return cast("Mapping[str, Any]", table).get(key) if isinstance(table, Mapping) else None


def _given(table: Any, key: str) -> bool:
    if isinstance(table, BaseModel):
        return key in table.model_fields_set
    return isinstance(table, Mapping) and key in table


def _with(table: Any, key: str, value: Any) -> Any:
    """Return a table with one more key; anything but a table is left to validation."""
    if isinstance(table, BaseModel):
        return table.model_copy(update={key: value})
    if table is None or isinstance(table, Mapping):
        return {**cast("Mapping[str, Any]", table or {}), key: value}
    return table
