"""Consensus: with training off, agents agree as fast and on what the theory of averaging says.

Real round machines in the simulator's driver. They begin with the unit vectors, so their values after r rounds are
the product W(r) … W(1) of the mixing matrices: what holds for these holds for any start, as merging is linear.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimat import events
from dimat.config import NetworkConfig
from dimat.simulate.world.scenario import prepare
from dimat.topology import Schedule, list_graphs, list_mixings, list_schedules, push_sum_matrix
from tests.agent.network import Run, Values, make_schedule, round_plan, run
from tests.simulate.helpers import tiny_experiment

Config = dict[str, Any]

EXACT = 1e-12
"""The rounding of a few hundred merges stays below."""
GOAL = 1e-8
"""Disagreement at which runs end: far down, where the slowest mode is alone, and far above rounding."""
SLOPE = 0.02
"""How far a slope may be from theory, as a part of it. The project asks for 10 %."""

ONE_WAY = [[(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (0, 3), (1, 4)]]
"""A strongly connected directed graph of five, in- and out-degrees from 1 to 3."""
HALVES = [[(0, 1), (2, 3), (3, 4)], [(1, 2), (4, 0), (0, 3)]]
"""Two directed graphs in turn, strongly connected only together."""
PARTS = [[(0, 1), (2, 3), (4, 5)], [(1, 2), (3, 4)]]
"""Two undirected graphs in turn, connected only together."""
RING_5, RING_8, PATH_5 = ((1 + 2 * math.cos(angle * math.pi)) / 3 for angle in (2 / 5, 2 / 8, 1 / 5))
ONE_PEER_10 = max(math.prod(abs(math.cos(math.pi * m * 2**k / 10)) for k in range(4)) for m in range(1, 10)) ** (1 / 4)
"""|(1 + z^(2^k)) / 2| for z a tenth root of 1, over the four rounds of a period."""

# Doubly stochastic: what keeps the mean, and the factor by which disagreement shrinks per round, in closed form (the
# eigenvalues of circulants, paths, products and complete parts) or None: computed
KEPT: dict[str, tuple[Config, float | None]] = {
    "ring": ({"graph": "ring", "agents": 8}, RING_8),
    "path": ({"graph": "path", "agents": 5}, PATH_5),
    "star": ({"graph": "star"}, 1 - 1 / 6),
    "torus": ({"graph": "torus", "agents": 9}, (3 - 1) / 5),
    "hypercube": ({"graph": "hypercube", "agents": 8}, (3 - 1) / (3 + 1)),
    "exponential": ({"graph": "exponential", "agents": 10}, 1 - 0.4),  # the gap of peers.md
    "bipartite": ({"graph": "bipartite", "agents": 7}, 1 - 3 / 5),
    "random-regular": ({"graph": "random-regular", "agents": 8, "options": {"degree": 3}}, None),
    "erdos-renyi": ({"graph": "erdos-renyi", "agents": 8}, None),
    "watts-strogatz": ({"graph": "watts-strogatz", "agents": 9}, None),
    "two-clusters": ({"graph": "two-clusters"}, None),
    "max-degree": ({"graph": "erdos-renyi", "agents": 8, "mixing": "max-degree"}, None),
    "lazy": ({"graph": "ring", "agents": 5, "weights": {"lazy": 0.25}}, 0.25 + 0.75 * RING_5),
    "uniform, regular": ({"graph": "ring", "agents": 5, "mixing": "uniform"}, RING_5),
    "one-peer-exponential": ({"agents": 10, "schedule": "one-peer-exponential"}, ONE_PEER_10),
    "cycle": ({"schedule": "cycle", "draws": {"graphs": ["ring", "star", "path"]}}, None),
    "cycle of parts": ({"edges": PARTS, "directed": False}, None),
}
AT_ONCE: dict[str, Config] = {
    "complete": {"graph": "complete"},
    "one-peer-exponential": {"agents": 8, "schedule": "one-peer-exponential"},
    **{
        f"base-{k + 1} of {n}": {"agents": n, "schedule": "base-k", "draws": {"k": k}}
        for n in (5, 7, 8, 10, 12)
        for k in (1, 2, 3)
    },
}
# Row-stochastic only, and the weights of the mean that they agree on: in closed form or None, computed
MATRIX = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]
TILTED: dict[str, tuple[Config, tuple[float, ...] | None]] = {
    "star, uniform": ({"graph": "star", "mixing": "uniform"}, (6, 2, 2, 2, 2, 2)),
    "path, uniform": ({"graph": "path", "agents": 5, "mixing": "uniform"}, (2, 3, 3, 3, 2)),
    "ring, samples": ({"graph": "ring", "agents": 4, "mixing": "samples", "samples": (1, 2, 3, 4)}, (1, 2, 3, 4)),
    "star, samples": ({"graph": "star", "agents": 4, "mixing": "samples", "samples": (9, 1, 2, 8)}, (9, 1, 2, 8)),
    "matrix": ({"graph": "path", "agents": 3, "mixing": "matrix", "weights": {"values": MATRIX}}, (1, 2, 1)),
    "one-way, uniform": ({"agents": 5, "edges": ONE_WAY, "mixing": "uniform"}, None),
    "one-way, metropolis": ({"agents": 5, "edges": ONE_WAY}, None),
    "one-way halves, uniform": ({"agents": 5, "edges": HALVES, "mixing": "uniform"}, None),
}
# Without a period; and the factor by which the square of the disagreement shrinks per round, in expectation
DRAWN: dict[str, tuple[Config, float | None]] = {
    "matching of 6": ({"schedule": "random-matching"}, 4 / 10),
    "matching of 7": ({"agents": 7, "schedule": "random-matching"}, 1 / 2),
    "matching on a torus": ({"graph": "torus", "agents": 9, "schedule": "random-matching"}, None),
    "epidemic of 6": ({"schedule": "epidemic", "draws": {"s": 2}}, (1 - (3 / 5) ** 6) / 2 - 1 / 5),
    "epidemic of 7": ({"agents": 7, "schedule": "epidemic", "draws": {"s": 1}}, 1 - (5 / 6) ** 7 - 1 / 6),
    "epidemic on a torus": ({"graph": "torus", "agents": 9, "schedule": "epidemic", "draws": {"s": 2}}, None),
}
EXPECTED = [name for name, (_, rate) in DRAWN.items() if rate is not None]
PUSHED: dict[str, Config] = {
    "one-way": {"agents": 5, "edges": ONE_WAY},
    "one-way halves": {"agents": 5, "edges": HALVES},
    "exponential": {"graph": "exponential"},
    "star": {"graph": "star"},
    "lazy": {"agents": 5, "edges": ONE_WAY, "weights": {"lazy": 0.25}},
}
CASES: dict[str, Config] = {
    **{f"kept: {name}": config for name, (config, _) in KEPT.items()},
    **{f"at once: {name}": config for name, config in AT_ONCE.items()},
    **{f"tilted: {name}": config for name, (config, _) in TILTED.items()},
    **{f"drawn: {name}": config for name, (config, _) in DRAWN.items()},
    **{f"pushed: {name}": {**config, "mixing": "push-sum"} for name, config in PUSHED.items()},
}


def labels(*kinds: str) -> list[str]:
    return [label for label in CASES if label.partition(":")[0] in kinds]


@cache
def schedule(label: str) -> Schedule:
    return make_schedule(**CASES[label])


def matrix(label: str, number: int) -> Values:
    """Return W of a round; for push-sum the column-stochastic A, which says what share of the weight goes where."""
    if label not in labels("pushed"):
        return schedule(label).mixing(number)
    lazy = CASES[label].get("weights", {}).get("lazy", 0.0)
    return lazy * np.eye(len(schedule(label).names)) + (1 - lazy) * push_sum_matrix(schedule(label).graph(number))


def products(label: str, rounds: int) -> Values:
    """Return by round the product of all matrices so far; rows are divided by their sums, 1 except for push-sum."""
    found = [np.eye(len(schedule(label).names))]
    for number in range(1, rounds + 1):
        found.append(matrix(label, number) @ found[-1])
    return np.array([whole / whole.sum(axis=1, keepdims=True) for whole in found])


def period(label: str) -> int:
    """Return the rounds after which the matrices repeat; what is drawn never does."""
    return len(CASES[label].get("edges", [()])) if label in labels("pushed") else schedule(label).period or 0


@cache
def theory(label: str) -> tuple[float, Values]:
    """Return the factor by which disagreement shrinks per round, and the weights of the mean that all tend to.

    P, the product of a period, has the simple eigenvalue 1 with left vector l and right vector r; where P is doubly
    stochastic r l / (l r) is J. The weights are l, the factor is the spectral radius of P − r l / (l r).
    """
    whole = np.eye(len(schedule(label).names))
    for number in range(1, period(label) + 1):
        whole = matrix(label, number) @ whole
    left, right = fixed(whole.T), fixed(whole)
    rest = whole - np.outer(right, left) / (left @ right)
    return float(abs(np.linalg.eigvals(rest)).max()) ** (1 / period(label)), left / left.sum()


def fixed(whole: Values) -> Values:
    values, vectors = np.linalg.eig(whole)
    return vectors[:, abs(values - 1).argmin()].real


@cache
def result(label: str) -> Run:
    """Run until disagreement has fallen to GOAL; two periods of what averages at once, 40 rounds of what is drawn."""
    if label in labels("drawn"):
        return run(schedule(label), 40)
    at_once = label in labels("at once")
    cycles = 2 if at_once else math.ceil(math.log(GOAL) / math.log(theory(label)[0]) / period(label))
    return run(schedule(label), cycles * period(label))


# ── lossless networks ────────────────────────────────────────────────────────────────────────────────────────────────
def test_all_graphs_schedules_and_mixings_are_tried() -> None:
    """Reference: the registries. A new entry fails here until it has a case."""
    for key, default, entries in (
        ("graph", "", list_graphs()),
        ("schedule", "static", list_schedules()),
        ("mixing", "metropolis", list_mixings()),
    ):
        assert {entry.name for entry in entries} <= {config.get(key, default) for config in CASES.values()}


@pytest.mark.parametrize("label", CASES)
def test_values_are_the_product_of_the_matrices(label: str) -> None:
    """Law: x(r) = W(r) … W(1) x(0), in every round; with push-sum A(r) … A(1), rows divided by their sums."""
    got = result(label)
    assert abs(got.values - products(label, len(got.values) - 1)).max() <= EXACT
    assert not [fact for fact in got.facts if isinstance(fact, events.PeerLate | events.RoundsSkipped | events.Warned)]


@pytest.mark.parametrize("label", labels("kept", "tilted", "pushed"))
def test_disagreement_decays_at_the_spectral_rate(label: str) -> None:
    """Reference: per round ln ‖x − mean‖ falls by the logarithm of the spectral radius of (product of a period −
    its limit), where the limit is J for doubly stochastic matrices; in closed form where KEPT has one.

    The slope is that of the run's second half, where the slowest mode is alone, at the ends of periods.
    """
    radius, _ = theory(label)
    if label in labels("kept"):
        assert radius == pytest.approx(KEPT[label.partition(": ")[2]][1] or radius, rel=1e-9)
    spread = result(label).spread[:: period(label)]
    rounds = np.arange(len(spread)) * period(label)
    half = len(spread) // 2
    slope = np.polyfit(rounds[half:], np.log(spread[half:]), 1)[0]
    assert slope == pytest.approx(math.log(radius), rel=SLOPE)


@pytest.mark.parametrize("label", labels("kept", "at once") + [one for one in labels("drawn") if "matching" in one])
def test_doubly_stochastic_weights_keep_the_mean(label: str) -> None:
    """Law: the columns of W sum to 1, so the mean stays, here 1/n in each column, in every round."""
    means = result(label).values.mean(axis=1)
    assert abs(means - 1 / means.shape[1]).max() <= EXACT


@pytest.mark.parametrize("label", labels("at once"))
def test_exact_average_in_one_period(label: str) -> None:
    """Reference: Takezawa et al. 2023 (Base-(k+1): any n, at most k peers a round), Ying et al. 2021 (one-peer
    exponential, n a power of two), one merge on a complete graph. Not before the period's last round, and it stays."""
    got, rounds = result(label), period(label)
    assert got.spread[rounds - 1] > 0.1
    assert abs(got.values[rounds:] - 1 / len(schedule(label).names)).max() <= EXACT
    fetched = [(fact.agent, fact.round) for fact in got.facts if isinstance(fact, events.SnapshotFetched)]
    assert max(map(fetched.count, fetched)) <= CASES[label].get("draws", {"k": 5})["k"]


