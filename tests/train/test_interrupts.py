"""Training that is broken off in the middle of a round. Reference: the unbroken round, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dimat.train.batch_feed as batch_feed_module
from dimat.errors import DataError
from dimat.tasks import TensorData
from dimat.train.base import TrainerState
from dimat.train.progress import Interrupts, TrainingInterruptedError
from dimat.train.trainer import Trainer
from tests.train.test_trainer import SETTINGS, assert_same, blobs, trainer


def absent_minded(inputs: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """An augmentation that draws from the agent's stream and, against the rules, from torch's global one too."""
    if generator is None:
        return inputs
    return tuple(x + 0.1 * torch.randn(x.shape, generator=generator) + 0.1 * torch.rand(x.shape) for x in inputs)


def own_data() -> TensorData:
    return blobs(transform=absent_minded)


def broken_off(one: Trainer, number: int, after: int) -> TrainerState:
    """Train until `after` steps of a round are done."""
    steps = iter(range(1, 10_000))
    one.interrupts = Interrupts(lambda: next(steps) == after, lambda: True)
    with pytest.raises(TrainingInterruptedError, match=f"round {number}, step {after} of"):
        one.train(number)
    return one.state()


def through_files(state: TrainerState, folder: Path) -> TrainerState:
    """Return a state as a checkpoint carries it: flat tensors and JSON values, nothing else."""
    save_file(state.tensors, folder / "state.safetensors")
    return TrainerState(load_file(folder / "state.safetensors"), json.loads(json.dumps(state.values)))


@pytest.mark.parametrize("gathered", [1, 4 << 20], ids=["batch by batch", "many batches at once"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_round_goes_on_where_it_was_broken_off(
    settings: dict[str, Any], gathered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its steps, in a life of its own: order, augmentation, dropout, optimizer, the round's loss."""
    monkeypatch.setattr(batch_feed_module, "GATHER_BYTES", gathered)
    unbroken = trainer(data=own_data(), **settings)
    reports = [unbroken.train(number) for number in (1, 2, 3)]
    for after in range(1, reports[1].steps + 1):
        first = trainer(data=own_data(), **settings)
        first.train(1)
        state = through_files(broken_off(first, 2, after), tmp_path)
        torch.rand(3)  # draws elsewhere do not matter
        second = trainer(seed=99, data=own_data(), **settings)
        second.load_state(state)
        assert_same(second.state(), state)
        for number in (2, 3):
            again, report = second.train(number), reports[number - 1]
            assert (again.loss, again.steps, again.samples) == (report.loss, report.steps, report.samples)
        assert_same(second.state(), unbroken.state())
        first.interrupts = None  # and in the same life
        first.train(2)
        first.train(3)
        assert_same(first.state(), unbroken.state())


def test_pauses_change_nothing_and_their_states_go_on(tmp_path: Path) -> None:
    """A state is taken after every second step; the round ends as without, and so does each life that begins there."""
    unbroken, watched = trainer(data=own_data()), trainer(data=own_data())
    taken: list[TrainerState] = []
    calls = iter(range(10_000))

    def pause() -> bool:
        taken.append(through_files(watched.state(), tmp_path))
        return False

    watched.interrupts = Interrupts(lambda: next(calls) % 2 == 1, pause)
    assert watched.train(1).loss == unbroken.train(1).loss
    assert_same(watched.state(), unbroken.state())
    assert len(taken) > 3
    for state in taken:
        later = trainer(seed=7, data=own_data())
        later.load_state(state)
        later.train(1)
        assert_same(later.state(), unbroken.state())


def test_a_round_broken_off_twice_goes_on(tmp_path: Path) -> None:
    """Within the same gathered batches, so that what is skipped adds up."""
    unbroken, first, second = trainer(), trainer(), trainer(seed=5)
    unbroken.train(1)
    second.load_state(through_files(broken_off(first, 1, 2), tmp_path))
    third = trainer(seed=6)
    state = through_files(_again(second, 1), tmp_path)
    assert state.values["round/done"] == 3
    third.load_state(state)
    third.train(1)
    assert_same(third.state(), unbroken.state())


def _again(one: Trainer, number: int) -> TrainerState:
    one.interrupts = Interrupts(lambda: True, lambda: True)
    with pytest.raises(TrainingInterruptedError):
        one.train(number)
    return one.state()


@pytest.mark.parametrize(
    "other", [lambda: trainer(batch_size=8), lambda: trainer(epochs_per_round=3), lambda: trainer(data=blobs(60))]
)
def test_the_middle_of_another_round_is_refused(other: Callable[[], Trainer]) -> None:
    """Rounds of other length, batches, or data: what is done of one is no part of the other."""
    state = broken_off(trainer(), 1, 3)
    with pytest.raises(DataError, match=r"the state is of the middle of round 1, which had 10 steps with 5 batches"):
        other().load_state(state)


def test_a_later_round_may_finish_it() -> None:
    """An agent whose network went on meanwhile trains what is left in the round that it comes back in."""
    one = trainer()
    broken_off(one, 1, 3)
    one.interrupts = None
    assert one.train(4).steps == 10
    assert "round/steps" not in one.state().values
