"""AddressResolver beside a directory of records in memory, which can be split, emptied and written to by others; the
same over a real DHT is in test_dht.py. Reference: what was put into the directory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dimat.net.backoff import Reminders
from dimat.net.discovery.address_records import AddressRecord
from dimat.net.discovery.resolver import AddressResolver, Announcement, RecordDirectory
from tests.net.nodes import make_record, until, until_there

pytestmark = pytest.mark.anyio


@dataclass
class Shelf:
    """Keeps the newest record of each agent; `lost` loses what is put in, though it says that it was taken."""

    healthy: bool = True
    lost: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    records: dict[str, AddressRecord] = field(default_factory=dict)
    announced: list[AddressRecord] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    slow: asyncio.Event | None = None

    async def announce(self, record: AddressRecord) -> bool:
        self.announced.append(record)
        held = self.records.get(record.agent)
        if not self.lost and (held is None or (held.seq, held.expires_s) < (record.seq, record.expires_s)):
            self.records[record.agent] = record
        return True

    async def lookup(self, agent: str, *, elsewhere: bool = False) -> AddressRecord | None:
        self.lookups.append(agent)
        if self.slow is not None:
            await self.slow.wait()
        return self.records.get(agent)


@asynccontextmanager
async def discovering(
    folder: Path, dht: RecordDirectory | None, said: list[str], **options: Any
) -> AsyncIterator[AddressResolver]:
    settings = {
        "run": "digits",
        "agent": "lab-a",
        "static": {"lab-b": ["10.0.0.2:1", "10.0.0.2:2"]},
        "members": ["lab-a", "lab-b", "lab-c"],
        "notice": said.append,
        "generator": random.Random(0),
        "record_life_s": 0.6,
        **options,
    }
    discovery = AddressResolver(dht=dht, folder=folder, **settings)
    await discovery.start()
    try:
        yield discovery
    finally:
        await discovery.close()


async def test_the_map_alone_suffices(tmp_path: Path) -> None:
    async with discovering(tmp_path, None, []) as discovery:
        discovery.announce(Announcement(("10.0.0.1:1",)))
        assert await discovery.addresses("lab-b") == ("10.0.0.2:1", "10.0.0.2:2")
        assert await discovery.addresses("lab-c") == ()
        discovery.update_members({"lab-c": ["10.0.0.3:1"]}, ["lab-a", "lab-c"])
        assert await discovery.addresses("lab-c") == ("10.0.0.3:1",)
        assert await discovery.addresses("lab-b") == ()


async def test_both_sources_together_and_one_lookup_for_all_who_ask(tmp_path: Path) -> None:
    shelf = Shelf(slow=asyncio.Event())
    shelf.records["lab-b"] = replace(make_record("lab-b"), addresses=("10.0.0.2:2", "10.0.0.2:3"))
    async with discovering(tmp_path, shelf, []) as discovery:
        asking = [asyncio.create_task(discovery.addresses("lab-b")) for _ in range(3)]
        await until(lambda: shelf.lookups == ["lab-b"])
        assert shelf.slow is not None
        shelf.slow.set()
        assert await asyncio.gather(*asking) == [("10.0.0.2:1", "10.0.0.2:2", "10.0.0.2:3")] * 3
        assert await discovery.addresses("lab-b") == ("10.0.0.2:1", "10.0.0.2:2", "10.0.0.2:3")
        assert shelf.lookups == ["lab-b"], "what was found a moment ago is not asked for again"
        assert await discovery.addresses("lab-x") == ()
        assert shelf.lookups == ["lab-b"], "nobody who is not on the map is asked for"
        shelf.healthy = False
        assert await discovery.addresses("lab-b") == ("10.0.0.2:1", "10.0.0.2:2", "10.0.0.2:3")
        assert await discovery.addresses("lab-c") == ()


async def test_a_dht_that_does_not_answer_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimat.net.discovery.resolver.LOOKUP_S", 0.05)
    shelf = Shelf(slow=asyncio.Event())
    async with discovering(tmp_path, shelf, []) as discovery:
        assert await discovery.addresses("lab-b") == ("10.0.0.2:1", "10.0.0.2:2")


async def test_records_are_renewed_and_news_goes_out_at_once(tmp_path: Path) -> None:
    shelf = Shelf()
    async with discovering(tmp_path, shelf, []) as discovery:
        discovery.announce(Announcement(("10.0.0.1:1",)))
        await until(lambda: len(shelf.announced) >= 3)
        assert {(record.addresses, record.round) for record in shelf.announced} == {(("10.0.0.1:1",), 0)}
    calm = Shelf()
    (tmp_path / "calm").mkdir()
    async with discovering(tmp_path / "calm", calm, [], record_life_s=1e6) as discovery:
        discovery.announce(Announcement(("10.0.0.1:1",)))
        await until(lambda: len(calm.announced) == 1)
        discovery.announce(Announcement(("10.0.0.1:1",), round=5, root="ab"))
        await until(lambda: len(calm.announced) == 2)
        assert (calm.announced[-1].round, calm.announced[-1].root) == (5, "ab")
        calm.changed.set()  # the node has met others, who know nothing yet
        await until(lambda: len(calm.announced) == 3)
        for before, after in zip(calm.announced, calm.announced[1:], strict=False):
            assert (before.seq, before.expires_s) < (after.seq, after.expires_s)


async def test_numbers_grow_across_lives_though_the_clock_goes_back(tmp_path: Path) -> None:
    seqs: list[int] = []
    for clock in (time.time, lambda: time.time() - 86_400, lambda: time.time() - 86_400):
        shelf = Shelf()
        async with discovering(tmp_path, shelf, [], clock=clock) as discovery:
            discovery.announce(Announcement(("10.0.0.1:1",)))
            await until(lambda shelf=shelf: len(shelf.announced) >= 2)
        seqs += [record.seq for record in shelf.announced]
    assert seqs == sorted(set(seqs))


async def test_a_lost_folder_goes_on_above_what_the_dht_holds(tmp_path: Path) -> None:
    shelf = Shelf()
    ahead = make_record("lab-a", seq=2**52)
    shelf.records["lab-a"] = ahead
    said: list[str] = []
    async with discovering(tmp_path, shelf, said) as discovery:
        discovery.announce(Announcement(ahead.addresses))
        assert (await until_there(lambda: _announced(shelf))).seq == 2**52 + 1
    assert not [line for line in said if "another process" in line]


async def _announced(shelf: Shelf) -> AddressRecord | None:
    return shelf.announced[0] if shelf.announced else None


async def test_a_twin_a_lost_record_and_loneliness_are_told_once(tmp_path: Path) -> None:
    shelf = Shelf()
    said: list[str] = []
    async with discovering(tmp_path, shelf, said) as discovery:
        discovery.announce(Announcement(("10.0.0.1:1",)))
        await until(lambda: len(shelf.announced) >= 4)
        assert [line for line in said if "none of the 2 other agents is in the DHT" in line] == said
        assert len(said) == 1
        shelf.records["lab-c"] = make_record("lab-c")
        await until(lambda: len(said) == 2)
        assert said[1] == "other agents are in the DHT again"
        await until(lambda: set(discovery.visible) == {"lab-c"})

        shelf.records["lab-a"] = make_record("lab-a", seq=shelf.announced[-1].seq + 10_000_000)
        await until(lambda: len(said) == 3)
        assert said[2] == "another process announces itself as 'lab-a', at 10.0.0.1:7300: stop one of the two"

        shelf.lost = True
        shelf.records.pop("lab-a")
        await until(lambda: len(said) == 4)
        assert "this agent's record is not in the DHT" in said[3]
        count = len(shelf.announced)
        await until(lambda: len(shelf.announced) >= count + 2)
        shelf.lost = False
        await until(lambda: len(said) == 5)
        assert said[4] == "this agent's record is in the DHT again"


async def test_own_addresses_that_cannot_be_are_told_and_end_nothing(tmp_path: Path) -> None:
    from dimat.net.discovery.address_records import seal_record

    class Sealing(Shelf):
        async def announce(self, record: AddressRecord) -> bool:
            seal_record(record, None, b"")
            return await super().announce(record)

    shelf, said = Sealing(), []
    async with discovering(tmp_path, shelf, said) as discovery:
        discovery.announce(Announcement(("nowhere",)))
        await until(lambda: said == ["this agent's record for the DHT ('lab-a'): address 'nowhere' is not host:port"])
        discovery.announce(Announcement(("10.0.0.1:1",)))
        await until(lambda: len(shelf.announced) > 0)


async def test_a_lookup_that_fails_is_the_fault_of_those_who_wait_for_it(tmp_path: Path) -> None:
    """Others are looked up as before, announcements go on and tell of it, and closing raises nothing."""

    class Failing(Shelf):
        async def lookup(self, agent: str, *, elsewhere: bool = False) -> AddressRecord | None:
            if agent == "lab-b":
                raise KeyError(agent)
            return await super().lookup(agent, elsewhere=elsewhere)

    shelf, said = Failing(), []
    shelf.records["lab-c"] = make_record("lab-c")
    async with discovering(tmp_path, shelf, said) as discovery:
        for _ in range(2):
            with pytest.raises(KeyError, match="lab-b"):
                await discovery.addresses("lab-b")
        assert await discovery.addresses("lab-c") == shelf.records["lab-c"].addresses
        discovery.announce(Announcement(("10.0.0.1:1",)))  # which looks the others up, too
        await until(lambda: len(shelf.announced) > 1)
        assert said == ["announcing in the DHT failed: KeyError: 'lab-b'"]
        assert await discovery.addresses("lab-c") == shelf.records["lab-c"].addresses


def test_reminders_come_at_growing_intervals() -> None:
    said: list[str] = []
    now = [0.0]
    reminders = Reminders(said.append, lambda: now[0])
    for minute in range(8 * 60):
        now[0] = 60.0 * minute
        reminders.tell("trouble", f"{minute}")
    assert [int(text) for text in said] == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363, 423]
    reminders.over("trouble", "over")
    reminders.over("trouble", "over")
    reminders.tell("trouble", "anew")
    assert said[-2:] == ["over", "anew"]
