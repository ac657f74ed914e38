"""Simulated language models of unlike tokenizers. References: training alone for as many steps; parts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat import events
from dimat.agent.setup.experiment import Whole
from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError
from dimat.events import Event
from dimat.net.compatibility import incompatibility
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from dimat.wire.v1 import peer_pb2 as pb
from tests.agent.learner.test_shared_tokens import PAIRS, experiment
from tests.tasks.huggingface.samples import GPT2, sentences


def run(config: ExperimentConfig, out: Path) -> tuple[Any, list[Event]]:
    heard: list[Event] = []
    return run_simulation(config, out=out, listeners=[heard.append]), heard


def changed(config: ExperimentConfig, **tables: Any) -> ExperimentConfig:
    """Return an experiment with other tables."""
    tree = config.model_dump(exclude_unset=True) | {"folder": str(config.folder)}
    return build(ExperimentConfig, tree | tables, "the test")


def test_both_learn_from_each_other(tmp_path: Path) -> None:
    """A byte GPT-2 and a byte-pair Llama with half of a short text each are right of more held tokens than alone with
    as many steps; with a crash the bits are the same."""
    config = experiment(tmp_path)
    results, heard = run(config, tmp_path / "one")
    train = {**config.model_dump(exclude_unset=True)["train"], "steps_per_round": 60}  # as many as with the exchange
    floor, _ = run(changed(config, merge={"method": "isolated"}, train=train), tmp_path / "alone")
    last, least = ({row.agent: row.after for row in each.rows if row.round == 3} for each in (results, floor))
    assert all(last[agent] > least[agent] for agent in last), (last, least)
    assert not any(isinstance(fact, events.PeerRefused | events.Warned) for fact in heard)
    faults = [{"kind": "crash", "agent": "agent-1", "round": 2, "on": "trained", "restart_after_s": 0.1}]
    crashed = changed(config, simulate={"workers": 1, "compute": {"step_s": 0.01}, "faults": faults})
    _, told = run(crashed, tmp_path / "crashed")
    assert sum(isinstance(fact, events.AgentCrashed) for fact in told) == 1
    for name in ("agent-0", "agent-1"):
        ours, theirs = (load_file(tmp_path / folder / "final" / f"{name}.safetensors") for folder in ("one", "crashed"))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_parts_are_of_the_same_text() -> None:
    """Blocks cut twice as long, and those of a class with others: each goes to who has the text at its place."""
    whole = Whole(8, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    parts = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    longer = Whole(4, torch.tensor([0, 0, 1, 1]))
    assert [part.tolist() for part in whole.followed(parts, longer)] == [[0, 3], [1, 2]]
    shorter = Whole(10, torch.tensor([0] * 4 + [1] * 6))
    assert [part.tolist() for part in whole.followed(parts, shorter)] == [[0, 1, 7, 8, 9], [2, 3, 4, 5, 6]]
    plain = Whole(6, None)
    halves = [torch.arange(3), torch.arange(3, 6)]
    assert [part.tolist() for part in plain.followed(halves, Whole(4, None))] == [[0, 1], [2, 3]]
    assert all(torch.equal(a, b) for a, b in zip(whole.followed(parts, whole), parts, strict=True))
    assert whole.followed((), longer) == ()


def test_each_has_its_part_of_its_own_blocks(tmp_path: Path) -> None:
    """No text of one agent is the other's, but at the edges of blocks, and no index lies outside of its task's data."""
    config = experiment(tmp_path)
    scenario = prepare(config)
    texts: list[bytes] = []
    for agent, part in zip(scenario.agents, scenario.parts, strict=True):
        task: Any = load_for(config.of_agent(agent)).task
        assert int(part.max()) < len(task.data("train"))
        assert scenario.histogram[agent] == (len(part),)
        ids = task.data("train").batch(part).inputs[0].flatten().tolist()
        texts.append(b"".join(task.probe_text.texts[i] for i in ids))
    assert sum(map(len, texts)) == pytest.approx(sum(len(text) + 1 for text in sentences(60)), rel=0.05)
    assert len(texts[0]) == pytest.approx(len(texts[1]), rel=0.15)


@pytest.mark.parametrize(
    ("probe", "own"),
    [
        ({"name": None, "count": 8}, PAIRS),
        ({"name": "public.txt", "count": 8}, PAIRS),
        ({"name": "public.txt", "count": 10_000}, {**PAIRS, "probe": {"name": "test.txt"}}),
    ],
)
def test_a_probe_text_that_differs_is_refused(tmp_path: Path, probe: dict[str, Any], own: dict[str, Any]) -> None:
    """Drawn blocks, too few blocks, another text: in a line that says what to give."""
    config = experiment(tmp_path, models=[{"agents": ["agent-1"], "options": own}])
    task = config.model_dump(exclude_unset=True)["task"]
    task["options"]["probe"] = probe
    with pytest.raises(ConfigError, match=r"task.models\[0\].*the text of the probe set.*task.options.probe.name") as e:
        prepare(changed(config, task=task))
    assert "\n" not in str(e.value)


def test_agents_greet_each_other_by_the_text(tmp_path: Path) -> None:
    """Unlike tokenizers fit; with other public texts they refuse each other, and are told what to do."""
    config = experiment(tmp_path)

    def profile(config: ExperimentConfig, name: str) -> Any:
        agent = config.agent.model_copy(update={"name": name})
        setup = prepare_agent(config.model_copy(update={"agent": agent}))
        return setup.profile(setup.learner(tmp_path).trainer.model)

    def refusal(one: Any, two: Any) -> str:
        return incompatibility(one, "tokens", pb.HelloRequest(**two.fields("tokens", "b")))

    one, two = profile(config, "agent-0"), profile(config, "agent-1")
    assert refusal(one, two) == refusal(two, one) == ""
    task = config.model_dump(exclude_unset=True)["task"]
    task["options"]["probe"]["name"] = "test.txt"
    other = profile(changed(config, task=task), "agent-1")
    assert "its logits are of other inputs: its probe set is 'text " in refusal(one, other)
    assert "a probe text of its own" in refusal(one, other)


def test_options_of_an_agent_go_over_the_tables_of_the_task(tmp_path: Path) -> None:
    """Key by key; a model's name takes the place of a config."""
    config = experiment(tmp_path, models=[{"agents": ["agent-1"], "options": {**PAIRS, "model": {"name": "folder"}}}])
    options: Any = config.task.of_agent("agent-1").options
    assert options["data"] == {"name": "text.txt", "test": "test.txt", "tokenizer": "pairs", "max_length": 24}
    assert options["model"] == {"name": "folder"}
    assert config.task.of_agent("agent-0").options["model"] == {"config": GPT2}
