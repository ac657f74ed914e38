"""Loops of one's own are protected as tasks are. References: the same loop without an agent; means of products."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dimat.agent.attach import Agent
from dimat.errors import ConfigError, DataError
from dimat.tasks import TensorData
from tests.agent.attach.test_part import adapted
from tests.agent.own_loop import STEPS, examples, experiment, learn, network

pytestmark = pytest.mark.live


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def test_an_agent_alone_changes_nothing(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: the same loop without an agent, bit for bit: shuffled loader, dropout, BatchNorm, and an `evaluate`
    that draws numbers and leaves the model in evaluation mode."""
    data = examples(0)

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        return {"accuracy": float(torch.rand(()))}

    def train(agent: Agent | None) -> tuple[nn.Module, list[bool]]:
        torch.manual_seed(0)
        model = noisy()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        group = optimizer.param_groups[0]
        shuffled = torch.Generator().manual_seed(1)
        loader = DataLoader(TensorDataset(*data), 64, shuffle=True, generator=shuffled)
        modes: list[bool] = []
        steps = 0
        running = None if agent is None else agent.attach(model, optimizer, data=loader, evaluate=evaluate).__enter__()
        while steps < 2 * STEPS:
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                steps += 1
                if running is not None:
                    running.step()
                modes.append(all(module.training for module in model.modules()))
                if steps == 2 * STEPS:
                    break
        if running is not None:
            assert running.done
            running.__exit__(None, None, None)
        assert optimizer.param_groups[0] is group
        return model, modes

    file = experiment(tmp_path, dict(zip("ab", free_ports)), schedule="rounds = 2\nround_deadline_s = 0.5")
    plain, _ = train(None)
    beside, modes = train(Agent(file, (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1"), name="a"))
    assert all(modes)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(beside.state_dict()[name], tensor), name


Loop = Callable[[Agent], Any]


def both(file: Path, loops: dict[str, Loop]) -> dict[str, Any]:
    """Run two loops beside agents of one process, and return what they return."""
    results: dict[str, Any] = {}

    def go(name: str, loop: Loop) -> None:
        try:
            results[name] = loop(Agent(file, (f"agent.folder='{file.parent / name}'",), name=name))
        except BaseException as error:
            results[name] = error

    threads = [threading.Thread(target=go, args=each) for each in loops.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return results


def test_adapters_are_merged_as_products_and_their_base_stays(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: the best product of the adapters' rank for the mean of the products that were trained."""
    file = experiment(
        tmp_path,
        dict(zip("ab", free_ports)),
        merge='method = "average"',
        schedule="rounds = 1\nround_deadline_s = 60",
    )
    models = {name: adapted(seed) for seed, name in enumerate("ab", 1)}
    trained: dict[str, Tensor] = {}
    whole = set(models["a"].state_dict())

    def product(model: Any) -> Tensor:
        layer = model.base_model.model[0]
        return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().clone()

    def loop(name: str, seed: int) -> Loop:
        def go(agent: Agent) -> set[str]:
            model = models[name]
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2)
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
            with agent.attach(model, optimizer, data=[(x, x)]) as running:
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
                    optimizer.step()
                    trained[name] = product(model)
                    running.step()
                assert running.done
            return set(model.state_dict())

        return go

    frozen = models["a"].base_model.model[0].base_layer.weight.detach().clone()
    assert both(file, {name: loop(name, seed) for seed, name in enumerate("ab")}) == dict.fromkeys("ab", whole)
    u, sigma, v = torch.linalg.svd((trained["a"] + trained["b"]) / 2, full_matrices=False)
    best = (u[:, :2] * sigma[:2]) @ v[:2]
    for name in "ab":
        torch.testing.assert_close(product(models[name]), best, rtol=1e-3, atol=1e-5)
        assert torch.equal(models[name].base_model.model[0].base_layer.weight, frozen)
        for snapshot in (tmp_path / name / "snapshots").glob("*.safetensors"):
            with safe_open(snapshot, framework="pt") as held:
                assert all("lora_" in key for key in held.keys())


def test_a_fresh_optimizer_each_round(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: Adam's own step counter."""
    file = experiment(
        tmp_path,
        dict(zip("ab", free_ports)),
        train=f'steps_per_round = {STEPS}\noptimizer_state = "fresh"',
        schedule="rounds = 3\nround_deadline_s = 0.5",
    )
    model, (inputs, targets) = network(0), examples(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    counts: list[int] = []
    agent = Agent(file, (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1"), name="a")
    with agent.attach(model, optimizer, data=[(inputs, targets)]) as running:
        while not running.done:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            counts.append(int(optimizer.state[model[0].weight]["step"]))
            running.step()
    assert counts == [*range(1, STEPS + 1)] * 3


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not this one")


def test_what_cannot_be_attached_is_said_in_a_line(tmp_path: Path, free_ports: list[int]) -> None:
    """A model that cannot be copied, one in a wrapper, batches that do not fit; what a forward pass left behind and
    torch.compile's wrapper are no obstacle."""
    file = experiment(tmp_path, dict(zip("ab", free_ports)))

    def attach(model: nn.Module, data: Any = None) -> Agent:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        options = (f"agent.folder='{tmp_path / 'a'}'",)
        return Agent(file, options, name="a").attach(
            model, optimizer, data=[torch.randn(8, 6)] if data is None else data
        )

    for model, data, kind, message in (
        (nn.Sequential(Uncopyable(6, 3)), None, ConfigError, r"cannot be copied \(RuntimeError: not this one\)"),
        (nn.DataParallel(network(0)), None, ConfigError, r"wrapped in DataParallel"),
        (network(0), [torch.randn(8, 6), torch.randn(8, 5)], DataError, r"batch 1 has examples of shape \(5,\)"),
    ):
        with pytest.raises(kind, match=message) as fault:
            attach(model, data)
        assert "\n" not in str(fault.value)
    model = network(0)
    model.kept = model(torch.randn(4, 6)).sum()
    compiled = torch.compile(model, backend="eager")
    agent = attach(compiled)
    assert agent._trainer is not None
    assert agent._trainer.model is model
    with agent as running:
        running.step()
    assert os.path.isdir(tmp_path / "a")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda _: 0.5, "evaluate returned a float"),
        (lambda _: {"accuracy": torch.zeros(3)}, "accuracy is not a single number"),
        (lambda _: {"loss": 1.0}, r"evaluate returned loss, but .* needs accuracy"),
        (None, r"judges merges by metrics; give attach\(…, evaluate=…\)"),
    ],
    ids=["no table", "no number", "another metric", "none"],
)
def test_metrics_that_merges_go_by(tmp_path: Path, free_ports: list[int], evaluate: Any, message: str) -> None:
    """What `evaluate` returns is checked where it is needed."""
    file = experiment(tmp_path, dict(zip("ab", free_ports)))
    model = network(0)
    agent = Agent(file, (f"agent.folder='{tmp_path / 'a'}'", "merge.accept='no-worse'"), name="a")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def judged() -> dict[str, float]:
        trainer = agent.attach(model, optimizer, data=[torch.randn(8, 6)], evaluate=evaluate)._trainer
        assert trainer is not None
        return trainer.evaluate(TensorData(torch.randn(2, 6), torch.zeros(2)))

    with pytest.raises(ConfigError, match=message):
        judged()


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("classes", {"classes": ["cat", "dog", "eel"]}, {"classes": iter(["dog", "cat", "eel"])}),
        (
            "tokenizer",
            {"agreement": {"tokenizer": "3 tokens, hash a"}},
            {"agreement": {"tokenizer": "3 tokens, hash b"}},
        ),
    ],
)
def test_loops_that_mean_other_things_by_their_weights_refuse_each_other(
    tmp_path: Path, free_ports: list[int], name: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Models of one shape: each says once what differs, with both sides, and trains on with its own weights alone."""
    schedule = "rounds = 2\nround_deadline_s = 3"
    file = experiment(tmp_path, dict(zip("ab", free_ports)), merge='method = "average"', schedule=schedule)
    told: dict[str, list[Any]] = {"a": [], "b": []}

    def loop(own: str, means: dict[str, Any]) -> Loop:
        def go(agent: Agent) -> int:
            agent.listeners.append(told[own].append)
            model, data = network(0), examples(0)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            with agent.attach(model, optimizer, data=[data], follow=[], **means) as running:
                return learn(running, model, optimizer, data)

        return go

    both(file, {"a": loop("a", one), "b": loop("b", other)})
    for events in told.values():
        refused = [fact.reason for fact in events if type(fact).__name__ == "PeerRefused"]
        assert refused
        assert all(name in reason for reason in refused)
        assert all(len(fact.contributions) == 1 for fact in events if type(fact).__name__ == "Merged")


def test_classes_that_are_no_list_of_names_are_refused(tmp_path: Path) -> None:
    agent, model = Agent(experiment(tmp_path, {"a": 1}), name="a"), network(0)
    for odd in ("cat", [1, 2], None, 3):
        with pytest.raises(ConfigError, match=r"classes=…\) got .*give the names of the model's outputs, in order"):
            agent.attach(model, torch.optim.SGD(model.parameters(), 0.1), data=[examples(0)], classes=odd)  # type: ignore[arg-type]
