"""What an agent exchanges in place of weights, and learns from. References: the steps by hand; the same agent anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.learner.learner import Learner
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.agent.setup.loaded_task import load_for
from dimat.errors import ConfigError, DataError
from dimat.merge.shared_logits import LOGITS, LogitLayout, distil
from dimat.seeds import torch_generator
from dimat.simulate.world.scenario import prepare
from dimat.train.lesson import ProbeLesson
from dimat.weights.tensors import schema_hash, write_weights
from tests.agent.learner.rounds import merged, trained
from tests.simulate.helpers import tiny_experiment

MERGE = {"method": "distil", "combine": {"name": "distil", "options": {"steps": 5, "weight": 0.6, "temperature": 3.0}}}
BASIS = BasisId(0, "agent-0", "n")
MODELS = [{"agents": ["agent-1"], "options": {"model": "mlp", "hidden": [12]}}]


def agents(folder: Path, **changes: Any) -> list[Learner]:
    """Return two agents of a task: a small CNN and an MLP, where nothing else is said."""
    task = {"name": "digits", "options": {"width": 4, "probe": 40}, "models": MODELS}
    config = tiny_experiment(folder, **{"task": task, "merge": MERGE, **changes})
    parts = prepare(config).parts
    (folder / "store").mkdir(exist_ok=True)
    made: list[Learner] = []
    for name, part in zip(("agent-0", "agent-1"), parts, strict=False):
        own = config.of_agent(name)
        made.append(load_for(own).learner(name, own, part[:64], folder / "store", durable=False))
    return made


def started(folder: Path, **changes: Any) -> tuple[Learner, Learner, dict[str, Path]]:
    one, two = agents(folder, **changes)
    files = {each.name: one.store / f"{trained(each, 1, learn=True).payload.root}.safetensors" for each in (one, two)}
    return one, two, files


def same(one: Learner, two: Learner) -> bool:
    ours, theirs = one.trainer.state(), two.trainer.state()
    assert ours.tensors.keys() == theirs.tensors.keys()
    return ours.values == theirs.values and all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())


def test_a_snapshot_holds_logits_alone_and_unlike_models_fit(tmp_path: Path) -> None:
    """bf16 logits of the first probe examples, by the model in eval mode; a schema that both models have."""
    one, two = agents(tmp_path, merge=MERGE | {"probe_samples": 30})
    first, second = (trained(each, 1, learn=True) for each in (one, two))
    assert one.schema() != two.schema()
    assert first.schema == second.schema == schema_hash(LogitLayout(30, 10).sample())
    sent = load_file(one.store / f"{first.payload.root}.safetensors")
    inputs = one.task.data("probe").batch(torch.arange(30)).inputs
    assert sent.keys() == {LOGITS}
    assert torch.equal(sent[LOGITS], one.trainer.model.eval()(*inputs).bfloat16())


def test_learning_from_peers_is_the_steps_by_hand(tmp_path: Path) -> None:
    """Reference: the mean of softened logits by mixing weights, then `Trainer.learn` on a twin of the agent."""
    (tmp_path / "again").mkdir()
    one, _, files = started(tmp_path)
    hand, _, _ = started(tmp_path / "again")
    assert same(one, hand)
    result = merged(one, 1, 0.3, [("agent-1", files["agent-1"], 0.7, False)], "all")
    sent = [load_file(files[name]) for name in ("agent-0", "agent-1")]
    said = distil(sent[0], sent[1:], [0.3, 0.7], 10, temperature=3.0)
    order = torch_generator(hand.config.seed, "distil", "agent-0", 1)
    hand.trainer.learn(1, ProbeLesson(hand.task.data("probe"), said, 0.6, 3.0, order), 5)
    assert same(one, hand)
    assert result.refused == {}
    assert result.before != result.after == one.evaluate()
    assert result.notes == ()
    assert {"train", "merge", "evaluate"} <= result.cpu_s.keys()


def test_nobody_heard_changes_nothing(tmp_path: Path) -> None:
    """Weight 1 on self, and a peer of weight 0: own weights, optimizer and streams bit for bit."""
    (tmp_path / "again").mkdir()
    one, _, files = started(tmp_path)
    twin, _, _ = started(tmp_path / "again")
    result = merged(one, 1, 1.0, [("agent-1", files["agent-1"], 0.0, False)], "all")
    assert same(one, twin)
    assert result.before == result.after
    assert result.notes == ()


def test_a_liar_teaches_nothing(tmp_path: Path) -> None:
    """NaN, and weights in place of logits: refused in a line each; the rest is as if their weight were own."""
    (tmp_path / "again").mkdir()
    one, _, files = started(tmp_path)
    twin, _, others = started(tmp_path / "again")
    bad = load_file(files["agent-1"])
    bad[LOGITS][3, 3] = float("nan")
    write_weights(tmp_path / "nan.safetensors", bad)
    write_weights(tmp_path / "weights.safetensors", one.trainer.weights())
    parts = [
        ("eve", tmp_path / "nan.safetensors", 0.2, False),
        ("agent-1", files["agent-1"], 0.5, False),
        ("mal", tmp_path / "weights.safetensors", 0.1, False),
    ]
    result = merged(one, 1, 0.2, parts, "none")
    assert result.refused.keys() == {"eve", "mal"}
    assert "not finite" in result.refused["eve"]
    assert "'aux.logits' is missing" in result.refused["mal"]
    merged(twin, 1, 0.2 + 0.2 + 0.1, [("agent-1", others["agent-1"], 0.5, False)], "none")
    assert same(one, twin)
    before = one.trainer.weights()
    alone = merged(one, 2, 0.5, [("eve", tmp_path / "nan.safetensors", 0.5, False)], "all")
    assert alone.before == alone.after
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.trainer.weights().items())


@pytest.mark.parametrize("keep", [None, 3])
def test_an_agent_that_goes_on_from_its_checkpoint_ends_with_the_same_bits(tmp_path: Path, keep: int | None) -> None:
    """Killed after training: the checkpoint has the weights, which its snapshot has not, and it sends the same again;
    killed after the merge: so too."""
    options = {"steps": 5, "keep": keep}
    merge = {"method": "distil", "combine": {"name": "distil", "options": options}}
    task = {"name": "digits", "options": {"width": 16, "probe": 40}}  # weights large enough for a file of their own
    (tmp_path / "again").mkdir()
    one, _, files = started(tmp_path, merge=merge, task=task)
    store = CheckpointStore(tmp_path / "kept", durable=False, elsewhere=(one.store,))
    store.save(one.checkpoint(MachineState("tiny", "agent-0", 1, "trained", BASIS)))
    other = agents(tmp_path / "again", merge=merge, task=task)[0]
    found = store.newest("tiny", "agent-0", other.schema())
    assert found is not None
    other.restore(found.checkpoint)
    assert other.record().payload.root == files["agent-0"].stem
    parts = [("agent-1", files["agent-1"], 0.5, False)]
    for each in (one, other):
        merged(each, 1, 0.5, parts, "none")
    assert same(one, other)
    store.save(one.checkpoint(MachineState("tiny", "agent-0", 1, "merged", BASIS)))
    assert store.share_weights(tmp_path / "weights.safetensors")
    shared = load_file(tmp_path / "weights.safetensors")
    assert shared.keys() == one.trainer.weights().keys()
    assert all(torch.equal(tensor, shared[name]) for name, tensor in one.trainer.weights().items())
    fresh = agents(tmp_path / "again", merge=merge, task=task)[0]
    newest = store.newest("tiny", "agent-0", fresh.schema())
    assert newest is not None
    fresh.restore(newest.checkpoint)
    sent = {trained(each, 2, learn=True).payload.root for each in (one, fresh)}
    assert len(sent) == 1
    assert same(one, fresh)


def test_what_cannot_be_taught_is_refused(tmp_path: Path) -> None:
    """A probe set of one example; a task without logits; a loop of the user's own."""
    one, _ = agents(tmp_path)
    with pytest.raises(ConfigError, match=r'combine = "distil" trains by itself, and here a loop of your own does'):
        Learner("x", one.config, one.task, torch.arange(20), one.store, None, custom_trainer=_Own())  # pyright: ignore
    code = (tmp_path / "tiny_task.py").read_text().replace("part(220, 240)", "part(220, 221)")
    (tmp_path / "few.py").write_text(code)
    few = {"hook": "few.py:task"}
    with pytest.raises(DataError, match=r'fewer than two examples \(1\), and merge.combine = "distil" learns'):
        agents(tmp_path, task=few)
    plain = code.replace("return ClassificationTask(", "return Plain(").replace(
        "def task",
        "class Plain(ClassificationTask):\n    logits = None\n    def loss(self, outputs, targets):\n"
        "        return torch.nn.functional.cross_entropy(outputs, targets)\n"
        "    def metrics(self, outputs, targets):\n"
        '        return {"accuracy": (outputs.argmax(1) == targets).float()}\n\ndef task',
    )
    (tmp_path / "plain.py").write_text(plain)
    with pytest.raises(ConfigError, match=r'merge.combine = "distil" teaches by logits over classes'):
        agents(tmp_path, task={"hook": "plain.py:task"})


class _Own:
    """A trainer that is not dimat's; nothing of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return torch.nn.Linear(2, 2) if name == "model" else lambda *_, **__: {}
