"""Snapshots and their store. References: blake3's own digests, safetensors' reader, and real damage to real files."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from dimat.errors import DataError, NetworkError
from dimat.events import Contribution
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.weights.durable import write_bytes
from dimat.weights.snapshot import (
    Form,
    Manifest,
    Payload,
    RecordedSnapshot,
    SnapshotStore,
    checksum,
    record_bytes,
    verify_file,
)
from dimat.weights.tensors import encode, schema_hash, write_weights


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(300, 40, generator=generator),
        "h": torch.randn(7, generator=generator).to(torch.bfloat16),
        "n": torch.tensor(3),
    }


def record(folder: Path, tensors: dict[str, torch.Tensor]) -> Payload:
    return record_bytes(folder, encode(tensors))


def manifest(payload: Payload, agent: str = "a", number: int = 1) -> Manifest:
    return Manifest(run="r", agent=agent, round=number, basis="0:a:0", schema="", payload=payload)


def test_payload_is_the_tensors_and_its_address_their_hash(tmp_path: Path) -> None:
    """Root = blake3 over the blocks' blake3 and the length; equal content has one address, wherever it lies."""
    payload = record(tmp_path, weights())
    file = tmp_path / f"{payload.root}.safetensors"
    data = file.read_bytes()
    size = payload.block_bytes
    blocks = [blake3(data[i : i + size]).digest() for i in range(0, len(data), size)]
    assert payload.root == blake3(b"".join(blocks) + len(data).to_bytes(8, "big")).hexdigest()
    loaded = load_file(file)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in weights().items())
    again = record(tmp_path, {k: v.clone() for k, v in reversed(weights().items())})
    assert again == payload
    assert len(list(tmp_path.iterdir())) == 1


def test_tied_and_strided_tensors_are_written_out() -> None:
    """safetensors refuses shared memory: tied tensors, views and transposes are each stored whole."""
    base = torch.arange(12.0).reshape(3, 4)
    tied = {"a": base, "b": base, "column": base[:, 1], "turned": base.T}
    plain = {name: tensor.clone().contiguous() for name, tensor in tied.items()}
    assert encode(tied) == encode(plain)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-5], "manifest says"),
        (lambda data: data + b"x", "manifest says"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "block 2 does not match"),
        (lambda data: bytes([data[0] ^ 128]) + data[1:], "block 0 does not match"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, said: str) -> None:
    """Bad input: a truncated or altered snapshot file gets one line with file and block."""
    data = encode(weights())
    payload = checksum(data, block_bytes=20_000)
    assert len(payload.blocks) == 3
    file = tmp_path / "x"
    file.write_bytes(data)
    verify_file(file, payload)
    file.write_bytes(damage(data))
    with pytest.raises(DataError, match=said) as caught:
        verify_file(file, payload)
    assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(DataError, match="cannot read snapshot"):
        verify_file(file, payload)


def test_store_keeps_the_newest_and_what_is_read(tmp_path: Path) -> None:
    """Keep N per agent; a payload with readers stays until the last one is through; equal content counts twice."""
    store = SnapshotStore(tmp_path / "s", keep=2)
    payloads = [record(store.folder, weights(i)) for i in range(4)]
    for number, payload in enumerate(payloads[:3], 1):
        store.publish(manifest(payload, number=number))
    assert [store.path(p.root).exists() for p in payloads[:3]] == [False, True, True]
    assert store.find("a", 1) is None
    found = store.find("a", 2)
    assert found is not None
    store.hold(found.payload.root)
    store.publish(manifest(payloads[3], number=4))
    assert store.find("a", 2) is None
    store.verify(found.payload)
    store.release(found.payload.root)
    assert not store.path(found.payload.root).exists()
    store.publish(manifest(payloads[3], agent="b"))
    for number in (5, 6):
        store.publish(manifest(record(store.folder, weights(number)), number=number))
    assert store.path(payloads[3].root).exists(), "b still offers it"


def test_network_counts_each_payload_once_per_reader(tmp_path: Path) -> None:
    """Blocks already held are never sent again; a damaged or withdrawn snapshot is an error, not weights."""
    store = SnapshotStore(tmp_path / "s", keep=1)
    network = MemoryNetwork(store)
    payload = record(store.folder, weights())
    network.publish(manifest(payload))
    for reader in ("b", "c", "b"):
        offered = network.ask("a", 1, payload.root)
        size = network.missing(reader, offered)
        network.moved(reader, 1, offered, size, size)
        assert load_file(network.receive(reader, offered)).keys() == weights().keys()
        network.release(offered.payload.root)
    assert network.sent["a", 1] == 2 * payload.bytes
    assert network.received["b", 1] == payload.bytes
    with pytest.raises(NetworkError, match="no snapshot of round 2"):
        network.ask("a", 2, payload.root)
    other = record(store.folder, weights(1))
    network.publish(manifest(other, number=2))
    file = store.path(other.root)
    file.write_bytes(file.read_bytes()[:-1])
    offered = network.ask("a", 2, other.root)
    network.moved("b", 2, offered, other.bytes, other.bytes)
    with pytest.raises(DataError, match="damaged"):
        network.receive("b", offered)
    assert network.missing("b", offered) == other.bytes, "what is damaged has to be sent again"


def test_a_transfer_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    """By hand: of what was sent 100 and then 50 bytes arrived; the rest is missing, and all of any other payload."""
    store = SnapshotStore(tmp_path / "s", keep=2)
    network = MemoryNetwork(store)
    payload, other = (record(store.folder, weights(i)) for i in range(2))
    network.publish(manifest(payload))
    network.publish(manifest(other, number=2))
    offered = network.ask("a", 1, payload.root)
    network.moved("b", 1, offered, 120, 100)
    network.moved("b", 1, offered, 60, 50)
    assert network.missing("b", offered) == payload.bytes - 150
    assert network.missing("c", offered) == payload.bytes
    assert network.missing("b", network.ask("a", 2, other.root)) == other.bytes
    assert network.received["b", 1] == network.sent["a", 1] == 180


