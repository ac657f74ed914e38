"""Single calls to a peer for command-line tools: hello, status, dial-back.

They are made in an agent's name and with its keys, and change nothing: the peer does not mistake the tool's hello for
that of the agent, which may be running at the same time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from dimat.errors import NetworkError, PeerError, SecurityError
from dimat.net.compatibility import Profile, quoted
from dimat.net.grpc_options import channel_options
from dimat.net.limits import MAX_QUERY_REPLY_BYTES, QUERY_S
from dimat.net.peers.connection import error_text
from dimat.net.pki.certificates import check_certificate, tls_name
from dimat.net.pki.identity import Identity
from dimat.wire import AGENT_HEADER, PEER_SERVICE, QUERY_HEADER
from dimat.wire.v1 import peer_pb2 as pb

R = TypeVar("R", bound=Message)
_TRUST = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


@dataclass(frozen=True, slots=True)
class PeerQuery:
    """Calls to a peer at an address; `query_peer` opens one."""

    peer: str
    address: str
    _channel: aio.Channel
    _agent: str
    _identity: Identity | None

    async def hello(self, run: str, profile: Profile) -> pb.HelloReply:
        """Return the peer's reply to a hello, which the caller may compare (`net.compatibility`).

        PeerError if another agent answers, SecurityError if the certificate is not the peer's.
        """
        reply = await self._call("Hello", pb.HelloRequest(**profile.fields(run, self._agent)), pb.HelloReply)
        if reply.agent != self.peer:
            raise PeerError(f"{quoted(reply.agent)} answers at {self.address}, not {self.peer}")
        if self._identity is not None:
            check_certificate(reply.certificate, self._identity.ca, self.peer)
        return reply

    async def status(self) -> dict[str, Any]:
        """Return the peer's status. PeerError if the reply is not one."""
        reply = await self._call("Status", pb.StatusRequest(), pb.StatusReply)
        try:
            found = json.loads(reply.json)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PeerError(f"{self.peer} at {self.address} answers with something that is not a status")
        return found  # pyright: ignore[reportUnknownVariableType]

    async def dial_back(self, port: int) -> pb.DialBackReply:
        """Let the peer dial a port of this agent, at the address from which the call comes and at those on its map."""
        return await self._call("DialBack", pb.DialBackRequest(port=port), pb.DialBackReply)

    async def _call(self, method: str, request: Message, reply: type[R]) -> R:
        call: Any = self._channel.unary_unary(
            f"/{PEER_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        metadata = [(QUERY_HEADER, "1")]
        if self._identity is None:
            metadata.append((AGENT_HEADER, self._agent))
        where = f"{self.peer} at {self.address}"
        try:
            async with asyncio.timeout(QUERY_S + 1):
                return await call(request, timeout=QUERY_S, metadata=metadata)
        except TimeoutError:
            raise NetworkError(f"{where}: no answer in time") from None
        except aio.AioRpcError as error:
            text = error_text(error)
            if error.code() in _TRUST or "no TLS connection" in text:
                raise SecurityError(f"{where}: {text}") from None
            raise NetworkError(f"{where}: {text}") from None


@asynccontextmanager
async def query_peer(peer: str, address: str, agent: str, identity: Identity | None) -> AsyncGenerator[PeerQuery]:
    """Open calls to a peer at `host:port`, in the name of `agent`.

    Calls raise NetworkError if it does not answer, SecurityError if one of the two does not trust the other.
    """
    if identity is None:
        channel = aio.insecure_channel(address, options=channel_options(MAX_QUERY_REPLY_BYTES, None))
    else:
        options = channel_options(MAX_QUERY_REPLY_BYTES, tls_name(peer))
        channel = aio.secure_channel(address, identity.channel_credentials(), options=options)
    async with channel:
        yield PeerQuery(peer, address, channel, agent, identity)
