"""A real agent that dies at an exact moment: `python -m tests.agent.doomed MOMENT COUNT agent FILE …`.

The daemon is the real one; one method of a real class is wrapped so that its COUNT-th call ends the process as kill -9
does. Moments: see `MOMENTS`. `pausing` stops it instead, until SIGCONT; `hanging` is a disk that takes the first half
of the COUNT-th checkpoint and then nothing more; `skew` moves its clock by COUNT seconds; `unwatched` has a fault that
nobody foresaw in its network monitor; `spoiled` dies with a checkpoint whose weights are not finite, COUNT rounds after
its first doubtful merge.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dimat.agent.learner.checkpoint_store as checkpoint
from dimat.agent.daemon.network_monitor import NetworkMonitor
from dimat.agent.daemon.worker import AgentWorker
from dimat.agent.learner.learner import Learner
from dimat.agent.lineage.manifest_log import ManifestLedger
from dimat.agent.protocol.messages import CheckpointAction
from dimat.cli import main
from dimat.net import grpc_server
from dimat.net.grpc_transport import GrpcTransport
from dimat.net.transfer.received_blocks import ReceivedBlocks
from dimat.net.transfer.upload import Uploader


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, count: int, *, after: bool = False) -> None:
    """Die at the `count`-th call of a method: before it, or once it is done."""
    method: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def doomed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            die()
        outcome = method(*args, **kwargs)
        if calls == count:
            die()
        return outcome

    setattr(owner, name, doomed)


def at_outcome(owner: Any, name: str, count: int) -> None:
    """Die once the outcome of the `count`-th call of a method is there."""
    method: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def doomed(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        nonlocal calls
        calls += 1
        wait, last = method(*args, **kwargs), calls == count

        def outcome() -> Any:
            found = wait()
            if last:
                die()
            return found

        return outcome

    setattr(owner, name, doomed)


def half_written(count: int, act: Callable[[], None] = die) -> None:
    """Do something in the middle of the `count`-th checkpoint's file."""
    calls = 0
    write = checkpoint.write_bytes

    def doomed(path: Path, data: bytes, *, durable: bool = True) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data[: len(data) // 2])
            act()
        write(path, data, durable=durable)

    checkpoint.write_bytes = doomed


def mid_stream(count: int, act: Callable[[], None] = die) -> None:
    """Do something between the second and third message of the `count`-th stream to a reader."""
    streams = 0
    stream = Uploader.stream

    async def doomed(
        self: Uploader, reader: str, path: Path, payload: Any, first: int, blocks: int, write: Any, encoding: str
    ) -> None:
        nonlocal streams
        streams += 1
        chosen, messages = streams == count, 0

        async def counted(chunk: bytes) -> None:
            nonlocal messages
            messages += 1
            if chosen and messages == 3:
                act()
            await write(chunk)

        await stream(self, reader, path, payload, first, blocks, counted, encoding)

    Uploader.stream = doomed


def pause() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    while True:
        time.sleep(1)


def skew(seconds: int) -> None:
    clock = time.time
    time.time = grpc_server.clock = lambda: clock() + seconds


def unwatched(_: int) -> None:
    async def go_on(self: NetworkMonitor) -> None:
        raise KeyError("rtt_s")

    NetworkMonitor.go_on = go_on


def spoil(count: int) -> None:
    """As a fault in memory would: an infinite weight goes into the checkpoint of a merge, and the process dies."""
    checkpointed = AgentWorker.checkpoint

    def spoiled(self: AgentWorker, action: CheckpointAction) -> Callable[[], None]:
        written = checkpointed(self, action)
        trainer, first = self._learner.trainer, self._learner.doubt[0]
        if not first or action.stage != "merged" or action.round < first + count:
            return written

        def outcome() -> None:
            trainer.load_weights({name: tensor * float("inf") for name, tensor in trainer.weights().items()})
            written()
            die()

        return outcome

    AgentWorker.checkpoint = spoiled


MOMENTS: dict[str, Callable[[int], None]] = {
    "training": lambda count: at_call(Learner, "train", count, after=True),
    "recording": lambda count: at_outcome(AgentWorker, "record", count),
    "publishing": lambda count: at_call(GrpcTransport, "publish", count),
    "published": lambda count: at_call(GrpcTransport, "publish", count, after=True),
    "serving": mid_stream,
    "pausing": lambda count: mid_stream(count, pause),
    "fetching": lambda count: at_call(ReceivedBlocks, "write", count),
    "fetched": lambda count: at_call(ManifestLedger, "note", count),
    "merging": lambda count: at_call(Learner, "merge", count, after=True),
    "ledger": lambda count: at_call(checkpoint.CheckpointStore, "save", count),
    "checkpointing": lambda count: half_written(count),
    "hanging": lambda count: half_written(count, hang),
    "checkpointed": lambda count: at_outcome(AgentWorker, "checkpoint", count),
    "skew": skew,
    "spoiled": spoil,
    "unwatched": unwatched,
}

if __name__ == "__main__":
    MOMENTS[sys.argv[1]](int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
