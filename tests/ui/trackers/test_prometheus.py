"""Metrics made of events. Reference: the events handed in, counted by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dimat import events
from dimat.ui.trackers.prometheus import LABELS, METRICS, UNLISTED, PrometheusListener

WHO = {"agent": "a", "run": "r"}


def started(**more: object) -> events.AgentStarted:
    values: dict[str, Any] = {
        "address": "127.0.0.1:1",
        "peers": ("b",),
        "samples": 10,
        "parameters": 5,
        "secure": True,
        "members": ("a", "b", "c"),
    }
    return events.AgentStarted(agent="a", run="r", round=0, time_s=5.0, **{**values, **more})


def value(listener: PrometheusListener, name: str, **labels: str) -> float | None:
    return listener.registry.get_sample_value(name, {**WHO, **labels})


def tell(listener: PrometheusListener, *events: events.Event) -> PrometheusListener:
    for event in events:
        listener(event)
    return listener


def at(number: int = 1) -> dict[str, Any]:
    return {"agent": "a", "run": "r", "round": number, "time_s": 7.0}


def test_names_are_those_of_prometheus() -> None:
    """Counters, and they alone, end in _total; each label set belongs to a metric; each has a help text."""
    assert set(LABELS) <= set(METRICS)
    assert all(METRICS.values())
    listener = tell(PrometheusListener("r", "a"), started())
    kinds = {family.name: family.type for family in listener.registry.collect()}
    assert {name.removesuffix("_total") for name in METRICS} >= set(kinds)
    for name, kind in kinds.items():
        assert (f"{name}_total" in METRICS) == (kind == "counter")


def test_what_a_merge_tells() -> None:
    """Who was merged, refused and late, and what the check after the merge said; a merge of nobody is none."""
    parts = (events.Contribution(agent="a", snapshot="x", round=1, weight=0.5, verdict="own"),)
    peer = events.Contribution(agent="b", snapshot="y", round=1, weight=0.5, verdict="same basis")
    traffic = {"heard": 1, "expected": 1, "bytes_sent": 0, "bytes_received": 0}
    listener = tell(
        PrometheusListener("r", "a"),
        started(),
        events.PeerRefused(peer="b", reason="nan", **at()),
        events.PeerLate(peer="b", **at()),
        events.RoundFinished(**traffic, contributions=parts, accepted=1.0, **at()),
        *(
            events.RoundFinished(**traffic, contributions=(*parts, peer), accepted=accepted, **at())
            for accepted in (1.0, 0.5, 0.0, 0.25)
        ),
    )
    verdicts = {v: value(listener, "dimat_screen_total", peer="b", verdict=v) for v in ("merged", "refused", "late")}
    assert verdicts == {"merged": 4, "refused": 1, "late": 1}
    accepts = {v: value(listener, "dimat_accept_total", verdict=v) for v in ("accepted", "partly", "refused")}
    assert accepts == {"accepted": 1, "partly": 2, "refused": 1}
    assert value(listener, "dimat_accepted_share") == 0.25


def test_series_are_bounded_by_the_map() -> None:
    """A thousand names that no map has are one series; those that a new map leaves out are told no more; names that
    would break a line are spelled out."""
    listener = tell(PrometheusListener("r", "a"), started())
    for number in range(1000):
        listener(events.PeerLate(peer=f"stranger-{number}", **at()))
    assert value(listener, "dimat_screen_total", peer=UNLISTED, verdict="late") == 1000
    assert value(listener, "dimat_screen_total", peer="b", verdict="late") == 0
    named = ("a", "c\n\x1b[31m")
    tell(
        listener,
        events.NetworkObserved(received={"b": {"fp32": 3}}, sent={"b": {"int8": 2}}, **at()),
        events.MapRead(members=named, peers=named[1:], **at()),
    )
    assert value(listener, "dimat_screen_total", peer="b", verdict="late") is None
    assert value(listener, "dimat_bytes_total", peer="b", direction="sent", encoding="int8") is None
    assert value(listener, "dimat_screen_total", peer="c \\x1b[31m", verdict="late") == 0


def test_phases_dht_and_the_end() -> None:
    """Seconds of a phase that goes on grow from scrape to scrape; the DHT is told once there is one; the reason of the
    end is one of few."""
    listener = tell(PrometheusListener("r", "a"), started())
    assert value(listener, "dimat_dht_up") is None
    assert value(listener, "dimat_left", reason="failed") is None
    listener(events.PhaseStarted(phase="train", **at()))
    first = value(listener, "dimat_phase_seconds_total", phase="train")
    time.sleep(0.01)
    second = value(listener, "dimat_phase_seconds_total", phase="train")
    assert first is not None
    assert second is not None
    assert second >= first + 0.01
    tell(
        listener,
        events.NetworkObserved(dht_up=False, dht_restarts=2, **at()),
        events.PhaseStarted(phase="done", **at()),
        events.AgentLeft(reason="loss is nan in /some/folder", **at()),
    )
    assert value(listener, "dimat_dht_up") == 0
    assert value(listener, "dimat_dht_restarts_total") == 2
    assert value(listener, "dimat_left", reason="failed") == 1
    assert [value(listener, "dimat_phase", phase=phase) for phase in ("join", "train", "wait", "merge")] == [0] * 4
    done = value(listener, "dimat_phase_seconds_total", phase="train")
    assert done == pytest.approx(value(listener, "dimat_phase_seconds_total", phase="train"))
