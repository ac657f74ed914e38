"""Is a ledger of manifests what peers have signed? Reference: manifests signed here with real keys, then changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dimat.agent.lineage.manifest_log import ManifestLedger, peers_records, read_ledger, starts
from dimat.agent.lineage.verify import verify_ledger
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import SecurityError
from dimat.events import Contribution
from dimat.net.manifest import seal
from dimat.net.pki.identity import Identity
from dimat.net.transport import Fetched
from dimat.weights.snapshot import Manifest, checksum
from tests.net.keys import Authority

ROOT = "ab" * 32


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def fetched(signer: Identity, number: int, parents: tuple[tuple[str, str, int, float], ...] = ()) -> Fetched:
    """A snapshot of the signer as it arrives, whatever its content."""
    payload = checksum(f"{signer.name} {number}".encode())
    manifest = Manifest(
        run="run",
        agent=signer.name,
        round=number,
        basis=f"0:{signer.name}:0",
        schema="s",
        payload=payload,
        parents=parents,
    )
    signed = seal(manifest, signer.sign)
    return Fetched(manifest, Path("none"), 0, (signed.data, signed.signature), signer.certificate_der)


def write(folder: Path, authority: Authority, *arrived: Fetched) -> Path:
    """Write a ledger, and the CA's certificate beside it."""
    ledger = ManifestLedger(folder / "manifests.jsonl")
    for each in arrived:
        ledger.note(each)
    ledger.close()
    (folder / "ca.crt").write_bytes(authority.pem)
    return folder / "manifests.jsonl"


def test_what_peers_signed_is_found_sound(tmp_path: Path, authority: Authority) -> None:
    """A line cut short by a crash vouches for nothing and is told apart; it is no fault."""
    b, c = authority.issue("b"), authority.issue("c")
    path = write(tmp_path, authority, fetched(b, 1), fetched(c, 1), fetched(b, 2, (("b", ROOT, 1, 1.0),)))
    with path.open("a") as file:
        file.write('{"agent":"b","rou\n')
    entry = list(read_ledger(path))[2]
    own = MergeRecord("a", 2, ROOT, (), manifests={"b": entry.hash})
    found = verify_ledger(path, tmp_path, [own])
    assert (found.checked, found.faults, found.torn) == (3, (), (4,))


@pytest.mark.parametrize(
    ("key", "value"),
    [("round", 7), ("agent", "c"), ("root", ROOT), ("parents", [["b", ROOT, 1, 0.5]]), ("manifest", None)],
)
def test_a_changed_line_is_named(tmp_path: Path, authority: Authority, key: str, value: object) -> None:
    """Whatever of a line is changed, that line alone is at fault."""
    b, c = authority.issue("b"), authority.issue("c")
    path = write(tmp_path, authority, fetched(c, 1), fetched(b, 2, (("b", ROOT, 1, 1.0),)), fetched(c, 2))
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1])
    if value is None:
        data = bytearray.fromhex(changed[key])
        data[-1] ^= 1
        value = data.hex()
    lines[1] = json.dumps(changed | {key: value})
    path.write_text("\n".join(lines) + "\n")
    found = verify_ledger(path, tmp_path)
    assert found.checked == 3
    assert len(found.faults) == 1
    assert "line 2" in found.faults[0]


def test_keys_of_others_do_not_pass(tmp_path: Path, authority: Authority) -> None:
    """A certificate of another CA, a line without signature, and an own merge whose manifest is not kept."""
    stranger = Authority("another").issue("b")
    path = write(tmp_path, authority, fetched(stranger, 1), fetched(authority.issue("c"), 1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines.append({**lines[1], "signature": ""})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = next(iter(read_ledger(path))).hash
    faults = verify_ledger(path, tmp_path, [MergeRecord("a", 1, ROOT, (), manifests={"b": bad})]).faults
    assert ["line 1" in faults[0], "line 3" in faults[1], "round 1" in faults[2]] == [True, True, True]
    assert "not signed" in faults[1]
    assert len(faults) == 3


def test_without_a_ca_nothing_is_checked(tmp_path: Path, authority: Authority) -> None:
    """A missing CA is no pass."""
    path = write(tmp_path, authority, fetched(authority.issue("b"), 1))
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(SecurityError, match=r"ca\.crt"):
        verify_ledger(path, tmp_path)


def test_lines_of_before_certificates_were_kept(tmp_path: Path, authority: Authority) -> None:
    """The agent's certificate among the keys does for them."""
    b = authority.issue("b")
    path = write(tmp_path, authority, fetched(b, 1))
    line = json.loads(path.read_text())
    del line["certificate"]
    path.write_text(json.dumps(line) + "\n")
    assert "no certificate" in verify_ledger(path, tmp_path).faults[0]
    (tmp_path / "b.crt").write_bytes(b.certificate)
    assert verify_ledger(path, tmp_path).faults == ()


def test_a_newcomers_start_is_a_join(tmp_path: Path, authority: Authority) -> None:
    """It took another's weights over: what it started from names no snapshot of its own."""
    b = authority.issue("b")
    path = write(tmp_path, authority, fetched(b, 1), fetched(b, 6, (("c", ROOT, 5, 1.0),)))
    vouched = list(read_ledger(path))
    assert starts(vouched) == {("b", 1): 0, ("b", 6): 5}
    (record,) = peers_records(vouched)
    assert (record.round, record.kind) == (5, "join")
    assert record.contributions == (Contribution(agent="c", snapshot=ROOT, round=5, weight=1.0),)


def test_a_ledger_keeps_to_its_bound_and_says_what_it_lost(tmp_path: Path, authority: Authority) -> None:
    """Two hundred rounds with a bound of 20 kB: the newest lines stay sound, older merges are no fault, and a manifest
    that should still be there is missed."""
    b = authority.issue("b")
    path = write(tmp_path, authority)
    ledger = ManifestLedger(path, 20_000)
    arrived = [fetched(b, number) for number in range(1, 201)]
    for each in arrived:
        ledger.note(each)
        assert path.stat().st_size <= 20_000
    ledger.close()
    known = list(read_ledger(path))
    assert [entry.round for entry in known] == list(range(known[0].round, 201))
    assert 1 < known[0].round < 200

    def merge(number: int, digest: str) -> MergeRecord:
        parts = (Contribution(agent="b", snapshot=ROOT, round=number, weight=1.0),)
        return MergeRecord("a", number, ROOT, parts, manifests={"b": digest})

    gone = merge(1, "cd" * 32)
    found = verify_ledger(path, tmp_path, [gone, merge(200, known[-1].hash)])
    assert (found.checked, found.faults, found.torn) == (len(known), (), ())
    assert found.dropped == 200 - len(known)
    assert len(verify_ledger(path, tmp_path, [merge(200, "cd" * 32)]).faults) == 1
