"""Bytes of simulated transfers. References: a sum by hand over forms and what of them is held; the run in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from dimat import events
from dimat.events import Event
from dimat.simulate import run_simulation
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.weights.snapshot import Form, Manifest, Payload, SnapshotStore
from tests.simulate.helpers import TINY_TASK, tiny_experiment


def payload(name: str, size: int) -> Payload:
    return Payload(blake3(name.encode()).hexdigest(), size, 1024, ())


def offer(number: int, *forms: Form) -> Manifest:
    return Manifest("run", "a", number, "", "", payload(f"plain {number}", 1000), "int8", forms)


def test_the_cheapest_form_that_can_be_decoded_is_sent(tmp_path: Path) -> None:
    """A delta only to who holds what it is to, whole; what broke off is not sent again, nor what is held."""
    network = MemoryNetwork(SnapshotStore(tmp_path, keep=1))
    first = offer(1, Form("int8", payload("one", 300)))
    assert network.missing("b", first) == 300
    network.moved("b", 1, first, 120, 100)
    assert network.missing("b", first) == 200
    second = offer(2, Form("int8", payload("two", 50), first.payload.root))
    assert network.missing("b", second) == 1000, "it holds but a part of what the delta is to"
    network.moved("b", 1, first, 200, 200)
    assert network.missing("b", first) == 0
    assert network.missing("b", second) == 50
    assert network.missing("c", second) == 1000
    network.moved("b", 2, second, 50, 20)
    assert network.missing("b", second) == 30
    network.moved("b", 2, second, 30, 30)
    third = offer(3, Form("int8", payload("three", 60), first.payload.root))
    assert network.missing("b", third) == 1000, "it is a delta to the snapshot before the last"
    assert network.missing("b", replace(second, round=3)) == 0
    assert (network.sent["a", 1], network.sent["a", 2], network.received["b", 1]) == (320, 80, 320)


@pytest.mark.parametrize(("exchange", "least", "most"), [("bf16", 0.5, 0.52), ("int8", 0.25, 0.3)])
def test_a_run_counts_what_an_encoding_saves(tmp_path: Path, exchange: str, least: float, most: float) -> None:
    """By the bits of a number, but for headers, scales and what is too small to be encoded; no form's file stays."""
    task = TINY_TASK.replace("mlp((6, 12, 8, 4))", "mlp((6, 200, 100, 4))")
    sizes: dict[str, list[int]] = {}
    for encoding in ("fp32", exchange):
        config = tiny_experiment(tmp_path, merge__method="average", exchange={"encoding": encoding})
        (tmp_path / "tiny_task.py").write_text(task)
        heard: list[Event] = []
        results = run_simulation(config, out=tmp_path / encoding, listeners=[heard.append])
        assert not [warning for warning in results.warnings if "exchange" in warning]
        left = [file.stat().st_size for file in (tmp_path / encoding).rglob("*.safetensors")]
        assert len(set(left)) == 1
        sizes[encoding] = [fact.bytes for fact in heard if isinstance(fact, events.SnapshotFetched)]
        assert sum(sizes[encoding]) == sum(row.bytes_received for row in results.rows)
    assert len(sizes[exchange]) == len(sizes["fp32"]) == 12
    for plain, small in zip(sizes["fp32"], sizes[exchange], strict=True):
        assert least < small / plain < most
