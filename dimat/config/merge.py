"""The table [merge]: the stages of a merge, how far it goes, and the base of task vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dimat.config.presets import Preset, preset_of
from dimat.config.tree import Named, Options, Tree, as_stage


class BaseConfig(Tree):
    """The base of task vectors: one of a file and a seed."""

    file: str | None = None
    """Weights (safetensors); a path, relative to the experiment's folder."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the initialisation of the task's model."""

    @model_validator(mode="after")
    def _one_source(self) -> BaseConfig:
        if (self.file is None) == (self.seed is None):
            raise ValueError("give file or seed")
        return self


class OuterConfig(Tree):
    """The step from own weights to merged ones."""

    name: str = "none"
    """"none": θ_own + lr (θ_merged − θ_own), without momentum."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the way to the merged weights."""


class MergeConfig(Tree):
    """The merge pipeline: screen → align → combine → repair → accept. Unset stages come from the preset."""

    method: str = "dimat"
    """Preset: "isolated" (no exchange), "average", "dimat" (shared basis), "dimat-paper" (aligned at every merge),
    "opcm" (orthogonal projection of deltas from `base`, which should be where all agents start), "distil" (logits on
    the probe set in place of weights, so that architectures may differ), "dpsgd" (average
    after every optimizer step), "sgp" (the same with push-sum mixing, for directed graphs), or "centralised" (one
    model on all data: the ceiling). "dpsgd" and "sgp" set `train.steps_per_round` = 1 unless steps
    or epochs per round are given; "sgp" sets `topology.mixing` = "push-sum" unless a map says how to mix."""
    align: Named | None = None
    """How units are matched: "none", "activations", "weights" (no data needed), or "auto" (the one of these, or the
    mixture of both by group, on which the networks agree best)."""
    align_to: Literal["shared", "self"] | None = None
    """"shared": basis gossip, each agent permutes itself once; "self": peers are permuted at every merge."""
    align_data: Literal["local", "probe", "pooled"] = "local"
    """Inputs on which activations are compared and BatchNorm is re-estimated: the agent's own, an agreed public
    set, or everyone's training data (in simulation only)."""
    probe_samples: Annotated[int, Field(ge=2)] | None = None
    """Size of the probe set, for align_data = "probe", accept sets named "probe" and method "distil". Default 100, with
    "distil" 1,000; the whole of the task's probe set where that has fewer."""
    statistics_samples: Annotated[int, Field(ge=1)] = 256
    """Most examples of its training data on which an agent takes the statistics that combine = "fisher" and "regmean",
    repair = "head" and head = "rows" rest on; they travel with its weights."""
    combine: Named | None = None
    """"average"; with method "distil" only "distil" (options: steps, weight, temperature, keep)."""
    repair: Named | None = None
    """"none", "batchnorm", or "head": batchnorm, then the classifier is refitted on features drawn from statistics by
    class, which agents tell each other."""
    head: Literal["mixing", "rows"] = "mixing"
    """How a classifier's last layer is averaged: by "mixing" weights as all else, or "rows": that of a class by mixing
    weights times examples of the class, whose counts agents tell each other."""
    accept: Named | None = None
    """"always" or "no-worse" (options: on = "local" | "probe", tolerance)."""
    outer: Annotated[OuterConfig, BeforeValidator(as_stage)] = OuterConfig()
    """How far a merge goes: { name = "none", lr = 0.5 } is half of the way."""
    layers: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """How far it goes in some tensors: patterns of their names → factors, the last one that matches counts. { "head.*"
    = 0 } keeps an agent's head its own."""
    keep_not_finite: bool = False
    """Keep a merge whose weights, or whose test metrics, are not finite: it is warned of, and kept all the same. By
    default it is not, and the agent's own weights go on."""
    screen: Options = Field(default_factory=dict)
    """Options of the screen, which is always on: max_norm_ratio, as a multiple of what own training has made."""
    base: BaseConfig | None = None
    """Weights that task-vector methods take deltas from; all agents have the same."""

    @property
    def preset(self) -> Preset:
        """The preset of the method, with its traits; ConfigError for a method that there is not."""
        return preset_of(self.method)
