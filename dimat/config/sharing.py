"""Checks that settings fit the content that a method exchanges: weights or logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dimat.config.presets import PRESETS, PUSH_SUM

if TYPE_CHECKING:
    from dimat.config.experiment import ExperimentConfig


def check_sharing(config: ExperimentConfig) -> None:
    """Raise ValueError, in a line, for the first setting that does not fit the content that the method exchanges.

    Unlike models have no weights in common, and agents that exchange logits never see their peers' weights.
    `preset_of` refuses unknown methods.
    """
    preset = PRESETS.get(config.merge.method)
    if preset is None:
        return
    if preset.shares == "weights":
        if config.task.models and preset.exchanges:
            raise ValueError(
                f'task.models gives agents other models, but merge.method "{config.merge.method}" merges weights, '
                'which unlike models do not share; use merge.method "distil", or leave task.models out'
            )
        return
    for key in _of_weights(config):
        raise ValueError(
            f'{key} applies to weights, but merge.method "{config.merge.method}" exchanges logits instead; leave it out'
        )
    changes = (change.topology for change in config.schedule.changes)
    if any(topology.mixing.name == PUSH_SUM for topology in (config.topology, *changes)):
        raise ValueError(
            f'topology.mixing = "{PUSH_SUM}" keeps sums of weights, but merge.method "{config.merge.method}" exchanges '
            'logits instead; use "metropolis" or another one'
        )
    combine = config.merge.combine
    if combine is not None and combine.name != preset.combine:
        raise ValueError(
            f'merge.combine = "{combine.name}" applies to weights, but merge.method "{config.merge.method}" exchanges '
            f'logits instead; its only one is "{preset.combine}"'
        )


def _of_weights(config: ExperimentConfig) -> list[str]:
    """Return the settings of an experiment that apply to weights."""
    merge, schedule, exchange = config.merge, config.schedule, config.exchange
    found = {
        "merge.align": merge.align is not None and merge.align.name != "none",
        "merge.repair": merge.repair is not None and merge.repair.name != "none",
        "merge.accept": merge.accept is not None and merge.accept.name != "always",
        "merge.align_to": merge.align_to is not None,
        "merge.align_data": merge.align_data != "local",
        "merge.head": merge.head != "mixing",
        "merge.outer": merge.outer.lr != 1,
        "merge.layers": bool(merge.layers),
        "merge.keep_not_finite": merge.keep_not_finite,
        "merge.screen": bool(merge.screen),
        "merge.base": merge.base is not None,
        "schedule.first_merge": schedule.first_merge != "align",
        "schedule.final_merge": schedule.final_merge,
        'train.optimizer_state = "merged"': config.train.optimizer_state == "merged",
        "exchange.encoding": exchange.encoding != "fp32",
    }
    return [key for key, given in found.items() if given]
