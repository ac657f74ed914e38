"""Bits per byte of language models with unlike tokenizers that learn from each other's logits (method "distil").

Four agents on a ring, text of four made-up languages of which each has two: two read bytes (a GPT-2), two a byte-pair
vocabulary of 400 that was made of the public text (a Llama). Each takes 16 steps before each of three exchanges, and
"distil" 80 more in it; the probe set is a public text of all four languages. Beside training alone, also with as many
steps, there is a harder control: no exchange, and in the place of what peers say the public text's own tokens, since
text has its labels in it (the same steps, batches and weight). Bits per byte of held text of all languages, which can
be compared whatever the tokens. No run left out.

Reference: training alone with as many steps; target: each agent below it.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _common import CACHE, Result, finish, options, table
from torch import Tensor, nn

from dimat import run_simulation
from dimat.agent.setup.loaded_task import load_for
from dimat.config import ExperimentConfig, build
from dimat.seeds import torch_generator
from dimat.simulate.world.scenario import prepare
from dimat.tasks.base import Batch, Task
from dimat.tasks.huggingface.library import library
from dimat.train.evaluation import evaluate
from dimat.train.trainer import Trainer
from dimat.weights.tensors import Tensors

AGENTS, LANGUAGES, STEPS, TAUGHT = 4, 4, 16, 80
BYTES = "bytes"
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
PAIRS = {"data": {"tokenizer": "pairs", "max_length": 48}, "model": {"config": LLAMA}}


class Language:
    """Words of random syllables, and which of them like to follow which."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(14)]
        self.words = sorted({"".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(60)})
        self.liked = {word: draw.sample(self.words, 4) for word in self.words}

    def document(self, draw: random.Random) -> str:
        """Return three sentences of six words."""
        sentences: list[str] = []
        for _ in range(3):
            words = [draw.choice(self.words)]
            while len(words) < 6:
                words.append(draw.choice(self.liked[words[-1]] if draw.random() < 0.9 else self.words))
            sentences.append(" ".join(words).capitalize() + ".")
        return " ".join(sentences)


def write(folder: Path, seed: int, sizes: dict[str, int]) -> None:
    """Write JSON Lines of texts with their language, and the byte-pair tokenizer of the public text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    languages = [Language(1000 * seed + k) for k in range(LANGUAGES)]
    draw = random.Random(seed)
    for name, size in sizes.items():
        rows = [{"text": languages[k % LANGUAGES].document(draw), "language": str(k % LANGUAGES)} for k in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    public = [json.loads(line)["text"] for line in (folder / "public.jsonl").read_text().splitlines()]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(public, trainer)
    fast = library("transformers").PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    fast.save_pretrained(folder / "pairs")


def experiment(folder: Path, seed: int, rounds: int, method: str, more: int = 0, **distil: Any) -> ExperimentConfig:
    """Return the experiment of one row. `more`: steps of a round in the place of an exchange's."""
    data = {"name": "train.jsonl", "test": "test.jsonl", "text_column": "text", "label_column": "language"}
    given = {"combine": {"name": "distil", "options": {"steps": TAUGHT, **distil}}} if method == "distil" else {}
    tree = {
        "run": "unlike-tokenizers",
        "seed": seed,
        "topology": {"graph": "ring", "agents": AGENTS},
        "task": {
            "name": "hf-causal-lm",
            "options": {
                "data": {**data, "tokenizer": BYTES, "max_length": 96},
                "model": {"config": GPT2},
                "probe": {"name": "public.jsonl", "count": 100_000},
            },
            "models": [{"agents": ["agent-1", "agent-3"], "options": PAIRS}],
            "partition": {"kind": "classes", "classes_per_agent": 2},
        },
        "train": {
            "steps_per_round": STEPS + more,
            "batch_size": 16,
            "device": "cpu",
            "optimizer": {"name": "adam", "lr": 2e-3},
        },
        "merge": {"method": method, **given},
        "schedule": {"rounds": rounds},
        "simulate": {"evaluate": "none", "workers": 1},
        "folder": str(folder),
    }
    return build(ExperimentConfig, tree, "the benchmark")


