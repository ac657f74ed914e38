"""What one merge costs: 2 and 5 CIFAR ResNet-20 (width 1) aligned, averaged and repaired with 2,000 images.

Reference: DIMAT's program (arXiv 2404.08079) needed 18.8 (n = 2) and 50 (n = 5) CPU-seconds for 2,000 images on one
thread of another machine, a fifth of the 94 and 250 s measured for 10,000. The machines are compared in the same
run, before and after the merges, and the reference is scaled: of the 94 s, 23.8 were the forward passes of both
networks, so the same passes are timed here. Beside them stand the plain MLP loop of `_plain_loop.py`, which took
2.2 to 2.6 s there, and a forward and backward pass of a ResNet-20, for the next machine: there nobody timed it.
Ours may look at fewer images, so the saving counts only where the result is as good: the assignment, judged on all
positions of all images, must be worth 99 % of the best one there is, summed over groups and peers (the worst single
group is shown beside it), and the merge must be within 0.5 points of test accuracy of one that used every image.
Right after a merge that accuracy swings by a point or two between assignments of equal value, so every network
takes its turn as self: costs and accuracies are means over five merges, memory and assignment value are those of
the worst.

CPU-seconds are time.process_time with one torch thread, in a fresh process for each merge, whose peak memory is
reported. Tracing the model, which an agent does once and not at every merge, is listed apart. The networks are
trained when the benchmark first runs (2 epochs on 10,000 images each, from different seeds) and kept under
benchmarks/cache/. `--data` holds cifar10-train.parquet and cifar10-test.parquet; without them: exit code 5.
`--quick`: n = 2, networks trained on 2,500 images for two epochs, cost alone: quality is not judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import process_time
from typing import Any

import torch
from _common import CACHE, DATA, Result, finish, options, table
from _plain_loop import plain_loop
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dimat.config import MergeConfig, NamedConfig
from dimat.merge import MergeContext, Peer, merge, open_weights, plan_merge
from dimat.merge.matching.activation_statistics import CrossStatistics, average_correlation
from dimat.merge.matching.assignment import assign, assignment_value
from dimat.merge.matching.correlation import choose_points
from dimat.seeds import derive_seed, torch_generator
from dimat.symmetry import Observer, derive_symmetry
from dimat.tasks.image_files import decode_images, open_images
from dimat.tasks.models import ResNet20, resnet20

REFERENCE_S = {2: 18.8, 5: 50.0}
FORWARD_S, LOOP_S = 23.8 / 5, (2.2, 2.6)
"""Of the machine on which the reference was measured: 2,000 images through two networks, and the plain loop."""
IMAGES = 2000
BATCH = 125
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
STAGES = {
    "align: forward": "align.forward",
    "align: statistics": "align.statistics",
    "align: matching": "align.matching",
    "apply and average": "combine",
    "BatchNorm": "repair",
    "screen": "screen",
}
SPEED, QUALITY, POINTS, MEMORY_MB = 0.2, 0.99, 0.5, 600


@dataclass(frozen=True)
class Size:
    """How much is trained and tested; `turns`: merges for each n, each with another network
    as self; `quality`: whether the result is judged too."""

    name: str
    train: int
    epochs: int
    test: int
    agents: tuple[int, ...]
    turns: int
    quality: bool


FULL = Size("full", 10_000, 2, 5_000, (2, 5), 5, quality=True)
QUICK = Size("quick", 2500, 2, 0, (2,), 1, quality=False)


def images(folder: Path, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised images and labels of a CIFAR-10 split."""
    source = open_images(folder / f"cifar10-{split}.parquet")
    pixels = decode_images(source, indices, None, None).float().div_(255)
    return pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1)), source.labels[indices]


def network() -> ResNet20:
    return resnet20(shortcut="B")


def checkpoint(size: Size, agent: int) -> Path:
    return CACHE / f"merge_cost-{size.name}-{agent}.safetensors"


