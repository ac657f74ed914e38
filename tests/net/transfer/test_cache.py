"""The store of what was fetched, and payloads that come in; the reference are files and their hashes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.net.limits import STALE_PART_S
from dimat.net.manifest import ManifestLimits, SignedManifest, seal
from dimat.net.threads import Threads
from dimat.net.transfer.cache import SnapshotCache
from dimat.net.transfer.received_blocks import ReceivedBlocks
from dimat.weights.snapshot import Payload, checksum
from tests.net.agents import BLOCK, RUN, record, weights

pytestmark = pytest.mark.anyio
BOUND = ManifestLimits(2**28)
QUOTA = 3 * 2**20 + 2**19  # three snapshots


@pytest.fixture
def threads() -> Iterator[Threads]:
    pool = Threads()
    yield pool
    pool.close()


def open_store(tmp_path: Path, threads: Threads, quota: int = 2**30, reserve: int = 0) -> SnapshotCache:
    return SnapshotCache(tmp_path / "received", quota, reserve, RUN, BOUND, threads, durable=False)


def sign(tmp_path: Path, agent: str, round_: int, seed: int) -> tuple[SignedManifest, bytes]:
    """Return a signed manifest and the content of its payload."""
    (tmp_path / "made").mkdir(exist_ok=True)
    manifest = record(tmp_path / "made", agent, round_, weights(seed))
    return seal(manifest, lambda data: b""), (tmp_path / "made" / f"{manifest.payload.root}.safetensors").read_bytes()


def blocks(data: bytes, payload: Payload) -> list[bytes]:
    return [data[start : start + payload.block_bytes] for start in range(0, len(data), payload.block_bytes)]


def bring(store: SnapshotCache, peer: str, signed: SignedManifest, data: bytes) -> Path:
    """Take a whole snapshot in, as a fetch does."""
    payload = signed.manifest.payload
    store.make_room(peer, payload)
    partial = store.begin(peer, payload)
    for index, block in enumerate(blocks(data, payload)):
        assert partial.write(index, [block])
    path = store.finish(peer, partial, payload.root)
    store.end(peer, partial, payload.root)
    store.write_manifest(signed)
    store.keep(peer, signed)
    return path


async def test_the_quota_lets_the_oldest_go_that_nobody_needs(tmp_path: Path, threads: Threads) -> None:
    store = open_store(tmp_path, threads, QUOTA)
    made = {name: sign(tmp_path, name, 1, seed) for seed, name in enumerate("abcd")}
    paths = {name: bring(store, name, *made[name]) for name in "abc"}
    for name in "ac":
        store.release(name, 1, paths[name].stem)
    assert all(path.exists() for path in paths.values())  # each is its peer's last
    paths["d"] = bring(store, "d", *made["d"])
    assert [paths[name].exists() for name in "abcd"] == [False, True, True, True]
    with pytest.raises(DataError, match="raise disk_bytes"):
        store.make_room("e", Payload("00" * 32, 2**21, ()))
    assert [paths[name].exists() for name in "abcd"] == [False, True, False, True]  # those that are needed stay


async def test_equal_content_of_two_peers_lies_there_once_and_as_long_as_one_needs_it(
    tmp_path: Path, threads: Threads
) -> None:
    store = open_store(tmp_path, threads)
    one, data = sign(tmp_path, "a", 1, 0)
    other, _ = sign(tmp_path, "b", 4, 0)
    path = bring(store, "a", one, data)
    store.keep("b", other)
    later, more = sign(tmp_path, "a", 2, 1)
    bring(store, "a", later, more)
    store.release("a", 1, path.stem)
    assert path.exists()
    assert store.find("b", 4, path.stem) == other
    newer, still_more = sign(tmp_path, "b", 5, 2)
    bring(store, "b", newer, still_more)
    assert path.exists()
    store.release("b", 4, path.stem)
    assert not path.exists()


async def test_a_later_life_takes_over_what_is_whole_and_removes_strangers(tmp_path: Path, threads: Threads) -> None:
    store = open_store(tmp_path, threads)
    kept, data = sign(tmp_path, "a", 2, 0)
    path = bring(store, "a", kept, data)
    folder = store.folder
    for name in ("stranger.safetensors", "x.manifest", ".5.x.gone", "notes.txt", f"{'ab' * 32}.old.part"):
        (folder / name).write_bytes(b"?")
    os.utime(folder / f"{'ab' * 32}.old.part", (time.time() - STALE_PART_S - 60,) * 2)
    (folder / f"{'cd' * 32}.new.part").write_bytes(b"?")
    again = open_store(tmp_path, threads)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [path.name, f"{path.stem}.manifest", f"{'cd' * 32}.new.part"]
    )
    assert again.find("a", 2, path.stem) == kept
    assert again.verify(path.stem)
    # damaged while nobody looked
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    third = open_store(tmp_path, threads)
    assert not third.verify(path.stem)
    assert third.find("a", 2, path.stem) is None


def test_a_payload_counts_by_the_hashes_of_its_blocks(tmp_path: Path) -> None:
    data = os.urandom(5 * BLOCK + 100)
    payload = checksum(data, BLOCK)
    path = tmp_path / "x.part"
    partial = ReceivedBlocks(path, payload)
    assert path.stat().st_size == len(data)
    assert partial.runs() == [(0, 6)]
    parts = blocks(data, payload)
    assert not partial.write(1, [parts[0]])
    assert partial.write(1, [parts[1][:1000], parts[1][1000:]])
    assert partial.write(5, [parts[5]])
    assert partial.runs() == [(0, 1), (2, 3)]
    assert partial.missing_bytes == 4 * BLOCK
    with pytest.raises(DataError, match="lacks 4 blocks"):
        partial.finish(tmp_path / "x", durable=True)
    partial.close()
    # another life finds what is right, and no more
    with path.open("r+b") as file:
        file.seek(BLOCK)
        file.write(b"\x00")
    partial = ReceivedBlocks(path, payload)
    assert partial.runs() == [(0, 5)]
    # other files serve, as far as their content is what their record says
    source = tmp_path / "source"
    source.write_bytes(parts[3] + parts[0] + b"\x00" * BLOCK)
    record = Payload("", 3 * BLOCK, (payload.blocks[3], payload.blocks[0], payload.blocks[1]), BLOCK)
    partial.fill([(tmp_path / "missing", record), (source, record)])
    assert partial.runs() == [(1, 2), (4, 1)]
    for index in (1, 2, 4):
        assert partial.write(index, [parts[index]])
    assert partial.whole
    partial.finish(tmp_path / "x", durable=True)
    assert (tmp_path / "x").read_bytes() == data
    assert not path.exists()
    with pytest.raises(DataError, match="closed"):
        partial.write(1, [parts[1]])


def test_a_payload_that_the_disk_has_no_room_for_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    payload = checksum(b"x" * 100, BLOCK)
    with pytest.raises(DataError, match=r"no room for a snapshot of 100 bytes in .* are free"):
        ReceivedBlocks(tmp_path / "x.part", payload, 2**62)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hurried() -> Iterator[None]:
    """Let threads take turns a thousand times as often as they do by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def test_what_threads_change_the_loop_iterates_without_a_fault(
    tmp_path: Path, threads: Threads, hurried: None
) -> None:
    """Twelve peers' payloads begin and finish in threads, while the loop makes room, lists sources and lets go; at the
    end the books say what lies on the disk."""
    store = open_store(tmp_path, threads, QUOTA * 4)
    made = [sign(tmp_path, f"p{number}", 1, number) for number in range(12)]

    async def come_and_go(signed: SignedManifest, data: bytes) -> None:
        peer, payload = signed.manifest.agent, signed.manifest.payload
        for _ in range(8):
            with store.pinned(payload.root):
                if not await threads.submit(store.verify, payload.root):
                    store.make_room(peer, payload)
                    partial = await threads.submit(store.begin, peer, payload)
                    for index, block in enumerate(blocks(data, payload)):
                        await threads.submit(partial.write, index, [block])
                    await threads.submit(store.finish, peer, partial, payload.root)
                    store.end(peer, partial, payload.root)
                await threads.submit(store.write_manifest, signed)
                store.keep(peer, signed)
            assert store.path(payload.root).stat().st_size == len(data)
            store.release(peer, 1, payload.root)
            store.sources("")

    await asyncio.gather(*(come_and_go(*one) for one in made))
    assert not store._coming
    assert not store._open
    lying = {path.stem for path in store.folder.glob("*.safetensors") if not path.name.startswith(".")}
    assert lying == set(store._entries)


async def test_a_snapshot_that_a_fetch_is_about_to_hold_is_not_let_go(tmp_path: Path, threads: Threads) -> None:
    store = open_store(tmp_path, threads, QUOTA)
    signed, data = sign(tmp_path, "a", 1, 1)
    path = bring(store, "a", signed, data)
    store.release("a", 1, path.stem)
    with store.pinned(path.stem):
        assert store.verify(path.stem)
        with pytest.raises(DataError, match="raise disk_bytes"):
            store.make_room("b", Payload("00" * 32, QUOTA, ()))
        assert path.exists()
    store.make_room("b", Payload("00" * 32, QUOTA, ()))
    assert not path.exists()