class PublicLabels:
    """The control's lesson: the labels of as many probe examples, with the weight that "distil" gives to peers."""

    def __init__(self, task: Task, order: torch.Generator) -> None:
        self._probe, self._order = task.data("probe"), order

    def __call__(self, task: Task, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        chosen = torch.randperm(len(self._probe), generator=self._order)[: len(batch.targets)]
        public = self._probe.batch(chosen)
        return 0.5 * loss + 0.5 * task.loss(model(*public.inputs), public.targets)


def bits(task: Any, model: nn.Module, weights: dict[str, Tensor], held: list[str]) -> float:
    """Return bits per byte of held text: of its predictions' mean, times tokens in a byte."""
    data = task.data("test")
    found = evaluate(task, model, data, weights, batch_size=64, precision="fp32", device=torch.device("cpu"))
    size = sum(len(text.encode()) + 1 for text in held)
    return found["nll"] / math.log(2) * len(data) * task.example_inputs()[0].shape[1] / size


def measure(folder: Path, seed: int, rounds: int, row: str) -> tuple[dict[str, float], float]:
    """Return bits per byte by agent after the last exchange of a row, and MB sent by an agent."""
    method, more = ("distil", 0) if row == "distil" else ("isolated", TAUGHT if row == "alone, as many steps" else 0)
    config = experiment(folder, seed, rounds, method, more)
    held = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    found: dict[str, float] = {}
    sent = 0.0
    if row != "labels of the public text":
        results = run_simulation(config, out=folder / row.replace(" ", "-"))
        sent = sum(each.bytes_sent for each in results.rows) / 1e6 / AGENTS
    scenario = prepare(config)
    for agent, part in zip(scenario.agents, scenario.parts, strict=True):
        own = config.of_agent(agent)
        loaded = load_for(own, symmetry=False)
        if row != "labels of the public text":
            trainer = None
            weights = dict(Tensors(folder / row.replace(" ", "-") / "final" / f"{agent}.safetensors"))
        else:
            trainer = loaded.learner(agent, own, part, folder, durable=False).trainer
            assert isinstance(trainer, Trainer)
            lesson = PublicLabels(loaded.task, torch_generator(seed, "public", agent))
            for number in range(1, rounds + 1):
                trainer.train(number)
                trainer.learn(number, lesson, TAUGHT)
            weights = trainer.weights()
        model = loaded.task.build_model(torch_generator(0))
        found[agent] = bits(loaded.task, model, weights, held)
    return found, sent


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--rounds", type=int, default=3, help="exchanges (default 3)")
    parser.add_argument("--public", type=int, default=80, help="documents of the public text (default 80)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seeds = (1, 1) if arguments.quick else (arguments.rounds, arguments.seeds)
    rows = ("alone", "alone, as many steps", "labels of the public text", "distil")
    found: defaultdict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    sent: dict[str, float] = {}
    CACHE.mkdir(exist_ok=True)
    for seed in range(arguments.first, arguments.first + seeds):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            sizes = {"train": 800, "test": 120, "public": arguments.public}
            write(Path(scratch), seed, {name: size // (5 if arguments.quick else 1) for name, size in sizes.items()})
            for row in rows:
                found[row][seed], sent[row] = measure(Path(scratch), seed, rounds, row)
    kinds = {BYTES: (0, 2), "pairs": (1, 3), "all": range(AGENTS)}
    cells: list[list[str]] = []
    for row, runs in found.items():
        cells.append([row])
        for kind in kinds.values():
            means = [mean(run[f"agent-{k}"] for k in kind) for run in runs.values()]
            cells[-1].append(f"{mean(means):.3f} ± {stdev(means) if len(means) > 1 else 0:.3f}")
        cells[-1] += [f"{max(max(run.values()) for run in runs.values()):.3f}", f"{sent[row]:.2f}"]
    table(("bits per byte", *kinds, "worst agent", "MB an agent"), cells)
    ours = found["distil"]
    for row in rows[:-1]:
        gains = [run[agent] - ours[seed][agent] for seed, run in found[row].items() for agent in run]
        print(
            f"distil against {row}: {sum(g > 0 for g in gains)} of {len(gains)} agents below; least {min(gains):+.3f}"
        )
    control = rows[1]
    overall = {row: mean(mean(run.values()) for run in found[row].values()) for row in rows}
    gains = [run[agent] - ours[seed][agent] for seed, run in found[control].items() for agent in run]
    target = "each agent below training alone with as many steps"
    ratio = overall["distil"] / overall[control]
    finish(Result("unlike_tokenizers", overall["distil"], overall[control], ratio, target, min(gains) > 0))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
