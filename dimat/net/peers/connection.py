"""Connections to peers: dialled over TLS, checked for compatibility, and ready for calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import grpc
from grpc import aio

from dimat.errors import SecurityError
from dimat.net.compatibility import Profile, doubtful, incompatibility, quoted
from dimat.net.grpc_options import channel_options
from dimat.net.limits import MAX_ERROR_TEXT, MAX_REPLY_BYTES, MOST_FORMS, Limits
from dimat.net.manifest import ManifestLimits, Verify
from dimat.net.pki.certificates import check_certificate, check_signature, tls_name
from dimat.net.pki.identity import Identity
from dimat.net.threads import InFlight
from dimat.wire import AGENT_HEADER, DATA_SERVICE, FETCH, PEER_SERVICE
from dimat.wire.v1 import peer_pb2 as pb

Code = grpc.StatusCode
Metadata = Sequence[tuple[str, str | bytes]]
Hear = Callable[[Metadata], None]


class PeerRefusedError(Exception):
    """The peer answers but is incompatible, or refuses this agent: trying again soon is of no use."""


class ConnectionBrokenError(Exception):
    """The connection broke, or a call on it failed in a way that may succeed at another attempt."""


@dataclass(eq=False)
class Connection:
    """A channel to a compatible peer that has said hello; to be closed by the caller of `Connector.connect`.

    `verify`: checks the peer's signatures; `clock_offset_s`: the least by which its clock and this machine's differ;
    `note`: settings of the compatible peer that differ; `heard_s`: when its last byte arrived, by the event loop's
    clock; `certificate`: DER, checked, empty on an insecure network; `life`: returns the header that says which process
    of this agent's name calls; `hear`: receives the metadata of the peer's replies and refusals; `transfers`: the
    current ones.
    """

    peer: str
    address: str
    channel: aio.Channel
    metadata: tuple[tuple[str, str], ...]
    verify: Verify
    clock_offset_s: float
    note: str
    life: Callable[[], tuple[str, str]]
    heard_s: float = 0.0
    certificate: bytes = b""
    hear: Hear = field(default=lambda _: None)
    transfers: InFlight = field(default_factory=InFlight, init=False)
    _closed: bool = field(default=False, init=False)

    async def close(self) -> None:
        """Close the channel; current calls fail."""
        self._closed = True
        await self.channel.close()

    def heard(self) -> None:
        """Note that a byte has arrived: the peer is alive."""
        self.heard_s = asyncio.get_running_loop().time()

    def fetch(self, root: str, first: int, blocks: int) -> Any:
        """Begin a transfer of a range of blocks; the call yields raw chunks. ConnectionBrokenError after `close`."""
        if self._closed:
            raise ConnectionBrokenError("the connection was closed")
        method: Any = self.channel.unary_stream(
            f"/{DATA_SERVICE}/{FETCH}",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=None,
        )
        return method(
            pb.FetchRequest(root=bytes.fromhex(root), first_block=first, blocks=blocks), metadata=self.metadata
        )

    async def call(self, method: str, request: Any, reply: Any, timeout_s: float) -> Any:
        """Call a method of the peer's service and return its reply."""
        metadata = (*self.metadata, self.life())
        return await _call(self.channel, method, request, reply, timeout_s, metadata, self.hear)


DATE_FAULTS = {
    "certificate is not yet valid": "is not valid yet (is the clock behind? set it)",
    "certificate has expired": "has expired (renew it, or set the clock)",
}
"""TLS's messages about dates → their meaning for a peer's certificate."""


