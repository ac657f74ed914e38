"""What symmetry costs: deriving and proving a spec when an agent starts, and looking at activations.

Start: `derive_symmetry` and `freeze_failing` (the proof by numbers, in float64), as every agent runs them once, on
torchvision's ResNet-50 with two images of 224 × 224 and on GPT-2 small (124 million parameters, transformers' own
module) with two texts of 64 words; random weights. CPU-seconds of one thread, imports left out, median of three fresh
processes (much of the proof's is the system's, for fresh memory, and varies): on two free cores it takes no longer.

Capture: an observer reads one point of every group of the ResNet-50, against the plain forward pass of the same
images by the same weights; the median over turns that alternate. Beside it the same with the sums that are kept of
what was read (align = "activations", one peer: half of its forwards), and an observer that reads the last group alone:
what running the traced graph costs by itself.

Memory: by how much the peak of a process that aligns two ResNet-50 by activations grows with each further image (eight
batches of images against two: one batch's samples are still there while the next one runs), against what it would keep
if it kept what it reads. Only sums are kept, so that this is 0 but for the allocator, which moves the peak by a tenth.

Needs torchvision and transformers (exit code 5 without them; torchvision's operators are not needed). Result: the row
that is nearest to its limit, or furthest beyond. `--quick`: images of 64 × 64, two layers of GPT-2 and a tenth of its
words; limits are for the full form.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import torch
from _common import Result, finish, options, table
from torch import Tensor, nn

from dimat.merge.context import MergeContext
from dimat.merge.matching.activation_statistics import CrossStatistics, PositionSampler
from dimat.merge.matching.correlation import choose_points
from dimat.merge.registry import align_registry
from dimat.symmetry import Observer, derive_symmetry, freeze_failing

LIMITS = {"resnet50": 5.0, "gpt2": 10.0, "capture": 1.25, "kept": 0.1}
TURNS = 5
STARTS = 3
BATCHES = (2, 8)
NAMES = {"resnet50": "ResNet-50", "gpt2": "GPT-2 small"}


def vision() -> Any:
    """Import torchvision's models. A wheel without its operators describes two of them to torch at import and fails;
    declaring those first lets the models, which use none, load."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models

    return torchvision.models


def network(name: str, quick: bool) -> tuple[nn.Module, Any]:
    """Return a model with random weights and its example inputs."""
    torch.manual_seed(0)
    models = vision()  # transformers imports torchvision, too
    if name == "resnet50":
        return models.resnet50(weights=None).eval(), (images_of(quick)[:2],)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    sizes = {"n_layer": 2, "vocab_size": 5000} if quick else {}
    config = transformers.GPT2Config(**sizes)
    words = torch.randint(config.vocab_size, (2, 64))
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": words, "use_cache": False}


def images_of(quick: bool) -> Tensor:
    """Return a batch of images."""
    return torch.randn(4 if quick else 8, 3, *[64 if quick else 224] * 2)


def start(name: str, quick: bool) -> dict[str, float]:
    """Derive and prove a spec as an agent does; return CPU-seconds of either, and what came out."""
    model, inputs = network(name, quick)
    outputs = ("logits",) if name == "gpt2" else None
    began = time.process_time()
    spec = derive_symmetry(model, inputs, outputs)
    derived = time.process_time()
    proven = freeze_failing(model, spec, inputs, torch.Generator().manual_seed(0))
    ended = time.process_time()
    return {
        "derive": derived - began,
        "verify": ended - derived,
        "groups": len(proven.groups),
        "frozen": len(spec.groups) - len(proven.groups),
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory_mb": peak_mb(),
    }


def capture(quick: bool) -> dict[str, float]:
    """Return CPU-seconds of a forward pass, and those of the observer's over it: median of turns."""
    model, example = network("resnet50", quick)
    spec = derive_symmetry(model, example)
    observer = Observer(model, spec, example)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    images = images_of(quick)
    points, _ = choose_points(spec, None, 1)
    last = [*points][-1]
    sums = {group: CrossStatistics(1) for group in points}
    sampler = PositionSampler(64, torch.Generator().manual_seed(0))

    def plain() -> None:
        with torch.no_grad():
            model(images)

    def summed() -> None:
        sampler.next_batch()
        for group, [shown] in observer.run(weights, (images,), points).items():
            kept = sampler(shown, len(images))
            sums[group].update(kept, [kept])

    ways: dict[str, Callable[[], object]] = {
        "plain": plain,
        "graph": lambda: observer.run(weights, (images,), {last: points[last]}),
        "capture": lambda: observer.run(weights, (images,), points),
        "sums": summed,
    }
    for way in ways.values():
        way()  # the first run sets libraries up, and finds out what the graph writes to
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    ratios = {name: median(one / plain for one, plain in zip(times, taken["plain"])) for name, times in taken.items()}
    return {**ratios, "plain": median(taken["plain"]), "points": sum(map(len, points.values()))}