@pytest.mark.parametrize("label", labels("tilted"))
def test_row_stochastic_weights_agree_on_a_weighted_mean(label: str) -> None:
    """Reference: the left Perron vector of a period's product, which every period keeps. By detailed balance it is
    ∝ d + 1 for "uniform" on undirected graphs, and ∝ the counts for "samples". It is not the plain mean."""
    known, weights = TILTED[label.partition(": ")[2]][1], theory(label)[1]
    if known is not None:
        weights = np.array(known) / sum(known)
    got = result(label).values[:: period(label)]
    assert abs(got[-1] - weights).max() <= 2 * GOAL
    assert abs(weights @ got - weights).max() <= EXACT
    assert abs(weights - 1 / len(weights)).max() > 0.01


@cache
def draws(name: str) -> list[Values]:
    return [run(make_schedule(**DRAWN[name][0], seed=seed), 30).values for seed in range(16)]


@pytest.mark.parametrize("name", EXPECTED)
def test_drawn_schedules_decay_at_the_expected_rate(name: str) -> None:
    """Reference: there is no period and no spectrum, but an expected square. No agent is special, so whatever x is,
    E‖x(r + 1) − x̄(r)‖² = b ‖x(r) − x̄(r)‖² with b = (E‖W‖² − 1) / (n − 1). That is (n − 2) / (2n − 2) for matchings
    of an even n and 1/2 of an odd n, and (1 − (1 − s / (n − 1))^n) / s − 1 / (n − 1) for epidemics, where the number
    of senders that an agent hears is binomial (De Vos et al. 2023 need the same for EL-Local).

    The slope of ln ‖x − mean‖ is half the logarithm of b; b is measured as the mean of 16 seeds × 30 rounds.
    """
    found = [
        np.linalg.norm(after - before.mean(axis=0)) ** 2 / np.linalg.norm(before - before.mean(axis=0)) ** 2
        for values in draws(name)
        for before, after in pairwise(values)
    ]
    assert math.log(np.mean(found)) / 2 == pytest.approx(math.log(DRAWN[name][1]) / 2, rel=0.1)


