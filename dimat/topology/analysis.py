"""How fast a topology mixes: spectral gap, rounds to consensus, traffic and other figures.

Consensus error after t rounds of mixing alone: ‖X(t) − x̄(t)‖ / ‖X(0) − x̄(0)‖ (Frobenius norm), X(t) = W(t) X(t-1), x̄
the mean over agents, X(0) Gaussian from a seed, n × 64. With doubly stochastic weights x̄ never moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.seeds import numpy_generator
from dimat.topology.distances import Distance, longest_distance
from dimat.topology.rounds import Schedule

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

COLUMNS = 64
"""Columns of the Gaussian start: many, so that counts depend little on the seed."""
DENSE = 2000
"""Most agents for which spectra are computed from dense matrices."""
SLOW = 600
"""Agents above which a spectrum that is not real is looked for by Arnoldi's method instead of computed whole."""
ARNOLDI = 32
"""Vectors of its subspace."""
WORK = 5e9
"""Products of numbers that running rounds may take in a summary: some seconds."""
DRAWING = 16
"""Times that a round which is drawn anew costs as much as one that is only run."""
FEW_ROUNDS = 200
"""Rounds that are cheaper to run than a spectrum is to compute."""
SAMPLED_ROUNDS = 16
"""Rounds over which averages are taken where a schedule has no period."""


def lambda_2(schedule: Schedule) -> float | None:
    """Return the second largest modulus of W's eigenvalues; None for schedules without a period.

    For a time-varying schedule of period T it is |lambda_2|^(1/T) of the product of its T matrices: the factor by
    which disagreement shrinks per round in the long run (0: finite-time exact). 0 for one agent. Up to 2,000 agents.
    Also None if W has complex eigenvalues, is large, and Arnoldi's method does not find them within some seconds.
    """
    if schedule.period is None:
        return None
    if len(schedule.names) > DENSE:
        raise TopologyError(f"the spectral gap is computed for up to {DENSE} agents, there are {len(schedule.names)}")
    return _second_largest(_matrices(schedule))


def spectral_gap(schedule: Schedule) -> float | None:
    """Return 1 − lambda_2; None for schedules without a period."""
    second = lambda_2(schedule)
    return None if second is None else 1.0 - second


def rounds_bound(schedule: Schedule, tolerance: float = 1e-3) -> int | None:
    """Return ln(1/tolerance) / −ln lambda_2, rounded up: rounds that suffice from the worst start, if W is symmetric.

    None if there is no lambda_2, or it is 1 (no consensus). At least 1.
    """
    second = lambda_2(schedule)
    if second is None or second >= 1:
        return None
    return max(1, math.ceil(math.log(tolerance) / math.log(second))) if second > 0 else schedule.period


def rounds_to_consensus(
    schedule: Schedule, tolerance: float = 1e-3, seed: int = 0, max_rounds: int = 100_000
) -> int | None:
    """Return the first round after which the consensus error is at most `tolerance`; 0 for one agent.

    Rounds are run one by one; None if `max_rounds` do not suffice. Symmetric static weights of up to 2,000
    agents: beyond 200 rounds the count is found from their spectrum, however many it takes.
    """
    return _rounds(schedule, _matrices(schedule), tolerance, seed, max_rounds)


def _matrices(schedule: Schedule) -> list[csr_array]:
    """Return the mixing matrices of one period, none where there is no period."""
    return [schedule.sparse_mixing(number) for number in range(1, (schedule.period or 0) + 1)]


def _rounds(
    schedule: Schedule, matrices: Sequence[csr_array], tolerance: float, seed: int, max_rounds: int
) -> int | None:
    n = len(schedule.names)
    if n == 1:
        return 0
    start = numpy_generator(seed, "consensus").standard_normal((n, COLUMNS))
    symmetric = len(matrices) == 1 and n <= DENSE and bool(abs(matrices[0] - matrices[0].T).max() < 1e-12)
    most = min(max_rounds, FEW_ROUNDS) if symmetric else max_rounds
    found = _by_running(schedule, matrices, start, tolerance, most)
    if found is None and symmetric:
        found = _from_spectrum(matrices[0].toarray(), start, tolerance)
    return found


def _second_largest(matrices: Sequence[csr_array]) -> float | None:
    """Return the second largest modulus of the eigenvalues of a product of matrices, its T-th root for T of them."""
    import numpy as np

    if matrices[0].shape[0] == 1:
        return 0.0
    weights = matrices[0].toarray()
    for each in matrices[1:]:
        weights = _as_dense(each) @ weights
    moduli = _moduli(weights)
    if moduli is None:
        return None
    second = float(np.sort(moduli)[-2])
    second = 0.0 if second < 1e-12 else second  # a product of exact averages leaves rounding only
    return min(second ** (1 / len(matrices)), 1.0)


def _as_dense(weights: csr_array) -> Any:
    """Return weights in the form whose products are faster: dense where many of them are not zero."""
    return weights.toarray() if weights.nnz * 8 > weights.shape[0] ** 2 else weights


def _moduli(weights: NDArray[np.float64]) -> NDArray[Any] | None:
    """Return the absolute values of all eigenvalues or of the largest few, in no order; None where they are not
    found."""
    import numpy as np

    first = weights[0]
    if all(np.array_equal(weights[i], np.roll(first, i)) for i in range(len(weights))):
        return np.abs(np.fft.fft(first))  # circulant, as rings and exponential graphs are
    similar = _symmetrised(weights)
    if similar is not None:
        return np.abs(np.linalg.eigvalsh(similar))
    return np.abs(np.linalg.eigvals(weights)) if len(weights) <= SLOW else _largest(weights)


