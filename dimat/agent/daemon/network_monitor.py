"""Reports the state of an agent's network as events, for listeners."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dimat import events

LOOK_S = 1.0
"""Seconds between two looks for a change."""


class Observed(Protocol):
    """The observed network: `dimat.net.grpc_transport.GrpcTransport`."""

    @property
    def peers(self) -> Mapping[str, Mapping[str, object]]: ...

    @property
    def traffic(self) -> Sequence[tuple[str, str, str, int]]: ...

    @property
    def retries(self) -> Mapping[str, int]: ...


class NetworkMonitor:
    """Emits `NetworkObserved` by `emit`, from the event loop's thread.

    `round`: gives the agent's round; `dht`: gives the state of the DHT, None if there is none; `folders`: of own and
    of received snapshots; `every_s`: seconds after which it emits even if nothing has changed.
    """

    def __init__(
        self,
        agent: str,
        run: str,
        round: Callable[[], int],
        network: Observed,
        dht: Callable[[], Mapping[str, object]] | None,
        folders: tuple[Path, Path],
        emit: Callable[[events.Event], None],
        every_s: float,
    ) -> None:
        self._agent = agent
        self._run = run
        self._round = round
        self._network = network
        self._dht = dht
        self._folders = folders
        self._emit = emit
        self._every_s = every_s
        self._told: tuple[object, ...] = ()
        self._told_s = float("-inf")

    async def go_on(self) -> None:
        """Watch for changes until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._every_s))
            if self._state() != self._told or time.monotonic() - self._told_s >= self._every_s:
                self.tell()

    def round_over(self) -> None:
        """Emit the state after a round, unless that has just been done."""
        if time.monotonic() - self._told_s >= LOOK_S:
            self.tell()

    def tell(self) -> None:
        """Emit the current state."""
        self._told, self._told_s = self._state(), time.monotonic()
        now = time.time()
        peers, dht = self._network.peers, self._dht_state()
        ways: dict[str, dict[str, dict[str, int]]] = {"sent": {}, "received": {}}
        for way, peer, encoding, count in self._network.traffic:
            ways[way].setdefault(peer, {})[encoding] = count
        own, received = map(_size, self._folders)
        self._emit(
            events.NetworkObserved(
                run=self._run,
                time_s=now,
                agent=self._agent,
                round=self._round(),
                connected=tuple(peer for peer, state in peers.items() if state["connected"]),
                heard_at_s={
                    peer: now - ago for peer, state in peers.items() if isinstance(ago := state["heard_s"], float)
                },
                sent=ways["sent"],
                received=ways["received"],
                retries=dict(self._network.retries),
                dht_up=None if dht is None else bool(dht["healthy"]),
                dht_restarts=0 if dht is None else int(str(dht["restarts"])),
                own_disk_bytes=own,
                received_disk_bytes=received,
            )
        )

    def _state(self) -> tuple[object, ...]:
        """Return what is worth telling at once when it changes."""
        peers, dht = self._network.peers, self._dht_state()
        connected = tuple(peer for peer, state in peers.items() if state["connected"])
        return connected, None if dht is None else (dht["healthy"], dht["restarts"])

    def _dht_state(self) -> Mapping[str, object] | None:
        return None if self._dht is None else self._dht()


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; files that go away meanwhile count nothing."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue
    except OSError:
        return total
    return total