def memory(what: str, quick: bool) -> dict[str, float]:
    """Return megabytes at the peak beyond those held before: of aligning on some batches, or of a forward pass of one.

    With the latter, megabytes that an observer reads of two networks on one image.
    """
    model, example = network("resnet50", quick)
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    images = images_of(quick)
    if what == "plain":
        mb = growth(lambda: forward(model, images))
        spec = derive_symmetry(model, example)
        points, _ = choose_points(spec, None, 1)
        shown = Observer(model, spec, example).run(own, (images,), points)
        return {"mb": mb, "read": 2 * sum(m.nbytes for ms in shown.values() for m in ms) / 2**20 / len(images)}
    peer = {name: tensor.clone() for name, tensor in own.items()}
    spec = derive_symmetry(model, example)
    context = MergeContext(model, spec, [(images_of(quick),) for _ in range(int(what))])
    context.observer(example)
    chosen = {"points_per_group": 1, "stable_within": None}

    def run() -> None:
        align_registry.call("activations", chosen, own, [peer], **context.offered())

    return {"mb": growth(run)}


def forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def growth(run: Callable[[], None]) -> float:
    gc.collect()
    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    run()
    return peak_mb() - before


def status_mb(key: str) -> float:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) / 1024


def resident_mb() -> float:
    return status_mb("VmRSS")


def peak_mb() -> float:
    if Path("/proc/self/status").exists():
        return status_mb("VmHWM")
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def in_fresh_process(what: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what] + ["--quick"] * quick
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measure(what: str, quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)  # two on a busy machine spin more than they compute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what in NAMES:
            return start(what, quick)
        return capture(quick) if what == "capture" else memory(what.removeprefix("memory-"), quick)


def run(quick: bool, parts: list[str]) -> Result:
    rows: list[list[object]] = []
    judged: list[tuple[str, float, float]] = []
    for name in NAMES:
        if name in parts:
            starts = [in_fresh_process(name, quick) for _ in range(1 if quick else STARTS)]
            starts.sort(key=lambda one: one["derive"] + one["verify"])
            least, found, most = starts[0], starts[len(starts) // 2], starts[-1]
            total = found["derive"] + found["verify"]
            judged.append((name, total, LIMITS[name]))
            size = f"{found['parameters'] / 1e6:.1f} M parameters, {found['groups']:.0f} groups"
            label = f"{NAMES[name]} ({size}): derive and prove, CPU-s"
            rows.append([label, total, LIMITS[name], total / LIMITS[name]])
            for label, one in (("least", least), ("most", most)):
                rows.append([f"  {label} of {len(starts)}", one["derive"] + one["verify"], "", ""])
            rows.append(["  of that derive", found["derive"], "", ""])
            rows.append(["  of that prove", found["verify"], "", ""])
            rows.append(["  groups that failed", round(found["frozen"]), "", ""])
            rows.append(["  peak memory of the process, MB", found["memory_mb"], "", ""])
    if "capture" in parts:
        found = in_fresh_process("capture", quick)
        judged.append(("capture", found["capture"], LIMITS["capture"]))
        label = f"ResNet-50: forward and {found['points']:.0f} points read, of a plain forward"
        rows.append([label, found["capture"], LIMITS["capture"], found["capture"] / LIMITS["capture"]])
        rows.append(["  the same and summed up", found["sums"], "", ""])
        rows.append(["  one point read", found["graph"], "", ""])
        rows.append(["  plain forward, CPU-s", found["plain"], "", ""])
    if "memory" in parts:
        few, many = (in_fresh_process(f"memory-{count}", quick)["mb"] for count in BATCHES)
        plain = in_fresh_process("memory-plain", quick)
        images = len(images_of(quick))
        kept = max(many - few, 0.0) / ((BATCHES[1] - BATCHES[0]) * images)
        judged.append(("memory", kept / plain["read"], LIMITS["kept"]))
        limit = LIMITS["kept"] * plain["read"]
        rows.append(["ResNet-50: two aligned, memory per further image, MB", kept, limit, kept / limit])
        rows.append(["  what is read of the two on an image, MB", plain["read"], "", ""])
        for count, mb in zip(BATCHES, (few, many)):
            rows.append([f"  peak with {count} batches of {images}, MB", mb, "", ""])
        rows.append([f"  peak of a plain forward of {images}, MB", plain["mb"], "", ""])
    table(["what", "measured", "limit or reference", "ratio"], rows)
    name, measured, limit = max(judged, key=lambda row: row[1] / row[2])
    ratio = measured / limit
    target = f"every row within its limit; nearest: {name}"
    return Result("symmetry_cost", round(measured, 3), limit, round(ratio, 4), target, ratio <= 1)


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parts = [*NAMES, "capture", "memory"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.quick)))
        return 0
    try:
        vision()
        __import__("transformers")
    except ImportError as error:
        print(f"{error}: pip install torchvision transformers", file=sys.stderr)
        return 5
    finish(run(given.quick, given.part))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