def train(folder: Path, size: Size, agent: int) -> None:
    """Train one network from its own seed on its own images, and keep it."""
    draw = torch_generator(0, "merge_cost", "split")
    mine = torch.randperm(50_000, generator=draw)[agent * size.train : (agent + 1) * size.train]
    inputs, labels = images(folder, "train", mine)
    g = torch_generator(0, "merge_cost", agent)
    torch.manual_seed(derive_seed(0, "merge_cost", "init", agent))
    model = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = size.epochs * (size.train // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(size.epochs):
        for batch in torch.randperm(size.train, generator=g).split(BATCH):
            x = inputs[batch].contiguous(memory_format=torch.channels_last)
            x = x.flip(3) if torch.rand((), generator=g) < 0.5 else x
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            rate.step()
    CACHE.mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, checkpoint(size, agent))


def merge_images(folder: Path) -> Tensor:
    """The 2,000 training images that are merged with."""
    indices = torch.randperm(50_000, generator=torch_generator(0, "merge_cost", "merge"))[:IMAGES]
    return images(folder, "train", indices)[0]


def batches(pixels: Tensor) -> list[tuple[Tensor]]:
    return [(batch,) for batch in pixels.split(BATCH)]


@dataclass(frozen=True)
class Machine:
    """A look at this machine, in CPU-seconds. `forward`: 2,000 images through two ResNet-20s; `both`: forward and
    backward of 125 images in one; `loop`: the plain MLP loop."""

    forward: float
    both: float
    loop: float

    @property
    def factor(self) -> float:
        """By what the reference is multiplied."""
        return self.forward / FORWARD_S

    @classmethod
    def timed(cls, pixels: Tensor) -> Machine:
        model, inputs = network(), pixels.split(BATCH)
        with torch.no_grad():
            model.eval()(inputs[0])  # once uncounted
            passes: list[float] = []
            for _ in range(3):
                began = process_time()
                for batch in inputs:
                    model(batch)
                passes.append(process_time() - began)
        model.train()
        labels = torch.zeros(BATCH, dtype=torch.int64)
        each: list[float] = []
        for _ in range(4):
            began = process_time()
            F.cross_entropy(model(inputs[0]), labels).backward()
            each.append(process_time() - began)
        return cls(2 * min(passes), min(each), min(plain_loop() for _ in range(2)))


def compare(before: Machine, after: Machine) -> Machine:
    """Print both looks at this machine beside the reference's; return the least of both, which is the hardest."""
    least = Machine(*(min(getattr(before, f.name), getattr(after, f.name)) for f in fields(Machine)))
    low, high = LOOP_S
    table(
        ["this machine, CPU-seconds", "before", "after", "reference's", "ratio"],
        [
            ["2,000 images through two ResNet-20", before.forward, after.forward, FORWARD_S, least.factor],
            ["forward and backward of 125 images", before.both, after.both, "not timed", ""],
            ["plain MLP loop", before.loop, after.loop, f"{low}-{high}", least.loop / (low + high) * 2],
        ],
    )
    return least


