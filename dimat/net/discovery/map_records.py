"""The network map as a DHT record signed by the CA, with which an organiser changes members.

A member's key cannot sign one, whatever its certificate says: the signature is checked against the public keys of the
CA's own certificates. The bytes are a magic word, the signature (after its length, 2 bytes), and the signed body: a
line of JSON, then the map's text, deflated. Nothing is inflated before the signature is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.errors import ConfigError, SecurityError
from dimat.net.limits import CLOCK_SKEW_S, MAX_MAP_BYTES, MAX_MAP_LIFE_S, MAX_MAP_TEXT_BYTES
from dimat.net.pki.certificates import CLOCK_SKEW, authorities, check_signature, is_p256

MAGIC = b"dimat-map-1\n"
_DOMAIN = b"dimat map v1\0"
_RUN = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,128}")
_FIELDS = {"run", "version", "digest", "time_s", "expires_s"}


@dataclass(frozen=True, slots=True)
class MapRecord:
    """A network map as it was published.

    `version`: the map's, above those of earlier maps; `digest`: BLAKE3 of its text's UTF-8, hex; `time_s` and
    `expires_s`: when it was signed and until when nodes keep it, Unix time.
    """

    run: str
    version: int
    digest: str
    text: str
    time_s: float
    expires_s: float


def map_key(run: str) -> bytes:
    """Return the DHT's key of a run's map, 20 bytes."""
    return hashlib.sha256(f"dimat map\0{run}".encode()).digest()[:20]


def seal_map(
    run: str, version: int, text: str, time_s: float, expires_s: float, key: ec.EllipticCurvePrivateKey
) -> bytes:
    """Return a map's record, signed with the CA's private key. ConfigError for one that no node would accept."""
    digest = blake3(text.encode()).hexdigest()
    record = MapRecord(run, version, digest, text, time_s, expires_s)
    if (fault := _fault(record)) is not None:
        raise ConfigError(f"the network map cannot be published: {fault}")
    if len(text.encode()) > MAX_MAP_TEXT_BYTES:
        raise ConfigError(f"the network map cannot be published: its text is longer than {MAX_MAP_TEXT_BYTES:,} bytes")
    head = {"run": run, "version": version, "digest": digest, "time_s": time_s, "expires_s": expires_s}
    line = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    body = line + b"\n" + zlib.compress(text.encode(), 9)
    signature = key.sign(_DOMAIN + body, ec.ECDSA(hashes.SHA256()))
    data = MAGIC + len(signature).to_bytes(2, "big") + signature + body
    if len(data) > MAX_MAP_BYTES:
        raise ConfigError(
            f"the network map takes {len(data):,} bytes, compressed; the DHT carries {MAX_MAP_BYTES:,}: name a "
            "generator instead of edges, or hand the file to the agents (SIGHUP)"
        )
    return data


def open_map(data: bytes, *, ca: bytes | None, run: str | None, now: float) -> MapRecord:
    """Return the map's record in bytes from the DHT, fully checked.

    `ca`: PEM of the CA's certificates, any of which may have signed; None checks the form alone (bootstrap nodes
    without a CA). `run`: the run to which the map must belong, None for any. SecurityError, in one line, for a record
    that is malformed, expired, from the future, of another run, or not signed by the CA.
    """
    if len(data) > MAX_MAP_BYTES:
        _refuse(f"{len(data)} bytes are more than {MAX_MAP_BYTES}")
    if not data.startswith(MAGIC):
        _refuse("it is not a map's record")
    start = len(MAGIC) + 2
    end = start + int.from_bytes(data[len(MAGIC) : start], "big")
    signature, body = data[start:end], data[end:]
    if ca is not None:
        _check_signed(ca, _DOMAIN + body, signature, now)
    line, _, packed = body.partition(b"\n")
    record = _parse(line, _inflated(packed))
    if (fault := _fault(record)) is not None:
        _refuse(fault)
    if blake3(record.text.encode()).hexdigest() != record.digest:
        _refuse("its digest is not that of its map")
    if run is not None and record.run != run:
        _refuse(f"it is of run {record.run!r}, not {run!r}")
    if record.expires_s <= now:
        _refuse("it has expired")
    if record.time_s > now + CLOCK_SKEW_S:
        _refuse(f"it was signed {record.time_s - now:.0f} s in the future (compare the machines' clocks)")
    return record


def _check_signed(ca: bytes, data: bytes, signature: bytes, now: float) -> None:
    moment = datetime.fromtimestamp(now, UTC)
    for authority in authorities(ca):
        key = authority.public_key()
        lasts = authority.not_valid_before_utc - CLOCK_SKEW <= moment <= authority.not_valid_after_utc + CLOCK_SKEW
        if not lasts or not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
            continue
        try:
            check_signature(key, data, signature)
        except SecurityError:
            continue
        return
    _refuse("the CA has not signed it")


def _inflated(packed: bytes) -> str:
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, MAX_MAP_TEXT_BYTES)
        if not unpacking.eof or unpacking.unused_data:
            _refuse("its map is cut off, too long, or followed by something else")
        return text.decode()
    except (zlib.error, UnicodeDecodeError):
        _refuse("its map cannot be read")


def _parse(line: bytes, text: str) -> MapRecord:
    try:
        tree: Any = json.loads(line.decode())
    except (ValueError, RecursionError):
        _refuse("its head is not JSON")
    if not isinstance(tree, dict):
        _refuse("its head is not an object")
    fields = cast("dict[str, Any]", tree)
    if set(fields) != _FIELDS:
        _refuse("its head does not have the fields of a map's record")
    if not isinstance(fields["run"], str) or not isinstance(fields["digest"], str):
        _refuse("run or digest is not text")
    if type(fields["version"]) is not int:
        _refuse("version is not a whole number")
    for name in ("time_s", "expires_s"):
        if type(fields[name]) not in (int, float) or not 0 <= fields[name] < 2**40:
            _refuse(f"{name} is not a time")
        fields[name] = float(fields[name])
    return MapRecord(**fields, text=text)


def _fault(record: MapRecord) -> str | None:
    """Return the fault of a record whose values are out of bounds, None if it has none."""
    if not _RUN.fullmatch(record.run):
        return "its run is not a valid name"
    if not 0 < record.version < 2**53:
        return f"version {record.version} is not a whole number from 1 on"
    if not 0 < record.expires_s - record.time_s <= MAX_MAP_LIFE_S:
        return f"it must last for more than 0 seconds and at most {MAX_MAP_LIFE_S / 86_400:.0f} days"
    return None


def _refuse(why: str) -> NoReturn:
    raise SecurityError(f"a network map from the DHT was refused: {why}")
