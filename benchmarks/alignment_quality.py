"""Loss barriers between networks that were trained apart, by way of alignment.

Pairs of networks of one architecture, each from its own initialisation and with its own order of the same training
data: CIFAR ResNet-20 (width 1, 1 × 1 shortcuts), a small vision transformer, a small character-level transformer. For
every registered align method the second network is permuted into the first one's order of units, and the loss is
measured on eleven points of the straight line between the two, on data that neither was trained on. The barrier is the
most by which the loss exceeds the straight line between the losses at the ends: 0 where the line never rises above it.
BatchNorm statistics are estimated anew at every point, the ends included, from training images, so that what is shown
is not the collapse of statistics that any merge repairs. Methods have their default options and see the same data.

Shown beside it: loss (nats) in the middle, where a merge of two puts its result; accuracy there (for text: of the next
character) and, in brackets, at the ends; the share of units that change place; CPU-seconds of the alignment.

Data: CIFAR-10 (cifar10-train.parquet, cifar10-test.parquet in Hugging Face's layout in --data); where it is absent,
scikit-learn's bundled digits, and the table says so. Text: sentences of a random language that the script makes up, or
the first characters of --text FILE, the last tenth to be tested on. Networks are trained when they are first needed and
kept in --cache under a name that says what they were made from.

Reference: the barrier without alignment; the result is align = "auto", as the worst ratio over the pairs. Target: no
pair is worse off for it. The full run takes about 12 CPU-minutes, a seventh of that once the networks are there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _common import CACHE, DATA, Result, finish, options, table
from _text import Text, from_file, grammar
from _transformers import CharTransformer, ViT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dimat.merge.barrier import barrier
from dimat.merge.registry import align_registry
from dimat.seeds import derive_seed, torch_generator
from dimat.tasks import resnet20, seeded
from dimat.tasks.data import balanced_draw
from dimat.tasks.digits import digits
from dimat.tasks.image_files import decode_images, open_images
from dimat.tasks.images import cropped, mirrored

POINTS = 11
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
State = Mapping[str, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a pair is trained. `examples`: images, or windows of text drawn in all."""

    examples: int
    epochs: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Size:
    """`shown`: examples that alignment and BatchNorm may see; `tested`: examples that the loss is measured on."""

    resnet: Recipe
    vit: Recipe
    text: Recipe
    width: int
    layers: int
    context: int
    characters: int
    shown: int
    tested: int


FULL = Size(
    resnet=Recipe(10_000, 4, 125, 3e-3),
    vit=Recipe(10_000, 8, 125, 1e-3),
    text=Recipe(48_000, 1, 32, 2e-3),
    width=64,
    layers=4,
    context=64,
    characters=400_000,
    shown=500,
    tested=1000,
)
QUICK = Size(
    resnet=Recipe(500, 1, 50, 3e-3),
    vit=Recipe(500, 1, 50, 1e-3),
    text=Recipe(1600, 1, 32, 2e-3),
    width=32,
    layers=2,
    context=32,
    characters=50_000,
    shown=100,
    tested=100,
)


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, with examples along dim 0. A target may be one number, or one for each position."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Pair:
    """Two networks to be: what they are built by, trained on and tested on. `key`: all that they are made from."""

    name: str
    build: Callable[[torch.Generator], nn.Module]
    recipe: Recipe
    train: Examples
    test: Examples
    augment: Augment | None
    key: str


def cifar(folder: Path, size: Size) -> tuple[Examples, Examples]:
    """Return normalised training and test images of CIFAR-10, class-balanced."""
    parts: list[Examples] = []
    for split, count in (("train", max(size.resnet.examples, size.vit.examples)), ("test", size.tested)):
        source = open_images(folder / f"cifar10-{split}.parquet")
        chosen = balanced_draw(source.labels, count, np.random.default_rng(0)).sort().values
        pixels = decode_images(source, chosen, None, None).float().div_(255)
        pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
        parts.append(Examples(pixels, source.labels[chosen]))
    return parts[0], parts[1]


