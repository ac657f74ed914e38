"""One agent in a process of its own, for tests that kill or stop it.

`python -m tests.net.lone serve FOLDER PORT` offers a snapshot of round 1, slowly (MB/s in LONE_MB_S);
`python -m tests.net.lone fetch FOLDER ADDRESS ROOT` fetches it. Both write a line when they are ready, and lines of
JSON of what they do. Under mTLS where LONE_KEYS is a folder of keys.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dimat.net.compatibility import Profile
from dimat.net.pki.identity import Identity, load_identity
from dimat.weights.tensors import schema_hash
from tests.net.agents import QUICK, make, started, update_neighbours, weights

WIDTH = 2048  # 16 MiB
WIDE = Profile(schema_hash({"layer.weight": torch.empty(WIDTH, WIDTH)}))


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def identity(name: str) -> Identity | None:
    """Return the agent's keys, if it has any."""
    folder = os.environ.get("LONE_KEYS")
    return load_identity(folder, name) if folder else None


async def serve(folder: Path, port: str) -> None:
    rate = os.environ.get("LONE_MB_S")
    a = make(
        folder,
        "a",
        identity=identity("a"),
        limits=replace(QUICK, rate_mb_s=float(rate) if rate else None),
        listen=f"127.0.0.1:{port}",
        bound=2**28,
        profile=WIDE,
    )
    async with started(a):
        update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"})
        manifest = a.publish(1, weights(1, WIDTH))
        say(port=a.transport.port, root=manifest.payload.root, bytes=manifest.payload.bytes)
        while True:
            await asyncio.sleep(0.1)
            say(sent=a.transport.sent_bytes.get("b", 0))


async def fetch(folder: Path, address: str, root: str) -> None:
    b = make(folder, "b", identity=identity("b"), limits=QUICK, bound=2**28, profile=WIDE)
    async with started(b):
        update_neighbours([b], {"a": address, "b": b.address})
        say(port=b.transport.port)
        fetching = asyncio.create_task(b.transport.fetch("a", 1, root))
        while not fetching.done():
            await asyncio.wait([fetching], timeout=0.1)
            say(received=b.transport.received_bytes.get("a", 0))
        fetched = await fetching
        say(path=str(fetched.path), bytes=fetched.bytes)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    asyncio.run({"serve": serve, "fetch": fetch}[what](Path(folder), *rest))
