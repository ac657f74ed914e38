"""Resolves agents to addresses, by map and DHT, and announces this agent in the DHT.

Either source suffices, and a lookup in the DHT delays its caller for at most `LOOKUP_S`.
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
from dimat.net.limits import ANNOUNCE_RETRY_S, LOOKUP_S, RECORD_FRESH_S, RECORD_LIFE_S, RECORD_SAMPLE
from dimat.net.threads import BackgroundTasks, first_of


class RecordDirectory(Protocol):
    """A store of address records: `dimat.net.discovery.dht.DhtNode`.

    `changed` is set when it is up again, or has joined other nodes again.
    """

    healthy: bool
    changed: asyncio.Event

    async def announce(self, record: AddressRecord) -> bool:
        """Store a record with other nodes; return whether any accepted it."""
        ...

    async def lookup(self, agent: str, *, elsewhere: bool = False) -> AddressRecord | None:
        """Return an agent's newest record; with `elsewhere`, only among those of other nodes."""
        ...


@dataclass(frozen=True, slots=True)
class Announcement:
    """The facts that this agent announces: its `host:port`s, and its newest snapshot."""

    addresses: tuple[str, ...] = ()
    round: int = 0
    root: str = ""


class AddressResolver:
    """Returns the addresses of agents, and announces those of this one.

    `static`: the map's addresses by agent; `members`: all agents of the map; `dht`: None for the map alone; `folder`
    keeps the number of the last record, as readers accept no older one; `notice` receives messages for a person;
    `record_life_s`: how long a record is valid without renewal. All methods belong to one event loop.
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
        record_life_s: float = RECORD_LIFE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.visible: Mapping[str, AddressRecord] = {}
        """The other members' records that were found recently, by agent."""
        self._run = run
        self._agent = agent
        self._dht = dht
        self._file = folder / "dht.seq"
        self._reminders = Reminders(notice)
        self._generator = generator
        self._record_life_s = record_life_s
        self._clock = clock
        self._announcement = Announcement()
        self._news = asyncio.Event()
        self._found: dict[str, tuple[float, AddressRecord | None]] = {}
        self._lookups: dict[str, asyncio.Task[AddressRecord | Exception | None]] = {}
        self._tasks = BackgroundTasks()
        self._last: AddressRecord | None = None
        self._number = _read_number(self._file)
        self._alone = 0
        self.update_members(static, members)

    def update_members(self, static: Mapping[str, Collection[str]], members: Collection[str]) -> None:
        """Take over the addresses and members of a new map."""
        self._static = {name: tuple(addresses) for name, addresses in static.items()}
        self._members = tuple(sorted(set(members) - {self._agent}))
        self.visible = {name: record for name, record in self.visible.items() if name in self._members}
        self._found = {name: found for name, found in self._found.items() if name in self._members}

    async def start(self) -> None:
        """Begin to announce this agent; return at once."""
        await self._tasks.open()
        if self._dht is not None:
            self._tasks.start(self._keep_announced(self._dht), "announcing")

    def announce(self, own: Announcement) -> None:
        """Announce new facts about this agent at once."""
        if own != self._announcement:
            self._announcement = own
            self._news.set()

    async def addresses(self, agent: str) -> tuple[str, ...]:
        """Return an agent's addresses, each once: first those on the map, then those in its record."""
        found = await self._lookup(agent)
        return tuple(dict.fromkeys([*self._static.get(agent, ()), *(found.addresses if found is not None else ())]))

    async def close(self) -> None:
        """Stop announcing; the last record expires by itself."""
        await self._tasks.close(cancel=True)

    async def _lookup(self, agent: str) -> AddressRecord | None:
        """Return an agent's record, from memory if it is fresh. Concurrent calls wait for one lookup."""
        if self._dht is None or agent == self._agent or agent not in self._members or not self._tasks.is_open:
            return None
        now = time.monotonic()
        when, record = self._found.get(agent, (float("-inf"), None))
        if now - when < RECORD_FRESH_S or not self._dht.healthy:
            return record if record is not None and record.expires_s > self._clock() else None
        task = self._lookups.get(agent)
        if task is None:
            task = self._lookups[agent] = self._tasks.start(self._try(self._dht, agent), f"lookup of {agent}")
            task.add_done_callback(lambda _: self._lookups.pop(agent, None))
        with suppress(TimeoutError):
            # where the map gives addresses too, the DHT only adds to them
            async with asyncio.timeout(LOOKUP_S):
                found = await asyncio.shield(task)
                if isinstance(found, Exception):
                    raise found
                return found
        return record

    async def _try(self, dht: RecordDirectory, agent: str) -> AddressRecord | Exception | None:
        """Look up an agent; return an error to the callers that wait: if it were raised here, it would end all
        tasks."""
        try:
            return await self._look_up(dht, agent)
        except Exception as error:
            return error

    async def _look_up(self, dht: RecordDirectory, agent: str) -> AddressRecord | None:
        record = await dht.lookup(agent)
        if record is not None:  # not kept where nothing was found: the agent may be about to start
            self._found[agent] = (time.monotonic(), record)
        return record

    async def _keep_announced(self, dht: RecordDirectory) -> None:
        """Renew the record in time, and at once when it or the DHT has changed; look up some other members."""
        while True:
            self._news.clear()
            dht.changed.clear()
            wait_s = self._record_life_s / 3
            if self._announcement.addresses and dht.healthy:
                try:
                    await self._look_for_twin(dht)
                    self._last = self._next()
                    if not await dht.announce(self._last):
                        wait_s = min(ANNOUNCE_RETRY_S, wait_s)
                    elif await dht.lookup(self._agent, elsewhere=True) is not None:
                        self._reminders.over("gone", "this agent's record is in the DHT again")
                    else:  # only records that others hold can be found
                        lost = "this agent's record is not in the DHT: the DHT is split, or refuses the record"
                        self._reminders.tell("gone", lost)
                    await self._look_around(dht)
                except DimatError as error:
                    self._reminders.tell("own", str(error))
                except Exception as error:  # a bug must not end the loop, and lookups with it, nor hide
                    self._reminders.tell("own", f"announcing in the DHT failed: {type(error).__name__}: {error}")
            wait_s *= self._generator.uniform(0.8, 1.0)
            await first_of(self._news.wait(), dht.changed.wait(), most_s=wait_s)

    def _next(self) -> AddressRecord:
        """Return the record to announce; its number is above all those announced before, including by earlier runs."""
        now = self._clock()
        # the time helps where the folder was lost, the count where the clock was set back
        self._number = max(self._number + 1, int(now * 1000))
        expires_s = now + self._record_life_s
        if self._last is not None and self._last.expires_s >= expires_s:
            expires_s = self._last.expires_s + 0.001  # the DHT keeps the value that expires last
        _write_number(self._file, self._number)
        own = self._announcement
        return AddressRecord(
            self._run, self._agent, own.addresses, "", own.round, own.root, self._number, now, expires_s
        )

    async def _look_for_twin(self, dht: RecordDirectory) -> None:
        """Look for a record of this agent that is newer than those written by this process."""
        held = await dht.lookup(self._agent, elsewhere=True)
        before = self._last
        if held is None or held.seq <= (self._number if before is None else before.seq):
            return
        self._number = held.seq  # of an earlier run whose folder is lost, else of another process
        if before is not None and held.addresses != before.addresses:
            where = ", ".join(held.addresses) or "no address"
            self._reminders.tell(
                "twin", f"another process announces itself as {self._agent!r}, at {where}: stop one of the two"
            )

    async def _look_around(self, dht: RecordDirectory) -> None:
        """Look up a sample of the other members, and give notice if none is found several times in a row."""
        some = self._generator.sample(self._members, min(RECORD_SAMPLE, len(self._members)))
        records = await asyncio.gather(*(self._look_up(dht, name) for name in some))
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
