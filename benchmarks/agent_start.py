"""What does it cost to start an agent, until it listens?

A network of three agents is written as `dimat init --agents 3` does (the digits task), and one of them is started as a
process again and again, each time without a folder of its own: first with an empty cache of symmetry groups, then with
what the first start kept. Counted are the CPU-seconds of the process until it tells the service manager READY=1, which
it does once its port and its status socket answer. Reference: `import torch` in a process of its own, in the same run.

    python benchmarks/agent_start.py [--repeats N]
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from _children import ONE_THREAD, watch
from _common import Result, finish, options, table

TARGET = 1.8
WAIT_S = 120.0
DIMAT = (sys.executable, "-m", "dimat.cli")


def import_torch(folder: Path) -> float:
    """Return the CPU-seconds of a process that imports torch and ends."""
    return watch([sys.executable, "-c", "import torch, os; os._exit(0)"], cwd=folder).cpu_s


def start(folder: Path, cache: Path) -> float:
    """Start an agent, and return the CPU-seconds of its process, children included, until it is ready."""
    shutil.rmtree(folder / "agents", ignore_errors=True)
    address = folder / "ready"
    address.unlink(missing_ok=True)
    environment = {**os.environ, **ONE_THREAD, "XDG_CACHE_HOME": str(cache), "NOTIFY_SOCKET": str(address)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (folder / "said").open("w+") as said:
        manager.bind(str(address))
        manager.settimeout(WAIT_S)
        agent = subprocess.Popen(
            [*DIMAT, "agent", "network/agents.toml", "--name", "lab-a"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while b"READY=1" not in manager.recv(4096):
                pass
            return spent_s(agent.pid)
        except TimeoutError:
            said.seek(0)
            raise RuntimeError(f"the agent is not ready after {WAIT_S:.0f} s:\n{said.read()}") from None
        finally:
            agent.kill()
            agent.wait()


def spent_s(pid: int) -> float:
    """Return the CPU-seconds of a process and of its children that have ended."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, numbers[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Start an agent and import torch in turn, and print what they cost."""
    parser = options(__doc__ or "")
    parser.add_argument("--repeats", type=int, help="starts of each kind")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (2 if arguments.quick else 7)
    torch_s: list[float] = []
    first_s: list[float] = []
    again_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init = [*DIMAT, "init", "--agents", "3", "network"]
        subprocess.run(init, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        import_torch(folder)
        start(folder, folder / "warm")  # byte code is written, files are in memory
        for repeat in range(repeats):
            torch_s.append(import_torch(folder))
            first_s.append(start(folder, folder / f"cache-{repeat}"))
            again_s.append(start(folder, folder / f"cache-{repeat}"))
    rows = [
        (label, median(each), min(each), median(mine / torch for mine, torch in zip(each, torch_s, strict=True)))
        for label, each in (("import torch", torch_s), ("first start", first_s), ("started again", again_s))
    ]
    table(["until it listens", "CPU s, median", "least", "ratio to import torch, median"], rows)
    measured, reference, ratio = rows[2][1], rows[0][1], rows[2][3]
    finish(Result("agent_start", measured, reference, ratio, f"ratio <= {TARGET}", ratio <= TARGET))


if __name__ == "__main__":
    main()
