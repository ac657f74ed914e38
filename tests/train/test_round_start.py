"""What training holds on to of where a round began. References: FedProx's objective in a plain torch loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import DataError
from dimat.tasks import mlp, seeded
from tests.train.test_interrupts import broken_off
from tests.train.test_trainer import blobs, trainer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CASES: dict[str, tuple[dict[str, Any], Make]] = {
    "sgd": ({"optimizer": {"name": "sgd", "lr": 0.2}}, lambda ps: torch.optim.SGD(ps, 0.2, momentum=0.9)),
    "adam": ({"optimizer": {"name": "adam", "lr": 0.02}, "accumulate": 3}, lambda ps: torch.optim.Adam(ps, 0.02)),
    "searches lines": (
        {
            "optimizer": {"name": "torch.optim.LBFGS", "options": {"line_search_fn": "strong_wolfe", "max_iter": 3}},
        },
        lambda ps: torch.optim.LBFGS(ps, line_search_fn="strong_wolfe", max_iter=3),
    ),
}


class Partly(nn.Module):
    """A frozen layer, and one that no loss reaches: neither has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.frozen, self.idle = mlp((6, 8, 3)), nn.Linear(6, 6), nn.Linear(2, 2)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.frozen(x))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_proximal_steps_are_those_of_the_whole_objective(case: str, clip: float | None) -> None:
    """Li et al. 2020, eq. 2, as one loss for autograd, clipped as one; two rounds, each with its own start."""
    settings, make = CASES[case]
    steps = 2 if case == "searches lines" else 6  # in float32 its ways part soon
    mu = 0.7
    data = blobs(transform=None)
    one = trainer(
        data=data,
        model=Partly,
        proximal=mu,
        batch_size=len(data),
        steps_per_round=steps,
        grad_clip_norm=clip,
        **settings,
    )
    model = seeded(Partly)(torch.Generator())
    model.load_state_dict(one.weights())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    batch = data.batch(torch.arange(len(data)))
    for number in (1, 2):
        plain: list[float] = []
        start = [p.detach().clone() for p in trained]
        for _ in range(steps):
            seen: list[float] = []

            def closure(start: list[Tensor] = start, seen: list[float] = seen) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(*batch.inputs), batch.targets)
                away = torch.stack([(p - s).square().sum() for p, s in zip(trained, start, strict=True)]).sum()
                whole = loss + mu / 2 * away
                whole.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(trained, clip)
                seen.append(loss.item())
                return whole

            optimizer.step(closure)
            plain.append(seen[0])
        report = one.train(number)
        assert report.loss == pytest.approx(sum(plain) / steps, rel=1e-4)  # the task's loss, without the pull
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(one.weights()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_stronger_pull_lets_weights_drift_less() -> None:
    """And without one training is what it was, to the last bit."""
    drifts: list[float] = []
    for settings in ({}, {"proximal": 0.0}, {"proximal": 1.0}, {"proximal": 10.0}):
        one = trainer(optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.0}, **settings)
        before = one.weights()
        one.train(1)
        drifts.append(
            float(torch.cat([(t - before[n]).flatten() for n, t in one.weights().items() if "fc" in n]).norm())
        )
    assert drifts[0] == drifts[1] > drifts[2] > drifts[3]


def test_the_middle_of_a_round_without_an_anchor_is_refused() -> None:
    """Where it ought to pull to nobody remembers, and nothing is guessed; one too many is let go."""
    state = broken_off(trainer(), 1, 3)
    with pytest.raises(DataError, match=r"middle of round 1, which began without the copies .* train\.proximal need"):
        trainer(proximal=0.1).load_state(state)
    pulled = broken_off(trainer(proximal=0.1), 1, 3)
    assert "anchor/fc1.weight" in pulled.tensors
    assert "anchor/bn.running_mean" not in pulled.tensors
    other = trainer()
    other.load_state(pulled)
    assert not any(name.startswith("anchor/") for name in other.state().tensors)