@pytest.mark.parametrize("name", [name for name in EXPECTED if "epidemic" in name])
def test_epidemics_agree_on_a_mean_of_drawn_weights(name: str) -> None:
    """Law: the rows of a product of row-stochastic matrices tend to one row, weights that the draw decides. They are
    not 1/n, but as no agent is special their expectation is: the mean of 16 draws within 4 standard errors."""
    agreed = np.array([values[-1, 0] for values in draws(name)])
    off = agreed - 1 / agreed.shape[1]
    assert max(abs(values[-1] - values[-1, 0]).max() for values in draws(name)) < 1e-3
    assert abs(agreed.sum(axis=1) - 1).max() <= EXACT
    assert abs(off).max(axis=1).min() > 0.01
    assert (abs(off.mean(axis=0)) < 4 * off.std(axis=0, ddof=1) / math.sqrt(len(off))).all()


# ── push-sum ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("label", labels("pushed"))
def test_push_sum_reaches_the_true_mean(label: str) -> None:
    """Law (Kempe et al. 2003): Σ y x and Σ y are kept in every round, nothing stays under way, and all tend to the
    mean, also on the directed graphs where row-stochastic weights miss it."""
    got = result(label)
    agents = got.weight.shape[1]
    assert abs(got.values[-1] - 1 / agents).max() <= 2 * GOAL
    assert abs(np.einsum("ri,rid->rd", got.weight, got.values) - 1).max() <= EXACT
    assert abs(got.weight.sum(axis=1) - agents).max() <= EXACT
    assert abs(got.late).max() <= EXACT


