"""Links in virtual time, against closed forms and laws: nothing is faster than its bandwidth, nothing overtakes."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.config import NetworkConfig
from dimat.errors import ConfigError
from dimat.simulate.world.link_model import Links, Transfer

AGENTS = tuple("abcdef")
MB = 1_000_000
MBIT = 125_000.0  # bytes


def links(seed: int = 0, **settings: Any) -> Links:
    return Links(NetworkConfig.model_validate(settings), AGENTS, seed)


def test_by_default_everything_is_there_at_once() -> None:
    """Reference: the settings' defaults. Ten thousand agents cost nothing before they talk, and little then."""
    made = links()
    assert (made.latency("a", "b"), made.bandwidth("a", "b"), made.uplink("a")) == (0, math.inf, math.inf)
    assert made.message(3.5, "a", "b") == 3.5
    assert made.transfer(3.5, "a", "b", MB) == Transfer(3.5, MB, 1)
    names = [f"agent-{i}" for i in range(10_000)]
    tracemalloc.start()
    large = Links(NetworkConfig(), names, 0)
    for name in names:
        large.message(0.0, name, names[0])
        large.transfer(0.0, name, names[0], MB)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 2 * MB


def test_one_transfer_by_hand() -> None:
    """Request 0.5 s, 1 MB = 8 Mbit at 2 Mbit/s 4 s, back 0.5 s; a narrower uplink (1 Mbit/s) makes it 8 s."""
    made = links(latency_s=0.5, bandwidth_mbit_s=2)
    assert made.message(10, "a", "b") == 10.5
    assert made.transfer(10, "a", "b", MB) == Transfer(15, MB, 1)
    assert links(latency_s=0.5, bandwidth_mbit_s=2, uplink_mbit_s=1).transfer(10, "a", "b", MB).arrives_s == 19
    assert links(latency_s=0.5, uplink_mbit_s=1).transfer(10, "a", "b", MB).arrives_s == 19


def test_queues_by_hand() -> None:
    """1 MB takes 4 s over a link (2 Mbit/s) and 1 s of an uplink (8 Mbit/s).

    Two over one link follow one another; the other direction and other links are free; one uplink serves its readers
    in turn; an uplink is busy for size / uplink only, whatever the link behind it does with the bytes.
    """
    made = links(bandwidth_mbit_s=2)
    times = [made.transfer(0, *pair, MB).arrives_s for pair in ("ab", "ab", "ba", "ac")]
    assert times == [4, 8, 4, 4]
    assert made.transfer(100, "a", "b", MB).arrives_s == 104
    made = links(uplink_mbit_s=8)
    assert [made.transfer(0, "a", reader, MB).arrives_s for reader in "bcd"] == [1, 2, 3]
    assert made.transfer(0, "b", "a", MB).arrives_s == 1
    made = links(uplink_mbit_s=8, bandwidth_mbit_s=2)
    assert [made.transfer(0, "a", reader, MB).arrives_s for reader in "bcb"] == [4, 5, 8]