def bundled() -> tuple[Examples, Examples]:
    """Return training and test images of the digits that come with scikit-learn."""
    task = digits()
    parts: list[Examples] = []
    for data in (task.train, task.test):
        (inputs,), targets = data.batch(torch.arange(len(data)), None)
        parts.append(Examples(inputs, targets))
    return parts[0], parts[1]


def windows(numbers: Tensor, starts: Tensor, context: int) -> Examples:
    """Return windows of a text that begin at `starts`, and the characters that follow each of theirs."""
    rows = numbers[starts[:, None] + torch.arange(context + 1)]
    return Examples(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    return mirrored(cropped(images, 4, generator, torch.zeros(images.shape[1])), generator)


def image_pairs(folder: Path, size: Size, parts: Sequence[str]) -> list[Pair]:
    """Return the pairs of networks for images that are asked for."""
    here = all((folder / f"cifar10-{split}.parquet").exists() for split in ("train", "test"))
    train, test = cifar(folder, size) if here else bundled()
    name = "CIFAR-10" if here else "digits"
    _, channels, side, _ = train.inputs.shape
    patch = 4 if here else 2
    augment = shifted if here else None  # a shifted or mirrored digit is another one
    builds: dict[str, tuple[str, Callable[[], nn.Module], Recipe]] = {
        "resnet": ("ResNet-20", lambda: resnet20(1, "B", 10, channels), size.resnet),
        "vit": ("ViT", lambda: ViT(channels, side, patch, size.width, size.layers), size.vit),
    }
    pairs: list[Pair] = []
    for part, (label, factory, recipe) in builds.items():
        if part in parts:
            key = f"{part} {name} {len(train.targets)} {asdict(recipe)} {size.width} {size.layers}"
            pairs.append(Pair(f"{label}, {name}", seeded(factory), recipe, train, test, augment, key))
    return pairs


def text_pair(text: Text, size: Size) -> Pair:
    """Return the pair of networks for text: windows from anywhere in the first nine tenths, tests from the last."""
    border = len(text.numbers) * 9 // 10
    generator = torch_generator(0, "alignment_quality", "windows")
    starts = torch.randint(border - size.context, (size.text.examples,), generator=generator)
    tests = torch.linspace(border, len(text.numbers) - size.context - 1, size.tested // 4).long()
    train, test = windows(text.numbers, starts, size.context), windows(text.numbers, tests, size.context)
    made_of = hashlib.sha256(text.numbers.numpy().tobytes()).hexdigest()
    key = f"text {made_of} {asdict(size.text)} {size.width} {size.layers} {size.context}"
    build = seeded(lambda: CharTransformer(text.characters, size.context, size.width, size.layers))
    return Pair(f"characters, {text.source}", build, size.text, train, test, None, key)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def trained(pair: Pair, seed: int, cache: Path) -> dict[str, Tensor]:
    """Return one of the networks of a pair, from the cache or trained now."""
    model = pair.build(torch_generator(0, "alignment_quality", "architecture"))
    digest = hashlib.sha256(f"{pair.key} {seed} {model}".encode()).hexdigest()[:16]
    path = cache / f"alignment_quality-{digest}.safetensors"
    if not path.exists():
        print(f"training {pair.name}, network {seed + 1} of 2 …", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        save_file(train(pair, seed), partial)
        partial.rename(path)  # whole or not at all
    return load_file(path)


def train(pair: Pair, seed: int) -> dict[str, Tensor]:
    """Train a network from its own initialisation, with its own order of the data."""
    recipe = pair.recipe
    model = pair.build(torch_generator(0, "alignment_quality", "init", seed))
    draw = torch_generator(0, "alignment_quality", "order", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=1e-4)
    count = min(recipe.examples, len(pair.train.targets))
    steps = recipe.epochs * -(-count // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(count, generator=draw).split(recipe.batch):
            inputs = pair.train.inputs[batch]
            inputs = inputs if pair.augment is None else pair.augment(inputs, draw)
            optimizer.zero_grad()
            loss_of(model(inputs), pair.train.targets[batch]).backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def tested(model: nn.Module, weights: State, data: Examples) -> dict[str, float]:
    """Return loss and accuracy of weights."""
    model.load_state_dict(dict(weights))
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for inputs, targets in zip(data.inputs.split(250), data.targets.split(250)):
            logits = model(inputs)
            loss += float(loss_of(logits, targets)) * targets.numel()
            correct += int((logits.argmax(-1) == targets).sum())
    return {"loss": loss / data.targets.numel(), "accuracy": correct / data.targets.numel()}


def rows_of(pair: Pair, size: Size, methods: Sequence[str], cache: Path) -> tuple[list[list[object]], dict[str, float]]:
    """Return the table's rows for a pair, and the barrier by method."""
    one, other = trained(pair, 0, cache), trained(pair, 1, cache)
    model = pair.build(torch_generator(0, "alignment_quality", "architecture"))
    shown = [(inputs,) for inputs in pair.train.inputs[: size.shown].split(50)]
    lines = barrier(
        *(one, other, lambda weights: tested(model, weights, pair.test)),
        **{"model": model, "data": shown, "align": methods, "points": POINTS},
        repair={"name": "batchnorm", "options": {"stable_within": None}},
        seed=derive_seed(0, "alignment_quality", "align") % 2**63,
    )
    rows: list[list[object]] = []
    for line in lines:
        loss, share = line.metrics["loss"], line.metrics["accuracy"]
        accuracy = f"{share[POINTS // 2]:.3f} ({share[0]:.3f}, {share[-1]:.3f})"
        rows.append([f"{pair.name}: {line.align}", line.barrier, loss[POINTS // 2], accuracy, line.moved, line.cpu_s])
        for note in line.notes:
            print(f"{pair.name}, {line.align}: {note}", file=sys.stderr)
    return rows, {line.align: line.barrier for line in lines}


def run(given: argparse.Namespace) -> int:
    size = QUICK if given.quick else FULL
    pairs: list[Pair] = []
    if {"resnet", "vit"} & set(given.part):
        pairs += image_pairs(given.data, size, given.part)
    if "text" in given.part:
        text = from_file(given.text, size.characters) if given.text else grammar(size.characters, seed=0)
        if len(text.numbers) < 40 * size.context:
            told = f"{given.text} has {len(text.numbers)} characters; at least {40 * size.context} are needed"
            print(told, file=sys.stderr)
            return 5
        pairs.append(text_pair(text, size))
    first = ("none", "activations", "weights", "auto")
    methods = sorted(align_registry.names(), key=lambda name: (*first, name).index(name))
    rows: list[list[object]] = []
    worst = Result("alignment_quality", 0.0, 0.0, 0.0, "barrier with auto <= without alignment, every pair", met=True)
    for pair in pairs:
        more, barriers = rows_of(pair, size, methods, given.cache)
        rows += more
        ratio = barriers["auto"] / max(barriers["none"], 1e-9)
        if ratio >= worst.ratio:
            worst = Result(
                worst.name,
                round(barriers["auto"], 4),
                round(barriers["none"], 4),
                round(ratio, 4),
                worst.target,
                ratio <= 1,
            )
    table(["pair: method", "barrier", "loss, middle", "accuracy, middle (ends)", "moved", "CPU-s"], rows)
    finish(worst)
    return 0


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the CIFAR-10 parquet files")
    parser.add_argument("--text", type=Path, help="a UTF-8 text to learn from (default: one is made up)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained networks are kept")
    parser.add_argument("--part", nargs="+", choices=("resnet", "vit", "text"), default=["resnet", "vit", "text"])
    given = parser.parse_args()
    if given.text is not None and not given.text.is_file():
        print(f"no text at {given.text}", file=sys.stderr)
        return 5
    torch.set_num_threads(1)  # two on a busy machine spin more than they compute
    return run(given)


if __name__ == "__main__":
    raise SystemExit(main())
