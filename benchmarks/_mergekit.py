"""`dimat merge` beside mergekit from PyPI: the same YAML, the same folders, from files to files.

mergekit gets a virtual environment of its own under benchmarks/cache, made by the first run with the packages of this
project's `bench` extra and the torch that is in use here. Each tool runs in a process of its own with one thread.
CPU time is user + system of the process from when it has imported what the tool imports, a start that any merge needs
once, to its end. Memory is the most anonymous memory seen, and imports are part of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from _children import Cost, watch
from _common import CACHE
from _folders import Llama, write_models
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parent.parent
ENVIRONMENT = CACHE / "mergekit-venv"
DENSITY = 0.2
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(CACHE / "huggingface")}

IMPORTS = {
    "mergekit": "import mergekit.scripts.run_yaml",
    "dimat": "import yaml, dimat.cli, dimat.merge, dimat.merge_files.recipe, dimat.ui.terminal.merge",
}

RUNS = {
    "mergekit": "mergekit.scripts.run_yaml.main(arguments, standalone_mode=False)",
    "dimat": "assert dimat.cli.main(arguments) == 0",
}
"""What each tool's command does once it is imported, with the command's arguments."""

TIMED = """
import pathlib, sys, time
{imports}
seconds, *arguments = sys.argv[1:]
start = time.process_time()
{run}
pathlib.Path(seconds).write_text(str(time.process_time() - start))
"""


class NoReference(Exception):
    """mergekit cannot be had here."""


@dataclass(frozen=True)
class Measured:
    """Of one method: the cheapest run of each tool, and its CPU-seconds without imports; how far the outputs are apart
    (see `apart`)."""

    ours: Cost
    theirs: Cost
    our_s: float
    their_s: float
    apart: float
    undecided: float


def environment() -> Path:
    """Return the Python that has mergekit, making its environment where it is missing; NoReference where that fails."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "installed"
    if done.exists():
        return python
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    ours = f"torch=={torch.__version__.split('+')[0]}"
    print(f"making {ENVIRONMENT} with {', '.join([*extra, ours])} (once, minutes) …", file=sys.stderr)
    commands = ([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], [python, "-m", "pip", "install", *extra, ours])
    for command in commands:
        ran = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ran.returncode:
            tail = "\n".join(ran.stderr.splitlines()[-5:])
            raise NoReference(f"cannot make an environment with mergekit, which this compares with:\n{tail}")
    done.write_text("\n".join([*extra, ours]))
    return python


def imports(python: Path, turns: int) -> dict[str, Cost]:
    """Return what starting each tool costs, the least of some turns."""
    interpreters = {"mergekit": python, "dimat": Path(sys.executable)}
    return {
        tool: _least([watch([interpreters[tool], "-c", code], OFFLINE, cwd=ROOT) for _ in range(turns)])
        for tool, code in IMPORTS.items()
    }


def measure(python: Path, folder: Path, models: list[Path], method: str, turns: int) -> Measured:
    """Merge the models (the base first) with both tools, turn by turn."""
    config, theirs, ours = folder / f"{method}.yml", folder / f"{method}-mergekit", folder / f"{method}-dimat"
    config.write_text(_configuration(models, method))
    arguments = {
        "mergekit": [config, theirs, "--no-copy-tokenizer", "-j", "1", "--quiet"],
        "dimat": ["merge", "--quiet", "--from-mergekit", config, "-o", ours, "--overwrite"],
    }
    interpreters = {"mergekit": python, "dimat": Path(sys.executable)}
    costs: dict[str, list[Cost]] = {"mergekit": [], "dimat": []}
    seconds: dict[str, list[float]] = {"mergekit": [], "dimat": []}
    for _ in range(turns):
        for tool in costs:
            code = TIMED.format(imports=IMPORTS[tool], run=RUNS[tool])
            noted = folder / "seconds"
            costs[tool].append(watch([interpreters[tool], "-c", code, noted, *arguments[tool]], OFFLINE, cwd=ROOT))
            seconds[tool].append(float(noted.read_text()))
    return Measured(
        _least(costs["dimat"]),
        _least(costs["mergekit"]),
        min(seconds["dimat"]),
        min(seconds["mergekit"]),
        *apart(models, ours, theirs, method),
    )


def models_in(folder: Path, llama: Llama, count: int) -> list[Path]:
    return write_models(folder, llama, count, llama.parameters * 2)


def _configuration(models: list[Path], method: str) -> str:
    """Return mergekit's YAML; JSON is YAML."""
    parameters = {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})
    listed = [{"model": str(model), "parameters": parameters} for model in models[1:]]
    base = {"base_model": str(models[0])} if method == "ties" else {}
    return json.dumps({"merge_method": method, **base, "models": listed, "dtype": "bfloat16"})


def _least(costs: list[Cost]) -> Cost:
    return Cost(min(c.cpu_s for c in costs), min(c.anonymous_mb for c in costs))


def apart(models: list[Path], ours: Path, theirs: Path, method: str) -> tuple[float, float]:
    """Return the largest |ours − theirs| over what bfloat16 rounding allows, 2⁻⁷ (|base| + Σ|delta|), and
    the share of elements left out of it.

    Left out are those where a delta is as large as the smallest one kept, or where kept ones cancel, up to bfloat16's
    last bits: of equal magnitudes at the threshold mergekit keeps as many as fit, in the order of its sort, and dimat
    all of them; and mergekit sums in bfloat16 what dimat sums in float32.
    """
    files = [safe_open(path / "model.safetensors", "pt") for path in (ours, theirs, *models)]
    names = sorted(files[0].keys())
    if names != sorted(files[1].keys()):
        raise ValueError(f"{ours} and {theirs} hold different tensors")
    worst, out, count = 0.0, 0, 0
    for name in names:
        mine, other, base, *tuned = (file.get_tensor(name).float() for file in files)
        unsure = torch.zeros_like(mine, dtype=torch.bool)
        size = base.abs() + sum((tensor - base).abs() for tensor in tuned)
        if method == "ties":
            unsure = _undecided([tensor - base for tensor in tuned])
        excess = (mine - other).abs() / (size * 2**-7).clamp(min=1e-30)
        worst = max(worst, float(excess.masked_fill(unsure, 0).max()))
        out += int(unsure.sum())
        count += mine.numel()
    return worst, out / count


def _undecided(deltas: list[Tensor]) -> Tensor:
    """Return where rounding decides what is kept, or which sign is elected."""
    unsure = torch.zeros_like(deltas[0], dtype=torch.bool)
    total, spread = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        size = delta.abs()
        kept = max(1, int(DENSITY * size.numel()))
        threshold = float(size.flatten().kthvalue(size.numel() - kept + 1).values)
        unsure |= (size - threshold).abs() <= 2**-7 * threshold
        total += delta.masked_fill(size < threshold, 0)
        spread += size.masked_fill(size < threshold, 0)
    return unsure | ((spread > 0) & (total.abs() <= 2**-7 * spread))
