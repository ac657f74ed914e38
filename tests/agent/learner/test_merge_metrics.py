"""Test metrics around a merge, and merges that make them not finite. References: the trainer's own evaluation."""

from __future__ import annotations

from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from dimat.agent.learner.learner import Learner
from dimat.events import WARNING
from tests.agent.learner.rounds import merged, trained
from tests.agent.learner.test_learner import agents


def ends_in_nan(
    agent: Learner, metric: str, monkeypatch: pytest.MonkeyPatch, before: dict[str, float] | None = None
) -> None:
    """Let a metric be NaN of any weights but the agent's present ones; `before`: what these have beside the task's."""
    held, evaluate = agent.trainer.weights(), agent.trainer.evaluate
    weight = next(iter(held))

    def judged(*given: Any) -> dict[str, float]:
        own = torch.equal(agent.trainer.weights()[weight], held[weight])
        return {**evaluate(*given), **((before or {}) if own else {metric: nan})}

    monkeypatch.setattr(agent.trainer, "evaluate", judged)


@pytest.mark.parametrize("asked", ["after", "none"])
def test_a_merge_with_metrics_that_are_not_finite_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Finite weights, NaN as loss after the merge and a number before it: own weights go on, and a warning says so.
    Where nobody asks for metrics, and between mixing steps, a few own examples tell."""
    one, two = agents(tmp_path, merge__method="average")
    peer = trained(two, 1, learn=True).payload
    trained(one, 1, learn=True)
    before, evaluate = one.trainer.weights(), one.trainer.evaluate
    ends_in_nan(one, "loss", monkeypatch)
    report = merged(one, 1, 0.5, [("two", one.store / f"{peer.root}.safetensors", 0.5, True)], asked)
    assert report.accepted == 0
    assert report.after == (evaluate(one.task.data("test")) if asked == "after" else {})
    assert report.notes[-1] == (f"{WARNING}after the merge loss is not finite: the merge is not kept, own weights stay")
    assert all(torch.equal(v, before[k]) for k, v in one.trainer.weights().items())


def test_a_ratio_that_is_no_number_on_a_few_examples_ends_no_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0/0 of eight examples says nothing: there only the loss counts."""
    one, two = agents(tmp_path, merge__method="average")
    peer = trained(two, 1, learn=True).payload
    trained(one, 1, learn=True)
    ends_in_nan(one, "precision", monkeypatch, before={"precision": 0.5})
    parts = [("two", one.store / f"{peer.root}.safetensors", 0.5, True)]
    assert merged(one, 1, 0.5, parts, "none").accepted == 1


def test_a_merge_is_not_to_blame_for_what_was_not_finite_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN as loss before the merge too: it is kept, and both metrics are told."""
    one, two = agents(tmp_path, merge__method="average")
    peer = trained(two, 1, learn=True).payload
    trained(one, 1, learn=True)
    own, other = one.trainer.weights(), two.trainer.weights()
    evaluate = one.trainer.evaluate
    monkeypatch.setattr(one.trainer, "evaluate", lambda *given: {**evaluate(*given), "loss": nan})
    report = merged(one, 1, 0.5, [("two", one.store / f"{peer.root}.safetensors", 0.5, True)], "after")
    assert report.accepted == 1
    assert isnan(report.before["loss"])
    assert isnan(report.after["loss"])
    for name, tensor in one.trainer.weights().items():
        torch.testing.assert_close(tensor, 0.5 * own[name] + 0.5 * other[name])


@pytest.mark.parametrize(("metric", "kept"), [("perplexity", True), ("accuracy", False)])
def test_a_merge_is_judged_by_a_perplexity_as_by_its_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, kept: bool
) -> None:
    """The merged weights' number is lower than own weights' by 1: as a perplexity that is better, and the whole merge
    is kept; as an accuracy it is worse than the tolerance, at every share of the way."""
    accept = {"name": "no-worse", "options": {"on": "local"}}
    one, two = agents(tmp_path, merge__method="average", merge__accept=accept)
    peer = trained(two, 1, learn=True).payload
    trained(one, 1, learn=True)
    own, evaluate = one.trainer.weights(), one.trainer.evaluate
    name = next(key for key, value in own.items() if value.is_floating_point())

    def judged(data: Any, weights: Any = None) -> dict[str, float]:
        held = one.trainer.weights() if weights is None else weights
        return {**evaluate(data, weights), metric: 3.0 - (not torch.equal(held[name], own[name]))}

    monkeypatch.setattr(one.trainer, "evaluate", judged)
    monkeypatch.setattr(one, "task", replace(one.task, metric=metric))
    report = merged(one, 1, 0.5, [("two", one.store / f"{peer.root}.safetensors", 0.5, True)], "after")
    assert report.accepted == float(kept)
