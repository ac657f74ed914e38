"""An agent's status for a person. Reference: one as an agent tells it, and what a hostile peer may send instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dimat.ui.terminal.status import status_lines

STATUS: dict[str, Any] = {
    "agent": "lab-a",
    "run": "trio",
    "started": 1000.0,
    "time": 1075.0,
    "warnings": ["lab-c is late"],
    "merged": {
        "round": 3,
        "heard": 2,
        "expected": 2,
        "accepted": 0.5,
        "before": {"accuracy": 0.5},
        "after": {"accuracy": 0.75},
        "weights": {"lab-a": 0.5, "lab-b": 0.5},
    },
    "checkpoint": {"round": 3, "stage": "merged", "time": 1070.0},
    "version": "0.1",
    "pid": 42,
    "address": "0.0.0.0:7300",
    "secure": True,
    "round": 4,
    "rounds": 9,
    "phase": "training",
    "sent_bytes": 2_000_000,
    "received_bytes": 1000,
    "peers": {
        "lab-b": {
            "connected": True,
            "address": "10.0.0.2:7300",
            "trouble": "",
            "rounds": [2, 3],
            "heard_s": 75.25,
            "sent_bytes": 2_000_000,
            "received_bytes": 1000,
        },
        "laboratory-c": {"connected": False, "address": "", "trouble": "Connection refused", "rounds": []},
    },
    "dht": {"healthy": True, "nodes": 3, "addresses": [], "agents": ["lab-b"]},
}


def test_what_a_person_reads() -> None:
    """Numbers in units, and peers as a table whose columns stand under each other."""
    lines = status_lines(STATUS)
    text = "\n".join(lines)
    assert "round 4 of 9, training; up 1 min 15 s" in text or "up 75.0 s" in text
    assert "sent 2.0 MB, received 1.0 kB" in text
    assert "heard 2 of 2" in text
    assert "accepted 50%" in text
    assert "accuracy 0.500 → 0.750" in text
    assert "checkpoint: round 3, merged, 5.0 s ago" in text
    assert "warning: lab-c is late" in text
    head, b, c = (next(line for line in lines if line.startswith(name)) for name in ("peer", "lab-b", "laboratory-c"))
    assert head.index("state") == b.index("connected") == c.index("out of reach")
    assert head.index("offers rounds") == b.index("2-3")
    assert head.index("trouble") == c.index("Connection refused")
    for column, value in (("last heard", "75.2 s ago"), ("received", "1.0 kB"), ("sent", "2.0 MB")):
        assert head.index(column) + len(column) == b.index(value) + len(value)
    assert c.split("  ")[-2].strip() == "-"  # it was never heard, and an older agent tells no bytes


def test_refused_offers_are_trouble() -> None:
    """As an agent counts them of a peer that gives a round two contents, beside why it is out of reach."""
    peers = {
        "lab-b": {**STATUS["peers"]["lab-b"], "refused_offers": 1234},
        "lab-c": {**STATUS["peers"]["laboratory-c"], "refused_offers": 1},
        "lab-d": {**STATUS["peers"]["lab-b"], "refused_offers": 0},
    }
    lines = status_lines({**STATUS, "peers": peers})
    b, c, d = (next(line for line in lines if line.startswith(name)) for name in ("lab-b", "lab-c", "lab-d"))
    assert b.endswith("  refused offers: 1,234")
    assert c.endswith("  Connection refused; refused offers: 1")
    assert d.rstrip().endswith("MB")


def test_no_column_of_troubles_without_any() -> None:
    peers = {"lab-b": STATUS["peers"]["lab-b"]}
    assert "trouble" not in "\n".join(status_lines({**STATUS, "peers": peers}))


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"agent": "\x1b[2Jx", "peers": {"\x1b]0;y\x07": {"trouble": "a\nb\x1b[31m"}}, "warnings": ["\x1b[0m"]},
        json.loads('{"time": NaN, "started": Infinity, "sent_bytes": 1e999, "received_bytes": -Infinity}'),
        {"sent_bytes": 10**400, "time": 10**400, "merged": {"round": 1, "after": {"x": 10**400}, "accepted": "yes"}},
        {"peers": [1], "merged": 3, "checkpoint": "no", "warnings": 5, "dht": {"agents": 7}},
        {"peers": {"b": {"rounds": "all"}, "c": {"rounds": [1, "two", None]}}},
        {"peers": {"b": {"heard_s": -1e300, "sent_bytes": 10**400}, "c": {"heard_s": "now", "received_bytes": [1]}}},
        {"peers": {"b": json.loads('{"heard_s": NaN, "sent_bytes": Infinity, "received_bytes": -1}')}},
    ],
)
def test_what_a_peer_may_send_instead(strange: dict[str, Any]) -> None:
    """Nothing raises, and nothing that steers a terminal comes through."""
    text = "\n".join(status_lines(strange))
    assert all(char == "\n" or char.isprintable() for char in text)
