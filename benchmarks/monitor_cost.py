"""What watching costs: CPU-seconds of two agents' rounds on the digits task, with listeners and without any.

Two real agents (gRPC on loopback, checkpoints, test metrics before and after each merge) run in this process, again and
again: with no listener, and with each of `SETS` in turn, so that whatever else the machine does falls on all alike.
Counted is the CPU time of the process and of what trackers start, from the beginning of the fourth round, when trackers
have begun, to the end of the last one; metrics are scraped every second by another process, which is not counted.
Reference: no listener, in the same run. The ratio is the median over the repeats of that to the run without listeners
of the same repeat.

    python benchmarks/monitor_cost.py [--repeats N] [--rounds N]
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from _agents import free_ports, write_map
from _common import Result, finish, options, table

from dimat import events
from dimat.agent.daemon.daemon import Daemon
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import MonitorConfig, load_experiment
from dimat.ui.jsonl import JsonlListener
from dimat.ui.listeners import open_listeners
from dimat.ui.terminal.agent import AgentListener
from dimat.ui.terminal.panel import LiveAgentListener

NAMES = ("lab-a", "lab-b")
TARGET = 1.02
SCRAPE_S = 1.0
FIRST = 4
"""First round that counts."""
EXPERIMENT = """
run = "{run}"
task = {{ name = "digits" }}
topology = {{ map = "map.toml" }}
[train]
epochs_per_round = {epochs}
device = "cpu"
[schedule]
rounds = {rounds}
round_deadline_s = 300
[agent]
founder = true
insecure = true
evaluate = "all"
linger_s = 5
"""


@dataclass(frozen=True)
class Watching:
    """A way to watch. `settings`: of `[monitor]`, where PORT is a free one; `path`: what is asked for there every
    second; `shown`: with log and lines as `dimat agent` has them; `live`: with the terminal's panel."""

    settings: tuple[str, ...] = ()
    path: str = ""
    shown: bool = True
    live: bool = False


METRICS = ("monitor.metrics=127.0.0.1:PORT", "monitor.observe_s=1")
TRACKERS = ("monitor.tensorboard=true", "monitor.wandb.mode=offline", 'monitor.mlflow.tracking="mlruns"')
SETS = {
    "none": Watching(shown=False),
    "lines, log, metrics": Watching(METRICS, "/metrics"),
    "all, with trackers": Watching((*METRICS, *TRACKERS), "/metrics", live=True),
}
# a dashboard is measured as soon as the configuration has one: it listens to events, and its pages are asked for
if "dashboard" in MonitorConfig.model_fields:
    SETS["dashboard"] = Watching(("monitor.dashboard=127.0.0.1:PORT",), "/")


class Meter:
    """Reads the CPU time when the first round that counts begins, and at each round's end. `cpu_s`: gives it."""

    def __init__(self, cpu_s: Callable[[], float]) -> None:
        self.began = self.ended = 0.0
        self._cpu_s = cpu_s

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == FIRST and not self.began:
            self.began = self._cpu_s()
        elif isinstance(event, events.RoundFinished):
            self.ended = self._cpu_s()


def children_s(but: set[int]) -> float:
    """Return the CPU-seconds of this process's children, but for some; a tracker's own process is one."""
    ticks = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if pid not in but:
                numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(numbers[11]) + int(numbers[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def scraper(urls: list[str]) -> subprocess.Popen[bytes]:
    """Ask for the URLs every second, in a process of its own."""
    code = (
        "import sys, time, urllib.request\n"
        "while True:\n"
        "    for url in sys.argv[1:]:\n"
        "        try: urllib.request.urlopen(url, timeout=5).read()\n"
        "        except OSError: continue\n"
        f"    time.sleep({SCRAPE_S})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, *urls])


def measure(folder: Path, watching: Watching, epochs: float, rounds: int) -> float:
    """Run two agents in a folder of their own; return the CPU-seconds of a round of both."""
    folder.mkdir(parents=True)
    write_map(folder, NAMES, "complete")
    file = folder / "experiment.toml"
    file.write_text(EXPERIMENT.format(run="cost", epochs=epochs, rounds=rounds))
    scraped: set[int] = set()
    meter = Meter(lambda: time.process_time() + children_s(scraped))
    with ExitStack() as stack:
        daemons: list[Daemon] = []
        urls: list[str] = []
        for name in NAMES:
            (port,) = free_ports(1)
            settings = [setting.replace("PORT", str(port)) for setting in watching.settings]
            config = load_experiment(file, (*settings, f"agent.name={name}", f'agent.folder="{folder / name}"'))
            setup = prepare_agent(config)
            opened = stack.enter_context(open_listeners(config, folder / name, agent=name))
            daemon = Daemon(setup, [meter, *opened.listeners])
            if watching.shown:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                lines = (LiveAgentListener if watching.live else AgentListener)("accuracy", nowhere, 2)
                log = JsonlListener(daemon.folder.events)
                daemon.listeners += [stack.enter_context(closing(lines)), stack.enter_context(closing(log))]
            daemons.append(daemon)
            urls += [f"http://127.0.0.1:{port}{watching.path}"] if watching.path else []
        process = scraper(urls) if urls else None
        scraped |= {process.pid} if process is not None else set()

        async def both() -> None:
            await asyncio.gather(*(daemon.run() for daemon in daemons))

        try:
            asyncio.run(both())
        finally:
            if process is not None:
                process.kill()
                process.wait()
    return (meter.ended - meter.began) / (rounds - FIRST + 1)


def main() -> None:
    """Measure all sets in turn, and print what they cost."""
    parser = options(__doc__ or "")
    parser.add_argument("--repeats", type=int, help="runs of each set")
    parser.add_argument("--rounds", type=int, help=f"rounds of a run, at least {FIRST}")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (1 if arguments.quick else 5)
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    epochs = 2.0  # the default of an experiment
    spent: dict[str, list[float]] = {name: [] for name in SETS}
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "warm", SETS["none"], epochs, 1)
        order = list(SETS)
        for repeat in range(repeats):
            for name in order:
                spent[name].append(measure(Path(folder) / f"{repeat}-{order.index(name)}", SETS[name], epochs, rounds))
            order = order[1:] + order[:1]  # nobody is always first, or always after the same one
    ratios = {name: [mine / none for mine, none in zip(each, spent["none"])] for name, each in spent.items()}
    rows = [(name, median(each), min(each), median(ratios[name]), min(ratios[name])) for name, each in spent.items()]
    table(["listeners", "CPU s a round, median", "least", "ratio, median", "least"], rows)
    print(f"two agents, {rounds - FIRST + 1} rounds counted, {repeats} runs of each")
    measured, ratio = median(spent["all, with trackers"]), median(ratios["all, with trackers"])
    finish(Result("monitor_cost", measured, median(spent["none"]), ratio, f"ratio <= {TARGET}", ratio <= TARGET))


if __name__ == "__main__":
    main()
