"""The table [merge]: the stages of a merge, how far it goes, and the base of task vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dimat.config.presets import Preset, preset_of
from dimat.config.tree import Named, Options, Tree, as_stage


class BaseConfig(Tree):
    """The base of task vectors: weights from a file, or an initialisation from a seed."""

    file: str | None = None
    """Weights (safetensors); a path, relative to the experiment's folder."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed with which the task's model is initialised."""

    @model_validator(mode="after")
    def _one_source(self) -> BaseConfig:
        if (self.file is None) == (self.seed is None):
            raise ValueError("give file or seed")
        return self


class OuterConfig(Tree):
    """The step from an agent's own weights to the merged ones."""

    name: str = "none"
    """"none": θ_own + lr (θ_merged − θ_own), without momentum."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the way to the merged weights."""


class MergeConfig(Tree):
    """The merge pipeline: screen → align → combine → repair → accept. The preset fills in unset stages."""

    method: str = "dimat"
    """Preset: "isolated" (no exchange), "average", "dimat" (shared basis), "dimat-paper" (aligned at every merge),
    "opcm" (orthogonal projection of deltas from `base`, which should be the weights that all agents start from),
    "distil" (logits on the probe set instead of weights, so that architectures may differ), "dpsgd" (average after
    every optimizer step), "sgp" (the same with push-sum mixing, for directed graphs), or "centralised" (one model on
    all data: the ceiling). "dpsgd" and "sgp" set `train.steps_per_round` = 1 unless steps or epochs per round are
    given; "sgp" sets `topology.mixing` = "push-sum" unless a map gives the mixing."""
    align: Named | None = None
    """How units are matched: "none", "activations", "weights" (no data needed), or "auto" (one of these, or a
    mixture of both by group, whichever makes the networks agree best)."""
    align_to: Literal["shared", "self"] | None = None
    """"shared": basis gossip, each agent permutes itself once; "self": peers are permuted at every merge."""
    align_data: Literal["local", "probe", "pooled"] = "local"
    """Inputs on which activations are compared and BatchNorm is re-estimated: the agent's own ("local"), an agreed
    public set ("probe"), or all agents' training data ("pooled", in simulation only)."""
    probe_samples: Annotated[int, Field(ge=2)] | None = None
    """Number of examples in the probe set, for align_data = "probe", accept on "probe" and method "distil". Default
    100, with "distil" 1,000; a smaller probe set of the task is used whole."""
    statistics_samples: Annotated[int, Field(ge=1)] = 256
    """Largest number of training examples from which an agent computes the statistics for combine = "fisher" and
    "regmean", repair = "head" and head = "rows"; it sends them with its weights."""
    combine: Named | None = None
    """"average", or with method "dimat" "regmean" where the model has linear layers whose statistics are no larger than
    it by half; with method "distil" only "distil" (options: steps, weight, temperature, keep)."""
    repair: Named | None = None
    """"none", "batchnorm", "variance": units of networks without BatchNorm at the models' means and deviations, or
    "head": batchnorm, and then a refit of the classifier on features drawn from per-class statistics, which agents tell
    each other."""
    head: Literal["mixing", "rows"] = "mixing"
    """How a classifier's last layer is averaged. "mixing": by the mixing weights, as everything else; "rows": each
    class's row by the mixing weights times the number of examples of the class, which agents tell each other."""
    accept: Named | None = None
    """"always" or "no-worse" (options: on = "local" | "probe", tolerance)."""
    outer: Annotated[OuterConfig, BeforeValidator(as_stage)] = OuterConfig()
    """How far a merge goes: { name = "none", lr = 0.5 } is half of the way."""
    layers: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """How far a merge goes in some tensors: patterns of tensor names → factors; the last pattern that matches counts.
    { "head.*" = 0 } keeps each agent's own head."""
    keep_not_finite: bool = False
    """Keep a merge whose weights or test metrics are not finite, with a warning. By default such a merge is rejected,
    and the agent continues with its own weights."""
    screen: Options = Field(default_factory=dict)
    """Options of the screen, which is always on: max_norm_ratio, a multiple of the norms that own training reached."""
    base: BaseConfig | None = None
    """Weights from which task-vector methods take deltas; must be the same for all agents."""

    @property
    def preset(self) -> Preset:
        """The preset of the method, with its traits; raises ConfigError for an unknown method."""
        return preset_of(self.method)
