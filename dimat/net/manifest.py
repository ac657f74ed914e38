"""Manifests on the wire: sealed and signed by the publisher, checked in full by the reader.

The signature is over the bytes of a `dimat.wire.v1.Manifest`, with `DOMAIN` before them, so that no signature made for
anything else is valid for a manifest. The same bytes are passed on and kept: nothing is serialised a second time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from blake3 import blake3
from google.protobuf.message import DecodeError

from dimat.errors import DataError, PeerError
from dimat.net.limits import (
    MANIFEST_MEMBER_BYTES,
    MANIFEST_REST_BYTES,
    MAX_BLOCK_BYTES,
    MAX_MANIFEST_REST_BYTES,
    MAX_TEXT_BYTES,
    MIN_BLOCK_BYTES,
    MOST_FORMS,
    MOST_METRICS,
    MOST_PARENTS,
    MOST_PUSHED,
)
from dimat.weights.durable import write_bytes
from dimat.weights.encodings import ENCODINGS
from dimat.weights.snapshot import Form, Manifest, Payload
from dimat.wire.v1 import peer_pb2 as pb

DOMAIN = b"dimat manifest v1\0"

Sign = Callable[[bytes], bytes]
"""Returns the signature over bytes; on an insecure network an empty one."""

Verify = Callable[[bytes, bytes], None]
"""Checks (bytes, signature); SecurityError if the signature is wrong. On an insecure network it accepts any."""

LARGEST_NUMBER = 2**53 - 1  # that JSON and doubles hold exactly
HASH_BYTES = 32
_BLOCK_ENTRY = HASH_BYTES + 2
_AGENT = re.compile(r"\w[\w.-]*")  # as in a map (dimat.topology.network_map)
_BASIS = re.compile(r"[0-9]{1,16}:\w[\w.-]*:[^:]+")  # as `dimat.agent.protocol.basis.BasisId` is written


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest, the exact bytes that are signed, and the publisher's signature over them."""

    manifest: Manifest
    data: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class ManifestLimits:
    """The most that a peer's manifest may claim.

    `bytes`: the largest payload and form that this model allows; `members`: number of agents on the map, which bounds
    the parents of a merge and the readers of a push-sum share.
    """

    bytes: int
    members: int = MOST_PARENTS

    @property
    def manifest_bytes(self) -> int:
        """Size of the largest manifest: the hashes of all blocks, and the rest."""
        return MAX_MANIFEST_REST_BYTES + (MOST_FORMS + 1) * _BLOCK_ENTRY * _blocks(self.bytes, MIN_BLOCK_BYTES)

    @property
    def rest_bytes(self) -> int:
        """Size of a manifest without the hashes of its blocks, which depends on the map."""
        return min(MANIFEST_REST_BYTES + MANIFEST_MEMBER_BYTES * self.members, MAX_MANIFEST_REST_BYTES)


class _Invalid(Exception):
    """The fault of a manifest."""


def seal(manifest: Manifest, sign: Sign) -> SignedManifest:
    """Sign this agent's manifest; equal ones give equal bytes. DataError if no reader would accept it."""
    try:
        message = _message(manifest)
        data = message.SerializeToString(deterministic=True)
        checked = _manifest(message, ManifestLimits(LARGEST_NUMBER))
        longest = ManifestLimits(max(payload.bytes for payload in _payloads(checked))).manifest_bytes
        if len(data) > longest:
            raise _Invalid(f"{len(data):,} bytes of manifest, at most {longest:,} are read")
    except (_Invalid, ValueError) as error:
        raise DataError(f"this agent's snapshot of round {manifest.round} cannot be offered: {error}") from None
    return SignedManifest(checked, data, sign(DOMAIN + data))


