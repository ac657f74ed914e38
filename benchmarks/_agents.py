"""A network of real agents on loopback: its map, keys and experiment in a folder, and its agents as processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _children import ONE_THREAD


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on, all different."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def write_map(folder: Path, names: Sequence[str], graph: str) -> Path:
    """Write the map of agents that listen on free ports, and return its file."""
    entries = "".join(
        f'[[agents]]\nname = "{name}"\naddresses = ["127.0.0.1:{port}"]\n'
        for name, port in zip(names, free_ports(len(names)), strict=True)
    )
    file = folder / "map.toml"
    file.write_text(f'graph = "{graph}"\n{entries}')
    return file


def write_network(folder: Path, names: Sequence[str], graph: str, hook: Path, experiment: str) -> Path:
    """Write a map, keys for all, and an experiment that trains `hook`'s function `task` on even parts.

    `experiment`: the experiment's own tables, as TOML. Returns its file.
    """
    card = write_map(folder, names, graph)
    file = folder / "experiment.toml"
    file.write_text(
        f'run = "{hook.stem}"\ntopology = {{ map = "{card.name}" }}\n'
        f'task = {{ hook = "{hook.resolve()}:task", partition = {{ kind = "iid" }} }}\n{experiment}'
    )
    for command in (["init-ca"], ["issue", "--map", card]):
        words = ["-m", "dimat.cli", "keys", *command, "--folder", folder / "keys"]
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    return file


def start(
    file: Path,
    name: str,
    folder: Path,
    *words: object,
    program: Sequence[object] = ("-m", "dimat.cli"),
    environment: Mapping[str, str] | None = None,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start an agent as a process with one thread for its maths, whose files lie in `folder`.

    `program`: what Python runs, which takes the words of `dimat`.
    """
    own = ["agent", file, "--name", name, "--set", f"agent.folder={folder}", "--quiet", *words]
    return subprocess.Popen(
        [sys.executable, *map(str, (*program, *own))], env={**os.environ, **ONE_THREAD, **(environment or {})}, **popen
    )
