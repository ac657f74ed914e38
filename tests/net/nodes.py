"""Real DHT nodes on loopback for the tests, and looks at the processes behind them."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from dimat.net.discovery.address_records import AddressRecord
from dimat.net.discovery.child_process import find_by_token
from dimat.net.discovery.dht import DhtNode

needs_hivemind = pytest.mark.skipif(importlib.util.find_spec("hivemind") is None, reason="hivemind is not installed")
LIMIT_S = 120.0
RUN = "digits"


def make_node(folder: Path, *, notices: list[str] | None = None, **options: Any) -> DhtNode:
    said = [] if notices is None else notices
    settings = {
        "run": RUN,
        "bootstraps": (),
        "ca": None,
        "listen": "127.0.0.1:0",
        "probe_s": 0.5,
        "generator": random.Random(0),
        "notice": said.append,
        **options,
    }
    return DhtNode(folder, **settings)


async def up(node: DhtNode, others: int = 0) -> None:
    """Wait until a node serves and knows so many others."""
    await until(lambda: node.healthy and node.known >= others)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await anyio.sleep(0.05)


async def until_there(find: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again until there is an answer, and return it."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        found = await find()
        if found:
            return found
        assert time.monotonic() < deadline, "it was not found"
        await anyio.sleep(0.05)


def make_record(agent: str, *, seq: int = 1, port: int = 7300, ttl_s: float = 600.0, **changes: Any) -> AddressRecord:
    now = time.time()
    values = {"round": seq, "root": "ab" * 32, "run": RUN, "time_s": now, "expires_s": now + ttl_s, **changes}
    return AddressRecord(agent=agent, addresses=(f"10.0.0.1:{port}",), fingerprint="", seq=seq, **values)


def token_of(folder: Path) -> str:
    return str(json.loads((folder / "dht.pid").read_text())["token"])


def processes(token: str) -> dict[str, list[int]]:
    """Return the living processes of a node by what they are: `p2pd` or `python`."""
    found: dict[str, list[int]] = {"p2pd": [], "python": []}
    for pid in find_by_token(token):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        found["p2pd" if os.path.basename(command) == "p2pd" else "python"].append(pid)
    return found
