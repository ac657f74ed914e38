"""An agent beside Lightning's `Trainer`. References: the trainer without it; equal weights after the last merge."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dimat.agent.attach import Agent
from tests.agent.attach.test_own_loops import both
from tests.agent.own_loop import STEPS, examples, experiment, network

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore"),  # the library's own advice
]


def lightning() -> Any:
    """Import Lightning; skip where it is not there, or where a library that it loads does not fit this torch."""
    try:
        return import_module("lightning.pytorch")
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
        pytest.skip(f"lightning (extra `lightning`) cannot be imported: {type(error).__name__}: {error}")


def module(seed: int) -> Any:
    LightningModule = lightning().LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Module()


def fit(seed: int, folder: Path, callbacks: list[Any], steps: int = -1, parts: int = 1) -> Any:
    made = module(seed)
    trainer = lightning().Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=parts,
    )
    torch.manual_seed(seed)
    trainer.fit(made, DataLoader(TensorDataset(*examples(seed)), 32, shuffle=True))
    return made, int(trainer.global_step)


def test_two_trainers_end_with_one_model(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: equal weights after the last merge. Steps of two batches count once."""
    lightning()
    from dimat.integrations import LightningCallback

    file = experiment(tmp_path, dict(zip("ab", free_ports)))
    made: dict[str, Any] = {}

    def loop(name: str, seed: int) -> Any:
        def go(_: Agent) -> int:
            options = (f"agent.folder='{tmp_path / name}'",)
            callback = LightningCallback(file, options, name=name, follow=[])
            made[name], steps = fit(seed, tmp_path / name, [callback], parts=2)
            return steps

        return go

    assert both(file, {name: loop(name, seed) for seed, name in enumerate("ab")}) == dict.fromkeys("ab", 3 * STEPS)
    a, b = (dict(made[name].named_parameters()) for name in "ab")
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_a_trainer_with_an_agent_alone_trains_as_without(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: the same trainer without the callback, bit for bit."""
    lightning()
    from dimat.integrations import LightningCallback

    schedule = "rounds = 2\nround_deadline_s = 0.5"
    file = experiment(tmp_path, dict(zip("ab", free_ports)), schedule=schedule)
    options = (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1")
    plain, _ = fit(0, tmp_path, [], 2 * STEPS)
    beside, steps = fit(0, tmp_path, [LightningCallback(file, options, name="a")])
    assert steps == 2 * STEPS
    for name, tensor in plain.state_dict().items():
        assert torch.equal(beside.state_dict()[name], tensor), name