def test_only_what_is_offered_can_be_asked_for(tmp_path: Path) -> None:
    """Bad input: another address than that of the round is refused, and neither payload is held for it."""
    store = SnapshotStore(tmp_path / "s", keep=1)
    network = MemoryNetwork(store)
    payload, other, newer = (record(store.folder, weights(i)) for i in range(3))
    network.publish(manifest(payload))
    network.publish(manifest(other, agent="c"))
    with pytest.raises(NetworkError, match=f"a offers no snapshot {other.root[:12]}"):
        network.ask("a", 1, other.root)
    network.publish(manifest(newer, number=2))
    assert [store.path(p.root).exists() for p in (payload, other, newer)] == [False, True, True]


def test_what_is_recorded_is_held_until_it_is_published(tmp_path: Path) -> None:
    """Law: equal content has one address. What one agent has recorded in its own folder, and what was taken in for it,
    outlive that another one lets equal content go."""
    store, own = SnapshotStore(tmp_path / "s", keep=1), tmp_path / "s" / "own"
    network = MemoryNetwork(store)
    network.publish(manifest(record(store.folder, weights()), agent="b"))
    own.mkdir()
    payload = record(own, weights())
    network.publish(manifest(record(store.folder, weights(1)), agent="b", number=2))
    assert not store.path(payload.root).exists()
    store.take_in(payload, own)
    network.hold(payload.root)
    store.hold(payload.root)
    store.release(payload.root)
    store.verify(payload)
    network.publish(manifest(payload))
    network.release(payload.root)
    store.verify(payload)
    assert list(own.iterdir()) == []
    with pytest.raises(DataError, match="cannot move"):
        store.take_in(payload, own)


def test_what_is_offered_again_takes_its_place_in_order(tmp_path: Path) -> None:
    """An agent that has lost a checkpoint publishes an old round again: it is the oldest, not the newest."""
    store = SnapshotStore(tmp_path / "s", keep=2)
    payloads = [record(store.folder, weights(i)) for i in range(3)]
    for number in (2, 1):
        store.publish(manifest(payloads[number], number=number))
    assert [m.round for m in store.offered("a")] == [1, 2]
    store.publish(manifest(payloads[0], number=3))
    assert [m.round for m in store.offered("a")] == [2, 3]


def test_files_appear_whole(tmp_path: Path) -> None:
    """Publication is by rename: a reader that polls sees every version whole or none."""
    file = tmp_path / "w.safetensors"
    write_weights(file, weights(0))
    stop = threading.Event()
    seen: list[float] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(float(load_file(file)["w"].sum()))

    reader = threading.Thread(target=read)
    reader.start()
    sums = [float(weights(i)["w"].sum()) for i in range(20)]
    for i in range(20):
        write_weights(file, weights(i), durable=False)
    stop.set()
    reader.join()
    assert set(seen) <= set(sums)
    assert list(tmp_path.iterdir()) == [file]


def test_unwritable_places(tmp_path: Path) -> None:
    """One line with path and cause; nothing half-written stays."""
    with pytest.raises(DataError, match="cannot write"):
        write_bytes(tmp_path / "none" / "x", b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the snapshot store"):
        SnapshotStore(tmp_path / "file" / "s", keep=2)


def test_schema_hash_sees_names_shapes_and_dtypes() -> None:
    """Equal for models that can be merged as they are; different where a name, shape or dtype differs."""
    one = schema_hash(weights(0))
    assert one == schema_hash(dict(reversed(weights(1).items())))
    changed = [
        {**weights(), "w": torch.zeros(40, 300)},
        {**weights(), "h": torch.zeros(7)},
        {**weights(), "x": torch.zeros(1)},
    ]
    assert len({one, *map(schema_hash, changed)}) == 4


def test_a_recorded_snapshot_is_known_in_the_next_life(tmp_path: Path) -> None:
    """load ∘ save = identity; none under another address; a damaged file is named."""
    whole, form = checksum(b"whole"), checksum(b"form", block_bytes=2)
    recorded = RecordedSnapshot(whole, (Form("int8", form, after="abc"),), "schema", 288)
    recorded.save(tmp_path)
    assert RecordedSnapshot.load(tmp_path, whole.root) == recorded
    assert RecordedSnapshot.load(tmp_path, form.root) is None
    (tmp_path / f"{whole.root}.json").write_text("[]")
    with pytest.raises(DataError, match=f"{whole.root}.json is not a JSON table but a list"):
        RecordedSnapshot.load(tmp_path, whole.root)


def test_a_manifest_says_what_was_recorded_and_where_it_comes_from() -> None:
    """Field by field; `encoding` is that of the forms, and fp32 where there are none."""
    whole, form = checksum(b"whole"), checksum(b"form")
    parents = (Contribution(agent="b", snapshot="bb", round=2, weight=0.25, verdict="same basis"),)
    more: dict[str, Any] = {"run": "r", "agent": "a", "round": 3, "basis": "0:a:0", "base": "f0", "pushed": {"b": 0.5}}
    recorded = RecordedSnapshot(whole, (Form("bf16", form),), "schema", 288)
    assert Manifest.of(recorded, parents=parents, **more) == Manifest(
        schema="schema",
        payload=whole,
        encoding="bf16",
        forms=(Form("bf16", form),),
        samples=288,
        parents=(("b", "bb", 2, 0.25),),
        **more,
    )
    assert Manifest.of(replace(recorded, forms=()), parents=(), **more).encoding == "fp32"
