"""The configuration tree: every setting that dimat has, its default, its unit and what it means.

One experiment is one TOML file (see `dimat init`). Precedence: flag > environment `DIMAT_*` > file > default.
This is the only place where defaults live. Reading and overriding is at the end of the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dimat.errors import ConfigError, nearest

Options = dict[str, Any]
T = TypeVar("T", bound=BaseModel)


class Tree(BaseModel):
    """Base of all configuration tables: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_stage(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class NamedConfig(Tree):
    """Something chosen by name with options of its own: `"adam"` or `{ name = "adam", options = { … } }`."""

    name: str
    """Registered name."""
    options: Options = Field(default_factory=dict)
    """Keyword options of what is named; its documentation lists them."""


Named = Annotated[NamedConfig, BeforeValidator(_as_stage)]


class TopologyConfig(Tree):
    """Who exchanges weights with whom, and with what mixing weights. Exactly one source of the graph."""

    map: str | None = None
    """Network map file (TOML) whose tables replace this one; a path, relative to the experiment's folder."""
    graph: str | None = None
    """Name of a generator, e.g. "ring"; `dimat topology list` shows all. Default: "ring" if nothing else is given."""
    edges: tuple[tuple[str | int, str | int], ...] | None = None
    """Explicit undirected edges between agents (names or indices)."""
    file: str | None = None
    """GraphML, GML, node-link JSON, edge list, map TOML or {connectivity, pi} JSON; a path."""
    python: str | None = None
    """`file.py:function` that returns a networkx graph."""
    agents: Annotated[int, Field(ge=1)] | None = None
    """Number of agents; needed by generators, checked against files."""
    options: Options = Field(default_factory=dict)
    """Options of the generator, e.g. { degree = 4 } for "random-regular"."""
    schedule: Named = NamedConfig(name="static")
    """Time-varying schedule: "static", "one-peer-exponential", "random-matching", "epidemic", "base-k", "cycle"."""
    mixing: Named = NamedConfig(name="metropolis")
    """Mixing weights: "metropolis", "max-degree", "uniform", "samples", "matrix"; option lazy in [0, 1)."""

    @model_validator(mode="after")
    def _one_source(self) -> TopologyConfig:
        given = [k for k in ("map", "graph", "edges", "file", "python") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of map, graph, edges, file, python, not {' and '.join(given)}")
        return self


class PartitionConfig(Tree):
    """How the training data are split among the agents."""

    kind: Literal["iid", "dirichlet", "classes", "shards"] = "iid"
    """"iid": class-balanced; "dirichlet": class shares drawn from Dirichlet(alpha); "classes": `classes_per_agent`
    classes each; "shards": sorted by label, cut, `shards_per_agent` each."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Dirichlet concentration (kind "dirichlet"); smaller is more skewed."""
    classes_per_agent: Annotated[int, Field(ge=1)] = 2
    """Classes that an agent holds (kind "classes")."""
    shards_per_agent: Annotated[int, Field(ge=1)] = 2
    """Shards that an agent holds (kind "shards")."""
    min_samples: Annotated[int, Field(ge=1)] = 8
    """No agent holds fewer samples than this; a draw that leaves one with fewer is drawn again."""


class TaskConfig(Tree):
    """What is trained: model, data, loss, metric."""

    name: str | None = None
    """Bundled task: "digits" or "images". Default "digits" if no hook is given."""
    hook: str | None = None
    """`package.module:function` or `file.py:function` that returns a Task."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the task, e.g. { model = "mlp" } or { train = "data/train.parquet" }."""
    partition: PartitionConfig = PartitionConfig()
    """How the training data are split among the agents."""

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if self.name is not None and self.hook is not None:
            raise ValueError("give name or hook, not both")
        return self


class OptimizerConfig(Tree):
    """A torch optimizer."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    """Which one."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum (sgd)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""


class LrScheduleConfig(Tree):
    """How the learning rate goes on within one round's local training or over the whole run."""

    name: Literal["constant", "cosine", "step"] = "constant"
    """"cosine" falls to 0 over all rounds; "step" multiplies by `gamma` after each of `milestones`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Points as shares of the whole run in (0, 1) (name "step")."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor at a milestone (name "step")."""


class TrainConfig(Tree):
    """Local training between merges."""

    epochs_per_round: Annotated[float, Field(gt=0)] | None = None
    """Epochs of local training per round. Default 2 if `steps_per_round` is not given."""
    steps_per_round: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per round, instead of epochs."""
    first_round_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs before the first merge, where they differ from the later rounds'."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples per optimizer step."""
    optimizer: Annotated[OptimizerConfig, BeforeValidator(_as_stage)] = OptimizerConfig()
    """Optimizer and learning rate."""
    initialisation: Literal["own", "shared"] = "own"
    """Each agent starts from weights of its own, or all from the same."""
    optimizer_state: Literal["fresh", "kept"] = "kept"
    """Whether the optimizer's state is kept over a merge or made afresh each round."""
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    """Learning rate over the run."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down to this global 2-norm; none by default."""
    device: str = "auto"
    """"auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1", …"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass; fp16 scales the loss. Weights stay fp32."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 512
    """Samples per forward pass in evaluation."""

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> TrainConfig:
        if self.epochs_per_round is not None and self.steps_per_round is not None:
            raise ValueError("give epochs_per_round or steps_per_round, not both")
        return self


class MergeConfig(Tree):
    """The merge pipeline: screen → align → combine → repair → accept. Unset stages come from the preset."""

    method: str = "dimat"
    """Preset: "isolated" (no exchange), "average", "dimat" (shared basis), "dimat-paper" (aligned at every merge),
    or "centralised" (one model on all data: the ceiling)."""
    align: Named | None = None
    """"none" or "activations"."""
    align_to: Literal["shared", "self"] | None = None
    """"shared": basis gossip, each agent permutes itself once; "self": peers are permuted at every merge."""
    align_data: Literal["local", "probe", "pooled"] = "local"
    """Inputs on which activations are compared and BatchNorm is re-estimated: the agent's own, an agreed public
    set, or everyone's training data (in simulation only)."""
    probe_samples: Annotated[int, Field(ge=2)] = 100
    """Size of the probe set, for align_data = "probe" and accept sets named "probe"."""
    combine: Named | None = None
    """"average"."""
    repair: Named | None = None
    """"none" or "batchnorm"."""
    accept: Named | None = None
    """"always" or "no-worse" (options: on = "local" | "probe", tolerance)."""
    screen: Options = Field(default_factory=dict)
    """Options of the screen, which is always on: max_norm_ratio."""


class ScheduleConfig(Tree):
    """When the run merges and when it ends."""

    rounds: Annotated[int, Field(ge=1)] = 10
    """Number of rounds (a round: train, publish, gather, merge)."""
    round_deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a round goes on with the peers that it has heard."""
    final_merge: bool = False
    """End with one cycle of the Base-(k+1) graph: an exact average of all agents without a server."""
    final_merge_peers: Annotated[int, Field(ge=1)] = 1
    """k of that Base-(k+1) graph: peers per agent and round."""


class SimulateConfig(Tree):
    """How the simulator runs on this host."""

    workers: Annotated[int, Field(ge=1)] | None = None
    """Worker processes; default: one per core. Results do not depend on it."""
    evaluate: Literal["all", "after", "none"] = "all"
    """Test metrics before and after each merge, only after it, or never."""
    keep_snapshots: Annotated[int, Field(ge=1)] = 2
    """Snapshots kept per agent; older ones are removed as soon as nobody reads them."""


class ExperimentConfig(Tree):
    """One experiment."""

    run: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)] = "run"
    """Name of the run; names its folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Root of all random draws: initialisations, partition, batches, augmentation, schedules."""
    topology: TopologyConfig = TopologyConfig()
    """Graph and mixing."""
    task: TaskConfig = TaskConfig()
    """Model and data."""
    train: TrainConfig = TrainConfig()
    """Local training."""
    merge: MergeConfig = MergeConfig()
    """How weights are merged."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Rounds and deadlines."""
    simulate: SimulateConfig = SimulateConfig()
    """The simulator."""
    folder: Annotated[str, Field(exclude=True)] = "."
    """Folder that relative paths are taken from; set when a file is read."""


def load_experiment(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> ExperimentConfig:
    """Read an experiment: TOML file, then `DIMAT_*` variables, then `key=value` overrides, the last one wins.

    `overrides` and variables name a key by its path (`train.optimizer.lr=0.01`, `DIMAT_TRAIN__OPTIMIZER__LR`);
    values are TOML, or plain text where that is not TOML. Raises ConfigError with file, key and nearest match.
    """
    tree: dict[str, Any] = {} if file is None else read_toml(file)
    origins: dict[str, str] = {}
    for name, text in sorted((os.environ if env is None else env).items()):
        path = name.removeprefix("DIMAT_").lower().split("__")
        # DIMAT_ variables with one level may be somebody else's; a table and a key are meant for us
        if name.startswith("DIMAT_") and (path[0] in ExperimentConfig.model_fields or len(path) > 1):
            _put(tree, path, text, name)
            origins[".".join(path)] = name
    for item in overrides:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign:
            raise ConfigError(f"--set {item!r}: expected KEY=VALUE, e.g. --set train.batch_size=64")
        _put(tree, key.split("."), text.strip(), f"--set {key}")
        origins[key] = f"--set {key}"
    where = str(file) if file is not None else "the command line"
    if "folder" in tree:
        raise ConfigError(f"unknown key 'folder' in {origins.get('folder', where)}: it is the file's own folder")
    tree["folder"] = str(Path(file).parent) if file is not None else "."
    return build(ExperimentConfig, tree, where, origins)


def read_toml(file: str | Path) -> dict[str, Any]:
    """Read a TOML file; ConfigError says where it cannot be read or parsed."""
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def build(kind: type[T], tree: Mapping[str, Any], where: str, origins: Mapping[str, str] | None = None) -> T:
    """Validate a tree of plain values; the first fault becomes a one-line ConfigError.

    `where` says where the values are from, `origins` where single keys are from that came from elsewhere.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, where, origins or {})) from None


def _put(tree: dict[str, Any], path: Sequence[str], text: str, where: str) -> None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in path[:-1]:
        child = tree.get(key)
        if isinstance(child, str):  # a stage that was given by name alone
            child = {"name": child}
        elif child is not None and not isinstance(child, dict):
            raise ConfigError(f"{where}: {key!r} is a value, not a table")
        tree[key] = dict(child or {})
        tree = tree[key]
    tree[path[-1]] = value


def _explain(kind: type[BaseModel], error: ValidationError, where: str, origins: Mapping[str, str]) -> str:
    faults = error.errors(include_url=False)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    location = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    key = ".".join(location) or "(top level)"
    for path, origin in origins.items():
        if f"{key}.".startswith(f"{path}.") or f"{path}.".startswith(f"{key}."):
            where = origin
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} in {where}{nearest(location[-1], _known(kind, location[:-1]))}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {key}: {message}{shown}"


def _known(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the keys of the table at `path`, for suggestions."""
    for part in path:
        field = kind.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not kinds:
            return []
        kind = kinds[0]
    return list(kind.model_fields)
