"""An agent's signed record in the DHT: its addresses and its newest snapshot.

The lifetime of a record and its other bounds are in `dimat.net.limits`. A record is signed with the agent's TLS key and
carries its certificate, so that every reader, and every node that stores it, can check it with the CA's certificate
alone. The bytes are a magic word, the certificate, the signature over the body (each after its length, 2 bytes), and
the body as JSON. On insecure trial networks certificate and signature are empty, and only the form is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from dimat.errors import ConfigError, SecurityError
from dimat.net.limits import CLOCK_SKEW_S, MAX_RECORD_ADDRESSES, MAX_RECORD_BYTES, MAX_RECORD_LIFE_S
from dimat.net.pki.certificates import check_certificate, check_signature

_MAGIC = b"dimat-record-1\n"
_DOMAIN = b"dimat record v1\0"
_AGENT = re.compile(r"\w[\w.-]{0,127}")
_RUN = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,128}")
_HEX = re.compile(r"[0-9a-f]{64}")
_ROOT = re.compile(r"[0-9a-f]{0,128}")
_ADDRESS = re.compile(r"([A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9._])?|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class AddressRecord:
    """An agent's addresses and newest snapshot.

    `addresses`: `host:port`s; `fingerprint`: SHA-256 of its certificate, hex, empty on insecure networks; `round` and
    `root`: of its newest snapshot, 0 and empty before the first; `seq`: grows with each record of the agent; `time_s`
    and `expires_s`: when it was written and until when it is valid, Unix time.
    """

    run: str
    agent: str
    addresses: tuple[str, ...]
    fingerprint: str
    round: int
    root: str
    seq: int
    time_s: float
    expires_s: float


def record_key(run: str, agent: str) -> bytes:
    """Return the DHT's key of an agent's record, 20 bytes."""
    return hashlib.sha256(f"dimat record\0{run}\0{agent}".encode()).digest()[:20]


def is_address(text: str) -> bool:
    """Return whether a text is `host:port`, with a name, an IPv4 address, or an IPv6 address in brackets."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 65536


def seal_record(record: AddressRecord, sign: Callable[[bytes], bytes] | None, certificate_der: bytes) -> bytes:
    """Return a record's bytes, signed with the key of the certificate; unsigned if `sign` is None.

    The record's fingerprint is set to the certificate's. Raises ConfigError for a record that no reader would accept.
    """
    fingerprint = hashlib.sha256(certificate_der).hexdigest() if sign is not None else ""
    record = replace(record, fingerprint=fingerprint)
    if (fault := _fault(record)) is not None:
        raise ConfigError(f"this agent's record for the DHT ({record.agent!r}): {fault}")
    tree = {name: getattr(record, name) for name in AddressRecord.__slots__}
    body = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    parts = (certificate_der, sign(_DOMAIN + body)) if sign is not None else (b"", b"")
    data = b"".join([_MAGIC, *map(_counted, parts), body])
    if len(data) > MAX_RECORD_BYTES:
        raise ConfigError(
            f"this agent's record for the DHT has {len(data)} bytes, at most {MAX_RECORD_BYTES} are allowed: "
            "give it fewer addresses, or a certificate of an EC key"
        )
    return data


