"""A network of real agents that falls in two halves, and meets again: each agent is a process on a host of its own (a
network namespace), with mutual TLS between them. References: what the round promises (docs/what-happens-when.md), and
the ledgers of all agents against what each has published."""

from __future__ import annotations

import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.agent.daemon.test_daemon_faults import EXCHANGE, WIDE, check_resumed, comes_in, widen
from tests.agent.processes import Network, check_ledgers, network
from tests.net.namespaces import hosts, need_namespaces

pytestmark = pytest.mark.live

RING = ("lab-a", "lab-b", "lab-c", "lab-d")
HALVES = (RING[:2], RING[2:])
DEADLINE_S = 15
SCHEDULE = f"rounds = 0\nround_deadline_s = {DEADLINE_S}\njoin_wait_s = 3"
SLOW_LINK = EXCHANGE + "\nrate_limit_mb_s = 1.0"  # a snapshot takes its readers some seconds, so that a cut can hit it


def merges_since(net: Network, before: dict[str, int], name: str) -> list[set[str]]:
    """Return who is in each merge of an agent but for so many of the first."""
    merges = net.events(name, "Merged")[before[name] :]
    return [{part["agent"] for part in merge["contributions"]} for merge in merges]


def merged(net: Network) -> dict[str, int]:
    return {name: len(net.events(name, "Merged")) for name in net.names}


def test_halves_go_on_and_meet_again(tmp_path: Path) -> None:
    """A ring is cut between lab-b and lab-c and between lab-d and lab-a, while a snapshot is on its way there. Each
    half goes on with itself alone, and ends each round in time; nothing of a snapshot that was broken off is merged.
    Healed, each agent merges with both its neighbours again, and all come to one basis."""
    need_namespaces()
    neighbours = {name: {name, RING[at - 1], RING[(at + 1) % 4]} for at, name in enumerate(RING)}
    # each host has all its ports to itself
    with (
        hosts(4) as made,
        network(tmp_path, RING, [7300] * 4, made, schedule=SCHEDULE, train=WIDE, exchange=SLOW_LINK) as net,
    ):
        widen(net)
        for name in RING:
            net.start(name)
        net.until(lambda: all(net.partners(name) == neighbours[name] for name in RING), "each merges both neighbours")
        net.until(lambda: not comes_in(net, "lab-b", "lab-c"), "nothing of lab-c is on its way to lab-b")
        net.until(lambda: comes_in(net, "lab-b", "lab-c"), "the next snapshot of lab-c is on its way to lab-b")
        for host in made[2:]:
            host.plug(1)
        assert comes_in(net, "lab-b", "lab-c"), "the line was cut in the middle of a transfer"
        before = merged(net)
        halves = {name: set(half) for half in HALVES for name in half}
        for name in RING:
            net.until(
                lambda name=name: merges_since(net, before, name)[-3:] == [halves[name]] * 3,
                f"{name} goes on with its half",
            )
        for name in RING:
            # what was here whole when the line was cut may still count in the round that was under way, and not later
            partners = merges_since(net, before, name)
            assert all(one <= halves[name] for one in partners[name != "lab-b" :]), f"{name}: {partners}"
            (other,) = neighbours[name] - halves[name]
            assert net.events(name, "PeerLate", peer=other), f"{name} says that {other} is missing"
        assert all(life.process.poll() is None for life in net.lives)

        for host in made[2:]:
            host.plug(0)
        before = merged(net)
        for name in RING:
            net.until(lambda name=name: neighbours[name] in merges_since(net, before, name), f"{name} merges all again")
        net.until(lambda: len({net.events(name, "Published")[-1]["basis"] for name in RING}) == 1, "one basis")
        for life in net.lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in net.lives] == [143] * 4, "\n".join(life.text() for life in net.lives)
        check_ledgers(net)
        for name in RING:
            check_resumed(net, name)
            times = [event["time_s"] for event in net.events(name, "Merged")]
            assert max(b - a for a, b in pairwise(times)) < 3 * DEADLINE_S


def test_one_that_is_far_behind_holds_nobody_up(tmp_path: Path) -> None:
    """One of three is cut off, and trains so much longer than the others that these are over 16 rounds ahead. Healed,
    it takes their round at once: within three deadlines all merge with all, and no deadline passes at those in step."""
    need_namespaces()
    three, slow = RING[:3], RING[2]
    schedule = f"rounds = 0\nround_deadline_s = {DEADLINE_S}\njoin_wait_s = 3"
    with hosts(3) as made, network(tmp_path, three, [7300] * 3, made, schedule=schedule, exchange=EXCHANGE) as net:
        for name in three:
            net.start(name, f"train.epochs_per_round={60 if name == slow else 1}")
        net.until(lambda: all(net.partners(name) == set(three) for name in three), "all merge with all")
        made[2].plug(1)
        net.until(lambda: _round(net, three[0]) > _round(net, slow) + 20, "the others are far ahead")
        healed = time.time()
        made[2].plug(0)
        for name in three:
            net.until(
                lambda name=name: any(
                    merge["time_s"] > healed and {part["agent"] for part in merge["contributions"]} == set(three)
                    for merge in net.events(name, "Merged")
                ),
                f"{name} merges with all again",
            )
        whole_s = time.time() - healed
        late = [
            event
            for name in three[:2]
            for event in net.events(name, "PeerLate", reason="deadline")
            if event["time_s"] > healed
        ]
        assert whole_s < 3 * DEADLINE_S, whole_s
        assert late == []
        skipped = [event for event in net.events(slow, "RoundsSkipped") if event["time_s"] > healed]
        assert sum(event["round"] - event["first"] for event in skipped) > 16
        check_ledgers(net)


def _round(net: Network, name: str) -> int:
    return net.events(name, "Merged")[-1]["round"]
