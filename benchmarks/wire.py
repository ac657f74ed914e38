"""What moving weights costs.

First one snapshot of 268 MB from process to process on loopback: through dimat's transport (mutual TLS, every block
verified with blake3, into a file), against raw TCP and against plain grpc.aio with protobuf messages under mutual TLS
(both into memory, nothing verified). What gRPC and TLS take by themselves is told by bare bytes that nobody keeps.
CPU-seconds are of both ends. Then the average of 44 MB among four processes, each fetching the other three snapshots
through dimat, against one step of hivemind's averaging whose group is formed ahead.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _wire
from _common import Result, finish, options, table

PATHS = {
    "raw TCP": (_wire.tcp_server, _wire.tcp_client),
    "grpc.aio, protobuf, mTLS": (_wire.protobuf_server, _wire.protobuf_client),
    "grpc.aio, bytes, mTLS, dropped": (_wire.bytes_server, _wire.bytes_client),
    "dimat, mTLS, verified": (_wire.dimat_server, _wire.dimat_client),
}
OURS = "dimat, mTLS, verified"
AVERAGERS = {"hivemind": _wire.hivemind_averager, "dimat, mTLS": _wire.dimat_averager}
SPAWN = multiprocessing.get_context("spawn")


def one_path(kind: str, megabytes: int, repeats: int, keys: str) -> tuple[list[float], float]:
    """Return MB/s of each repeat, and CPU-seconds per GB of both ends."""
    server, client = PATHS[kind]
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=server, args=(theirs, megabytes, repeats, keys), daemon=True)
    process.start()
    port = ours.recv()
    receive, ready, close = client(port, megabytes, keys)

    async def run() -> tuple[list[float], float]:
        rates, spent = [], 0.0
        before = 0.0
        for _ in range(repeats):
            if ready is not None:
                before = await asyncio.to_thread(ours.recv)
                await ready()
            own, begun = _wire.cpu_s(), time.perf_counter()
            await receive()
            rates.append(megabytes / (time.perf_counter() - begun))
            spent += _wire.cpu_s() - own
            if kind != "raw TCP":
                ours.send(None)
            after = await asyncio.to_thread(ours.recv)
            spent += after - before if before else 0.0
            before = after
        if close is not None:
            await close()
        return rates, spent

    rates, spent = asyncio.run(run())
    process.join(60)
    return rates, spent / (repeats * megabytes / 1000)


def averaging(kind: str, megabytes: int, repeats: int, shared: str) -> list[float]:
    """Return the seconds of each step: until the last of four is done."""
    barrier, ports, results = SPAWN.Barrier(4), SPAWN.Array("i", 4), SPAWN.Queue()
    job = (megabytes, repeats, shared)
    # no daemons: hivemind's peers have processes of their own
    processes = [
        SPAWN.Process(target=AVERAGERS[kind], args=(index, 4, barrier, ports, results, job)) for index in range(4)
    ]
    for process in processes:
        process.start()
    times: list[Any] = [results.get(timeout=_wire.SECONDS) for _ in processes]
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [max(step) for step in zip(*times)]


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    megabytes, repeats, steps = (67, 3, 2) if arguments.quick else (268, 7, 5)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        for command in (["init-ca"], *(["issue", name, "--addresses", "127.0.0.1:7300"] for name in "abcd")):
            words = [sys.executable, "-m", "dimat.cli", "keys", *command, "--folder", str(keys)]
            subprocess.run(words, check=True, capture_output=True)
        rates = {kind: one_path(kind, megabytes, repeats, str(keys)) for kind in PATHS}
        raw = statistics.median(rates["raw TCP"][0])
        rows = [
            (kind, max(found), statistics.median(found), statistics.median(found) / raw, cpu)
            for kind, (found, cpu) in rates.items()
        ]
        table((f"{megabytes} MB", "best MB/s", "median MB/s", "/ raw TCP", "CPU-s/GB"), rows)
        shared = {"hivemind": str(Path(folder) / "addresses"), "dimat, mTLS": str(keys)}
        means = {kind: averaging(kind, 44, steps, shared[kind]) for kind in AVERAGERS}
        slow = statistics.median(means["hivemind"])
        rows = [(k, min(t), statistics.median(t), slow / statistics.median(t)) for k, t in means.items()]
        table(("44 MB among 4", "best s", "median s", "times as fast"), rows)
    ours = statistics.median(rates[OURS][0])
    protobuf = statistics.median(rates["grpc.aio, protobuf, mTLS"][0])
    faster = slow / statistics.median(means["dimat, mTLS"])
    met = ours >= 0.30 * raw and ours >= 2 * protobuf and faster >= 3
    target = ">= 0.30 x raw TCP, >= 2 x grpc.aio protobuf, averaging >= 3 x hivemind"
    finish(Result("wire", ours, raw, ours / raw, target, met))


if __name__ == "__main__":
    main()