def unseal(
    data: bytes, signature: bytes, verify: Verify, *, publisher: str, run: str, limits: ManifestLimits
) -> SignedManifest:
    """Return a peer's manifest, fully checked; its signature is checked before it is parsed.

    Raises SecurityError if the signature is wrong, and PeerError for any other fault.
    """
    try:
        if len(data) > limits.manifest_bytes:
            raise _Invalid(f"{len(data):,} bytes long, at most {limits.manifest_bytes:,} are read for this model")
        verify(DOMAIN + data, signature)
        try:
            message = pb.Manifest.FromString(data)
        except DecodeError:
            raise _Invalid("not a manifest of this protocol") from None
        if message.agent != publisher:
            raise _Invalid(f"it is of agent {_short(message.agent)}")
        if message.run != run:
            raise _Invalid(f"it is of run {_short(message.run)}, this is {_short(run)}")
        manifest = _manifest(message, limits)
        rest = len(data) - _BLOCK_ENTRY * sum(len(payload.blocks) for payload in _payloads(manifest))
        if rest > limits.rest_bytes:
            raise _Invalid(f"{rest:,} bytes beside its blocks, at most {limits.rest_bytes:,} on this map")
        return SignedManifest(manifest, data, signature)
    except _Invalid as wrong:
        raise PeerError(f"manifest of {publisher} refused: {wrong}") from None


def to_bytes(signed: SignedManifest) -> bytes:
    """Return a signed manifest as the content of a file, with a checksum."""
    content = pb.SignedManifest(manifest=signed.data, signature=signed.signature).SerializeToString()
    return blake3(content).digest() + content


def write_signed(path: Path, signed: SignedManifest, *, durable: bool = True) -> None:
    """Write a signed manifest by rename, to offer the same bytes again after a restart; DataError on failure."""
    write_bytes(path, to_bytes(signed), durable=durable)


