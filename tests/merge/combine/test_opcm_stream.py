"""OPCM as a stream: each update folded once, its state saved and restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.combine.opcm import opcm
from tests.merge.opcm_reference import (
    BASE,
    TASKS,
    assert_bits,
    assert_close,
    length,
    merged_delta,
    plain_projection,
    stream,
)


def bits_of(state: dict[str, Any]) -> dict[str, Any]:
    """A state, frozen; so it is of what a checkpoint holds: tensors and plain values."""
    assert all(isinstance(v, Tensor | int | float | str) for v in state.values())
    return {k: v.numpy().tobytes() if isinstance(v, Tensor) else v for k, v in state.items()}


def test_a_repeated_update_is_refused() -> None:
    """State and result stay as they were, whoever sends it; own weights that are the last result bring nothing."""
    state: dict[str, Any] = {}
    own, names, weights = TASKS[0], ["b", "c"], [0.4, 0.3, 0.3]
    first = opcm(own, TASKS[1:3], weights, base=BASE, state=state, names=names, mode="stream")
    kept = bits_of(state)
    for again in (own, first):
        result = opcm(again, TASKS[1:3], weights, base=BASE, state=state, names=names, mode="stream")
        assert_bits(result, first)
        assert bits_of(state) == kept
    assert state["opcm/count"] == 3
    assert_bits(stream(state, "d", TASKS[1]), first)
    assert state["opcm/count"] == 3
    assert_bits(first, opcm(own, TASKS[1:3], weights, base=BASE))  # the first call is a fold


def test_save_and_restore_mid_way_equals_uninterrupted(tmp_path: Path) -> None:
    """Through a file, after every step; bit for bit."""
    whole, parts = dict[str, Any](), dict[str, Any]()
    for step in range(6):
        peer = {n: t + 0.01 * step for n, t in TASKS[step % 4].items()}
        expected = stream(whole, f"p{step % 2}", peer)
        assert_bits(stream(parts, f"p{step % 2}", peer), expected)
        save_file({k: v for k, v in parts.items() if isinstance(v, Tensor)}, tmp_path / "state.safetensors")
        values = json.dumps({k: v for k, v in parts.items() if not isinstance(v, Tensor)})
        parts = load_file(tmp_path / "state.safetensors") | json.loads(values)
        assert bits_of(parts) == bits_of(whole)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_newer_update_enters_as_its_difference(diagonal: bool) -> None:
    """Reference: the plain projection of θ_new − θ_old on λM; the norm of the newer delta replaces the older's."""
    state: dict[str, Any] = {}
    newer = {n: t + 0.3 * (TASKS[3][n] - BASE[n]) for n, t in TASKS[0].items()}
    for name, model in (("a", TASKS[0]), ("b", TASKS[1])):
        stream(state, name, model, state_dtype="float64", diagonal=diagonal)
    before = {n: t.double() * state["opcm/lambda"] for n, t in merged_delta(state).items()}
    result = stream(state, "a", newer, state_dtype="float64", diagonal=diagonal)
    y = {}
    for name, tensor in before.items():
        step = newer[name].double() - TASKS[0][name].double()
        y[name] = tensor + (step if step.ndim < 2 else plain_projection(step, tensor, 0.5, diagonal)[0])
    norms = [length({n: m[n].double() - BASE[n].double() for n in BASE}) for m in (newer, TASKS[1])]
    factor = length(y) / (sum(norms) / 2)
    assert state["opcm/lambda"] == pytest.approx(factor, rel=1e-9)
    assert state["opcm/count"] == 3
    assert_close(result, {n: BASE[n].double() + t / factor for n, t in y.items()}, 1e-6)
    stream(state, "a", TASKS[0], diagonal=diagonal)  # the older one, again
    assert state["opcm/count"] == 3


def test_without_projection_a_stream_is_the_fold_of_the_newest() -> None:
    """At alpha 0 differences telescope: reference: the fold of what each peer sent last."""
    state: dict[str, Any] = {}
    for name, model in (("a", TASKS[0]), ("b", TASKS[1]), ("a", TASKS[2]), ("b", TASKS[3])):
        result = stream(state, name, model, alpha=0.0, state_dtype="float64")
    expected = opcm(TASKS[2], [TASKS[3]], [0.5, 0.5], base=BASE, alpha=0.0)
    assert_close(result, expected, 1e-6)


def test_own_weights_enter_by_what_training_added() -> None:
    """Reference: alpha 0, where M is along the sum: own's first delta, the peer's, and what own added to the result."""
    base = {n: t.double() for n, t in BASE.items()}
    own, peer = ({n: t.double() for n, t in m.items()} for m in TASKS[:2])
    state: dict[str, Any] = {}
    options: dict[str, Any] = {"base": base, "state": state, "names": ["b"], "mode": "stream", "alpha": 0.0}
    first = opcm(own, [peer], [0.5, 0.5], **options)
    y = {n: (first[n] - base[n]) * state["opcm/lambda"] for n in base}
    step = {n: 0.1 * (TASKS[2][n].double() - base[n]) for n in base}
    moved = {n: first[n] + step[n] for n in base}
    second = opcm(moved, [peer], [0.5, 0.5], **options)
    y = {n: y[n] + step[n] for n in base}
    norms = [length({n: m[n] - base[n] for n in base}) for m in (moved, peer)]
    scale = sum(norms) / 2 / length(y)
    assert_close(second, {n: base[n] + scale * t for n, t in y.items()}, 1e-9)


def test_streams_need_a_state_names_and_their_base() -> None:
    """Errors leave the state as it was."""
    args = (TASKS[0], [TASKS[1]], [0.5, 0.5])
    with pytest.raises(MergeError, match="needs a state"):
        opcm(*args, base=BASE, mode="stream", names=["b"])
    with pytest.raises(MergeError, match="needs the peers' names"):
        opcm(*args, base=BASE, mode="stream", state={})
    state: dict[str, Any] = {}
    stream(state, "b", TASKS[1])
    kept = bits_of(state)
    with pytest.raises(MergeError, match="the state is of base"):
        stream(state, "b", TASKS[2], base=TASKS[0])
    with pytest.raises(MergeError, match="not finite"):
        stream(state, "b", TASKS[2] | {"head.bias": torch.full((10,), torch.nan)})
    assert bits_of(state) == kept
    assert_bits(opcm(TASKS[0], [], [1.0], base=BASE, state=state, names=[], mode="stream"), TASKS[0])
    assert bits_of(state) == kept
