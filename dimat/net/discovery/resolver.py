"""Where agents are reached: the addresses of the map, and those that the agents themselves leave in the DHT.

Either source suffices, and neither is waited for longer than it is worth.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dimat.errors import DimatError
from dimat.net.backoff import Reminders
from dimat.net.discovery.address_records import AddressRecord

TTL_S = 600.0
"""How long an own record holds without being renewed, seconds. Beyond what clocks may differ by."""
FRESH_S = 30.0
"""How long what was found of an agent is taken as it is."""
LOOKUP_S = 5.0
"""How long a lookup may keep the caller waiting."""
_SAMPLE = 8
_RETRY_S = 5.0


class RecordDirectory(Protocol):
    """Keeps records: `dimat.net.discovery.dht.DhtNode`. `changed` is set when it is up, or has met others, anew."""

    healthy: bool
    changed: asyncio.Event

    async def announce(self, record: AddressRecord) -> bool:
        """Leave a record; returns whether anybody took it."""
        ...

    async def lookup(self, agent: str, *, elsewhere: bool = False) -> AddressRecord | None:
        """Return an agent's newest record; with `elsewhere`, of those that others hold."""
        ...


@dataclass(frozen=True, slots=True)
class Announcement:
    """What this agent tells of itself: `host:port`s where it is reached, and its newest snapshot."""

    addresses: tuple[str, ...] = ()
    round: int = 0
    root: str = ""


