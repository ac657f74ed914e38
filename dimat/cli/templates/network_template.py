"""The network that `dimat init --agents N` writes for this host: map, config, keys."""

from __future__ import annotations

import json
import re
import shutil
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from dimat.cli.templates.experiment_template import tables_of
from dimat.errors import ConfigError, DataError
from dimat.net.pki.keyring import init_authority, issue
from dimat.weights.durable import write_bytes

FIRST_PORT = 7300
PARTS = ("task", "train", "merge", "deadline")
"""The parts of the file that depend on the task."""
MOST = 1000
"""Agents of a network on one host; a machine's memory ends long before."""
CA_DAYS, DAYS = 3650, 365
"""How long the CA and the agents' certificates last, as with `dimat keys`."""

AGENTS = """\
# One file for all agents of the network: `dimat agent agents.toml --name {first}`.
# `dimat simulate agents.toml` runs the same in virtual time. Keys left out keep their defaults.

run = {run}                   # names the agents' folders: agents/RUN/NAME where they are started

[topology]
map = "map.toml"               # who is there, at which address, and who exchanges with whom

[task]
{task}
[train]
{train}
[merge]
{merge}
[schedule]
rounds = 500                   # 0 = until stopped
round_deadline_s = {deadline:<12}# after the agent's own training; peers not heard by then are left out of the round

[agent]
keys = "keys"                  # NAME.key, NAME.crt and ca.crt; see `dimat keys`
founder = true                 # is there from the beginning; a newcomer joins the network that it finds
"""

MAP = """\
# The network map, the same on all machines. On machines of their own: their host names, and any port, e.g. 7300.
graph = "ring"                 # see `dimat topology list`; or edges, file, python
"""


@dataclass(frozen=True, slots=True)
class StarterNetwork:
    """A network that was written. `file`: for `dimat agent`; `run`: name of the run; `names`: of the agents."""

    file: Path
    run: str
    names: tuple[str, ...]


def write_network(folder: Path, agents: int, *, task: str = "digits", force: bool = False) -> StarterNetwork:
    """Write map.toml, agents.toml and keys/ into a folder, all of it or nothing.

    keys/ has a CA and a certificate per agent. `agents`: 2 to 1,000; they listen on 127.0.0.1, on ports from 7300 on
    that are free now. `task`: a bundled one. Raises ConfigError where one of the three exists and `force` is not set
    (with it these three are replaced, and nothing else is touched), DataError where the disk fails.
    """
    if not 2 <= agents <= MOST:
        raise ConfigError(f"--agents {agents}: a network has 2 to {MOST:,} agents")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; with --agents, name the folder to write the network to")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"no folder {folder.parent} to write {folder.name} to")
    there = [name for name in ("map.toml", "agents.toml", "keys") if (folder / name).exists()]
    if there and not force:
        raise ConfigError(f"{folder} has {', '.join(there)} already; choose another folder, or --force to replace them")
    tables = tables_of(task)
    names = _names(agents)
    run = re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip(".-") or "network"
    staged = folder.resolve().parent / f".{folder.resolve().name}.init"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            entries = [
                f'\n[[agents]]\nname = "{name}"\naddresses = ["127.0.0.1:{port}"]\n'
                for name, port in zip(names, _free_ports(agents), strict=True)
            ]
            write_bytes(staged / "map.toml", "".join([MAP, *entries]).encode())
            quoted = json.dumps(run, ensure_ascii=False)
            filled = AGENTS.format(first=names[0], run=quoted, **{k: tables[k] for k in PARTS})
            write_bytes(staged / "agents.toml", filled.encode())
            init_authority(staged / "keys", "dimat trial on one host", CA_DAYS)
            issue(staged / "keys", dict.fromkeys(names, ("127.0.0.1",)), DAYS)
            _put(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}") from error
    return StarterNetwork(folder / "agents.toml", run, names)


def _names(agents: int) -> tuple[str, ...]:
    if agents <= len(ascii_lowercase):
        return tuple(f"lab-{letter}" for letter in ascii_lowercase[:agents])
    return tuple(f"lab-{number:0{len(str(agents))}}" for number in range(1, agents + 1))


def _free_ports(count: int) -> list[int]:
    """Return the first ports from 7300 on that are free now; another program may still take one."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in range(FIRST_PORT, 65536):
            if len(found) == count:
                break
            probe = stack.enter_context(socket.socket())
            # as the agent binds: an address that a process left a moment ago counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    if len(found) < count:
        raise ConfigError(f"fewer than {count} ports from {FIRST_PORT} on are free on 127.0.0.1")
    return found


def _put(staged: Path, folder: Path) -> None:
    """Move the staged files into the folder; put the old ones back if one cannot be moved."""
    if not folder.exists():
        staged.rename(folder)
        return
    old = staged / "replaced"
    names = [path.name for path in staged.iterdir()]
    old.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                (folder / name).rename(old / name)
            (staged / name).rename(folder / name)
    except OSError:
        for name in names:
            if not (staged / name).exists():
                (folder / name).rename(staged / name)
            if (old / name).exists():
                (old / name).rename(folder / name)
        raise
