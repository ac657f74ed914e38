"""A ledger of far more manifests than it remembers. Reference: the means of two agents by hand, and real signatures."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimat.agent.lineage.lineage import lineage
from dimat.agent.lineage.manifest_log import KNOWN, ManifestLedger, peers_records, read_ledger, starts
from dimat.agent.lineage.verify import verify_ledger
from dimat.agent.protocol.messages import MergeRecord
from dimat.events import Contribution
from dimat.net.manifest import seal
from dimat.net.pki.identity import Identity
from dimat.net.transport import Fetched
from dimat.weights.snapshot import Manifest, checksum
from tests.net.keys import Authority

ROUNDS = 8 * KNOWN


def root(agent: str, number: int) -> str:
    return checksum(f"{agent} {number}".encode()).root


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def published(signer: Identity, rounds: int) -> Iterator[Fetched]:
    """The snapshots of an agent that takes the mean with `a` every round."""
    for number in range(1, rounds + 1):
        before = tuple((agent, root(agent, number - 1), number - 1, 0.5) for agent in ("a", signer.name))
        manifest = Manifest(
            run="run",
            agent=signer.name,
            round=number,
            basis="0:a:0",
            schema="s",
            payload=checksum(f"{signer.name} {number}".encode()),
            parents=before if number > 1 else (),
        )
        signed = seal(manifest, signer.sign)
        yield Fetched(manifest, Path("none"), 0, (signed.data, signed.signature), signer.certificate_der)


def test_lineage_and_verdicts_are_exact_beyond_what_a_ledger_remembers(tmp_path: Path, authority: Authority) -> None:
    """Two agents that take their mean every round, eight times as often as the ledger remembers. Every snapshot arrives
    twice, and the first ones once more when they are forgotten: these are written again, and count no more for it. By
    hand: either's first network and each of its rounds are in the last model with one half. Every manifest that a merge
    names is found and sound; one that never came is missed, however many there are."""
    b = authority.issue("b")
    arrived = list(published(b, ROUNDS))
    ledger = ManifestLedger(tmp_path / "manifests.jsonl")
    for each in arrived:
        ledger.note(each)
        ledger.note(each)
    for each in arrived[:3]:
        ledger.note(each)
    ledger.close()
    vouched = list(read_ledger(ledger.path))
    assert [entry.round for entry in vouched] == [*range(1, ROUNDS + 1), 1, 2, 3]

    hashes = {entry.round: entry.hash for entry in vouched}
    own = [
        MergeRecord(
            "a",
            number,
            root("a", number),
            tuple(Contribution(agent=x, snapshot=root(x, number), round=number, weight=0.5) for x in ("a", "b")),
            manifests={"b": hashes[number]},
        )
        for number in range(1, ROUNDS + 1)
    ]
    made = lineage([*own, *peers_records(vouched)], "a", starts=starts(vouched))
    assert dict(made.initial) == pytest.approx({"a": 0.5, "b": 0.5})
    assert not made.earlier
    every = {(agent, number): 0.5 for agent in ("a", "b") for number in range(1, ROUNDS + 1)}
    assert dict(made.updates) == pytest.approx(every)

    (tmp_path / "ca.crt").write_bytes(authority.pem)
    found = verify_ledger(ledger.path, tmp_path, own)
    assert (found.checked, found.faults, found.torn, found.dropped) == (ROUNDS + 3, (), (), 0)
    strange = MergeRecord("a", 5, own[4].snapshot, own[4].contributions, manifests={"b": "cd" * 32})
    (fault,) = verify_ledger(ledger.path, tmp_path, [*own, strange]).faults
    assert "round 5" in fault


def test_a_ledger_does_not_grow_in_memory(tmp_path: Path, authority: Authority) -> None:
    """Reference: what Python counts itself. After eight times `KNOWN` manifests a ledger takes less than three times
    what it takes after `KNOWN`: its table of them has room for more, but no more are in it."""
    arrived = list(published(authority.issue("b"), ROUNDS))
    ledger = ManifestLedger(tmp_path / "manifests.jsonl")
    taken: list[int] = []
    tracemalloc.start()
    try:
        for number, each in enumerate(arrived, 1):
            ledger.note(each)
            if number in (KNOWN, ROUNDS):
                gc.collect()
                taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        ledger.close()
    assert taken[1] < 3 * taken[0], taken
    assert len(list(read_ledger(ledger.path))) == ROUNDS
