"""Teaching by several models. References: the formula by hand, and a plain torch loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dimat.config import DistilConfig
from dimat.errors import ConfigError
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations
from dimat.tasks import Subset, mlp, seeded
from dimat.train.lesson import ProbeLesson, check_teachable, probe_logits
from dimat.train.trainer import Trainer
from tests.train.test_losses import Plain, Stepping
from tests.train.test_trainer import assert_same, blobs, task, trainer


def small() -> Any:
    return mlp((6, 8, 3))


def teachers(count: int = 2) -> list[dict[str, Tensor]]:
    return [seeded(small)(torch.Generator().manual_seed(10 + k)).state_dict() for k in range(count)]


def taught(config: DistilConfig, known: list[dict[str, Tensor]], **settings: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """Return a trainer of all examples at once by plain gradient descent, distilled, and its weights of before."""
    data = blobs(transform=None)
    plain = {"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.0}, "batch_size": len(data)}
    one = trainer(data=data, model=small, **plain, **settings)
    before = one.weights()
    one.distil(1, known, config)
    return one, before


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"loss": "logit-adjusted"}], ids=str)
def test_distillation_is_the_hand_written_loop(settings: dict[str, Any]) -> None:
    """(1 − w) the configured loss of own labels + w T² KL to the softmax of the teachers' mean logits, each step."""
    config = DistilConfig(steps=3, weight=0.3, temperature=2.0)
    one, before = taught(config, teachers(), **settings)
    model = small()
    model.load_state_dict(before)
    batch = one.data.batch(torch.arange(len(one.data)))
    known: list[Tensor] = []
    for each in teachers():
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(each)
        known.append(teacher(*batch.inputs).detach())
    p = (sum(known) / 2 / 2.0).softmax(1)
    for _ in range(3):
        logits = model(*batch.inputs)
        gap = (p * (p.log() - (logits / 2.0).log_softmax(1))).sum(1).mean()
        ((1 - 0.3) * one.loss(logits, batch.targets) + 0.3 * 4 * gap).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(one.weights()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_order_of_a_teachers_units_does_not_matter() -> None:
    """Logits are the same whatever the basis; nothing is aligned for it."""
    spec = derive_symmetry(small(), (torch.zeros(2, 6),))
    known = teachers(1)
    turned = [permute_weights(known[0], spec, random_permutations(spec, torch.Generator().manual_seed(0)))]
    config = DistilConfig(steps=2, weight=1.0)
    one, two = (taught(config, each)[0].weights() for each in (known, turned))
    assert not all(torch.equal(tensor, turned[0][name]) for name, tensor in known[0].items())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def test_distillation_goes_on_in_the_agents_streams_and_its_state() -> None:
    """Equal states give equal bits; what comes after goes on as after training, fresh or kept; loss and model are its
    own again."""
    for settings in ({}, {"optimizer_state": "fresh", "loss": "not-true-distillation", "proximal": 0.1}):
        one = trainer(**settings)
        one.train(1)
        two = trainer(seed=5, **settings)
        two.load_state(one.state())
        known = [trainer(seed=k).weights() for k in (7, 8)]
        for each in (one, two):
            report = each.distil(1, known, DistilConfig(steps=7))
            assert report.steps == 7
            each.train(2)
        assert_same(one.state(), two.state())
        untaught = trainer(**settings)
        untaught.train(1)
        untaught.train(2)
        assert one.samples_seen > untaught.samples_seen


def test_tasks_without_logits_are_not_taught() -> None:
    own: Any = task()
    stepping: Any = Stepping(own.name, own.model, own.train, own.test, own.probe, own.classes)
    plain: Any = Plain(own)
    for odd, why in ((stepping, "train_step of its own"), (plain, "does not say that it has any")):
        with pytest.raises(ConfigError, match=why):
            check_teachable(odd, "first_merge")
    check_teachable(own, "first_merge")


def test_a_lesson_on_the_probe_set_is_the_hand_written_loop() -> None:
    """(1 − w) the loss of own labels + w T² KL(p̄ ‖ model) of as many probe examples, which come again only after all
    have been."""
    data, probe = blobs(transform=None), blobs(samples=40, transform=None)
    plain = {"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.0}, "batch_size": len(data)}
    one = trainer(data=data, model=small, **plain)
    model = small()
    model.load_state_dict(one.weights())
    said = torch.randn(len(probe), 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    report = one.learn(1, ProbeLesson(probe, said, 0.3, 2.0, torch.Generator().manual_seed(4)), 3)
    assert report.steps == 3
    batch, asked = data.batch(torch.arange(len(data))), probe.batch(torch.arange(len(probe)))  # all of it each time
    for _ in range(3):
        logits = (model(*asked.inputs) / 2.0).log_softmax(1)
        gap = (said * (said.log() - logits)).sum(1).mean()
        (0.7 * one.loss(model(*batch.inputs), batch.targets) + 0.3 * 4 * gap).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(one.weights()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_probe_set_is_gone_through_whole_and_in_a_drawn_order() -> None:
    """Counted: two batches of 4 and one of 2 of ten examples are all of them, and another seed orders otherwise."""
    data = blobs(transform=None)
    read: list[list[int]] = []

    class Watched(Subset):
        def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Any:
            read[-1].extend(indices.tolist())
            return super().batch(indices, generator)

    for seed in (0, 0, 1):
        read.append([])
        probe = Watched(data, torch.arange(10))
        one = trainer(data=Subset(data, torch.arange(4)), model=small, batch_size=4)
        one.learn(1, ProbeLesson(probe, torch.full((10, 3), 1 / 3), 0.5, 1.0, torch.Generator().manual_seed(seed)), 5)
    assert sorted(read[0][:10]) == sorted(read[0][10:]) == list(range(10))
    assert read[0] == read[1] != read[2]


def test_logits_of_a_set_leave_everything_as_it_was() -> None:
    """Reference: the model in eval mode, whatever the size of batches; no stream, mode or statistic moves."""
    one = trainer(model=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)))
    one.train(1)
    before, streams = one.state(), torch.get_rng_state()
    data = blobs(transform=None)
    expected = one.model.eval()(*data.batch(torch.arange(len(data))).inputs).detach()
    one.model.train()
    for size in (3, 1000):
        options = {"batch_size": size, "precision": "fp32", "device": torch.device("cpu")}
        torch.testing.assert_close(probe_logits(one.task, one.model, data, **options), expected)
    assert one.model.training
    assert torch.equal(streams, torch.get_rng_state())
    assert_same(one.state(), before)
