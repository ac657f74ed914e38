"""Who contributed what. Reference: linear algebra on symbolic vectors, carried along with random histories of merges:
one coordinate per initial network and one per round of training, mixed as the merges mix."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.agent.lineage.lineage import Lineage, append_record, lineage, read_records
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.events import Contribution, MergeResult

Symbol = tuple[str, int]  # (agent, 0): its first network; (agent, n): what its training of round n added
Vector = dict[Symbol, float]


def plus(*terms: tuple[float, Vector]) -> Vector:
    total: Vector = {}
    for weight, vector in terms:
        for symbol, value in vector.items():
            total[symbol] = total.get(symbol, 0.0) + weight * value
    return total


@dataclass
class History:
    """Agents that train, publish and merge in any order; `models` are their weights as symbolic vectors."""

    models: dict[str, Vector] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    published: dict[Symbol, tuple[str, Vector]] = field(default_factory=dict)
    untrained: set[Symbol] = field(default_factory=set)
    records: list[MergeRecord] = field(default_factory=list)
    merged: dict[Symbol, Vector] = field(default_factory=dict)

    def begin(self, agent: str, at: int = 0) -> None:
        """With an initial network of its own, after round `at` of a network that lives already."""
        self.models[agent] = {(agent, 0): 1.0}
        self.rounds[agent] = at

    def adopt(self, agent: str, peer: Symbol) -> None:
        root, vector = self.published[peer]
        self.models[agent], self.rounds[agent] = dict(vector), peer[1]
        self.merged[agent, peer[1]] = dict(vector)
        whole = Contribution(agent=peer[0], snapshot=root, round=peer[1], weight=1.0, verdict="adopted")
        self.records.append(MergeRecord(agent, peer[1], "", (whole,), kind="join"))

    def train(self, agent: str, skipped: int = 0, learn: bool = True) -> Symbol:
        """Train and publish; `skipped`: rounds that are left out."""
        number = self.rounds[agent] + 1 + skipped
        self.rounds[agent] = number
        if learn:
            self.models[agent] = plus((1.0, self.models[agent]), (1.0, {(agent, number): 1.0}))
        else:
            self.untrained.add((agent, number))
        self.published[agent, number] = (f"snapshot of {agent} {number}", dict(self.models[agent]))
        return agent, number

    def merge(self, agent: str, peers: dict[Symbol, float], *, durable: bool = True) -> None:
        """Merge published snapshots, with weights of self and peers that sum to 1. Without `durable` a crash undoes
        it: only the record stays."""
        own: Symbol = (agent, self.rounds[agent])
        weights = {own: 1.0 - sum(peers.values()), **peers}
        parts = tuple(
            Contribution(agent=who, snapshot=self.published[who, n][0], round=n, weight=weight)
            for (who, n), weight in weights.items()
        )
        learned = own not in self.untrained
        self.records.append(MergeRecord(*own, self.published[own][0], parts, trained=learned))
        if durable:
            self.models[agent] = plus(*((weight, self.published[part][1]) for part, weight in weights.items()))
            self.merged[own] = dict(self.models[agent])


def shares(draw: st.DrawFn, parts: list[Symbol]) -> dict[Symbol, float]:
    """Draw weights for peers' snapshots; what is left of 1 is for self."""
    numbers = [draw(st.integers(0, 4)) for _ in parts]
    whole = sum(numbers) + draw(st.integers(0, 4)) or 1
    return {part: number / whole for part, number in zip(parts, numbers, strict=True)}


@st.composite
def synchronous(draw: st.DrawFn) -> History:
    """Rounds in step: some agents are late or gone, newcomers adopt or align, merges are undone by crashes and made
    again, and the last rounds merge without training."""
    agents = "abcd"[: draw(st.integers(1, 4))]
    history = History()
    late = {agent: draw(st.integers(2, 4)) for agent in agents[1:] if draw(st.booleans())}
    gone = {agent: draw(st.integers(1, 5)) for agent in agents if draw(st.integers(0, 3)) == 0}
    for agent in agents:
        if agent not in late:
            history.begin(agent)
    for number in range(1, draw(st.integers(1, 6)) + 1):
        for agent, first in late.items():
            if first == number:
                before = [key for key in history.published if key[1] == number - 1]
                if before and draw(st.booleans()):
                    history.adopt(agent, draw(st.sampled_from(before)))
                else:
                    history.begin(agent, number - 1)
        up = [a for a in agents if history.rounds.get(a) == number - 1 and gone.get(a, 99) > number]
        trained = [history.train(agent, learn=number < 5) for agent in up]
        mergers = [agent for agent in up if draw(st.integers(0, 9))]  # else it is gone before it merges
        gone.update({agent: number for agent in up if agent not in mergers})
        for agent in mergers:
            others = [part for part in trained if part[0] != agent and draw(st.booleans())]
            if draw(st.integers(0, 4)) == 0:
                history.merge(agent, shares(draw, others[:1]), durable=False)
            history.merge(agent, shares(draw, others))
    return history


