"""A model larger than the memory that its merge may take: TIES over three 6-GB models and their base, in shards.

The models are a Llama's tensors in bfloat16 that nobody trained (see _folders.py), written under --folder and removed
afterwards unless --keep is given: four times the size, and the result. `dimat merge` runs in a process of its own,
whose anonymous memory (RssAnon: heap and the like; mapped files are the kernel's to drop) is looked at every 5 ms and
must stay under 4 GB. --size sets the size of one model in GB (10⁹ bytes), --quick is --size 0.3; the limit of such a
smaller form is two thirds of the size, as 4 of 6 GB are, and 0.5 GB for what is fixed (imports, the embedding).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from _children import ChildError, watch
from _common import CACHE, Result, finish, options, table
from _folders import Llama, write_models

GB = 10**9
SIZE, LIMIT, FIXED = 6.0, 4.0, 0.5
DENSITY = 0.2
ROOT = Path(__file__).parent.parent


def llama(size: float) -> Llama:
    """Return a Llama of about `size` GB: as wide as a 3-billion one has it, narrow below 2 GB, all of 32,000 words."""
    hidden, inner = (3200, 8640) if size >= 2 else (768, 2048)
    layer = 4 * hidden**2 + 3 * hidden * inner
    return Llama(hidden, inner, max(1, round((size * GB / 2 - 64_000 * hidden) / layer)))


def run(folder: Path, size: float) -> Result:
    model = llama(size)
    needed, free = 5.1 * size * GB, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / GB:.1f} GB free, and {needed / GB:.1f} GB are needed; name another --folder"
        )
    began = time.monotonic()
    models = write_models(folder, model, 3, int(size * GB / 6))
    written = time.monotonic() - began
    out = folder / "merged"
    command = [sys.executable, "-m", "dimat.cli", "merge", "--quiet", "--method", "ties", "--set", f"density={DENSITY}"]
    began = time.monotonic()
    cost = watch([*command, "--base", *models, "-o", out, "--shard-size", f"{int(size * 1000 / 6)}MB"], cwd=ROOT)
    took = time.monotonic() - began
    bytes_in = sum(file.stat().st_size for path in models for file in path.iterdir())
    bytes_out = sum(file.stat().st_size for file in out.iterdir())
    shards = sum(file.suffix == ".safetensors" for file in models[0].iterdir())
    if bytes_out < 2 * model.parameters:
        raise OSError(f"{out} holds {bytes_out} bytes, fewer than the {2 * model.parameters} of the model")
    limit = min(LIMIT, size * LIMIT / SIZE + FIXED)
    anonymous = cost.anonymous_mb * 2**20 / GB
    table(
        [f"TIES, {model.parameters:,} bf16, {shards} shards each", ""],
        [
            ["inputs: 3 models and a base, GB", bytes_in / GB],
            ["output, GB", bytes_out / GB],
            ["peak anonymous memory, GB", anonymous],
            ["CPU-seconds (user + system)", cost.cpu_s],
            ["seconds", took],
            ["seconds to write the inputs", written],
        ],
    )
    ratio = anonymous / limit
    return Result("merge_large", round(anonymous, 3), round(limit, 3), round(ratio, 4), "ratio <= 1", ratio <= 1)


def main() -> int:
    parser = options("Peak memory of a TIES merge of three 6-GB models and their base.")
    parser.add_argument("--size", type=float, help="GB of one model; default: 6")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where five times the size is free")
    parser.add_argument("--keep", action="store_true", help="leave the models and the result there")
    given = parser.parse_args()
    size = given.size or (0.3 if given.quick else SIZE)
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merge_large-", dir=given.folder))
    try:
        result = run(folder, size)
    except (ChildError, OSError) as error:
        print(error, file=sys.stderr)
        return 5
    finally:
        if given.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    finish(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