def measure(size: Size, members: list[int], all_images: bool, folder: Path) -> dict[str, Any]:
    """Merge networks, self first; keep the result in `folder`, which holds the images; return what it cost."""
    torch.set_num_threads(1)
    data, model = batches(load_file(folder / "images.safetensors")["images"]), network()
    own = load_file(checkpoint(size, members[0]))
    began = process_time()
    spec = derive_symmetry(model, (data[0][0][:2],))
    context = MergeContext(model, spec, data)
    points, _ = choose_points(spec, None, 2)
    context.observer(data[0]).run(own, (data[0][0][:2],), points)  # its first run finds out what the graph writes to
    traced = process_time() - began
    config = MergeConfig(method="dimat-paper")
    if all_images:
        align = NamedConfig(name="activations", options={"stable_within": None})
        repair = NamedConfig(name="batchnorm", options={"stable_within": None})
        config = MergeConfig(method="dimat-paper", align=align, repair=repair)
    share = 1 / len(members)
    peers = [Peer(str(k), open_weights(checkpoint(size, k)), share) for k in members[1:]]
    torch.nn.functional.conv2d(data[0][0], own["conv1.weight"])  # set the library up before the clock runs
    began = process_time()
    outcome = merge(own, share, peers, plan_merge(config), context)
    total = process_time() - began
    save_file(outcome.weights, folder / "merged.safetensors")
    permutations = {f"{peer}:{group}": p for peer, ps in outcome.permutations.items() for group, p in ps.items()}
    save_file(permutations, folder / "permutations.safetensors")
    return {
        "total": total,
        "trace": traced,
        **{key: outcome.cpu_s[key] for key in STAGES.values()},
        **{f"images.{stage}": count for stage, count in outcome.images.items()},
        "memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float:
    """Peak memory of this process. Linux's ru_maxrss can hold the parent's from before exec, so VmHWM goes first."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def in_fresh_process(pixels: Tensor, size: Size, members: list[int], all_images: bool) -> dict[str, Any]:
    """Run `measure` in a process of its own; return what it says, with weights and permutations."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({"images": pixels}, Path(folder) / "images.safetensors")
        command = [sys.executable, __file__, "--measure", *map(str, members), "--folder", folder]
        command += ["--quick"] * (size is QUICK) + ["--all-images"] * all_images
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        found["weights"] = load_file(Path(folder) / "merged.safetensors")
        found["permutations"] = load_file(Path(folder) / "permutations.safetensors")
    return found


def quality(pixels: Tensor, size: Size, members: list[int], permutations: dict[str, Tensor]) -> dict[str, float]:
    """Value of the assignments over that of the best ones, on all positions of all images: of a merge as a whole
    (summed over groups and peers), and of its worst group."""
    data, model = batches(pixels), network()
    spec = derive_symmetry(model, (data[0][0][:2],))
    observer = Observer(model, spec, (data[0][0][:2],))
    points, _ = choose_points(spec, None, 2)
    states = [load_file(checkpoint(size, k)) for k in members]
    statistics = {group: [CrossStatistics(len(members) - 1) for _ in at] for group, at in points.items()}
    for inputs in data:
        own, *others = [observer.run(state, inputs, points) for state in states]
        for group, listed in statistics.items():
            for i, point in enumerate(listed):
                point.update(own[group][i], [other[group][i] for other in others])
    values: list[float] = []
    best: list[float] = []
    for group, listed in statistics.items():
        for peer, name in enumerate(members[1:]):
            scores = average_correlation(listed, peer)
            values.append(assignment_value(scores, permutations[f"{name}:{group}"]))
            best.append(assignment_value(scores, assign(scores)))
    return {"value": sum(values) / sum(best), "value_group": min(v / b for v, b in zip(values, best))}


def accuracy(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> float:
    """Test accuracy in percent."""
    model = network().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(500), labels.split(500)))
    return 100 * correct / len(labels)


def run(folder: Path, size: Size) -> Result:
    count = max(size.agents)
    for agent in range(count):
        if not checkpoint(size, agent).exists():
            print(f"training network {agent + 1} of {count} …", file=sys.stderr)
            train(folder, size, agent)
    pixels = merge_images(folder)
    test = images(folder, "test", torch.arange(size.test)) if size.quality else None
    before = Machine.timed(pixels)
    found = {agents: merges(pixels, test, size, agents, count) for agents in size.agents}
    machine = compare(before, Machine.timed(pixels))
    worst = Result("merge_cost", 0.0, 1.0, 0.0, "", met=True)
    for agents, (column, bar) in found.items():
        reference = REFERENCE_S[agents] * machine.factor
        report(agents, [column, bar][: 1 + size.quality], reference)
        ratio = column["total"] / reference
        good = ratio <= SPEED and column["memory_mb"] <= MEMORY_MB and worst.met
        if size.quality:
            good = good and column["value"] >= QUALITY and column["accuracy"] >= bar["accuracy"] - POINTS
        if ratio >= worst.ratio:
            worst = Result("merge_cost", round(column["total"], 3), round(reference, 2), round(ratio, 4), "", good)
        worst = replace(worst, met=good)
    target = f"ratio <= {SPEED:g}, <= {MEMORY_MB} MB"
    if size.quality:
        target += f", assignment >= {QUALITY:.0%}, accuracy within {POINTS:g} points"
    return replace(worst, target=target)


