"""How fast a topology mixes: spectral gap, rounds to consensus, diameter, traffic.

Consensus error after t rounds of mixing alone: ‖X(t) − x̄(t)‖ / ‖X(0) − x̄(0)‖ (Frobenius norm), X(t) = W(t) X(t-1), x̄
the mean over agents, X(0) Gaussian from a seed, n × 64. With doubly stochastic weights x̄ never moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.seeds import numpy_generator
from dimat.topology.rounds import Schedule

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = 64
"""Columns of the Gaussian start: many, so that counts depend little on the seed."""
DENSE = 2000
"""Most agents for which spectra are computed from dense matrices."""
FEW_ROUNDS = 200
"""Rounds that are cheaper to run than a spectrum is to compute."""
SAMPLED_ROUNDS = 16
"""Rounds over which averages are taken where a schedule has no period."""


def lambda_2(schedule: Schedule) -> float | None:
    """Return the second largest modulus of W's eigenvalues; None for schedules without a period.

    A time-varying schedule of period T counts with the product of its T matrices, |lambda_2|^(1/T): the factor by
    which disagreement shrinks per round in the long run (0: finite-time exact). 0 for one agent. Up to 2,000 agents.
    """
    import numpy as np

    n = len(schedule.names)
    if schedule.period is None:
        return None
    if n == 1:
        return 0.0
    if n > DENSE:
        raise TopologyError(f"the spectral gap is computed for up to {DENSE} agents, there are {n}")
    weights = schedule.mixing(1)
    for number in range(2, schedule.period + 1):
        weights = schedule.mixing(number) @ weights
    second = float(np.sort(_moduli(weights))[-2])
    second = 0.0 if second < 1e-12 else second  # a product of exact averages leaves rounding only
    return min(second ** (1 / schedule.period), 1.0)


def spectral_gap(schedule: Schedule) -> float | None:
    """Return 1 − lambda_2; None for schedules without a period."""
    second = lambda_2(schedule)
    return None if second is None else 1.0 - second


def rounds_bound(schedule: Schedule, tolerance: float = 1e-3) -> int | None:
    """Return ln(1/tolerance) / −ln lambda_2, rounded up: rounds that suffice from the worst start, if W is symmetric.

    None where there is no lambda_2, or it is 1 (no consensus). At least 1.
    """
    second = lambda_2(schedule)
    if second is None or second >= 1:
        return None
    return max(1, math.ceil(math.log(tolerance) / math.log(second))) if second > 0 else schedule.period


def rounds_to_consensus(
    schedule: Schedule, tolerance: float = 1e-3, seed: int = 0, max_rounds: int = 100_000
) -> int | None:
    """Return the first round after which the consensus error is at most `tolerance`; 0 for one agent.

    Rounds are run one by one, sparse; None if `max_rounds` do not suffice. Symmetric static weights of up to 2,000
    agents: beyond 200 rounds the count is found from their spectrum, however many it takes.
    """
    n = len(schedule.names)
    if n == 1:
        return 0
    start = numpy_generator(seed, "consensus").standard_normal((n, COLUMNS))
    symmetric = False
    if schedule.period == 1 and n <= DENSE:
        weights = schedule.mixing(1)
        symmetric = bool(abs(weights - weights.T).max() < 1e-12)
    found = _by_running(schedule, start, tolerance, min(max_rounds, FEW_ROUNDS) if symmetric else max_rounds)
    if found is None and symmetric:
        found = _from_spectrum(schedule.mixing(1), start, tolerance)
    return found


def _moduli(weights: NDArray[np.float64]) -> NDArray[Any]:
    """Return the eigenvalues' absolute values, in no order."""
    import numpy as np

    first = weights[0]
    if all(np.array_equal(weights[i], np.roll(first, i)) for i in range(len(weights))):
        return np.abs(np.fft.fft(first))  # circulant, as rings and exponential graphs are
    if abs(weights - weights.T).max() < 1e-12:
        return np.abs(np.linalg.eigvalsh(weights))
    return np.abs(np.linalg.eigvals(weights))


