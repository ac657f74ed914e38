"""Somebody's own training loop with an agent beside it: `python -m tests.agent.own_loop FILE NAME SEED OUT [WORKERS]`.

With WORKERS each epoch has a new loader with so many worker processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dimat import Agent, events

STEPS = 5


def experiment(folder: Path, ports: dict[str, int], **changes: str) -> Path:
    """Write a map and an agent's file; `changes`: lines of tables, by table."""
    agents = "\n".join(f'[[agents]]\nname = "{name}"\naddresses = ["127.0.0.1:{port}"]' for name, port in ports.items())
    (folder / "map.toml").write_text(f'graph = "complete"\n{agents}\n')
    tables = {
        "topology": 'map = "map.toml"',
        "train": f"steps_per_round = {STEPS}",
        "merge": 'method = "dimat"',
        "schedule": "rounds = 3\nround_deadline_s = 60",
        "agent": "insecure = true\nfounder = true",
    } | changes
    text = 'run = "own-loop"\n' + "\n".join(f"[{name}]\n{lines}" for name, lines in tables.items())
    file = folder / "agent.toml"
    file.write_text(text + "\n")
    return file


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def examples(seed: int, count: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, :3]).argmax(1)


def learn(agent: Agent, model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> int:
    """Train until the agent is through; return the steps made."""
    inputs, targets = data
    steps = 0
    while not agent.done:
        rows = torch.arange(32) + 32 * (steps % 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        steps += 1
        agent.step()
    return steps


def learn_with_workers(
    agent: Agent, model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], workers: int
) -> int:
    """Do what `learn` does with a new loader each epoch, whose workers are forked beside the agent."""
    steps = 0
    while not agent.done:
        for inputs, targets in DataLoader(TensorDataset(*data), 64, shuffle=True, num_workers=workers):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            steps += 1
            agent.step()
            if agent.done:
                break
    return steps


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    mode = model.training
    model.eval()
    with torch.no_grad():
        right = (model(data[0]).argmax(1) == data[1]).float().mean()
    model.train(mode)
    return right.item()


def main(file: str, name: str, seed: int, out: Path, workers: int) -> None:
    model, data = network(seed), examples(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    told: list[events.Event] = []
    agent = Agent(file, (f"agent.folder='{out}'",), name=name)
    agent.listeners.append(told.append)
    with agent.attach(model, optimizer, data=[data], evaluate=lambda m: {"accuracy": accuracy(m, data)}) as running:
        if workers:
            steps = learn_with_workers(running, model, optimizer, data, workers)
        else:
            steps = learn(running, model, optimizer, data)
    save_file(dict(model.named_parameters()), out / "parameters.safetensors")
    (out / "told.json").write_text(json.dumps({"steps": steps, "events": [fact.to_dict() for fact in told]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]) if sys.argv[5:] else 0)