def _symmetrised(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return a symmetric matrix with the same eigenvalues, for weights that are symmetric or those of a reversible
    chain: pi_i W_ij = pi_j W_ji for some pi, as with "uniform" and "samples" on undirected graphs; else None."""
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order

    if ((weights > 0) != (weights.T > 0)).any():
        return None
    order, before = breadth_first_order(csr_array(weights), 0)
    if len(order) < len(weights):
        return None
    root_of_pi = np.ones(len(weights))
    for i in order[1:]:
        root_of_pi[i] = root_of_pi[before[i]] * math.sqrt(weights[before[i], i] / weights[i, before[i]])
    similar = weights * (root_of_pi[:, None] / root_of_pi[None, :])
    return similar if np.allclose(similar, similar.T, rtol=1e-12, atol=1e-15) else None


def _largest(weights: NDArray[np.float64]) -> NDArray[Any] | None:
    """Return the absolute values of the largest eigenvalues by Arnoldi's method (ARPACK, Lehoucq et al. 1998)."""
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, eigs

    start = numpy_generator(0, "arnoldi").standard_normal(len(weights))
    restarts = max(10, int(WORK / 4 / (ARNOLDI * weights.size)))
    try:
        found = eigs(weights, k=4, ncv=ARNOLDI, v0=start, maxiter=restarts, return_eigenvectors=False)
    except ArpackNoConvergence:
        return None
    return np.abs(found)


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


def _by_running(
    schedule: Schedule,
    matrices: Sequence[csr_array],
    start: NDArray[np.float64],
    tolerance: float,
    max_rounds: int,
) -> int | None:
    import numpy as np

    goal = tolerance * float(np.linalg.norm(start - start.mean(axis=0)))
    kept = [_as_dense(each) for each in matrices]
    values = start
    for number in range(1, max_rounds + 1):
        weights = kept[(number - 1) % len(kept)] if kept else schedule.sparse_mixing(number)
        values = weights @ values
        if float(np.linalg.norm(values - values.mean(axis=0))) <= goal:
            return number
    return None


def models_sent(schedule: Schedule) -> float:
    """Return the models that an agent sends per round, the mean over agents and one period (or 16 rounds)."""
    rounds = schedule.period or SAMPLED_ROUNDS
    sent = sum(len(targets) for number in range(1, rounds + 1) for targets in schedule.links(number).targets)
    return sent / rounds / len(schedule.names)


@dataclass(frozen=True)
class Summary:
    """The figures of a topology; None if a figure does not exist (or is not computed: over 2,000 agents)."""

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
    diameter_from: int
    """Agents from which the diameter was looked for; fewer than all: it is a lower bound."""
    models_sent: float
    """Per agent and round."""
    lambda_2: float | None
    spectral_gap: float | None
    rounds_to_consensus: int | None
    """Rounds until the consensus error is 1e-3, from a Gaussian start."""
    rounds_tried: int
    """Rounds that were run to find it, at most; 0: none."""
    doubly_stochastic: bool
    """Whether merging keeps the network's mean (round 1)."""


def summarise(schedule: Schedule, graph: nx.Graph[str] | None = None, max_rounds: int = 10_000) -> Summary:
    """Return the figures of a schedule, within about a minute for networks of up to a million links.

    `graph` is the union of its links, made here if it is not given. Figures that would take longer are sampled or left
    out, and the summary says so: `diameter_from`, `rounds_tried`.
    """
    import numpy as np

    n = len(schedule.names)
    rounds = schedule.period or SAMPLED_ROUNDS
    heard = [len(sources) for number in range(1, rounds + 1) for sources in schedule.links(number).sources]
    matrices = _matrices(schedule) if n <= DENSE else []
    opening = matrices[0] if matrices else schedule.sparse_mixing(1)
    second = _second_largest(matrices) if matrices else None
    links, directed, distance = _shape(schedule, graph)
    tried = 0
    if n <= DENSE:
        entries = max(each.nnz for each in matrices) if matrices else DRAWING * opening.nnz
        tried = min(max_rounds, max(SAMPLED_ROUNDS, int(WORK / (entries * COLUMNS))))
    return Summary(
        agents=n,
        links=links,
        directed=directed,
        period=schedule.period,
        min_peers=min(heard),
        max_peers=max(heard),
        diameter=distance.links,
        diameter_from=distance.starts if not distance.exact else n,
        models_sent=models_sent(schedule),
        lambda_2=second,
        spectral_gap=None if second is None else 1.0 - second,
        rounds_to_consensus=_rounds(schedule, matrices, 1e-3, 0, tried) if tried else None,
        rounds_tried=tried,
        doubly_stochastic=bool(np.allclose(np.asarray(opening.sum(axis=0)), 1.0, rtol=0, atol=1e-9)),
    )


def _shape(schedule: Schedule, graph: nx.Graph[str] | None) -> tuple[int, bool, Distance]:
    """Return the number of links that are ever used, whether they go one way, and the diameter."""
    n = len(schedule.names)
    if graph is None and schedule.any_pair:  # as many as they are, they need not be made to be counted
        directed = schedule.links(1).directed
        return n * (n - 1) // (1 if directed else 2), directed, Distance(min(1, n - 1), True, n)
    union = schedule.union() if graph is None else graph
    return union.number_of_edges(), union.is_directed(), longest_distance(union)