def test_a_short_transfer_fits_before_one_that_starts_later() -> None:
    """An uplink is not kept idle for a reader that is far away, and nobody is promised the same moment twice."""
    made = links(uplink_mbit_s=8, links=[{"between": ["a", "b"], "latency_s": 10}])
    assert made.transfer(0, "a", "b", MB).arrives_s == 21  # on the uplink from 10 to 11
    assert made.transfer(1, "a", "c", MB).arrives_s == 2
    assert made.transfer(9.5, "a", "d", MB).arrives_s == 12  # does not fit before
    assert made.transfer(9.5, "a", "e", MB // 2).arrives_s == 10
    made = links(uplink_mbit_s=8, links=[{"between": ["a", "b"], "latency_s": 10}])
    assert [made.transfer(0, "a", reader, MB).arrives_s for reader in "cbd"] == [1, 21, 2]
    made = links(uplink_mbit_s=8, links=[{"between": ["a", "b"], "latency_s": 10}])
    sizes = {"b": 1, "c": 4, "d": 6, "e": 1}  # d fills what c and b leave to the last
    times = [made.transfer(0, "a", reader, size * MB).arrives_s for reader, size in sizes.items()]
    assert times == [21, 4, 10, 12]


def test_links_of_their_own() -> None:
    """What an entry leaves out is as everywhere; both directions are alike; inf is unlimited."""
    own = [
        {"between": ["b", "a"], "latency_s": 2},
        {"between": ["c", "d"], "bandwidth_mbit_s": math.inf, "loss": 0.25},
    ]
    made = links(latency_s=[0.1, 0.2], bandwidth_mbit_s=8, loss=0.5, links=own)
    assert (made.latency("a", "b"), made.latency("b", "a"), made.bandwidth("a", "b")) == (2, 2, MB)
    assert (made.bandwidth("d", "c"), made.loss("d", "c"), made.loss("a", "b")) == (math.inf, 0.25, 0.5)
    assert 0.1 <= made.latency("c", "d") <= 0.2
    with pytest.raises(ConfigError) as error:
        Links(NetworkConfig.model_validate({"links": own}), ["lab-a", "c", "d", "b"], 0)
    said = "simulate.network.links[0]: no agent 'a' in the topology; use one of its 4 agents, e.g. 'lab-a'"
    assert str(error.value) == said
    with pytest.raises(ConfigError, match="no agent 'lab-1' in the topology; did you mean 'lab-12'"):
        Links(NetworkConfig.model_validate({"links": [{"between": ["lab-1", "c"]}]}), ["lab-12", "c"], 0)


def test_ranges_are_drawn_as_they_say() -> None:
    """Latency: uniform, mean (low + high) / 2, one per link. Bandwidth, uplink: log-uniform, median √(low·high),
    one per direction and agent. Tolerances: four standard errors of 2,000 draws, fixed seed."""
    names = [f"agent-{i}" for i in range(2000)]
    config = NetworkConfig(latency_s=(0.1, 0.5), bandwidth_mbit_s=(1, 100), uplink_mbit_s=(1, 100))
    made = Links(config, names, 5)
    latencies = [made.latency(name, names[0]) for name in names[1:]]
    assert all(0.1 <= x <= 0.5 for x in latencies)
    assert sum(latencies) / len(latencies) == pytest.approx(0.3, abs=4 * 0.4 / math.sqrt(12 * 2000))
    assert latencies == [made.latency(names[0], name) for name in names[1:]]
    for values in (
        [made.bandwidth(name, names[0]) / MBIT for name in names[1:]],
        [made.uplink(name) / MBIT for name in names],
    ):
        assert all(1 <= x <= 100 for x in values)
        below = sum(x < 10 for x in values) / len(values)
        assert below == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
    assert made.bandwidth("agent-0", "agent-1") != made.bandwidth("agent-1", "agent-0")
    assert len({made.latency("agent-0", "agent-1"), Links(config, names, 6).latency("agent-0", "agent-1")}) == 2


@pytest.mark.parametrize("loss", [0.1, 0.5])
def test_losses_are_as_frequent_as_they_say(loss: float) -> None:
    """A message arrives after k lost attempts with probability p^k (1 - p), is lost with p^attempts; what it costs
    is k·retry_s. Tolerance: four standard errors of 4,000 draws, fixed seed."""
    made = links(loss=loss, attempts=3, retry_s=2, latency_s=0.25)
    outcomes = [made.message(0, "a", "b") for _ in range(4000)]
    for outcome, p in (
        (0.25, 1 - loss),
        (2.25, loss * (1 - loss)),
        (4.25, loss**2 * (1 - loss)),
        (None, loss**3),
    ):
        share = outcomes.count(outcome) / 4000
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))
    transfers = [made.transfer(t * 100, "c", "d", 1000) for t in range(4000)]
    lost = [t for t in transfers if t.arrives_s is None]
    assert len(lost) / 4000 == pytest.approx(loss**3, abs=4 * math.sqrt(loss**3 * (1 - loss**3) / 4000))
    assert all(t.bytes_sent == 1000 * t.attempts for t in transfers)
    assert all((t.failed_s is None) != (t.arrives_s is None) for t in transfers)


def test_lost_transfers_by_hand() -> None:
    """Each attempt: 0.5 s to ask, 1 s for 1 MB at 8 Mbit/s, 0.5 s back; 3 s to the next. It fails when the last
    attempt should have been there, or comes after those before."""
    made = links(loss=0.5, attempts=2, retry_s=3, latency_s=0.5, bandwidth_mbit_s=8)
    seen = {made.transfer(t * 100, "a", "b", MB).attempts for t in range(50)}
    assert seen == {1, 2}
    made = links(loss=0.5, attempts=2, retry_s=3, latency_s=0.5, bandwidth_mbit_s=8)
    for start in range(0, 5000, 100):
        done = made.transfer(start, "a", "b", MB)
        if done.arrives_s is None:
            assert (done.failed_s, done.attempts, done.bytes_sent) == (start + 2 + 3 + 2, 2, 2 * MB)
        else:
            assert done.arrives_s == start + 2 + (done.attempts - 1) * 5


