"""Follows the network maps that the organiser publishes in the DHT (`dht.follow_map`).

The newest published map is kept in the agent's folder (`dht/map.toml`), never in the operator's file. Of the two files
the higher version counts, so that an operator can overrule a published map, and no older one comes back. An
agent also keeps the signed record, and publishes it in the DHT again when it is no longer there: nodes lose it when
they are restarted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from dimat.agent.setup.followed_map import MAP_FILE, own_version
from dimat.config import ExperimentConfig
from dimat.errors import DimatError, TopologyError
from dimat.net.backoff import Reminders
from dimat.net.discovery.map_records import MapRecord, open_map
from dimat.topology import load_map
from dimat.topology.network_map import check_alone
from dimat.weights.durable import write_bytes

LOOK_S = 30.0
"""Seconds between two looks for a newer map; each is drawn from the half of it on."""
_SOON_S = 1.0
_SEALED = "map.record"


class MapDirectory(Protocol):
    """Keeps published maps: `dimat.net.discovery.dht.DhtNode`."""

    healthy: bool
    known: int

    @property
    def now(self) -> float:
        """Unix time, seconds."""
        ...

    async def announce_map(self, sealed: bytes, record: MapRecord) -> int:
        """Publish a map; return the number of nodes that stored it."""
        ...

    async def lookup_map(self) -> tuple[MapRecord, bytes] | None:
        """Return the newest valid map of the run, and its sealed bytes."""
        ...


class MapFollower:
    """Looks for newer maps for one agent.

    `folder`: the agent's folder for files of the DHT; `ca`: gives the current CA certificates; `check` raises
    DimatError if a map file cannot be used; `take` is called after a usable one was written.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        folder: Path,
        dht: MapDirectory,
        ca: Callable[[], bytes],
        *,
        check: Callable[[Path], object],
        take: Callable[[], Awaitable[None]],
        notice: Callable[[str], None],
        generator: random.Random,
    ) -> None:
        self._config = config
        self._folder = folder
        self._dht = dht
        self._ca = ca
        self._check = check
        self._take = take
        self._notice = notice
        self._reminders = Reminders(notice)
        self._generator = generator
        self._passed_over = 0
        self._held: tuple[MapRecord, bytes] | None = None

    async def look(self, now: float) -> None:
        """Look once: adopt a newer map, or publish the current one in the DHT again."""
        found = await self._dht.lookup_map()
        known = self._followed()
        newer = found is not None and found[0].version > max(known, self._passed_over)
        if found is None or found[0].version < known:
            held = self._sealed(now)
            if held is not None and held[0].version == known:
                await self._dht.announce_map(held[1], held[0])
        elif newer and found[0].version > await asyncio.to_thread(own_version, self._config):
            await self._take_over(*found)

    async def follow(self) -> None:
        """Look repeatedly, until cancelled."""
        while True:
            wait_s = _SOON_S
            if self._dht.healthy and self._dht.known:
                wait_s = LOOK_S * self._generator.uniform(0.5, 1.0)
                try:
                    await self.look(self._dht.now)
                except DimatError as error:  # the disk, or the operator's file as it is just now
                    self._reminders.tell("fault", f"the network map from the DHT: {error}")
            await asyncio.sleep(wait_s)

    async def _take_over(self, record: MapRecord, sealed: bytes) -> None:
        candidate = self._folder / f"new-{MAP_FILE}"
        write_bytes(candidate, record.text.encode(), durable=False)
        try:
            await asyncio.to_thread(self._examine, candidate, record)
        except DimatError as error:
            self._passed_over = record.version
            self._notice(
                f"the network map of version {record.version} from the DHT is not used: {error}; the current one stays "
                "in use"
            )
            return
        finally:
            candidate.unlink(missing_ok=True)
        write_bytes(self._folder / _SEALED, sealed)
        write_bytes(self._folder / MAP_FILE, record.text.encode())
        self._held = record, sealed
        await self._take()

    def _examine(self, candidate: Path, record: MapRecord) -> None:
        check_alone(candidate)  # before anything that it names is read or run
        stated = load_map(candidate).version
        if stated != record.version:
            raise TopologyError(f"it states version {stated or 'none'}, and was signed as {record.version}")
        self._check(candidate)

    def _followed(self) -> int:
        path = self._folder / MAP_FILE
        return load_map(path).version if path.exists() else 0

    def _sealed(self, now: float) -> tuple[MapRecord, bytes] | None:
        """Return the record of the followed map, None where it is lost or over."""
        if self._held is None:
            path = self._folder / _SEALED
            if not path.exists():
                return None
            try:
                data = path.read_bytes()
                self._held = open_map(data, ca=self._ca(), run=self._config.run, now=now), data
            except (OSError, DimatError):
                return None  # damaged or over: others may have it, and the map itself is there
        return self._held if self._held[0].expires_s > now else None
