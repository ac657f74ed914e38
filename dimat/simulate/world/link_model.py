"""Links in virtual time: when, if at all, a message or snapshot arrives.

Nothing is really sent.

A small control message takes a link's latency. A snapshot is asked for (latency), waits for the publisher's uplink
and for the link in its direction, takes its size over the narrower of the two, and travels (latency). The uplink is
busy for size / uplink alone: where the link is narrower, the network beyond the uplink holds what is on its way.
Transfers over one link direction follow one another in the order of their requests, lost ones with all their
attempts; on the uplink a transfer takes the first gap that it fits into. All times are booked when a transfer is
requested; if one is given up, the transfers that its publisher has not yet begun are planned anew (`replan`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from dimat.config import LinkConfig, NetworkConfig, Span
from dimat.errors import ConfigError, unknown_agent
from dimat.seeds import numpy_generator

BYTES_PER_MBIT = 125_000.0


@dataclass(slots=True)
class Transfer:
    """The course of a transfer.

    `arrives_s`: virtual time at which its last byte arrives, or None, and then `failed_s` is the time at which the
    reader gives up; `bytes_sent`: bytes of all attempts, also of lost ones. `route` (publisher, reader), `asked_s`,
    `size`: the request; `latency_s`: latency of the link; `legs`: for each attempt, the times at which its first and
    last bytes are sent. Without legs everything arrives at once.
    """

    arrives_s: float | None
    bytes_sent: int
    attempts: int
    failed_s: float | None = None
    route: tuple[str, str] = field(default=("", ""), compare=False)
    asked_s: float = field(default=0.0, compare=False)
    size: int = field(default=0, compare=False)
    latency_s: float = field(default=0.0, compare=False)
    legs: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]], compare=False)

    @property
    def ends_s(self) -> float:
        """The time at which the reader has it, or gives up."""
        end = self.arrives_s if self.arrives_s is not None else self.failed_s
        assert end is not None
        return end

    def sent(self, now: float) -> int:
        """Return how many bytes have been sent by `now`, also in lost attempts."""
        return sum(self._passed(leg, now) for leg in self.legs) if self.legs else self.bytes_sent

    def there(self, now: float) -> int:
        """Return how many bytes have reached the reader by `now`; a lost attempt brings none."""
        if self.arrives_s is None:
            return 0
        return self.size if now >= self.arrives_s else self._passed(self.legs[-1], now - self.latency_s)

    def _passed(self, leg: tuple[float, float], now: float) -> int:
        start, end = leg
        if now >= end:
            return self.size
        return 0 if now <= start else int(self.size * ((now - start) / (end - start)))


@dataclass(slots=True)
class _Uplink:
    """An agent's uplink: its rate in bytes/s and the times at which it is busy, as sorted disjoint intervals."""

    rate: float
    starts: list[float]
    ends: list[float]

    def forget(self, now: float) -> None:
        """Drop the intervals that are over."""
        over = 0
        while over < len(self.ends) and self.ends[over] <= now:
            over += 1
        if over:
            del self.starts[:over], self.ends[:over]

    def clear(self) -> None:
        """Drop all intervals."""
        self.starts.clear()
        self.ends.clear()

    def reserve(self, ready: float, duration: float) -> float:
        """Take the first gap of this duration from `ready` on; return its start."""
        i = bisect_left(self.ends, ready)
        start = ready
        while i < len(self.starts) and start + duration > self.starts[i]:
            start = max(start, self.ends[i])
            i += 1
        end = start + duration
        joins_left = i > 0 and self.ends[i - 1] >= start
        joins_right = i < len(self.starts) and self.starts[i] <= end
        if joins_left and joins_right:
            self.ends[i - 1] = self.ends[i]
            del self.starts[i], self.ends[i]
        elif joins_left:
            self.ends[i - 1] = end
        elif joins_right:
            self.starts[i] = start
        else:
            self.starts.insert(i, start)
            self.ends.insert(i, end)
        return start


