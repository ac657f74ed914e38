"""Base-(k+1) graphs: an exact average in finitely many rounds, with at most k peers each.

Takezawa, Sato, Bao, Niwa & Yamada, "Beyond Exponential Graph: Communication-Efficient Topologies for Decentralized
Learning via Finite-time Convergence", NeurIPS 2023, arXiv 2305.11420. Every round is undirected and its mixing matrix
symmetric and doubly stochastic; their product over one period is the matrix of all 1/n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from dimat.errors import TopologyError
from dimat.topology.mixing import RoundLinks, Row, RowOf
from dimat.topology.rounds import Schedule

Edge = tuple[int, int, float]
Rounds = list[list[Edge]]
"""Per round the undirected edges (i, j, W_ij); who has none keeps its weights."""


class BaseK(Schedule):
    """The Base-(k+1) graph: after every `period` rounds all agents hold the exact average (n = 1: a round alone)."""

    def __init__(self, names: Sequence[str], k: int = 1) -> None:
        if k < 1:
            raise TopologyError(f"option 'k' of schedule 'base-k' must be at least 1, not {k}")
        self._edges = base_k_rounds(len(names), k)
        super().__init__(names, max(1, len(self._edges)))

    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        rows: list[Row] = [{i: 1.0} for i in range(len(self.names))]
        for i, j, weight in self._edges[number - 1] if self._edges else ():
            for one, other in ((i, j), (j, i)):
                rows[one][other] = weight
                rows[one][one] -= weight
        others = [sorted(row.keys() - {i}) for i, row in enumerate(rows)]
        return RoundLinks(self.names, others, others), rows.__getitem__


def base_k_rounds(n: int, k: int) -> Rounds:
    """Return the rounds of the Base-(k+1) graph on n agents, the shortest over all n = d·q.

    d blocks of q agents reach their exact averages in parallel, then a hyper-hypercube across blocks (agents at the
    same position in each) averages these. d has no prime factor above k + 1; d = 1 is the plain construction.
    """
    divisors = [d for d in range(1, n + 1) if n % d == 0 and _factors(d, k + 1) is not None]
    d = min(divisors, key=lambda d: _length(n // d, k) + len(_factors(d, k + 1) or ()))
    q = n // d
    inner = _side_by_side(_simple(range(b * q, (b + 1) * q), k) for b in range(d))
    return inner + _side_by_side(_hyper_hypercube(range(place, n, q), k) for place in range(q))


@lru_cache(maxsize=4096)
def _factors(n: int, most: int) -> tuple[int, ...] | None:
    """Return n as a product of as few factors from 2 to `most` as can be, largest first; None if it is not one."""
    if n == 1:
        return ()
    best: tuple[int, ...] | None = None
    for factor in range(min(most, n), 1, -1):
        rest = _factors(n // factor, factor) if n % factor == 0 else None
        if rest is not None and (best is None or len(rest) + 1 < len(best)):
            best = (factor, *rest)
    return best


def _length(n: int, k: int) -> int:
    """Return the number of rounds of `_simple` without making them."""
    factors = _factors(n, k + 1)
    if factors is not None:
        return len(factors)
    first = _digits(n, k)[0]
    return len(_factors(first[0] * (k + 1) ** first[1], k + 1) or ()) + 1 + first[1]


def _digits(n: int, k: int) -> list[tuple[int, int]]:
    """Return n in base k + 1 as its non-zero digits (a, p), n = sum a·(k+1)^p, the largest p first."""
    digits: list[tuple[int, int]] = []
    power = 0
    while n:
        n, digit = divmod(n, k + 1)
        if digit:
            digits.append((digit, power))
        power += 1
    return digits[::-1]


def _hyper_hypercube(agents: Sequence[int], k: int) -> Rounds:
    """Return rounds that average agents whose number has no prime factor above k + 1: one factor a round.

    In a round of factor f, groups of f agents take their mean (all pairs linked with 1/f). Writing places in the
    mixed radix of the factors, the groups of a round are those that differ in one digit.
    """
    rounds: Rounds = []
    stride = 1
    for factor in _factors(len(agents), k + 1) or ():
        edges: list[Edge] = []
        for start in range(len(agents)):
            if start // stride % factor == 0:
                group = [agents[start + digit * stride] for digit in range(factor)]
                edges.extend((i, j, 1 / factor) for x, i in enumerate(group) for j in group[x + 1 :])
        rounds.append(edges)
        stride *= factor
    return rounds


def _simple(agents: Sequence[int], k: int) -> Rounds:
    """Return rounds that average any number of agents: the simple Base-(k+1) graph.

    n = sum_l a_l (k+1)^p_l, largest first, V_l the next a_l (k+1)^p_l agents. First every V_l takes its mean, in m
    rounds. In round m + l each agent of R = V_{l+1} ∪ … is paired with an own agent in each of the a_l equal parts of
    V_l, edge weight |V_l| / (a_l (|V_l| + |R|)): its value becomes the mean of V_l ∪ R, and so does the mean of every
    part, which a hyper-hypercube inside the part spreads.
    """
    if _factors(len(agents), k + 1) is not None:
        return _hyper_hypercube(agents, k)
    sets: list[tuple[int, int, Sequence[int]]] = []
    start = 0
    for a, p in _digits(len(agents), k):
        size = a * (k + 1) ** p
        sets.append((a, (k + 1) ** p, agents[start : start + size]))
        start += size
    means = [_hyper_hypercube(members, k) for _, _, members in sets]
    first = len(means[0])
    rounds = _side_by_side(means)
    end = 0
    for l, (a, part, members) in enumerate(sets[:-1], start=1):
        end += len(members)
        rest = agents[end:]
        weight = len(members) / (a * (len(members) + len(rest)))
        pairs = [(rest[x], members[which * part + x], weight) for which in range(a) for x in range(len(rest))]
        inside = _side_by_side(_hyper_hypercube(members[which * part : (which + 1) * part], k) for which in range(a))
        rounds = _side_by_side([rounds, [[] for _ in range(first + l - 1)] + [pairs, *inside]])
    return rounds


def _side_by_side(parts: Iterable[Rounds]) -> Rounds:
    """Return rounds in which each part does its own at the same time; shorter ones wait at the end."""
    merged: Rounds = []
    for part in parts:
        merged.extend([] for _ in range(len(part) - len(merged)))
        for number, edges in enumerate(part):
            merged[number].extend(edges)
    return merged