@st.composite
def asynchronous(draw: st.DrawFn) -> History:
    """Any agent goes on at any time and merges whatever others have published, of rounds behind and ahead of its own;
    rounds are skipped, newcomers adopt."""
    agents = "abcd"[: draw(st.integers(1, 4))]
    history = History()
    history.begin("a")
    for _ in range(draw(st.integers(1, 15))):
        agent = draw(st.sampled_from(agents))
        known = sorted(history.published)
        if agent not in history.models:
            if known and draw(st.booleans()):
                history.adopt(agent, draw(st.sampled_from(known)))
            else:
                history.begin(agent)
            continue
        history.train(agent, skipped=draw(st.sampled_from([0, 0, 0, 2])))
        newest = {who: max(n for w, n in history.published if w == who) for who, _ in history.published}
        others = [(who, n) for who, n in newest.items() if who != agent and draw(st.booleans())]
        if draw(st.integers(0, 5)) == 0:
            history.merge(agent, shares(draw, others[:1]), durable=False)
        history.merge(agent, shares(draw, others))
    return history


def equal(found: Lineage, expected: Vector) -> None:
    initial = {agent: value for (agent, number), value in expected.items() if not number and value}
    updates = {symbol: value for symbol, value in expected.items() if symbol[1] and value}
    assert {k: v for k, v in found.initial.items() if v} == pytest.approx(initial, abs=1e-12)
    assert {k: v for k, v in found.updates.items() if v} == pytest.approx(updates, abs=1e-12)


@settings(max_examples=300)
@given(st.one_of(synchronous(), asynchronous()))
def test_lineage_is_the_linear_algebra_of_the_merges(history: History) -> None:
    """Every model of random histories: the weights of initial networks and of each round of training are the
    coordinates of its symbolic vector; those of initial networks sum to 1, and so do the agents' shares."""
    last: dict[str, int] = {}
    for (agent, number), vector in history.merged.items():
        found = lineage(history.records, agent, number)
        equal(found, vector)
        assert sum(found.initial.values()) == pytest.approx(1, abs=1e-12)
        assert all(0 <= weight <= 1 + 1e-12 for weight in (*found.initial.values(), *found.updates.values()))
        parts = found.shares()
        assert not parts or sum(parts.values()) == pytest.approx(1, abs=1e-12)
        last[agent] = max(last.get(agent, 0), number)
    for agent, number in last.items():
        assert lineage(history.records, agent) == lineage(history.records, agent, number)


@settings(max_examples=50)
@given(synchronous(), st.randoms(use_true_random=False))
def test_the_order_of_agents_in_the_ledger_does_not_matter(history: History, chance: Any) -> None:
    """Agents write at any time: only the order of one agent's own records of a round counts."""
    where = {id(record): chance.random() for record in history.records}
    mixed = sorted(history.records, key=lambda record: (record.round, chance.random() and where[id(record)]))
    for agent, number in history.merged:
        own = [r for r in history.records if (r.agent, r.round) == (agent, number)]
        places = [i for i, r in enumerate(mixed) if (r.agent, r.round) == (agent, number)]
        for place, record in zip(places, own, strict=True):
            mixed[place] = record
    for (agent, number), vector in history.merged.items():
        equal(lineage(mixed, agent, number), vector)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────
def record(agent: str, number: int, *parts: tuple[str, int, float], **more: Any) -> MergeRecord:
    listed = tuple(Contribution(agent=a, snapshot=f"{a}{n}", round=n, weight=w) for a, n, w in parts)
    return MergeRecord(agent, number, f"{agent}{number}", listed, **more)