class Links:
    """The links between `agents`, of which every pair may communicate. Times are virtual seconds, sizes bytes.

    Values drawn from ranges depend only on `seed` and the agents' names, and each direction of a link draws its losses
    from a stream of its own: neither other links nor the order of calls over them change its behaviour. Calls come in
    order of `now`. A cut stops messages sent from then on; those already on their way arrive.
    Raises ConfigError for a configured link of an unknown agent.
    """

    def __init__(self, config: NetworkConfig, agents: Sequence[str], seed: int) -> None:
        self._config = config
        self._seed = seed
        self._special: dict[tuple[str, str], LinkConfig] = {}
        known = set(agents)
        for i, link in enumerate(config.links):
            for name in link.between:
                if name not in known:
                    raise ConfigError(unknown_agent(f"simulate.network.links[{i}]", name, agents))
            a, b = link.between
            self._special[(a, b) if a < b else (b, a)] = link
        self._instant = (
            config.latency_s == 0
            and config.bandwidth_mbit_s is None
            and config.uplink_mbit_s is None
            and config.loss == 0
            and not config.links
        )
        self._latencies: dict[tuple[str, str], float] = {}
        self._bandwidths: dict[tuple[str, str], float] = {}
        self._uplinks: dict[str, _Uplink] = {}
        self._free: dict[str, dict[str, float]] = {}  # by publisher and reader, when their link has nothing to send
        self._losses: dict[tuple[str, str], np.random.Generator] = {}
        self._cuts: dict[str, dict[str, int]] = {}

    # ── properties of a link ─────────────────────────────────────────────────────────────────────────────────
    def latency(self, a: str, b: str) -> float:
        """Return the one-way latency between two agents in seconds, the same in both directions."""
        pair = (a, b) if a < b else (b, a)
        special = self._special.get(pair)
        if special is not None and special.latency_s is not None:
            return special.latency_s
        span = self._config.latency_s
        if not isinstance(span, tuple):
            return span
        drawn = self._latencies.get(pair)
        if drawn is None:
            drawn = float(numpy_generator(self._seed, "network", "latency", *pair).uniform(*span))
            self._latencies[pair] = drawn
        return drawn

    def bandwidth(self, a: str, b: str) -> float:
        """Return the bandwidth of the link from `a` to `b` in bytes/s, inf if it is unlimited."""
        special = self._special.get((a, b) if a < b else (b, a))
        if special is not None and special.bandwidth_mbit_s is not None:
            return special.bandwidth_mbit_s * BYTES_PER_MBIT
        span = self._config.bandwidth_mbit_s
        if not isinstance(span, tuple):
            return math.inf if span is None else span * BYTES_PER_MBIT
        drawn = self._bandwidths.get((a, b))
        if drawn is None:
            drawn = log_uniform(span, self._seed, "network", "bandwidth", a, b) * BYTES_PER_MBIT
            self._bandwidths[a, b] = drawn
        return drawn

    def uplink(self, agent: str) -> float:
        """Return the total rate in bytes/s at which an agent can send, inf if it is unlimited."""
        if self._config.uplink_mbit_s is None:
            return math.inf
        return self._uplink(agent).rate

    def loss(self, a: str, b: str) -> float:
        """Return the probability that a message or transfer between two agents is lost."""
        special = self._special.get((a, b) if a < b else (b, a))
        return self._config.loss if special is None or special.loss is None else special.loss

    # ── partitions ───────────────────────────────────────────────────────────────────────────────────────────
    def cut(self, id: str, groups: Sequence[Collection[str]]) -> None:
        """Begin a partition: agents of different groups cannot reach each other; those in none form one more group."""
        self._cuts[id] = {agent: number for number, group in enumerate(groups) for agent in group}

    def heal(self, id: str) -> None:
        """End a partition; other partitions stay."""
        self._cuts.pop(id, None)

    def reachable(self, a: str, b: str) -> bool:
        """Return whether no partition lies between two agents now."""
        return all(group.get(a, -1) == group.get(b, -1) for group in self._cuts.values())

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────
    def message(self, now: float, sender: str, reader: str) -> float | None:
        """Return when a small message that is sent now arrives, after repeats of lost attempts.

        None: the agents cannot reach each other, or all attempts were lost.
        """
        if self._cuts and not self.reachable(sender, reader):
            return None
        if self._instant:
            return now
        lost = self._lost(sender, reader)
        if lost == self._config.attempts:
            return None
        return now + lost * self._config.retry_s + self.latency(sender, reader)

    def transfer(self, now: float, publisher: str, reader: str, size_bytes: int) -> Transfer:
        """Return the transfer of `size_bytes` that `reader` requests from `publisher` now.

        The reader notices a lost attempt when it should have arrived, and asks again `retry_s` later; across a
        partition nothing is sent, and each attempt costs it `retry_s`.
        """
        attempts = self._config.attempts
        if self._cuts and not self.reachable(publisher, reader):
            return Transfer(None, 0, attempts, now + attempts * self._config.retry_s)
        if self._instant:
            return Transfer(now, size_bytes, 1, size=size_bytes)
        lost = self._lost(publisher, reader)
        tries = min(lost + 1, attempts)
        latency = self.latency(publisher, reader)
        arrives = None if lost == attempts else now  # to be planned
        made = Transfer(arrives, tries * size_bytes, tries, None, (publisher, reader), now, size_bytes, latency)
        self._plan(now, made)
        return made

    def replan(self, now: float, publisher: str, asked: Sequence[Transfer]) -> None:
        """Plan a publisher's transfers anew after others were given up.

        Transfers that have begun continue, and the rest follow in the order of `asked`, as if there had been no other
        requests.
        """
        if self._instant:
            return
        self._free.pop(publisher, None)
        if publisher in self._uplinks:
            self._uplinks[publisher].clear()
        for transfer in asked:
            transfer.legs = [leg for leg in transfer.legs if leg[0] < now]
            for start, _ in transfer.legs:
                self._book(now, start, transfer)
        for transfer in asked:
            self._plan(now, transfer)

    def _plan(self, now: float, transfer: Transfer) -> None:
        """Book the attempts of a transfer that have not begun."""
        latency, retry = transfer.latency_s, self._config.retry_s
        while len(transfer.legs) < transfer.attempts:
            asked = transfer.legs[-1][1] + latency + retry if transfer.legs else transfer.asked_s
            transfer.legs.append(self._book(now, max(asked + latency, now), transfer))
        end = transfer.legs[-1][1] + latency
        if transfer.arrives_s is None:
            transfer.failed_s = end
        else:
            transfer.arrives_s = end

    def _book(self, now: float, ready: float, transfer: Transfer) -> tuple[float, float]:
        """Queue bytes that are requested at `ready`; return when the first one is sent, and the last one."""
        (publisher, reader), size = transfer.route, transfer.size
        bandwidth = self.bandwidth(publisher, reader)
        limited = self._config.uplink_mbit_s is not None
        if bandwidth == math.inf and not limited and self.loss(publisher, reader) == 0:
            return ready, ready  # nothing to wait for, not even another's repeats
        free = self._free.setdefault(publisher, {})
        start = max(ready, free.get(reader, ready))
        rate = bandwidth
        if limited:
            uplink = self._uplink(publisher)
            uplink.forget(now)
            start = uplink.reserve(start, size / uplink.rate)
            rate = min(bandwidth, uplink.rate)
        end = start + size / rate
        free[reader] = end
        return start, end

    def _uplink(self, agent: str) -> _Uplink:
        found = self._uplinks.get(agent)
        if found is None:
            span = self._config.uplink_mbit_s
            mbit = log_uniform(span, self._seed, "network", "uplink", agent) if isinstance(span, tuple) else span
            found = _Uplink(math.inf if mbit is None else mbit * BYTES_PER_MBIT, [], [])
            self._uplinks[agent] = found
        return found

    def _lost(self, sender: str, reader: str) -> int:
        """Draw how many attempts are lost before one succeeds; `attempts` if none does."""
        loss = self.loss(sender, reader)
        if loss == 0:
            return 0
        stream = self._losses.get((sender, reader))
        if stream is None:
            stream = numpy_generator(self._seed, "network", "loss", sender, reader)
            self._losses[sender, reader] = stream
        lost = 0
        while lost < self._config.attempts and stream.random() < loss:
            lost += 1
        return lost


def log_uniform(span: Span, seed: int, *path: str | int) -> float:
    """Return a plain number, or draw one log-uniformly from a range with the stream that `path` names."""
    if not isinstance(span, tuple):
        return span
    low, high = span
    drawn = math.exp(numpy_generator(seed, *path).uniform(math.log(low), math.log(high)))
    return min(max(drawn, low), high)