def merges(
    pixels: Tensor, test: tuple[Tensor, Tensor] | None, size: Size, agents: int, count: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Merge `agents` of `count` networks, each in its turn as self; return a summary of the default merges and, where
    quality is judged, of those that use every image."""
    ours: list[dict[str, Any]] = []
    full: list[dict[str, Any]] = []
    for turn in range(size.turns):
        members = [(turn + k) % count for k in range(agents)]
        ours.append(in_fresh_process(pixels, size, members, all_images=False))
        if test is not None:
            full.append(in_fresh_process(pixels, size, members, all_images=True))
            ours[-1] |= quality(pixels, size, members, ours[-1]["permutations"])
            for each in (ours[-1], full[-1]):
                each["accuracy"] = accuracy(each["weights"], *test)
    return summary(ours), summary(full)


def summary(merges: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over merges of costs, images and accuracy, and the worst memory and assignment value."""
    worst = {"memory_mb": max, "value": min, "value_group": min}
    numbers = [key for key, value in merges[0].items() if isinstance(value, int | float)] if merges else []
    return {
        key: worst[key](m[key] for m in merges) if key in worst else sum(m[key] for m in merges) / len(merges)
        for key in numbers
    }


def report(agents: int, columns: list[dict[str, float]], reference: float) -> None:
    """Print one column for the default merge and, where it was measured, one for a merge that uses every image."""
    rows: list[list[object]] = [[name, *(c[key] for c in columns), ""] for name, key in STAGES.items()]
    rows.append(["merge", *(c["total"] for c in columns), reference])
    rows.append(["reference as measured there", *("" for _ in columns), REFERENCE_S[agents]])
    rows.append(["ratio to the reference", *(c["total"] / reference for c in columns), 1.0])
    rows.append(["trace (once per agent)", *(c["trace"] for c in columns), ""])
    rows += [
        [f"images: {stage}", *(round(c[f"images.{stage}"]) for c in columns), IMAGES] for stage in ("align", "repair")
    ]
    if "accuracy" in columns[0]:
        rows.append(["assignment value, worst merge", columns[0]["value"], "", 1.0])
        rows.append(["assignment value, worst group", columns[0]["value_group"], "", 1.0])
        rows.append(["test accuracy, %", *(c["accuracy"] for c in columns), ""])
    rows.append(["peak memory, MB", *(c["memory_mb"] for c in columns), ""])
    print(f"\nn = {agents}")
    table(["CPU-seconds, one thread", *("dimat", "every image")[: len(columns)], "reference"], rows)


def main() -> int:
    parser = options("CPU-seconds of a merge of 2 and 5 CIFAR ResNet-20, against DIMAT's own program.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two CIFAR-10 parquet files")
    parser.add_argument("--measure", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--all-images", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    if given.measure:
        print(json.dumps(measure(size, given.measure, given.all_images, given.folder)))
        return 0
    torch.set_num_threads(1)  # two on a busy machine spin more than they compute
    if not all((given.data / f"cifar10-{split}.parquet").exists() for split in ("train", "test")):
        print(
            f"no cifar10-train.parquet, cifar10-test.parquet in {given.data}: name a folder by --data", file=sys.stderr
        )
        return 5
    finish(run(given.data, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