def read_signed(path: Path) -> tuple[bytes, bytes]:
    """Return (data, signature), for `unseal`, as `write_signed` wrote them; DataError if missing or damaged."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror or error}") from error
    content = stored[HASH_BYTES:]
    try:
        if blake3(content).digest() != stored[:HASH_BYTES]:
            raise DecodeError
        message = pb.SignedManifest.FromString(content)
    except DecodeError:
        raise DataError(f"the manifest {path} is damaged; remove it, and the round is published again") from None
    return message.manifest, message.signature


# ── to a message ─────────────────────────────────────────────────────────────────────────────────────────────
def _message(manifest: Manifest) -> pb.Manifest:
    return pb.Manifest(
        run=manifest.run,
        agent=manifest.agent,
        round=manifest.round,
        basis=manifest.basis,
        schema=manifest.schema,
        payload=_payload_message(manifest.payload),
        encoding=manifest.encoding,
        forms=[
            pb.Form(encoding=form.encoding, after=bytes.fromhex(form.after), payload=_payload_message(form.payload))
            for form in manifest.forms
        ],
        base=manifest.base,
        samples=manifest.samples,
        parents=[
            pb.Parent(agent=agent, root=bytes.fromhex(root), round=round_, weight=weight)
            for agent, root, round_, weight in manifest.parents
        ],
        pushed=dict(manifest.pushed),
        metrics=dict(manifest.metrics),
    )


def _payload_message(payload: Payload) -> pb.Payload:
    return pb.Payload(
        root=bytes.fromhex(payload.root),
        bytes=payload.bytes,
        block_bytes=payload.block_bytes,
        blocks=[bytes.fromhex(block) for block in payload.blocks],
    )


# ── from a message, checked ──────────────────────────────────────────────────────────────────────────────────
def _manifest(message: pb.Manifest, limits: ManifestLimits) -> Manifest:
    """Return the manifest in a message; _Invalid for a fault."""
    largest = limits.bytes
    _number(message.round, "round", lowest=1)
    _number(message.samples, "samples")
    _agent(message.agent, "agent")
    for what, text in (("run", message.run), ("schema", message.schema), ("base", message.base)):
        _text(text, what)
    _text(message.basis, "basis")
    if _BASIS.fullmatch(message.basis) is None:
        raise _Invalid(f"basis {_short(message.basis)} is not round:founder:nonce")
    _few(message.forms, "forms", MOST_FORMS)
    _few(message.parents, "parents", min(limits.members, MOST_PARENTS))
    _few(message.pushed, "pushed", min(limits.members, MOST_PUSHED))
    _few(message.metrics, "metrics", MOST_METRICS)
    for agent, weight in message.pushed.items():
        _agent(agent, "pushed")
        _finite(weight, "pushed")
    for name, value in message.metrics.items():
        _text(name, "metrics")
        _finite(value, "metrics")
    if not message.HasField("payload"):
        raise _Invalid("it has no payload")
    return Manifest(
        run=message.run,
        agent=message.agent,
        round=message.round,
        basis=message.basis,
        schema=message.schema,
        payload=_payload(message.payload, "payload", largest),
        encoding=_encoding(message.encoding, "snapshot"),
        forms=tuple(_form(form, f"form {number}", largest) for number, form in enumerate(message.forms)),
        base=message.base,
        samples=message.samples,
        parents=tuple(_parent(parent) for parent in message.parents),
        pushed=dict(message.pushed),
        metrics=dict(message.metrics),
    )


def _payload(message: pb.Payload, where: str, largest: int) -> Payload:
    size, block = message.bytes, message.block_bytes
    if not 1 <= size <= largest:
        raise _Invalid(f"{where} claims {size:,} bytes, this model takes 1 to {largest:,}")
    if not MIN_BLOCK_BYTES <= block <= MAX_BLOCK_BYTES:
        raise _Invalid(f"{where} is in blocks of {block:,} bytes, not of {MIN_BLOCK_BYTES:,} to {MAX_BLOCK_BYTES:,}")
    if len(message.blocks) != _blocks(size, block):
        raise _Invalid(f"{where} has {len(message.blocks)} blocks, its {size:,} bytes take {_blocks(size, block)}")
    root = blake3()
    for digest in message.blocks:
        if len(digest) != HASH_BYTES:
            raise _Invalid(f"{where} has the hash of a block of {len(digest)} bytes")
        root.update(digest)
    root.update(size.to_bytes(8, "big"))
    if root.digest() != message.root:
        raise _Invalid(f"{where} has an address that is not the hash of its blocks")
    return Payload(message.root.hex(), size, tuple(digest.hex() for digest in message.blocks), block)


def _form(message: pb.Form, where: str, largest: int) -> Form:
    if message.after:
        _hash(message.after, f"after of {where}")
    return Form(_encoding(message.encoding, where), _payload(message.payload, where, largest), message.after.hex())


def _parent(message: pb.Parent) -> tuple[str, str, int, float]:
    _agent(message.agent, "parents")
    _hash(message.root, "parents")
    _number(message.round, "round of a parent")
    _finite(message.weight, "parents")
    return message.agent, message.root.hex(), message.round, message.weight


def _encoding(name: str, where: str) -> str:
    if name not in ENCODINGS:
        raise _Invalid(f"encoding {_short(name)} of {where} is not known ({', '.join(ENCODINGS)})")
    return name


def _text(text: str, what: str) -> None:
    """Refuse text that would fill a log, or write over it."""
    if len(text.encode()) > MAX_TEXT_BYTES or not text.isprintable():
        raise _Invalid(f"{what} {_short(text)} is longer than {MAX_TEXT_BYTES} bytes or not printable")


def _agent(name: str, what: str) -> None:
    _text(name, what)
    if _AGENT.fullmatch(name) is None:
        raise _Invalid(f"{what}: {_short(name)} is not an agent's name")


def _number(number: int, what: str, lowest: int = 0) -> None:
    if not lowest <= number <= LARGEST_NUMBER:
        raise _Invalid(f"{what} {number} is not between {lowest} and 2^53")


def _finite(number: float, what: str) -> None:
    if not isfinite(number):
        raise _Invalid(f"{what}: {number} is not finite")


def _hash(digest: bytes, what: str) -> None:
    if len(digest) != HASH_BYTES:
        raise _Invalid(f"{what}: a hash of {len(digest)} bytes, not {HASH_BYTES}")


def _few(entries: Sequence[object] | Mapping[str, object], what: str, most: int) -> None:
    if len(entries) > most:
        raise _Invalid(f"{len(entries):,} {what}, at most {most:,} are read")


def _blocks(size: int, block_bytes: int) -> int:
    return -(-size // block_bytes)


def _payloads(manifest: Manifest) -> list[Payload]:
    return [manifest.payload, *(form.payload for form in manifest.forms)]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