def _from_spectrum(weights: NDArray[np.float64], start: NDArray[np.float64], tolerance: float) -> int | None:
    """Bisect error(t)² = sum_k c_k lambda_k^(2t) / sum_k c_k, which never grows; c_k the start's share in mode k."""
    import numpy as np

    values, vectors = np.linalg.eigh(weights)
    sizes = np.abs(values[:-1])  # the last one is 1, of the constant vector, which the centred start does not hold
    shares = ((vectors[:, :-1].T @ (start - start.mean(axis=0))) ** 2).sum(axis=1)
    shares = shares / shares.sum()

    def error(rounds: int) -> float:
        return math.sqrt(float((shares * sizes ** (2.0 * rounds)).sum()))

    high = 1
    while error(high) > tolerance:
        high *= 2
        if high > 1 << 50:  # disconnected or periodic: some mode never shrinks
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) > tolerance else (low, middle)
    return high


def _by_running(schedule: Schedule, start: NDArray[np.float64], tolerance: float, max_rounds: int) -> int | None:
    import numpy as np

    goal = tolerance * float(np.linalg.norm(start - start.mean(axis=0)))
    period = schedule.period
    kept = [schedule.sparse_mixing(number) for number in range(1, period + 1)] if period else []
    values = start
    for number in range(1, max_rounds + 1):
        weights = kept[(number - 1) % len(kept)] if kept else schedule.sparse_mixing(number)
        values = weights @ values
        if float(np.linalg.norm(values - values.mean(axis=0))) <= goal:
            return number
    return None


def diameter(graph: nx.Graph[str]) -> int:
    """Return the longest shortest path in links, along their direction where they have one; TopologyError if some
    agent does not reach some other."""
    import networkx as nx
    import numpy as np
    from scipy.sparse.csgraph import dijkstra

    matrix = nx.to_scipy_sparse_array(graph, weight=None, format="csr").astype(np.float64)
    longest = 0.0
    for at in range(0, matrix.shape[0], 256):  # in blocks: all pairs at once would not fit for large networks
        block = np.arange(at, min(at + 256, matrix.shape[0]))
        longest = max(longest, float(dijkstra(matrix, unweighted=True, indices=block).max()))
    if math.isinf(longest):
        raise TopologyError("the graph is not connected: it has no diameter")
    return int(longest)


def models_sent(schedule: Schedule) -> float:
    """Return the models that an agent sends per round, the mean over agents and one period (or 16 rounds)."""
    rounds = schedule.period or SAMPLED_ROUNDS
    sent = sum(len(targets) for number in range(1, rounds + 1) for targets in schedule.links(number).targets)
    return sent / rounds / len(schedule.names)


@dataclass(frozen=True)
class Summary:
    """A topology in figures; None where a figure does not exist (or is not computed: over 2,000 agents)."""

    agents: int
    links: int
    """Undirected links, or one-way ones where `directed`, that are ever used."""
    directed: bool
    """Whether links go one way, in some round at least."""
    period: int | None
    min_peers: int
    max_peers: int
    """Fewest and most peers that an agent hears in one round."""
    diameter: int
    """Of the union of all rounds' links, along their direction: rounds until everybody can have heard of everybody,
    were all of them used in each. A schedule whose union is not connected, a directed one strongly, is never made."""
    models_sent: float
    """Per agent and round."""
    lambda_2: float | None
    spectral_gap: float | None
    rounds_to_consensus: int | None
    """Rounds until the consensus error is 1e-3, from a Gaussian start."""
    doubly_stochastic: bool
    """Whether merging keeps the network's mean (round 1)."""


def summarise(schedule: Schedule, graph: nx.Graph[str] | None = None, max_rounds: int = 10_000) -> Summary:
    """Return the figures of a schedule; `graph` is the union of its links, made here if it is not given."""
    import numpy as np

    union = schedule.union() if graph is None else graph
    rounds = schedule.period or SAMPLED_ROUNDS
    heard = [len(sources) for number in range(1, rounds + 1) for sources in schedule.links(number).sources]
    small = len(schedule.names) <= DENSE
    second = lambda_2(schedule) if small else None
    columns = np.asarray(schedule.sparse_mixing(1).sum(axis=0))
    return Summary(
        agents=len(schedule.names),
        links=union.number_of_edges(),
        directed=union.is_directed(),
        period=schedule.period,
        min_peers=min(heard),
        max_peers=max(heard),
        diameter=diameter(union),
        models_sent=models_sent(schedule),
        lambda_2=second,
        spectral_gap=None if second is None else 1.0 - second,
        rounds_to_consensus=rounds_to_consensus(schedule, max_rounds=max_rounds) if small else None,
        doubly_stochastic=bool(np.allclose(columns, 1.0, rtol=0, atol=1e-9)),
    )
