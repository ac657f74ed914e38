"""Checks a log of manifests against the CA, and an agent's merges against both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from dimat.agent.lineage.manifest_log import Dropped, Vouched, dropped_of, read_line
from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError, SecurityError
from dimat.net.manifest import DOMAIN
from dimat.net.pki.certificates import check_certificate, check_signature, readable
from dimat.net.pki.key_files import read_file
from dimat.wire.v1 import peer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Verified:
    """`checked`: lines whose signature was checked.

    `faults`: each with file and line; `torn`: lines that cannot be read, as a crash leaves them: they
    vouch for nothing. `dropped`: older lines that the ledger has lost to its bound.
    """

    checked: int
    faults: tuple[str, ...]
    torn: tuple[int, ...]
    dropped: int = 0


def verify_ledger(path: Path, keys: Path, records: Sequence[MergeRecord] = ()) -> Verified:
    """Check every line of a log of manifests: its signature, its signer, and its content.

    A line must be signed by the agent that it names, whose certificate the CA in `keys` (ca.crt) issued, and must agree
    with the signed bytes. `records`: the agent's own merges; each manifest that a merge used must be among the lines.

    A ledger outlives certificates, so their dates are not checked. For a line without a certificate, those in other
    lines of that agent and NAME.crt in `keys` are tried. Raises SecurityError if there is no CA to check against,
    DataError for a ledger that cannot be read.
    """
    ca = read_file(keys / "ca.crt")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    dropped = (dropped_of(lines[0]) if lines else None) or Dropped()
    entries: dict[int, Vouched] = {}
    torn: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            entries[number] = read_line(line)
        except (ValueError, KeyError, TypeError):
            if line.strip() and not (number == 1 and dropped.lines):
                torn.append(number)
    certificates: dict[str, list[bytes]] = {}
    for entry in entries.values():
        known = certificates.setdefault(entry.agent, _on_file(keys, entry.agent))
        if entry.certificate and entry.certificate not in known:
            known.append(entry.certificate)
    faults: list[str] = []
    sound: set[str] = set()
    for number, entry in entries.items():
        try:
            _check(entry, [entry.certificate] if entry.certificate else certificates[entry.agent], ca)
            sound.add(entry.hash)
        except SecurityError as error:
            faults.append(f"{path.name}, line {number} ({entry.agent}, round {entry.round}): {error}")
    faults += _unfounded(records, sound, dropped)
    return Verified(len(entries), tuple(faults), tuple(torn), dropped.lines)


def _check(entry: Vouched, certificates: Sequence[bytes], ca: bytes) -> None:
    """Raise SecurityError where a line is not what its agent has signed."""
    if not entry.signature:
        raise SecurityError("it is not signed: it was made on an insecure network")
    if not certificates:
        raise SecurityError("no certificate of this agent is known; put its .crt into the folder of keys")
    fault: SecurityError | None = None
    for certificate in certificates:
        try:
            check_signature(_key(certificate, ca, entry.agent), DOMAIN + entry.manifest, entry.signature)
            break
        except SecurityError as error:
            fault = error
    else:
        raise fault or SecurityError("its signature was not checked")
    try:
        said = pb.Manifest.FromString(entry.manifest)
    except DecodeError:
        raise SecurityError("the signed text is not a manifest") from None
    parents = tuple((parent.agent, parent.root.hex(), parent.round, parent.weight) for parent in said.parents)
    signed = {"agent": said.agent, "round": said.round, "root": said.payload.root.hex(), "parents": parents}
    for name, value in signed.items():
        if value != getattr(entry, name):
            raise SecurityError(f"{name!r} of the line differs from the signed one")


def _key(certificate: bytes, ca: bytes, agent: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate that the CA issued to an agent, whatever the dates of either."""
    with readable(f"certificate of {agent!r}"):
        loaded = x509.load_der_x509_certificate(certificate)
        began = loaded.not_valid_before_utc
    # in its first seconds it was valid, and so was the CA that issued it
    now = datetime.now(UTC)
    at = now if began <= now <= loaded.not_valid_after_utc else began + timedelta(seconds=1)
    return check_certificate(certificate, ca, agent, at)


def _on_file(keys: Path, agent: str) -> list[bytes]:
    path = keys / f"{agent}.crt"
    if "/" in agent or not path.is_file():
        return []
    try:
        with readable(str(path)):
            certificate = x509.load_pem_x509_certificate(read_file(path))
    except SecurityError:
        return []  # it proves nothing; the line is told to have no certificate
    return [certificate.public_bytes(serialization.Encoding.DER)]


def _unfounded(records: Sequence[MergeRecord], sound: set[str], dropped: Dropped) -> list[str]:
    """Return the parts of own merges whose manifest is not among the sound ones, nor among those that were dropped."""
    faults: list[str] = []
    # the last record of a round is the one that became durable
    last: Mapping[int, MergeRecord] = {record.round: record for record in records}
    for record in last.values():
        rounds = {part.agent: part.round for part in record.contributions}
        for peer, digest in record.manifests.items():
            if digest not in sound and rounds.get(peer, record.round) > dropped.rounds.get(peer, 0):
                faults.append(
                    f"lineage.jsonl, round {record.round}: no intact line has the manifest {digest[:12]}… of {peer}, "
                    "which the merge used"
                )
    return faults
