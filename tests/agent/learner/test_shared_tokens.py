"""Language models of unlike tokenizers that learn from each other. References: the same steps on own labels alone;
dense formulas; the same agents anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimat.agent.learner.learner import Learner
from dimat.agent.setup.loaded_task import load_for
from dimat.config import ExperimentConfig, build
from dimat.merge.token_logits import LOGITS, TEXTS
from dimat.seeds import torch_generator
from dimat.simulate.world.scenario import prepare
from dimat.weights.tensors import Tensors, write_weights
from tests.agent.learner.rounds import merged, trained
from tests.tasks.huggingface.samples import GPT2, LLAMA, sentences, write_byte_pairs

PAIRS = {"data": {"tokenizer": "pairs", "max_length": 24}, "model": {"config": LLAMA}}


def experiment(folder: Path, models: Any = ({"agents": ["agent-1"], "options": PAIRS},), **options: Any) -> Any:
    """Return the experiment of a byte model and another, with a public text that all of it is probed on."""
    held, public = sentences(30, seed=5), sentences(40, seed=9)
    for name, texts in (("text", sentences(60)), ("test", held), ("public", public)):
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    write_byte_pairs(folder / "pairs", sentences(60))
    data = {"name": "text.txt", "test": "test.txt", "tokenizer": "bytes", "max_length": 48}
    tree = {
        "run": "tokens",
        "topology": {"graph": "complete", "agents": 2},
        "task": {
            "name": "hf-causal-lm",
            "options": {
                "data": data,
                "model": {"config": GPT2},
                "probe": {"name": "public.txt", "count": 10_000},
            },
            "models": models,
        },
        "train": {
            "steps_per_round": 30,
            "batch_size": 8,
            "device": "cpu",
            "optimizer": {"name": "adam", "lr": 3e-3},
        },
        "merge": {"method": "distil", "combine": {"name": "distil", "options": {"steps": 30, **options}}},
        "schedule": {"rounds": 3},
        "folder": str(folder),
    }
    return build(ExperimentConfig, tree, "the test")


def agents(config: ExperimentConfig, blocks: int | None = None) -> list[Learner]:
    """Return both agents; `blocks`: of own text that each has, at most."""
    (Path(config.folder) / "store").mkdir(exist_ok=True)
    made: list[Learner] = []
    for name, part in zip(("agent-0", "agent-1"), prepare(config).parts, strict=True):
        own = config.of_agent(name)
        loaded = load_for(own)
        made.append(loaded.learner(name, own, part[:blocks], Path(config.folder) / "store", durable=False))
    return made


def nats_per_byte(learner: Learner) -> float:
    """Return the loss on held text, which can be compared whatever the tokens."""
    data = learner.task.data("test")
    texts: Any = learner.task
    lengths = torch.tensor([len(text) for text in texts.probe_text.texts])
    size = int(lengths[data.batch(torch.arange(len(data))).targets[:, 1:]].sum())
    return learner.evaluate()["nll"] * len(data) * texts.probe_text.tokens.shape[1] / size


def file_of(learner: Learner, number: int, *, learn: bool = True) -> Path:
    return learner.store / f"{trained(learner, number, learn=learn).payload.root}.safetensors"


@pytest.mark.parametrize("pupil", ["pairs", "bytes"])
def test_a_pupil_learns_more_than_from_its_own_text(tmp_path: Path, pupil: str) -> None:
    """A teacher of the other tokenizer has learned the text in many steps; the pupil has two blocks of its own. On held
    text it does better than after as many steps on those alone, in each of three exchanges."""
    config = experiment(tmp_path, text=0.0)
    teacher = agents(config)[(pupil == "pairs" and 0) or 1]
    for number in range(1, 8):
        teacher.train(number)
    source = file_of(teacher, 8)
    ours, alone = (agents(config, 2)[(pupil == "pairs" and 1) or 0] for _ in range(2))
    steps: list[tuple[float, float]] = []
    for number in (1, 2, 3):
        file_of(ours, number)
        result = merged(ours, number, 0.2, [(teacher.name, source, 0.8, False)], "none")
        assert result.refused == {}
        assert result.notes == ()
        alone.train(number)
        alone.train(number)  # as many steps as in the exchange
        steps.append((nats_per_byte(ours), nats_per_byte(alone)))
    assert all(taught < own for taught, own in steps), steps
    assert steps[-1][0] < 0.8 * steps[-1][1]


def test_snapshots_of_unlike_tokenizers_have_one_schema_and_one_limit(tmp_path: Path) -> None:
    """bf16 logits of 16 texts of each prediction, in bytes of one text; both within what either expects at most."""
    config = experiment(tmp_path)
    one, two = agents(config)
    first, second = (trained(each, 1, learn=True) for each in (one, two))
    assert first.schema == second.schema
    assert one.schema() != two.schema()
    for learner, snapshot in ((one, first), (two, second)):
        sent = load_file(learner.store / f"{snapshot.payload.root}.safetensors")
        assert sent[LOGITS].dtype == torch.bfloat16
        assert sent[LOGITS].shape[1] == 16
        loaded = load_for(config.of_agent(learner.name))
        assert loaded.schema(learner.trainer.model) == first.schema
        most = sum(t.nbytes for t in loaded.sample_snapshot(learner.trainer.model, {}, largest=True).values())
        assert max(first.payload.bytes, second.payload.bytes) < most


def test_equal_tokens_are_taught_the_mean_of_both(tmp_path: Path) -> None:
    """With one tokenizer and all logits kept, the lesson is the formula: p̄ of both softmaxes, weighted by how well each
    knows the example."""
    config = experiment(tmp_path, models=(), keep=257, text=0.0)
    one, two = agents(config)
    two.train(1)
    source = file_of(two, 2)
    file_of(one, 1)
    logits = _probe_logits(one), _probe_logits(two)
    exchange: Any = one._logits  # pyright: ignore[reportPrivateUsage]
    said = exchange._exchange.read("agent-1", Tensors(source))
    lesson, _ = exchange._exchange.lesson({"agent-1": said}, [0.3, 0.7], torch_generator(0))
    text = one.task.probe_text  # pyright: ignore[reportAttributeAccessIssue]
    dense = torch.zeros(text.tokens.numel(), 257).scatter_(1, lesson._said.ids, lesson._said.shares)
    known = [
        (each.flatten(0, 1).bfloat16().double().masked_fill(~text.known, -torch.inf)).softmax(1) for each in logits
    ]
    trust: list[torch.Tensor] = []
    for shares, weight in zip(known, (0.3, 0.7), strict=True):
        right = shares.gather(1, text.tokens.flatten()[:, None]).clamp(min=1e-4).log().reshape(text.tokens.shape)
        trust.append(weight * right.mean(1).exp().repeat_interleave(text.tokens.shape[1]))
    expected = sum(t[:, None] * s for t, s in zip(trust, known, strict=True)) / sum(trust)[:, None]  # pyright: ignore
    assert len(lesson._said.rows) == len(dense)
    torch.testing.assert_close(dense.double(), expected, atol=2e-6, rtol=1e-4)


def test_equal_seeds_give_equal_bits(tmp_path: Path) -> None:
    """Two rounds of both agents, twice; and a liar's part counts as own."""
    config = experiment(tmp_path)
    states: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        pair = agents(config)
        for number in (1, 2):
            files = [file_of(each, number) for each in pair]
            merged(pair[0], number, 0.5, [("agent-1", files[1], 0.5, False)], "none")
            merged(pair[1], number, 0.5, [("agent-0", files[0], 0.5, False)], "none")
        states.append({f"{each.name}/{k}": t for each in pair for k, t in each.trainer.weights().items()})
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_liar_teaches_nothing_and_strangers_are_told(tmp_path: Path) -> None:
    """A snapshot that names texts it has not, refused by name; a peer that speaks of one place, with what to do."""
    config = experiment(tmp_path)
    one, two = agents(config)
    source = file_of(two, 1)
    file_of(one, 1)
    sent = load_file(source)
    before = one.trainer.weights()
    write_weights(tmp_path / "bad.safetensors", {**sent, TEXTS: sent[TEXTS][:-1].contiguous()})
    bad = merged(one, 1, 0.5, [("eve", tmp_path / "bad.safetensors", 0.5, False)], "none")
    assert "'aux.token_lengths' must be lengths" in bad.refused["eve"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.trainer.weights().items())
    few = {name: tensor if name.endswith(("lengths", "texts")) else tensor[:9] for name, tensor in sent.items()}
    write_weights(tmp_path / "few.safetensors", {name: tensor.contiguous() for name, tensor in few.items()})
    told = merged(one, 1, 0.5, [("agent-1", tmp_path / "few.safetensors", 0.5, False)], "none")
    assert len(told.notes) == 1
    assert told.notes[0].startswith("agent-1 says something of ")
    assert "task.options.probe.name" in told.notes[0]


def _probe_logits(learner: Learner) -> torch.Tensor:
    data = learner.task.data("probe")
    with torch.no_grad():
        return learner.trainer.model.eval()(data.batch(torch.arange(len(data))).inputs[0]).logits[:, :-1]