@pytest.mark.parametrize("name", PUSHED)
def test_rows_of_push_sum_are_what_agents_do(name: str) -> None:
    """Law: where nothing is lost, the weights that travel give the matrices that the schedule states."""
    for number, (before, after) in enumerate(pairwise(result(f"pushed: {name}").values), start=1):
        assert abs(schedule(f"pushed: {name}").mixing(number) @ before - after).max() <= EXACT


def test_push_sum_shares_are_those_of_experiments(tmp_path: Path) -> None:
    """Reference: the plan that the agents of an experiment follow. What is tested here is tested with their shares."""
    mixing = {"name": "push-sum", "options": {"lazy": 0.25}}
    scenario = prepare(tiny_experiment(tmp_path, topology={"graph": "star", "agents": 4, "mixing": mixing}))
    for agent in scenario.agents:
        assert round_plan(scenario.schedule.first.schedule, agent, 2) == scenario.schedule.round_plan(agent, 2)


# ── lossy networks ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("label", ["kept: ring", "pushed: one-way", "pushed: one-way halves"])
def test_delays_change_nothing(label: str) -> None:
    """Law: a synchronous round waits for its snapshots. Where messages take up to five rounds, and are repeated until
    they come through, values are those of a network that loses nothing, bit for bit."""
    network = NetworkConfig(latency_s=(0.0, 5.0), loss=0.3, attempts=60)
    assert (run(schedule(label), 20, network=network).values == result(label).values[:21]).all()


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("label", labels("pushed"))
def test_bias_of_push_sum_is_what_came_late(label: str, attempts: int) -> None:
    """Law, derived here. There is always n of weight, held or under way: Σ y + Σ late = n. A share that its reader
    misses is not lost: it is taken in with the publisher's next snapshot that comes through, and then counts for that
    one's numbers, which have moved. So, with what is under way reckoned at what its publisher offers now,

        Σ_i y_i(r) x_i(r) + Σ_ij late_ij(r) x_i(r − 1) = Σ_i x_i(0) + Σ_{q < r} Σ_ij late_ij(q) (x_i(q) − x_i(q − 1)),

    and what all agree on in the end is the mean plus 1/n of the last sum: the bias that lost messages leave.
    """
    network = NetworkConfig(loss=0.1, attempts=attempts, retry_s=0.1)
    got = run(schedule(label), 120, network=network, deadline_s=2.0, keep=2)
    agents = got.weight.shape[1]
    assert any(isinstance(fact, events.PeerLate) for fact in got.facts)
    assert abs(got.weight.sum(axis=1) + got.late.sum(axis=(1, 2)) - agents).max() <= EXACT
    assert got.late.min() >= -EXACT

    offered, late = got.values[:-1], got.late[1:]  # in round r agents offer what they had after round r - 1
    whole = np.einsum("ri,rid->rd", got.weight[1:], got.values[1:]) + np.einsum("rij,rid->rd", late, offered)
    moved = np.einsum("rij,rid->rd", late[:-1], np.diff(offered, axis=0)).cumsum(axis=0)
    assert abs(whole[0] - 1).max() <= EXACT
    assert abs(whole[1:] - 1 - moved).max() <= EXACT

    bias = got.values[-1] - 1 / agents
    assert got.spread[-1] <= GOAL
    assert abs(bias - moved[-1] / agents).max() <= 2 * GOAL
    assert 1e-4 < abs(bias).max() * agents < 1  # as a part of the mean