def test_two_agents_by_hand() -> None:
    """a₁ = ½(a₀ + τa₁) + ½(b₀ + τb₁), b alone; a₂ = ¾(a₁ + τa₂) + ¼(b₁ + τb₂)."""
    records = [
        record("a", 1, ("a", 1, 0.5), ("b", 1, 0.5)),
        record("b", 1, ("b", 1, 1.0)),
        record("a", 2, ("a", 2, 0.75), ("b", 2, 0.25)),
        record("b", 2, ("b", 2, 1.0)),
    ]
    found = lineage(records, "a")
    assert found.initial == {"a": 0.375, "b": 0.625}
    assert found.updates == {("a", 1): 0.375, ("a", 2): 0.75, ("b", 1): 0.625, ("b", 2): 0.25}
    assert found.shares() == pytest.approx({"a": 1.125 / 2, "b": 0.875 / 2})
    assert lineage(records, "b") == Lineage({"b": 1.0}, {("b", 1): 1.0, ("b", 2): 1.0})
    assert lineage(records, "a", 1).initial == {"a": 0.5, "b": 0.5}


def test_a_newcomer_that_adopts_has_nothing_of_its_own_first_network() -> None:
    """c takes over b's snapshot of round 1: all of it counts for a and b, what c trains from then on for c."""
    records = [
        record("b", 1, ("b", 1, 1.0)),
        record("c", 1, ("b", 1, 1.0), kind="join"),
        record("c", 2, ("c", 2, 1.0)),
    ]
    assert lineage(records, "c", 1) == Lineage({"b": 1.0}, {("b", 1): 1.0})
    assert lineage(records, "c") == Lineage({"b": 1.0}, {("b", 1): 1.0, ("c", 2): 1.0})


def test_a_round_without_training_counts_for_nobody() -> None:
    """A final merge moves weights, and trains nothing."""
    records = [record("a", 1, ("a", 1, 1.0)), record("a", 2, ("a", 2, 1.0), trained=False)]
    assert lineage(records, "a").updates == {("a", 1): 1.0}


def test_the_last_record_of_a_round_counts() -> None:
    """A crash between record and checkpoint: the merge was made again, with whom was heard then."""
    lost, kept = record("a", 1, ("a", 1, 0.5), ("b", 1, 0.5)), record("a", 1, ("a", 1, 1.0))
    assert lineage([lost, kept], "a").initial == {"a": 1.0}
    assert lineage([kept, lost], "a").initial == {"a": 0.5, "b": 0.5}


def test_a_long_history_needs_no_deep_stack() -> None:
    """2,000 rounds of two agents that mix in halves: both come to the mean of their first networks at once."""
    records = [record(a, n, ("a", n, 0.5), ("b", n, 0.5)) for n in range(1, 2001) for a in "ab"]
    found = lineage(records, "a")
    assert found.initial == pytest.approx({"a": 0.5, "b": 0.5})
    assert len(found.updates) == 4000


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "no record of a merge of a in round 0"),
        ([record("b", 1, ("b", 1, 1.0))], "no record of a merge of a in round 0"),
        (
            [replace(record("b", 1, ("b", 1, 1.0)), snapshot="other"), record("a", 1, ("a", 1, 0.5), ("b", 1, 0.5))],
            "the records disagree about b's snapshot of round 1: other… and b1…",
        ),
        (
            [record("a", 1, ("a", 1, 0.5), ("b", 2, 0.5)), record("b", 1, ("b", 1, 0.5), ("a", 2, 0.5))],
            "depend on each other in a circle",
        ),
        ([record("a", 2, ("a", 3, 1.0))], "depend on each other in a circle"),
    ],
    ids=["empty", "stranger", "disagreement", "circle of two", "circle of one"],
)
def test_records_that_cannot_be(records: list[MergeRecord], said: str) -> None:
    """DataError in one line, that names the agents."""
    with pytest.raises(DataError) as caught:
        lineage(records, "a")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────
MANY = [
    record(
        "a",
        1,
        ("a", 1, 1 / 3),
        ("b", 1, 2 / 3),
        result=MergeResult(refused={"c": "fc.weight: not finite"}, accepted=0.5),
    ),
    record("lab-ä", 1, ("lab-ä", 1, 1.0), trained=False),
    record("a", 2, ("b", 2, 1.0), kind="join"),
]


@pytest.mark.parametrize("durable", [True, False])
def test_a_ledger_reads_back_as_written(tmp_path: Path, durable: bool) -> None:
    """read ∘ append = identity, to the last bit of a weight."""
    for each in MANY:
        append_record(tmp_path / "ledger", each, durable=durable)
    assert read_records(tmp_path / "ledger") == MANY
    assert len((tmp_path / "ledger").read_text().splitlines()) == 3