class Connector:
    """Connects `agent` to its peers. `life`: see `Connection`; `hear`: receives a peer and the metadata of its
    answers."""

    def __init__(
        self,
        run: str,
        agent: str,
        identity: Identity | None,
        profile: Profile,
        manifest_limits: ManifestLimits,
        limits: Limits,
        life: Callable[[], tuple[str, str]],
        hear: Callable[[str, Metadata], None],
    ) -> None:
        self._life = life
        self._hear = hear
        self._run = run
        self._agent = agent
        self._identity = identity
        self._profile = profile
        self._manifest_limits = manifest_limits
        self._limits = limits

    async def connect(self, peer: str, address: str) -> Connection:
        """Connect to a peer at an address.

        Raises ConnectionBrokenError or AioRpcError if it does not answer there, PeerRefusedError if it is incompatible
        or refuses this agent.
        """
        channel = self._channel(peer, address)
        try:
            return await self._hello(peer, address, channel)
        except BaseException:
            await channel.close()
            raise

    async def greet_again(self, connection: Connection) -> bool:
        """Fetch a peer's current certificate on the existing connection; return whether it has changed. Raises the
        errors of `connect`."""
        renewed = await self._hello(connection.peer, connection.address, connection.channel)
        changed = renewed.certificate != connection.certificate
        connection.verify, connection.certificate = renewed.verify, renewed.certificate
        return changed

    def _channel(self, peer: str, address: str) -> aio.Channel:
        # the longest reply holds all manifests that a peer offers
        largest = max(MAX_REPLY_BYTES, MOST_FORMS * self._manifest_limits.manifest_bytes)
        if self._identity is None:
            return aio.insecure_channel(address, options=channel_options(largest, None))
        options = channel_options(largest, tls_name(peer))
        return aio.secure_channel(address, self._identity.channel_credentials(), options=options)

    async def _hello(self, peer: str, address: str, channel: aio.Channel) -> Connection:
        metadata = ((AGENT_HEADER, self._agent),) if self._identity is None else ()
        request = pb.HelloRequest(**self._profile.fields(self._run, self._agent))
        before = time.time()
        hear = partial(self._hear, peer)
        try:
            reply: pb.HelloReply = await _call(
                channel, "Hello", request, pb.HelloReply, self._limits.connect_s, (*metadata, self._life()), hear
            )
        except aio.AioRpcError as error:
            if error.code() in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.UNIMPLEMENTED):
                raise PeerRefusedError(f"it refuses this agent: {error_text(error)}") from None
            raise
        clock_offset_s = max(before - reply.time_s, reply.time_s - time.time())
        if reply.agent != peer:
            raise ConnectionBrokenError(f"{quoted(reply.agent)} answers there, not {peer}")
        reason = incompatibility(self._profile, self._run, reply)
        if reason:
            raise PeerRefusedError(reason)
        try:
            verify = self._verifier(peer, reply.certificate)
        except SecurityError as error:
            raise PeerRefusedError(str(error)) from None
        # on an insecure network a certificate would be anybody's
        certificate = b"" if self._identity is None else reply.certificate
        note = doubtful(self._profile, reply)
        return Connection(
            peer,
            address,
            channel,
            metadata,
            verify,
            clock_offset_s,
            note,
            self._life,
            certificate=certificate,
            hear=hear,
        )

    def _verifier(self, peer: str, certificate: bytes) -> Verify:
        """Return the check of the peer's signatures; SecurityError if its certificate is not its own."""
        if self._identity is None:
            return _unsigned
        key = check_certificate(certificate, self._identity.ca, peer)
        return lambda data, signature: check_signature(key, data, signature)


def _unsigned(data: bytes, signature: bytes) -> None:
    """Nothing is signed on an insecure network."""


async def _call(
    channel: aio.Channel,
    method: str,
    request: Any,
    reply: Any,
    timeout_s: float,
    metadata: Sequence[tuple[str, str]],
    hear: Hear,
) -> Any:
    """Call a method of the service in `peer.proto`. `hear`: receives the metadata at the end of the reply or
    refusal."""
    call: Any = channel.unary_unary(
        f"/{PEER_SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=reply.FromString,
    )
    try:
        async with asyncio.timeout(timeout_s + 1.0):
            answering: Any = call(request, timeout=timeout_s, metadata=metadata)
            answer = await answering
            hear(tuple(await answering.trailing_metadata() or ()))
            return answer
    except TimeoutError:
        raise ConnectionBrokenError("no answer in time") from None
    except aio.AioRpcError as error:
        hear(cast("Metadata", tuple(error.trailing_metadata() or ())))
        raise


def error_text(error: Exception) -> str:
    """Return the error of a failed call in one line."""
    if not isinstance(error, aio.AioRpcError):
        return str(error)
    whole = " ".join((error.details() or "").split())
    if error.code() is Code.DEADLINE_EXCEEDED:
        return "no answer in time"
    for mark, fault in DATE_FAULTS.items():
        if mark in whole:
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            return f"no TLS connection: by this machine's clock, {now}, its certificate {fault}"
    details = whole[:MAX_ERROR_TEXT]
    if any(word in details.lower() for word in ("handshake", "certificate", "hostname verification")):
        return (
            f"no TLS connection: is its certificate of the same CA, and valid, and are both clocks right? ({details})"
        )
    return details or error.code().name
