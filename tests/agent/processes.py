"""Real agents in real processes, for tests: their map, keys and configuration, what they tell, and their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dimat.net.pki.keyring import init_authority, issue
from tests.agent.bound import bound
from tests.forks import Process, start
from tests.net.namespaces import Host
from tests.simulate.helpers import TINY_TASK

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 120.0  # for whatever must come: generous, since tests share few cores
Event = dict[str, Any]

TABLES = {
    "task": 'hook = "tiny_task.py:task"\npartition = { kind = "iid" }',
    "train": 'epochs_per_round = 1\nbatch_size = 16\noptimizer = { name = "adam", lr = 0.01 }\ninitialisation = "own"',
    "merge": 'method = "dimat"',
    "schedule": "rounds = 4\nround_deadline_s = 30\njoin_wait_s = 3",
    "agent": "founder = true\nlinger_s = 20",
    "exchange": "lost_after_s = 60",  # agents start some seconds apart on a busy machine
}


@dataclass
class Life:
    """One process of an agent."""

    name: str
    process: subprocess.Popen[bytes] | Process
    said: Path

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Return the exit code; a negative one is a signal's."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.text()}") from None

    def text(self) -> str:
        """Return what it has said on stderr."""
        return self.said.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass
class Network:
    """Agents on one map. `lives`: all processes that were started, in order; `hosts`: the network namespaces that
    agents live in, by name, where it is not this one; `loads`: what is loaded before they fork, see `tests.forks`."""

    folder: Path
    names: Sequence[str]
    ports: Mapping[str, int]
    lives: list[Life] = field(default_factory=list)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    loads: Sequence[str] = ()

    def address(self, name: str) -> str:
        """Return where an agent is reached."""
        host = self.hosts.get(name)
        return f"{'127.0.0.1' if host is None else host.address}:{self.ports[name]}"

    def write_map(self, names: Sequence[str] | None = None, graph: str = "ring", addresses: bool = True) -> None:
        """Write the map, of all agents or of some."""
        entries = [f'graph = "{graph}"']
        for name in names or self.names:
            at = f'\naddresses = ["{self.address(name)}"]' if addresses else ""
            entries.append(f'[[agents]]\nname = "{name}"{at}')
        (self.folder / "map.toml").write_text("\n".join(entries) + "\n")

    def start(
        self, name: str, *sets: str, driver: Sequence[str] = (), file: str = "agents.toml", anew: bool = False
    ) -> Life:
        """Start an agent; `driver`: another module than dimat's command line, with its first arguments; `anew`: in a
        new interpreter, as people start it, in place of a fork."""
        said = self.folder / f"{name}.{len(self.lives)}.err"
        own = [f"agent.folder={self.folder / name}", f"agent.listen={self.address(name)}"]
        options = [word for one in (*own, *sets) for word in ("--set", one)]
        words = [*(driver or ("dimat.cli",)), "agent", str(self.folder / file), "--name", name, "-vv", *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with said.open("wb") as stream:
            if anew or name in self.hosts:
                command = bound(*words)
                process = subprocess.Popen(
                    self.hosts[name].command(command) if name in self.hosts else command,
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                )
            else:
                process = start(["-m", *words], env=env, stderr=stream.fileno(), loads=self.loads)
        life = Life(name, process, said)
        self.lives.append(life)
        return life

    def events(self, name: str, kind: str = "", **values: Any) -> list[Event]:
        """Return what an agent has told so far, in all its lives, with these values; whole lines only."""
        path = self.folder / name / "events.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[1:-1]
        found = [json.loads(line) for line in lines]
        found = [event for event in found if kind in ("", event["event"])]
        return [event for event in found if all(event.get(key) == value for key, value in values.items())]

    def wait_for(self, name: str, kind: str, count: int = 1, timeout: float = PATIENCE_S, **values: Any) -> list[Event]:
        """Wait until an agent has told so many events of a kind, with these values; return them."""

        def found() -> list[Event]:
            events = self.events(name, kind, **values)
            return events if len(events) >= count else []

        return self.until(found, f"{name}: {kind} {values or ''}", timeout)

    def until(self, true: Callable[[], Any], what: str, timeout: float = PATIENCE_S) -> Any:
        """Wait until something holds, and return it."""
        ends = time.monotonic() + timeout
        while not (value := true()):
            if time.monotonic() > ends:
                told = "\n".join(f"== {life.name}\n{life.text()}" for life in self.lives)
                raise AssertionError(f"it never came: {what}\n{told}")
            time.sleep(0.05)
        return value

    def partners(self, name: str) -> set[str]:
        """Return whose snapshots are in an agent's newest merge, its own among them."""
        merges = self.events(name, "Merged")
        return {part["agent"] for part in merges[-1]["contributions"]} if merges else set()

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return an agent's ledger of merges, but for torn lines."""
        lines = (self.folder / name / "lineage.jsonl").read_bytes().split(b"\n")
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def end(self) -> None:
        """Kill whatever is left."""
        for life in self.lives:
            if life.process.poll() is None:
                life.process.kill()
                life.process.wait()


@contextmanager
def network(
    folder: Path,
    names: Sequence[str],
    ports: Sequence[int],
    hosts: Sequence[Host] = (),
    loads: Sequence[str] = (),
    **tables: str,
) -> Iterator[Network]:
    """Write map, keys and configuration of agents, and end all that was started. `hosts`: one for each agent, where
    they are to live apart; `loads`: see `Network`; `tables`: lines of the configuration's tables, instead of those of
    `TABLES` or on top of them."""
    net = Network(folder, names, dict(zip(names, ports)), hosts=dict(zip(names, hosts)), loads=loads)
    net.write_map()
    (folder / "tiny_task.py").write_text(TINY_TASK)
    init_authority(folder / "keys", "tests", 400)
    issue(folder / "keys", dict.fromkeys(names, ("127.0.0.1:7300",)), 100)  # nothing is warned of
    write_config(folder / "agents.toml", **tables)
    try:
        yield net
    finally:
        net.end()


def write_config(file: Path, run: str = "tiny", **tables: str) -> None:
    """Write an agents' file."""
    text = "".join(f"[{table}]\n{lines}\n" for table, lines in (TABLES | tables).items())
    file.write_text(f'run = "{run}"\n[topology]\nmap = "map.toml"\n{text}')


def check_ledgers(net: Network, names: Sequence[str] | None = None) -> None:
    """Check what must hold of the ledgers of a network whatever happened: each merge of a round is there once as the
    last word, its weights sum to 1, and each peer's part is a snapshot that this peer has published for that round,
    with one content."""
    published: dict[tuple[str, int], set[str]] = {}
    for name in net.names:
        for event in net.events(name, "Published"):
            published.setdefault((name, event["round"]), set()).add(event["snapshot"])
    assert all(len(roots) == 1 for roots in published.values()), "other content under an old (agent, round)"
    for name in names or net.names:
        for record in net.records(name):
            parts = record["contributions"]
            assert abs(sum(part["weight"] for part in parts) - 1) < 1e-9
            assert len({part["agent"] for part in parts}) == len(parts)
            for part in parts:
                assert part["snapshot"] in published[part["agent"], part["round"]]
