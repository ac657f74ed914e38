"""Schedules that change every round: one-peer exponential, random matching, epidemic.

Random rounds are derived from the seed and the round's number alone, through a hash and `random.random()`, whose
stream Python guarantees over versions: all agents of a network draw the same round, each on its own machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dimat.errors import TopologyError
from dimat.seeds import derive_seed
from dimat.topology.mixing import Links, Mixer, RowOf, links_of
from dimat.topology.rounds import Schedule

if TYPE_CHECKING:
    import networkx as nx


class OnePeerExponential(Schedule):
    """In round t agent i sends to i + 2^((t-1) mod tau) mod n only, tau = ceil(log2 n); receivers weigh it 1/2.

    Doubly stochastic; n = 2^tau: the exact average after tau rounds, else it is approached. Ying et al. 2021.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, max(1, (len(names) - 1).bit_length()))

    def _round(self, number: int) -> tuple[Links, RowOf]:
        n = len(self.names)
        if n == 1:
            return _alone(self.names)
        hop = 1 << (number - 1)
        links = Links(self.names, [((i - hop) % n,) for i in range(n)], [((i + hop) % n,) for i in range(n)])
        return links, Mixer("uniform").rows(links)


class RandomMatching(Schedule):
    """Every round pairs the agents at random (one sits out if n is odd); pairs average, weights by the mixing rule.

    With a base graph only its links are used: a random maximal matching of them.
    """

    def __init__(self, names: Sequence[str], seed: int, base: nx.Graph[str] | None, mixer: Mixer) -> None:
        super().__init__(names, None)
        self._seed, self._mixer = seed, mixer
        self._base = links_of(base) if base is not None else None
        if self._base is not None and self._base.directed:
            raise TopologyError("schedule 'random-matching' needs undirected links")
        self._at(1)

    def _round(self, number: int) -> tuple[Links, RowOf]:
        rng = random.Random(derive_seed(self._seed, "random-matching", number))
        n = len(self.names)
        partner: list[tuple[int, ...]] = [()] * n
        if self._base is None:
            order = sorted(range(n), key=lambda _: rng.random())
            pairs = list(zip(order[::2], order[1::2], strict=False))
        else:
            pairs = [(i, j) for i, others in enumerate(self._base.targets) for j in others if i < j]
            pairs.sort(key=lambda _: rng.random())
        for i, j in pairs:
            if not partner[i] and not partner[j]:
                partner[i], partner[j] = (j,), (i,)
        links = Links(self.names, partner, partner)
        return links, self._mixer.rows(links)

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        either = set(self._base.targets[i]) if self._base else set(range(len(self.names))) - {i}
        return either, either


class Epidemic(Schedule):
    """Every round each agent sends to `s` others drawn at random; receivers take the plain mean of what they hold.

    Row-stochastic: agents agree, on a random weighted mean near the average. With a base graph only its links are
    used. De Vos et al., Epidemic Learning, NeurIPS 2023.
    """

    def __init__(self, names: Sequence[str], seed: int, base: nx.Graph[str] | None, s: int) -> None:
        super().__init__(names, None)
        self._seed, self._s = seed, s
        self._base = links_of(base) if base is not None else None

    def _round(self, number: int) -> tuple[Links, RowOf]:
        rng = random.Random(derive_seed(self._seed, "epidemic", number))
        n = len(self.names)
        targets: list[list[int]] = []
        sources: list[list[int]] = [[] for _ in range(n)]
        for i in range(n):
            among = self._base.targets[i] if self._base else None
            count = n - 1 if among is None else len(among)
            picks = _distinct(rng, count, min(self._s, count))
            sent = [p + (p >= i) for p in picks] if among is None else [among[p] for p in picks]
            targets.append(sorted(sent))
            for j in sent:
                sources[j].append(i)
        links = Links(self.names, sources, targets)
        return links, Mixer("uniform").rows(links)

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        if self._base is None:
            either = set(range(len(self.names))) - {i}
            return either, either
        return set(self._base.sources[i]), set(self._base.targets[i])


def _distinct(rng: random.Random, count: int, size: int) -> list[int]:
    """Return `size` distinct numbers below `count` (Floyd's algorithm), from `random()` alone: its stream is stable."""
    picks: list[int] = []
    for top in range(count - size, count):
        pick = int(rng.random() * (top + 1))
        picks.append(top if pick in picks else pick)
    return picks


def _alone(names: tuple[str, ...]) -> tuple[Links, RowOf]:
    nobody: list[tuple[int, ...]] = [()] * len(names)
    links = Links(names, nobody, nobody)
    return links, Mixer("uniform").rows(links)