def test_partitions() -> None:
    """Agents in no group form one more; several partitions hold at once; who cannot be reached sends nothing, and is
    given up after all attempts."""
    made = links(retry_s=2, attempts=3)
    made.cut("one", [("a", "b")])
    assert made.reachable("a", "b")
    assert made.reachable("c", "d")
    assert not made.reachable("a", "c")
    made.cut("two", [("a",), ("b", "c")])
    assert not made.reachable("a", "b")
    assert not made.reachable("c", "d")
    assert made.message(1, "a", "b") is None
    assert made.transfer(1, "a", "b", MB) == Transfer(None, 0, 3, 7)
    made.heal("one")
    assert made.reachable("d", "e")
    assert not made.reachable("a", "b")
    assert made.reachable("b", "c")
    made.heal("two")
    made.heal("never was")
    assert made.message(1, "a", "b") == 1


def test_what_was_sent_by_hand() -> None:
    """1 MB takes 4 s (2 Mbit/s) after a request of 0.5 s; a byte is there 0.5 s after it was sent. Of an attempt that
    is lost nothing is there."""
    sure = links(latency_s=0.5, bandwidth_mbit_s=2).transfer(10, "a", "b", MB)
    assert [sure.sent(t) for t in (10, 10.5, 11.5, 14.5, 20)] == [0, 0, MB // 4, MB, MB]
    assert [sure.there(t) for t in (11, 12, 14.5, 15)] == [0, MB // 4, MB * 7 // 8, MB]
    made = links(loss=0.5, attempts=2, retry_s=3, latency_s=0.5, bandwidth_mbit_s=8)
    for start in range(0, 5000, 100):
        done = made.transfer(start, "a", "b", MB)
        assert done.sent(start + 1) == MB // 2
        assert done.sent(done.ends_s) == done.bytes_sent
        assert done.there(start + 1.5) == (MB // 2 if done.attempts == 1 else 0)
        assert done.there(done.ends_s) == (MB if done.arrives_s is not None else 0)
    assert links().transfer(3.5, "a", "b", MB).there(3.5) == MB


def test_those_behind_an_abandoned_transfer_move_up() -> None:
    """By hand: 1 MB takes 1 s of an uplink. The first of three is given up halfway: the second, then the third follow
    from there; what has begun stays, and what is asked for later comes last."""
    made = links(uplink_mbit_s=8)
    first, second, third = (made.transfer(0, "a", reader, MB) for reader in "bcd")
    assert (first.ends_s, second.ends_s, third.ends_s) == (1, 2, 3)
    made.replan(0.5, "a", [second, third])
    assert (second.ends_s, third.ends_s) == (1.5, 2.5)
    made.replan(1.0, "a", [second])
    assert second.ends_s == 1.5
    assert made.transfer(1.0, "a", "b", MB).ends_s == 2.5
    assert made.transfer(1.0, "b", "a", MB).ends_s == 2, "other uplinks are as they were"


PAIRS = [(a, b) for a in AGENTS for b in AGENTS if a != b]
asked = st.lists(
    st.tuples(st.floats(0, 5), st.sampled_from(PAIRS), st.integers(0, 10 * MB)),
    min_size=1,
    max_size=40,
)
settings_of = st.fixed_dictionaries(
    {
        "latency_s": st.sampled_from([0, 0.1, (0.01, 3.0)]),
        "bandwidth_mbit_s": st.sampled_from([None, 10, (1, 100)]),
        "uplink_mbit_s": st.sampled_from([None, 20, (2, 200)]),
        "loss": st.sampled_from([0, 0.4]),
    }
)


@given(settings_of, asked, st.integers(0, 3))
def test_laws_of_transfers(settings: dict[str, Any], requests: list[Any], seed: int) -> None:
    """Nothing arrives before its bytes could: (arrival - asking) ≥ 2 latencies + bytes / rate, for every attempt;
    one link keeps the order of asking; and no link or uplink carries more than its rate: all that it carried since
    the first request fits between that and the last arrival."""
    made = links(seed, **settings)
    now = 0.0
    last: dict[tuple[str, str], float] = {}
    link_bytes: defaultdict[tuple[str, str], int] = defaultdict(int)
    uplink_bytes: defaultdict[str, int] = defaultdict(int)
    for wait, (publisher, reader), size in requests:
        now += wait
        done = made.transfer(now, publisher, reader, size)
        end = done.arrives_s if done.arrives_s is not None else done.failed_s
        assert end is not None
        rate = min(made.bandwidth(publisher, reader), made.uplink(publisher))
        latency = made.latency(publisher, reader)
        least = done.attempts * (2 * latency + size / rate) + (done.attempts - 1) * 1.0
        assert end - now >= least * (1 - 1e-9) - 1e-9
        assert done.bytes_sent == done.attempts * size
        assert end >= last.get((publisher, reader), 0.0) - 1e-9
        last[publisher, reader] = end
        link_bytes[publisher, reader] += done.bytes_sent
        uplink_bytes[publisher] += done.bytes_sent
    for (publisher, reader), carried in link_bytes.items():
        assert carried / made.bandwidth(publisher, reader) <= last[publisher, reader] * (1 + 1e-9) + 1e-9
    for publisher, carried in uplink_bytes.items():
        latest = max(end for (p, _), end in last.items() if p == publisher)
        assert carried / made.uplink(publisher) <= latest * (1 + 1e-9) + 1e-9


@given(asked, st.randoms(use_true_random=False))
def test_links_do_not_disturb_each_other(requests: list[Any], order: random.Random) -> None:
    """Law: with uplinks unlimited, what happens on a link depends on what is asked of it alone: any order of calls
    over links, and links that are left out, give the same draws."""
    settings = {"latency_s": (0.1, 1.0), "bandwidth_mbit_s": (1, 10), "loss": 0.4}
    by_pair: defaultdict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    together = links(3, **settings)
    now, outcomes = 0.0, defaultdict[tuple[str, str], list[Transfer]](list)
    for wait, pair, size in requests:
        now += wait
        by_pair[pair].append((now, size))
        outcomes[pair].append(together.transfer(now, *pair, size))
    pairs = list(by_pair)
    order.shuffle(pairs)
    apart = links(3, **settings)
    for pair in pairs[: len(pairs) // 2 + 1]:
        assert [apart.transfer(at, *pair, size) for at, size in by_pair[pair]] == outcomes[pair]


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3), st.sampled_from("bcdef")), min_size=1, max_size=30))
def test_an_uplink_serves_one_at_a_time(requests: list[tuple[float, float, str]]) -> None:
    """Law: with links unlimited, the times at which one agent sends do not overlap, whoever asks from how far."""
    own = [{"between": ["a", reader], "latency_s": i * 0.7} for i, reader in enumerate("bcdef")]
    made = links(uplink_mbit_s=8, links=own)
    now, busy = 0.0, list[tuple[float, float]]()
    for wait, seconds, reader in requests:
        now += wait
        done = made.transfer(now, "a", reader, round(seconds * MB))
        assert done.arrives_s is not None
        end = done.arrives_s - made.latency("a", reader)
        busy.append((end - round(seconds * MB) / MB, end))
    busy = sorted(slot for slot in busy if slot[1] > slot[0])
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(busy))