class AddressResolver:
    """Answers where an agent is reached, and tells others where this one is.

    `static`: the map's addresses by agent; `members`: all agents of the map. Without a DHT only the map speaks.
    `folder` keeps the number of the last record, as readers take no older one. All methods belong to one event loop.
    """

    def __init__(
        self,
        *,
        run: str,
        agent: str,
        static: Mapping[str, Collection[str]],
        members: Collection[str],
        dht: RecordDirectory | None,
        folder: Path,
        notice: Callable[[str], None],
        generator: random.Random,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.visible: Mapping[str, AddressRecord] = {}
        """The other members' records, as far as they were looked for and found of late."""
        self._run = run
        self._agent = agent
        self._dht = dht
        self._file = folder / "dht.seq"
        self._reminders = Reminders(notice)
        self._generator = generator
        self._ttl_s = ttl_s
        self._clock = clock
        self._own = Announcement()
        self._told = asyncio.Event()
        self._found: dict[str, tuple[float, AddressRecord | None]] = {}
        self._asking: dict[str, asyncio.Task[AddressRecord | None]] = {}
        self._loop: asyncio.Task[None] | None = None
        self._last: AddressRecord | None = None
        self._number = _read_number(self._file)
        self._alone = 0
        self.update_neighbours(static, members)

    def update_neighbours(self, static: Mapping[str, Collection[str]], members: Collection[str]) -> None:
        """Take over what a map says, now and when it is loaded anew."""
        self._static = {name: tuple(addresses) for name, addresses in static.items()}
        self._members = tuple(sorted(set(members) - {self._agent}))
        self.visible = {name: record for name, record in self.visible.items() if name in self._members}
        self._found = {name: found for name, found in self._found.items() if name in self._members}

    async def start(self) -> None:
        """Begin to announce this agent; returns at once."""
        if self._dht is not None:
            self._loop = asyncio.create_task(self._announce(self._dht), name="announcing")

    def tell(self, own: Announcement) -> None:
        """Announce at once what is new of this agent."""
        if own != self._own:
            self._own = own
            self._told.set()

    async def addresses(self, agent: str) -> tuple[str, ...]:
        """Return where an agent is reached, each once: the map's addresses first, then those it gives itself."""
        found = await self._lookup(agent)
        return tuple(dict.fromkeys([*self._static.get(agent, ()), *(found.addresses if found is not None else ())]))

    async def close(self) -> None:
        """Stop announcing; the last record runs out by itself."""
        tasks = [task for task in (self._loop, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._loop = None

    async def _lookup(self, agent: str) -> AddressRecord | None:
        """Return an agent's record, from memory where it is fresh. Whoever asks meanwhile waits for the same lookup."""
        if self._dht is None or agent == self._agent or agent not in self._members:
            return None
        now = time.monotonic()
        when, record = self._found.get(agent, (float("-inf"), None))
        if now - when < FRESH_S or not self._dht.healthy:
            return record if record is not None and record.expires_s > self._clock() else None
        task = self._asking.get(agent)
        if task is None:
            task = self._asking[agent] = asyncio.create_task(self._ask(self._dht, agent))
            task.add_done_callback(lambda _: self._asking.pop(agent, None))
        with suppress(TimeoutError):
            # where the map gives addresses too, the DHT only adds to them
            return await asyncio.wait_for(asyncio.shield(task), LOOKUP_S)
        return record

    async def _ask(self, dht: RecordDirectory, agent: str) -> AddressRecord | None:
        record = await dht.lookup(agent)
        if record is not None:  # nothing found is asked for again: the agent may be about to come
            self._found[agent] = (time.monotonic(), record)
        return record

    async def _announce(self, dht: RecordDirectory) -> None:
        """Renew the record in time, and at once when there is news or the DHT is another; look who is there."""
        while True:
            self._told.clear()
            dht.changed.clear()
            wait_s = self._ttl_s / 3
            if self._own.addresses and dht.healthy:
                try:
                    await self._look_for_twin(dht)
                    self._last = self._next()
                    if not await dht.announce(self._last):
                        wait_s = min(_RETRY_S, wait_s)
                    elif await dht.lookup(self._agent, elsewhere=True) is not None:
                        self._reminders.over("gone", "own record is found in the DHT again")
                    else:  # only what others hold can be found
                        self._reminders.tell("gone", "own record is not found in the DHT: it is split, or refuses it")
                    await self._look_around(dht)
                except DimatError as error:
                    self._reminders.tell("own", str(error))
            await self._pause(dht, wait_s * self._generator.uniform(0.8, 1.0))

    async def _pause(self, dht: RecordDirectory, seconds: float) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._told, dht.changed)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    def _next(self) -> AddressRecord:
        """Return the record to announce; its number is above all that were announced before, in earlier lives too."""
        now = self._clock()
        # the time helps where the folder was lost, the count where the clock was set back
        self._number = max(self._number + 1, int(now * 1000))
        expires_s = now + self._ttl_s
        if self._last is not None and self._last.expires_s >= expires_s:
            expires_s = self._last.expires_s + 0.001  # the DHT keeps what runs out last
        _write_number(self._file, self._number)
        own = self._own
        return AddressRecord(
            self._run, self._agent, own.addresses, "", own.round, own.root, self._number, now, expires_s
        )

    async def _look_for_twin(self, dht: RecordDirectory) -> None:
        """Look whether others hold a record of this agent that is newer than any that this process wrote."""
        held = await dht.lookup(self._agent, elsewhere=True)
        before = self._last
        if held is None or held.seq <= (self._number if before is None else before.seq):
            return
        self._number = held.seq  # of an earlier life whose folder is lost, else of another process
        if before is not None and held.addresses != before.addresses:
            where = ", ".join(held.addresses) or "no address"
            self._reminders.tell(
                "twin", f"another process announces itself as {self._agent!r}, at {where}: stop one of the two"
            )

    async def _look_around(self, dht: RecordDirectory) -> None:
        """Look for other members, a few of many, and say so where none is there time and again."""
        some = self._generator.sample(self._members, min(_SAMPLE, len(self._members)))
        records = await asyncio.gather(*(self._ask(dht, name) for name in some))
        seen = {name: record for name, record in zip(some, records, strict=True) if record is not None}
        now = self._clock()
        self.visible = {**{name: old for name, old in self.visible.items() if old.expires_s > now}, **seen}
        self._alone = 0 if self.visible or not some else self._alone + 1
        if self._alone > 2:  # the others may only be about to start
            others = f"none of the {len(self._members)} other agents"
            self._reminders.tell("alone", f"{others} is in the DHT: do they have the same run and bootstraps?")
        elif not self._alone:
            self._reminders.over("alone", "other agents are in the DHT again")


def _read_number(file: Path) -> int:
    try:
        return int(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return 0  # the clock has to do


def _write_number(file: Path, number: int) -> None:
    fresh = file.with_suffix(".new")
    try:
        fresh.write_text(f"{number}\n", encoding="utf-8")
        os.replace(fresh, file)
    except OSError:
        return  # a full disk must not keep the agent from being found; the clock has to do
