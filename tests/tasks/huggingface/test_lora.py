"""LoRA adapters as what agents train, exchange and merge. References: PEFT's own tensors, dense products B·A, and the
model before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat import events
from dimat.agent.learner.learner import Learner
from dimat.agent.learner.shared_base import base_address, plan_for
from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError, DimatError
from dimat.merge.lora.factors import find_pairs
from dimat.seeds import torch_generator
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from tests.agent.learner.rounds import merged, trained
from tests.tasks.huggingface.samples import GPT2, VIT, grouped, write_parquet, write_text

RANK = 4


def experiment(
    folder: Path, options: dict[str, Any] | None = None, name: str = "hf-causal-lm", **changes: Any
) -> ExperimentConfig:
    if options is None:
        write_text(folder / "text.txt", 90)
        options = {"data": {"name": "text.txt", "tokenizer": "bytes", "max_length": 32}, "probe": {"count": 4}}
        options |= {"model": {"config": GPT2, "lora": {"r": RANK, "dropout": 0.1}}, "seed": 5}
    tree: dict[str, Any] = {
        "run": "adapters",
        "topology": {"graph": "complete", "agents": 3},
        "task": {"name": name, "options": options},
        "train": {
            "steps_per_round": 6,
            "batch_size": 8,
            "optimizer": {"name": "adam", "lr": 0.01},
            "initialisation": "own",
            "optimizer_state": "fresh",
        },
        "schedule": {"rounds": 2},
        "simulate": {"workers": 1},
        "folder": str(folder),
        **changes,
    }
    return build(ExperimentConfig, tree, "the test")


def agents(tmp_path: Path, config: ExperimentConfig) -> list[Learner]:
    scenario = prepare(config)
    store = tmp_path / "store"
    store.mkdir(exist_ok=True)
    return [
        Learner(name, config, scenario.task, part, store, None, durable=False)
        for name, part in zip(scenario.agents, scenario.parts, strict=True)
    ]


def frozen(agent: Learner) -> dict[str, Tensor]:
    model = agent.trainer.model
    held = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in [*held.items(), *model.named_buffers()]}


def products(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {pair.key: weights[pair.b].double() @ weights[pair.a].double() for pair in find_pairs(weights)}


def test_adapters_alone_are_exchanged_and_merged_as_products(tmp_path: Path) -> None:
    """Snapshots hold PEFT's factors and nothing else; the merged product is the best approximation of rank r to the
    mean of the products, in the Frobenius norm, which is no product of mean factors; the base is untouched."""
    one, two, three = agents(tmp_path, experiment(tmp_path))
    before = frozen(one)
    reports = [trained(agent, 1, learn=True) for agent in (one, two, three)]
    files = [one.store / f"{report.payload.root}.safetensors" for report in reports]
    held = [load_file(file) for file in files]
    changing = {name for name, p in one.trainer.model.named_parameters() if p.requires_grad}
    assert set(held[0]) == changing
    assert {len(find_pairs(held[0])) * 2} == {len(held[0])}
    everything = sum(p.numel() for p in one.trainer.model.parameters())
    adapters = sum(tensor.numel() for tensor in held[0].values())
    assert adapters < everything / 10
    assert files[0].stat().st_size < 4 * adapters + 200 * len(held[0])
    mean = {key: sum(products(weights)[key] for weights in held) / 3 for key in products(held[0])}
    parts = [(agent.name, file, 1 / 3, True) for agent, file in ((two, files[1]), (three, files[2]))]
    report = merged(one, 1, 1 / 3, parts, "all")
    assert report.refused == {}
    assert report.notes == ("the base is frozen and shared by all, so nothing is aligned",)
    for key, found in products(one.trainer.weights()).items():
        u, sigma, v = torch.linalg.svd(mean[key])
        best = (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]
        torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-4)
        apart = [sum(weights[name] for weights in held).double() / 3 for name in factor_names(held[0], key)]
        assert (apart[1] @ apart[0] - mean[key]).norm() > 2 * (found - mean[key]).norm()
    after = frozen(one)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    others = frozen(three)
    assert all(torch.equal(tensor, others[name]) for name, tensor in before.items())


def factor_names(weights: dict[str, Tensor], key: str) -> tuple[str, str]:
    pair = next(pair for pair in find_pairs(weights) if pair.key == key)
    return pair.a, pair.b


def test_a_run_sends_adapters_and_learns(tmp_path: Path) -> None:
    """Three agents for two rounds: bytes on the wire are the adapters', and all end with one product."""
    heard: list[events.Event] = []
    config = experiment(tmp_path)
    results = run_simulation(config, out=tmp_path / "run", listeners=[heard.append])
    model = prepare(config).task.build_model(torch_generator(0))
    adapters = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    sizes = {event.bytes for event in heard if isinstance(event, events.Published)}
    assert all(adapters < size < adapters + 300 * len(model.state_dict()) for size in sizes)
    assert len(sizes) == 1
    assert {row.bytes_sent for row in results.rows} == {2 * size for size in sizes}
    losses = [[row.loss for row in results.rows if row.round == number] for number in (1, 2)]
    assert max(losses[1]) < min(losses[0])
    final = [load_file(file) for file in sorted((tmp_path / "run" / "final").iterdir())]
    for key, product in products(final[0]).items():
        for weights in final[1:]:
            torch.testing.assert_close(products(weights)[key], product, atol=1e-6, rtol=1e-4)