@given(settings_of, asked, st.integers(0, 3), st.floats(0, 60))
def test_planning_anew_changes_nothing_by_itself(
    settings: dict[str, Any], requests: list[Any], seed: int, later: float
) -> None:
    """Law: nothing having been given up, every transfer comes out as it was, whenever that is looked at."""
    made = links(seed, **settings)
    now, asked_for = 0.0, list[Transfer]()
    for wait, (_, reader), size in requests:
        now += wait
        if reader != "a":
            asked_for.append(made.transfer(now, "a", reader, size))
    before = [(t.arrives_s, t.failed_s, list(t.legs)) for t in asked_for]
    now += later
    made.replan(now, "a", [t for t in asked_for if t.ends_s >= now])
    assert [(t.arrives_s, t.failed_s, t.legs) for t in asked_for] == before


@given(settings_of, asked, st.integers(0, 3), st.data())
def test_what_is_given_up_before_it_begins_was_never_asked_for(
    settings: dict[str, Any], requests: list[Any], seed: int, data: st.DataObject
) -> None:
    """Law: all being asked for at once and some given up at once, the others fare as without them; and then no link
    or uplink serves two at a time."""
    settings = {**settings, "loss": 0}  # whose draws are those of the order of asking
    wanted = [(reader, size) for _, (_, reader), size in requests if reader != "a"]
    kept = [data.draw(st.booleans()) for _ in wanted]
    made, apart = links(seed, **settings), links(seed, **settings)
    all_of_them = [made.transfer(1.0, "a", reader, size) for reader, size in wanted]
    rest = [transfer for transfer, keep in zip(all_of_them, kept, strict=True) if keep]
    made.replan(1.0, "a", rest)
    assert rest == [
        apart.transfer(1.0, "a", reader, size) for (reader, size), keep in zip(wanted, kept, strict=True) if keep
    ]
