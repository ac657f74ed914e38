"""Ledgers that are compacted. Reference: the lineage that the whole ledgers give."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dimat.agent.lineage.compaction import SUMMARY, Compaction, compact, read_summary
from dimat.agent.lineage.lineage import Lineage, append_record, lineage
from dimat.agent.lineage.manifest_log import ManifestLedger, dropped_of, peers_records, read_ledger, starts
from dimat.agent.lineage.verify import verify_ledger
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.events import Contribution
from dimat.ui.dashboard.record_reader import RecordReader
from dimat.ui.report.agent_summary import agent_lineage
from tests.net.keys import Authority, save

ABC = "abc"


@dataclass
class Gossip:
    """Three agents that merge with each other, and miss one another at times; `folder` has what a real agent's has."""

    folder: Path
    chance: float = 0.15
    even: bool = False
    random: random.Random = field(default_factory=lambda: random.Random(3))
    number: int = 0
    records: list[MergeRecord] = field(default_factory=list)
    parents: dict[str, tuple[Contribution, ...]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def own(self) -> Path:
        return self.folder / "lineage.jsonl"

    @property
    def manifests(self) -> Path:
        return self.folder / "manifests.jsonl"

    def rounds(self, count: int) -> None:
        """Make so many rounds."""
        for _ in range(count):
            self.number += 1
            parents = self.parents
            self.parents = {agent: tuple(self._merge(agent)) for agent in ABC}
            heard = {part.agent for part in self.parents["a"]}
            for peer in sorted(heard - {"a"}):
                self._vouch(peer, parents.get(peer, ()))
            for agent, parts in self.parents.items():
                record = MergeRecord(agent, self.number, f"{agent}{self.number:062x}", parts)
                self.records.append(record)
                if agent == "a":
                    append_record(self.own, record, durable=False)

    def _merge(self, agent: str) -> Iterator[Contribution]:
        others = [peer for peer in ABC if peer != agent and self.random.random() >= self.chance]
        shares = {peer: 1 / 3 if self.even else self.random.uniform(0.1, 0.4) for peer in others}
        for peer, weight in {agent: 1 - sum(shares.values()), **shares}.items():
            yield Contribution(agent=peer, snapshot=f"{peer}{self.number:062x}", round=self.number, weight=weight)

    def _vouch(self, peer: str, parents: tuple[Contribution, ...]) -> None:
        line = {
            "agent": peer,
            "round": self.number,
            "root": f"{peer}{self.number:062x}",
            "parents": [[part.agent, part.snapshot, part.round, part.weight] for part in parents],
            "manifest": f"{self.number:04x}",
            "signature": "00",
        }
        self.lines.append(json.dumps(line))
        with self.manifests.open("a") as file:
            file.write(self.lines[-1] + "\n")

    def whole(self) -> Lineage:
        """Return a's lineage by all its records and all manifests that it has ever had."""
        (self.folder / "all").mkdir(exist_ok=True)
        everything = self.folder / "all" / "manifests.jsonl"
        everything.write_text("\n".join(self.lines) + "\n")
        vouched = list(read_ledger(everything))
        own = [record for record in self.records if record.agent == "a"]
        peers = [record for record in peers_records(vouched) if record.agent != "a"]
        return lineage([*own, *peers], "a", starts=starts(vouched))


def same(one: Lineage, other: Lineage) -> None:
    for name in ("initial", "updates", "earlier"):
        assert dict(getattr(one, name)) == pytest.approx(dict(getattr(other, name)), rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("even", [False, True])
def test_lineage_is_what_it_was_however_often_ledgers_are_compacted(tmp_path: Path, even: bool) -> None:
    """After each of several compactions, and after the rounds that follow. With every peer in every merge the whole
    network is on record, and the summary is as exact as that."""
    gossip = Gossip(tmp_path, chance=0.0 if even else 0.15, even=even)
    for rounds in (7, 20, 3, 40):
        gossip.rounds(rounds)
        before = gossip.own.stat().st_size + gossip.manifests.stat().st_size
        assert compact("a", gossip.own, ManifestLedger(gossip.manifests))
        assert gossip.own.stat().st_size + gossip.manifests.stat().st_size < 0.7 * before
        same(agent_lineage(tmp_path, "a")[1], gossip.whole())
        gossip.rounds(5)
        made = agent_lineage(tmp_path, "a")[1]
        same(made, gossip.whole())
        assert sum(made.initial.values()) + sum(made.earlier.values()) == pytest.approx(1)
    if even:
        same(made, lineage(gossip.records, "a"))


def test_a_summary_stays_small_where_weights_come_to_rest(tmp_path: Path) -> None:
    """With even weights on a complete graph a round of training ends with the same share everywhere: a run of rounds is
    one entry, however long it is."""
    gossip = Gossip(tmp_path, chance=0.0, even=True)
    sizes: list[int] = []
    for _ in range(3):
        gossip.rounds(200)
        compact("a", gossip.own, ManifestLedger(gossip.manifests))
        sizes.append((tmp_path / SUMMARY).stat().st_size)
    assert max(sizes) < 5_000
    assert sizes[2] < 1.2 * sizes[1]


def test_ledgers_are_compacted_before_they_pass_their_bounds(tmp_path: Path) -> None:
    """The bound of either; what was dropped is counted, and the manifests that the records rest on are all there."""
    keys = tmp_path / "keys"
    save(Authority().issue("a"), keys)
    for name, most_own, most_manifests in (("own", 20_000, 10**9), ("manifests", 10**9, 40_000)):
        folder = tmp_path / name
        folder.mkdir()
        gossip = Gossip(folder)
        ledger = ManifestLedger(gossip.manifests, most_manifests)
        compaction = Compaction("a", gossip.own, ledger, most_own)
        done = 0
        for _ in range(150):
            gossip.rounds(1)
            done += compaction.look()
            assert gossip.own.stat().st_size <= most_own
            assert gossip.manifests.stat().st_size <= most_manifests
        assert done > 1
        head = dropped_of(gossip.manifests.read_text().splitlines()[0])
        assert head is not None
        assert head.lines + len(list(read_ledger(gossip.manifests))) == len(gossip.lines)
        same(agent_lineage(folder, "a")[1], gossip.whole())
        own = agent_lineage(folder, "a")[2]
        assert not [fault for fault in verify_ledger(gossip.manifests, keys, own).faults if "lineage.jsonl" in fault]


def test_the_dashboard_goes_by_the_summary_too(tmp_path: Path) -> None:
    """Also where the folders of all agents are there: their ledgers are not whole any more."""
    (tmp_path / "b").mkdir()
    gossip = Gossip(tmp_path)
    gossip.rounds(30)
    for record in gossip.records:
        if record.agent != "a":
            append_record(tmp_path / "b" / "lineage.jsonl", record, durable=False)
    compact("a", gossip.own, ManifestLedger(gossip.manifests))
    shown = RecordReader().lineage("a", tmp_path, [tmp_path, tmp_path / "b"])
    first = {row["agent"]: row["first"] for row in shown["contributors"]}
    assert {agent: share for agent, share in first.items() if share} == pytest.approx(dict(gossip.whole().initial))


def test_a_crash_in_between_loses_nothing(tmp_path: Path) -> None:
    """The summary is there, the records of before still are too; and a second try ends well."""
    gossip = Gossip(tmp_path)
    gossip.rounds(20)
    own, manifests = gossip.own.read_bytes(), gossip.manifests.read_bytes()
    compact("a", gossip.own, ManifestLedger(gossip.manifests))
    for file, data in ((gossip.manifests, manifests), (gossip.own, own)):
        file.write_bytes(data)
        same(agent_lineage(tmp_path, "a")[1], gossip.whole())
    compact("a", gossip.own, ManifestLedger(gossip.manifests))
    same(agent_lineage(tmp_path, "a")[1], gossip.whole())


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "models": [{}]}', '{"format": 2, "models": []}'])
def test_a_damaged_summary_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / SUMMARY).write_text(text)
    with pytest.raises(DataError, match=SUMMARY):
        read_summary(tmp_path / SUMMARY)


def test_a_single_round_is_left_alone(tmp_path: Path) -> None:
    gossip = Gossip(tmp_path)
    gossip.rounds(1)
    assert not compact("a", gossip.own, ManifestLedger(gossip.manifests))
    assert not (tmp_path / SUMMARY).exists()