def test_a_torn_last_line_loses_itself_alone(tmp_path: Path) -> None:
    """kill -9 at every byte of the last record: all before are read, and what is written next is too."""
    ledger = tmp_path / "ledger"
    for each in MANY:
        append_record(ledger, each)
    whole = ledger.read_bytes()
    first = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(first, len(whole)):
        ledger.write_bytes(whole[:cut])
        # the newline alone missing: the record is whole
        kept = MANY if cut == len(whole) - 1 else MANY[:2]
        if _text(whole[:cut]):
            assert read_records(ledger) == kept
        append_record(ledger, MANY[0])
        if _text(whole[:cut]):
            assert read_records(ledger) == [*kept, MANY[0]]


def _text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _spoiled(change: Callable[[dict[str, Any]], object]) -> str:
    values = MANY[0].to_dict()
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "5",
        "null",
        "[1]",
        _spoiled(lambda v: v.pop("round")),
        _spoiled(lambda v: v.update(more=1)),
        _spoiled(lambda v: v.update(contributions=5)),
        _spoiled(lambda v: v.update(contributions=[{"agent": "a"}])),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    """JSON of something else is no torn line: DataError with file and line."""
    ledger = tmp_path / "ledger"
    append_record(ledger, MANY[0])
    with ledger.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"ledger, line 2: not a merge record") as caught:
        read_records(ledger)
    assert "\n" not in str(caught.value)


def test_a_ledger_of_other_bytes_says_what_to_do(tmp_path: Path) -> None:
    """No person writes a ledger: saving it in another encoding mends nothing."""
    (tmp_path / "ledger").write_bytes(random.Random(0).randbytes(3000))
    with pytest.raises(DataError, match=r"ledger holds no text \(byte \d+ is 0x..\); the file is damaged: put a copy"):
        read_records(tmp_path / "ledger")


def test_a_missing_ledger(tmp_path: Path) -> None:
    """DataError with the path, for both directions."""
    with pytest.raises(DataError, match=r"cannot read .*none"):
        read_records(tmp_path / "none")
    with pytest.raises(DataError, match="cannot write"):
        append_record(tmp_path / "no" / "folder", MANY[0])


def test_beyond_neighbours_it_ends_with_what_is_not_known() -> None:
    """On a path a - b - c, agent a has its own records and b's manifests, which name c's snapshots. Reference: all
    records, once the model of c that is not known is written out with what they tell of it."""
    a = [record("a", 1, ("a", 1, 0.5), ("b", 1, 0.5)), record("a", 2, ("a", 2, 0.5), ("b", 2, 0.5))]
    a.append(record("a", 3, ("a", 3, 0.5), ("b", 3, 0.5)))
    b = [record("b", n, ("b", n, 0.25), ("a", n, 0.5), ("c", n, 0.25)) for n in (1, 2)]
    c = [record("c", n, ("c", n, 0.5), ("b", n, 0.5)) for n in (1, 2)]
    whole = lineage([*a, *b, *c], "a")
    part = lineage([*a, *b], "a", starts={("b", 1): 0, ("b", 2): 1, ("b", 3): 2})
    assert part.earlier == {("c", 1): pytest.approx(0.0625 + 0.03125), ("c", 2): pytest.approx(0.125)}
    assert sum(part.initial.values()) + sum(part.earlier.values()) == pytest.approx(1)
    # c's model as it went into round 2 is that of its merge of round 1; into round 1, its first network
    before_two = lineage([*a, *b, *c], "c", 1)
    for key, weight in whole.updates.items():
        of_c = part.earlier["c", 2] * before_two.updates.get(key, 0.0)
        assert part.updates.get(key, 0.0) + of_c == pytest.approx(weight)
    for agent, weight in whole.initial.items():
        told = part.initial.get(agent, 0.0) + part.earlier["c", 2] * before_two.initial.get(agent, 0.0)
        assert told + (part.earlier["c", 1] if agent == "c" else 0.0) == pytest.approx(weight)


def test_a_gap_in_what_is_told_is_not_bridged() -> None:
    """Of b only the manifest of round 3 was fetched, which started from its merge of round 2; nothing of round 1 is
    taken for what round 5 started from."""
    a = [record("a", 5, ("a", 5, 0.5), ("b", 5, 0.5))]
    b = [record("b", 2, ("b", 2, 1.0))]
    assert lineage([*a, *b], "a", starts={("b", 3): 2}).earlier == {("b", 5): 0.5}
    assert lineage([*a, *b], "a", starts={("b", 3): 2, ("b", 5): 4}).earlier == {("b", 5): 0.5}
