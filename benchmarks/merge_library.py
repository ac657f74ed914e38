"""What merges cost beside the references that they replace: OPCM, merges of files, and the spectral methods.

opcm      One more task folded onto a merged delta at the sizes of a CLIP ViT-B/32, whole step: dimat's `opcm` against
          the formula written out with full SVDs in float32, in the same process (see _opcm.py, which says of what
          random deltas). Without the diagonal at most a quarter of the CPU-seconds, the result within 1e-5 (‖·‖,
          every tensor) of the same formula in float64, and a lower peak of memory, each side in a fresh process.
          dimat multiplies in float32, as it does unless told otherwise; float64 and the diagonal: stated.
files     A base and three models of 95 million bfloat16 numbers, from folders to a folder: `dimat merge` against
          mergekit from PyPI, same YAML, TIES and linear (see _mergekit.py). CPU-seconds without imports: TIES at most
          a third of mergekit's, linear no more; peak anonymous memory, imports included, at most half of its; results
          as near as bfloat16 rounding allows.
spectral  TSV-M and Iso-C at the sizes of ViT-B/32 blocks, PLeaS on a ResNet-20: seconds and memory, stated.

The first run makes an environment with mergekit under benchmarks/cache (minutes, and the network). The last line is of
the requirement that is met least well, and `met` of all that was run. `--quick`: 2 blocks of 12, a 24-million-number
model, one turn each; then what is fixed (imports, single largest tensors) weighs more.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # scipy's; torch is told below

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import _mergekit
import _opcm
import torch
from _children import ChildError
from _common import CACHE, Result, finish, options, table
from _folders import Llama

from dimat.merge.registry import combine_registry
from dimat.seeds import torch_generator
from dimat.tasks.models import resnet20

PARTS = ("opcm", "files", "spectral")


@dataclass(frozen=True)
class Size:
    """`blocks`: of the 12 of a ViT-B; `spectral`: for TSV-M and Iso-C. Embeddings and projection are always there."""

    blocks: int
    spectral: int
    llama: Llama
    turns: int


FULL = Size(12, 2, Llama(640, 1728, 11), 3)
QUICK = Size(2, 0, Llama(320, 896, 3), 1)


@dataclass(frozen=True)
class Check:
    """A requirement: measured ≤ limit · reference."""

    name: str
    measured: float
    reference: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.measured / self.reference

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit


def opcm(size: Size) -> list[Check]:
    rows = _opcm.cost(size.blocks, size.turns)
    memory = {
        (row.diagonal, row.products): in_child("opcm", size.blocks, row.diagonal, row.products)["memory_mb"]
        for row in rows
    }
    table(
        [f"opcm, {size.blocks} blocks", "CPU-s", "ratio", "error", "memory, MB"],
        [
            [
                f"diagonal={row.diagonal}, " + ("formula in float32" if row.products is None else row.products),
                row.cpu_s,
                row.cpu_s / next(r.cpu_s for r in rows if r.diagonal == row.diagonal),
                f"{row.error:.1e}",
                round(memory[row.diagonal, row.products]),
            ]
            for row in rows
        ],
    )
    formula, default = rows[:2]
    return [
        Check("opcm CPU-seconds", default.cpu_s, formula.cpu_s, 1 / 4),
        Check("opcm error", default.error, 1e-5, 1),
        Check("opcm memory", memory[False, "float32"], memory[False, None], 1),
    ]


def files(size: Size) -> list[Check]:
    python = _mergekit.environment()
    start = _mergekit.imports(python, size.turns)
    rows: list[list[object]] = []
    checks: list[Check] = []
    for tool, cost in start.items():
        rows.append(["imports", tool, cost.cpu_s, "", "", cost.anonymous_mb, ""])
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        models = _mergekit.models_in(Path(folder), size.llama, 3)
        for method, limit in (("ties", 1 / 3), ("linear", 1.0)):
            found = _mergekit.measure(python, Path(folder), models, method, size.turns)
            theirs, ours = found.their_s, found.our_s
            checks.append(Check(f"{method} CPU-seconds without imports", ours, theirs, limit))
            checks.append(Check(f"{method} memory", found.ours.anonymous_mb, found.theirs.anonymous_mb, 1 / 2))
            checks.append(Check(f"{method} difference, roundings", found.apart, 1.0, 1.0))
            for tool, cost, net, times in (("mergekit", found.theirs, theirs, ""), ("dimat", found.ours, ours, None)):
                ratios = [times] * 2 if times == "" else [check.ratio for check in checks[-3:-1]]
                rows.append([method, tool, cost.cpu_s, net, ratios[0], cost.anonymous_mb, ratios[1]])
            if method == "ties":
                print(f"ties: {found.undecided:.1%} of the elements are at a threshold or cancel, and are not compared")
    table([f"{size.llama.parameters:,} bf16, 3 models", "", "CPU-s", "net", "ratio", "MB", "ratio"], rows)
    return checks


def spectral(size: Size) -> list[Check]:
    rows: list[list[object]] = []
    for method in ("tsv-m", "iso-c", "pleas"):
        if method in combine_registry.names():
            cost = in_child(method, size.spectral)
            what = f"ViT-B/32 with {size.spectral} blocks" if method != "pleas" else "ResNet-20, 256 images"
            rows.append([f"{method}, 3 models: {what}", cost["cpu_s"], round(cost["memory_mb"])])
    table(["spectral", "CPU-s", "memory, MB"], rows)
    return []


def in_child(*what: Any) -> dict[str, float]:
    """Run `child` in a fresh process and return what it says."""
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc: what is freed is gone, not kept for later
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=at_once).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def child(method: str, blocks: int, diagonal: bool = False, products: str | None = None) -> dict[str, float]:
    """Return the CPU-seconds of a merge, and by how much it raises the most memory that the process held."""
    base, *tuned = _opcm.weights(blocks)
    run: Callable[[], object]
    if method == "opcm":
        run = partial(_opcm.side, (base, *tuned), diagonal, products)
    elif method == "pleas":
        run = partial(_merge_networks, method)
    else:
        third = {name: (tuned[0][name] + 2 * tuned[1][name]) / 3 for name in base}
        bound = combine_registry.bind(method, {})
        run = lambda: dict(bound(tuned[0], [tuned[1], third], [1 / 3] * 3, base=base))  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before, began = peak_mb(), process_time()
    run()
    return {"cpu_s": process_time() - began, "memory_mb": peak_mb() - before}


def _merge_networks(method: str) -> object:
    """Merge three ResNet-20s that nobody trained, on noise."""
    models = [resnet20() for _ in range(3)]
    data = [(torch.randn(64, 3, 32, 32, generator=torch_generator(0, "noise", k)),) for k in range(4)]
    weights = [dict(model.state_dict()) for model in models]
    return dict(combine_registry.call(method, {}, weights[0], weights[1:], [1 / 3] * 3, model=models[0], data=data))


def peak_mb() -> float:
    row = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(row.split()[1]) / 1024


def main() -> int:
    parser = options("CPU-seconds and memory of merges, against full SVDs and against mergekit.")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        print(json.dumps(child(*given.child)))
        return 0
    size = QUICK if given.quick else FULL
    checks: list[Check] = []
    try:
        for part in given.part or PARTS:
            checks += {"opcm": opcm, "files": files, "spectral": spectral}[part](size)
            print()
    except (_mergekit.NoReference, ChildError) as error:
        print(error, file=sys.stderr)
        return 5
    if not checks:
        return 0
    table(
        ["requirement", "measured", "reference", "ratio", "at most", "met"],
        [
            [c.name, f"{c.measured:.4g}", f"{c.reference:.4g}", c.ratio, c.limit, "yes" if c.met else "NO"]
            for c in checks
        ],
    )
    worst = max(checks, key=lambda check: check.ratio / check.limit)
    met, target = all(check.met for check in checks), f"ratio <= {worst.limit:.3g}"
    name = f"merge_library: {worst.name}"
    finish(Result(name, round(worst.measured, 4), round(worst.reference, 4), round(worst.ratio, 4), target, met))
    return 0


if __name__ == "__main__":
    sys.exit(main())
