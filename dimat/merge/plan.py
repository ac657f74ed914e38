"""The plan of a merge: each stage's method, found by name, with checked options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dimat.config import MergeConfig, NamedConfig
from dimat.errors import ConfigError
from dimat.merge.models.classifier import class_counts_of
from dimat.merge.natures import Natures
from dimat.merge.outer import layer_factors, outer_registry
from dimat.merge.registry import CONTEXT, accept_registry, align_registry, combine_registry, repair_registry
from dimat.merge.screen import MAX_NORM_RATIO, screen
from dimat.merge.shared_logits import logits_registry
from dimat.merge.shared_statistics import Statistics, statistics_of
from dimat.merge.stages import Accepted, Aligned, Repaired, Weights
from dimat.registry import Bound, Registry, check_options

R = TypeVar("R")


@dataclass(frozen=True)
class MergePlan:
    """A merge configuration with a method for every stage, its options checked, ready to be called."""

    align: Bound[Aligned]
    combine: Bound[Any]
    repair: Bound[Repaired]
    accept: Bound[Accepted]
    align_to: str
    align_data: str
    probe_samples: int
    statistics_samples: int
    head: str
    keep_not_finite: bool
    screen: dict[str, Any]
    outer: Bound[Weights]
    layers: Mapping[str, float]
    shares: Literal["weights", "logits"]
    """What agents exchange: "weights", or "logits", which `merge` has nothing to do with."""
    notes: tuple[str, ...] = ()
    """Notes on every merge by this plan."""

    @property
    def aligns(self) -> bool:
        """Whether peers' units are brought into this agent's order."""
        return not self.align.traits["idle"]

    @property
    def repairs(self) -> bool:
        """Whether the average is repaired afterwards."""
        return not self.repair.traits["idle"]

    @property
    def judges(self) -> bool:
        """Whether merges are accepted by the task's metric."""
        return "score" in self.accept.asks

    @property
    def most(self) -> float:
        """The factor by which weights may exceed the norms after the agent's own training, if a merge is of peers
        alone."""
        return float(self.screen.get("max_norm_ratio", MAX_NORM_RATIO))

    def factors(self, own: Weights, natures: Natures) -> dict[str, float]:
        """Return the factors by which `merge.layers` limits a merge in tensors of `own`; ConfigError if `layers` do not
        fit it."""
        products = self.combine.traits["lora_products"]
        return layer_factors(self.layers, own.keys(), natures, products=products)

    @property
    def statistics(self) -> tuple[Statistics, ...]:
        """The functions with which an agent takes the statistics for its merges; empty if they need none."""
        found = (statistics_of("merge.combine", self.combine), statistics_of("merge.repair", self.repair))
        rows = (Statistics('merge.head = "rows"', class_counts_of),) if self.head == "rows" else ()
        return tuple(each for each in found if each is not None) + rows


def plan_merge(config: MergeConfig) -> MergePlan:
    """Return the plan of a configuration: its preset with what it overrides, all names and options checked.

    Raises ConfigError that names the first fault and the nearest known name.
    """
    preset = config.preset
    return MergePlan(
        align=_bound(align_registry, config.align, preset.align),
        combine=_combine(config),
        repair=_bound(repair_registry, config.repair, preset.repair),
        accept=_bound(accept_registry, config.accept, "always"),
        align_to=config.align_to or preset.align_to,
        align_data=config.align_data,
        probe_samples=config.probe_samples or preset.probe_samples,
        statistics_samples=config.statistics_samples,
        head=config.head,
        keep_not_finite=config.keep_not_finite,
        screen=check_options(screen, config.screen, "merge.screen", context=CONTEXT),
        outer=outer_registry.bind(config.outer.name, {"lr": config.outer.lr}),
        layers=config.layers,
        shares=preset.shares,
    )


def _combine(config: MergeConfig) -> Bound[Any]:
    if config.preset.shares == "logits":
        return _bound(logits_registry, config.combine, config.preset.combine)
    if config.combine is not None and config.combine.name in logits_registry.names():
        raise ConfigError(
            f'merge.combine = "{config.combine.name}" merges logits, and merge.method "{config.method}" exchanges '
            f'weights; set merge.method = "{config.combine.name}"'
        )
    return _bound(combine_registry, config.combine, config.preset.combine)


def _bound(registry: Registry[R], stage: NamedConfig | None, preset: str) -> Bound[R]:
    """Return a stage's method with its options, or the preset's method if none is given."""
    return registry.bind(preset, {}) if stage is None else registry.bind(stage.name, stage.options)


def needs_symmetry(plan: MergePlan) -> bool:
    """Tell whether a plan needs the model's symmetry groups: because it aligns, or for its combine method."""
    return plan.aligns or "spec" in plan.combine.asks