def test_bias_of_fixed_weights_is_what_was_missed() -> None:
    """Law: the weight of a peer that was missed goes to self, W_ii + W_ij. So a round moves the mean by
    Σ W_ij (x_i − x_j) / n over all that were missed, and what both ends of a link miss cancels."""
    plan = schedule("kept: ring")
    got = run(plan, 60, network=NetworkConfig(loss=0.1, attempts=1), deadline_s=2.0)
    assert not any(isinstance(fact, events.RoundsSkipped) for fact in got.facts)
    used = np.array([plan.mixing(number) for number in range(1, 61)])
    drift = np.zeros((60, 8))
    for fact in (fact for fact in got.facts if isinstance(fact, events.PeerLate)):
        at, i, j = fact.round - 1, plan.names.index(fact.agent), plan.names.index(fact.peer)
        weight = plan.mixing(fact.round)[i, j]
        used[at, i, [i, j]] += weight, -weight
        drift[at] += weight * (got.values[at, i] - got.values[at, j]) / 8
    assert abs(used @ got.values[:-1] - got.values[1:]).max() <= EXACT
    means = got.values.mean(axis=1)
    assert abs(np.diff(means, axis=0) - drift).max() <= EXACT
    assert abs(means[-1] - 1 / 8).max() > 0.01