def test_an_agent_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Train, checkpoint, a new agent, train: bit for bit as without a break; the checkpoint holds no base."""
    config = experiment(tmp_path)
    one, broken, again = (agents(tmp_path, config)[0] for _ in range(3))
    for agent in (one, broken):
        trained(agent, 1, learn=True)
    held = broken.trainer.state()
    assert {name.split("/")[1] for name in held.tensors if name.startswith("model/")} == set(one.trainer.weights())
    again.trainer.load_state(held)
    for agent in (one, again):
        trained(agent, 2, learn=True)
    assert all(torch.equal(tensor, again.trainer.weights()[name]) for name, tensor in one.trainer.weights().items())


def test_an_image_classifier_is_adapted_and_its_head_trained_whole(tmp_path: Path) -> None:
    """The classifier travels beside the factors and is averaged, as it is no product; a base in bfloat16 stays so."""
    write_parquet(tmp_path / "colours.parquet")
    task: dict[str, Any] = {"data": {"name": "colours.parquet"}, "probe": {"count": 6}}
    task["model"] = {"config": VIT, "dtype": "bf16", "lora": {"r": 2, "targets": "all-linear"}}
    one, two, _ = agents(tmp_path, experiment(tmp_path, task, "hf-image-classification"))
    files = [one.store / f"{trained(agent, 1, learn=True).payload.root}.safetensors" for agent in (one, two)]
    held = [load_file(file) for file in files]
    heads = [name for name in held[0] if "classifier" in name]
    assert len(heads) == 2
    assert len(held[0]) == 2 * len(find_pairs(held[0])) + 2
    merged(one, 1, 0.5, [(two.name, files[1], 0.5, True)], "none")
    for name in heads:
        torch.testing.assert_close(one.trainer.weights()[name], (held[0][name] + held[1][name]) / 2)
    assert {t.dtype for name, t in frozen(one).items() if "q_proj.base_layer" in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in held[0].items() if "lora_" in name} == {torch.float32}


def test_the_frozen_base_is_compared_by_its_hash(tmp_path: Path) -> None:
    """The address that peers compare is one for equal bases, whatever the agent's adapters, and another for another
    base, rank or scale; a plain model has none."""
    config = experiment(tmp_path)
    address = prepare(config).schedule.base
    assert address
    assert prepare(experiment(tmp_path, train={"steps_per_round": 1})).schedule.base == address
    seen = {address}
    for change in ({"seed": 6}, {"model": {"lora": {"r": 2}}}, {"model": {"lora": {"r": RANK, "alpha": 3.0}}}):
        seen.add(prepare(experiment(tmp_path, grouped(config.task.options, change))).schedule.base)
    assert len(seen) == 4
    plain = {**config.task.options, "model": {"config": GPT2}}
    other = experiment(tmp_path, plain)
    assert base_address(other, prepare(other).task) == ""
    based = experiment(tmp_path, merge={"base": {"seed": 0}})
    assert prepare(based).schedule.base not in {"", address}


def test_what_a_frozen_base_does_not_allow_is_said(tmp_path: Path) -> None:
    """Alignment and methods that pair units are refused; other methods are warned of; presets are fitted."""
    task = prepare(experiment(tmp_path)).task
    for method in ("dimat", "dimat-paper", "average"):
        plan = plan_for(experiment(tmp_path, merge={"method": method}).merge, task)
        assert (plan.align.name, plan.combine.name, plan.repair.name) == ("none", "lora-svd", "none")
    with pytest.raises(ConfigError, match=r'merge.align = "weights" would move the units'):
        plan_for(experiment(tmp_path, merge={"align": "weights"}).merge, task)
    with pytest.raises(ConfigError, match='"zipit" pairs units of whole models'):
        plan_for(experiment(tmp_path, merge={"method": "zipit"}).merge, task)
    plan = plan_for(experiment(tmp_path, merge={"method": "average", "combine": "average"}).merge, task)
    assert plan.combine.name == "average"
    assert "merges LoRA factors one by one" in plan.notes[0]
    plan = plan_for(experiment(tmp_path, merge={"combine": "lora-lego"}).merge, task)
    assert plan.combine.name == "lora-lego"


def test_agents_of_a_process_share_the_frozen_base(tmp_path: Path) -> None:
    """Three agents hold one base and three times adapters, by the memory of their tensors; training changes no bit of
    it; a base that somebody has written into is refused."""
    config = experiment(tmp_path)
    parties = agents(tmp_path, config)
    frozen_bytes, trained_bytes = (
        sum(p.nbytes for p in parties[0].trainer.model.parameters() if p.requires_grad is wanted)
        for wanted in (False, True)
    )
    parameters = [p for agent in parties for p in agent.trainer.model.parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    assert sum(storages.values()) == frozen_bytes + 3 * trained_bytes
    before = {name: tensor.clone() for name, tensor in frozen(parties[0]).items()}
    for agent in parties:
        trained(agent, 1, learn=True)
    for agent in parties:
        assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(agent).items())
    held = next(p for p in parties[1].trainer.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        held.view(-1)[0] += 1
    with pytest.raises(DimatError, match="of the frozen base has changed"):
        parties[2].task.build_model(torch_generator(0))