def open_record(data: bytes, *, ca: bytes | None, run: str | None, agent: str | None, now: float) -> AddressRecord:
    """Return the record in bytes from the DHT, fully checked.

    `ca`: the CA's certificate as PEM; None accepts unsigned records (insecure trial networks, and bootstrap nodes
    without a CA). `run` and `agent`: those to which the record must belong; None for any. `now`: Unix time, seconds.
    Raises SecurityError, in one line, for a record that is malformed, expired, from the future, of another agent, or
    whose certificate or signature is not valid.
    """
    certificate, signature, body = _split(data)
    record = _parse(body)
    if (fault := _fault(record)) is not None:
        _refuse(fault)
    if run is not None and record.run != run:
        _refuse(f"it is of run {record.run!r}, not {run!r}")
    if agent is not None and record.agent != agent:
        _refuse(f"it is of agent {record.agent!r}, not {agent!r}")
    if record.expires_s <= now:
        _refuse("it has expired")
    if record.time_s > now + CLOCK_SKEW_S:
        _refuse(f"it was written {record.time_s - now:.0f} s in the future (compare the machines' clocks)")
    if ca is not None:
        if not certificate or not signature:
            _refuse("it is not signed")
        if hashlib.sha256(certificate).hexdigest() != record.fingerprint:
            _refuse("its fingerprint is not that of its certificate")
        check_signature(check_certificate(certificate, ca, record.agent), _DOMAIN + body, signature)
    return record


def _counted(part: bytes) -> bytes:
    return len(part).to_bytes(2, "big") + part


def _split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return certificate, signature and body; each length is checked before it is used."""
    if len(data) > MAX_RECORD_BYTES:
        _refuse(f"{len(data)} bytes are more than {MAX_RECORD_BYTES}")
    if not data.startswith(_MAGIC):
        _refuse("it is not a record")
    parts: list[bytes] = []
    at = len(_MAGIC)
    for _ in range(2):
        size = int.from_bytes(data[at : at + 2], "big")
        at += 2
        if at + size > len(data):
            _refuse("it is cut off")
        parts.append(data[at : at + size])
        at += size
    return parts[0], parts[1], data[at:]


def _parse(body: bytes) -> AddressRecord:
    try:
        tree: Any = json.loads(body.decode(), parse_constant=_not_finite)
    except (ValueError, RecursionError):
        _refuse("its body is not JSON")
    if not isinstance(tree, dict):
        _refuse("its body is not an object")
    fields = cast("dict[str, Any]", tree)
    if set(fields) != set(AddressRecord.__slots__):
        _refuse("its body does not have the fields of a record")
    for name in ("run", "agent", "fingerprint", "root"):
        if not isinstance(fields[name], str):
            _refuse(f"{name} is not text")
    for name in ("round", "seq"):
        if type(fields[name]) is not int or not 0 <= fields[name] < 2**62:
            _refuse(f"{name} is not a whole number from 0 on")
    for name in ("time_s", "expires_s"):
        # the bound also keeps integers of thousands of digits away from float()
        if type(fields[name]) not in (int, float) or not 0 <= fields[name] < 2**40:
            _refuse(f"{name} is not a time")
        fields[name] = float(fields[name])
    addresses: Any = fields["addresses"]
    if not isinstance(addresses, list) or not all(isinstance(item, str) for item in cast("list[Any]", addresses)):
        _refuse("addresses are not a list of texts")
    fields["addresses"] = tuple(cast("list[str]", addresses))
    return AddressRecord(**fields)


def _fault(record: AddressRecord) -> str | None:
    """Return the fault of a record whose values are out of bounds, None if it has none."""
    if not _RUN.fullmatch(record.run):
        return "its run is not a valid name"
    if not _AGENT.fullmatch(record.agent):
        return "its agent is not a valid name"
    if record.fingerprint and not _HEX.fullmatch(record.fingerprint):
        return "its fingerprint is not a SHA-256 hash"
    if not _ROOT.fullmatch(record.root):
        return "its root is not a hash"
    if len(record.addresses) > MAX_RECORD_ADDRESSES:
        return f"it has more than {MAX_RECORD_ADDRESSES} addresses"
    for address in record.addresses:
        if not is_address(address):
            return f"address {address[:80]!r} is not host:port"
    if not 0 < record.expires_s - record.time_s <= MAX_RECORD_LIFE_S:
        return "its times contradict each other"
    return None


def _not_finite(text: str) -> NoReturn:
    raise ValueError(text)


def _refuse(why: str) -> NoReturn:
    raise SecurityError(f"a record from the DHT was refused: {why}")
