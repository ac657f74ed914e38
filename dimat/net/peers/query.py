"""Single calls to a peer, for people's tools: who are you, how are you, can you reach me.

They are made in an agent's name and with its keys, and change nothing: the peer does not take the asker's hello for
that of the agent, which may be running meanwhile.
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
from dimat.net.compatibility import AGENT_HEADER, PEER_SERVICE, QUERY_HEADER, Profile, channel_options, shown
from dimat.net.limits import MIB
from dimat.net.peers.connection import words
from dimat.net.pki.identity import Identity, check_certificate, tls_name
from dimat.wire.v1 import peer_pb2 as pb

LARGEST_REPLY = 4 * MIB
ANSWER_S = 10.0
R = TypeVar("R", bound=Message)
_TRUST = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


@dataclass(frozen=True, slots=True)
class PeerQuery:
    """A peer that can be asked, at an address."""

    peer: str
    address: str
    _channel: aio.Channel
    _agent: str
    _identity: Identity | None

    async def hello(self, run: str, profile: Profile) -> pb.HelloReply:
        """Return who answers. Whether it fits is for the caller to see (`net.compatibility`). PeerError where it is
        another agent, SecurityError where its certificate is not its own."""
        reply = await self._call("Hello", pb.HelloRequest(**profile.fields(run, self._agent)), pb.HelloReply)
        if reply.agent != self.peer:
            raise PeerError(f"{shown(reply.agent)} answers at {self.address}, not {self.peer}")
        if self._identity is not None:
            check_certificate(reply.certificate, self._identity.ca, self.peer)
        return reply

    async def status(self) -> dict[str, Any]:
        """Return how the peer is, as it tells itself."""
        reply = await self._call("Status", pb.StatusRequest(), pb.StatusReply)
        try:
            found = json.loads(reply.json)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PeerError(f"{self.peer} at {self.address} answers with something that is no status")
        return found  # pyright: ignore[reportUnknownVariableType]

    async def dial_back(self, port: int) -> pb.DialBackReply:
        """Let the peer dial a port of this agent, at the address that it sees and at those of its map."""
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
            async with asyncio.timeout(ANSWER_S + 1):
                return await call(request, timeout=ANSWER_S, metadata=metadata)
        except TimeoutError:
            raise NetworkError(f"{where}: no answer in time") from None
        except aio.AioRpcError as error:
            said = words(error)
            if error.code() in _TRUST or "no TLS connection" in said:
                raise SecurityError(f"{where}: {said}") from None
            raise NetworkError(f"{where}: {said}") from None


@asynccontextmanager
async def query_peer(peer: str, address: str, agent: str, identity: Identity | None) -> AsyncGenerator[PeerQuery]:
    """Give a peer at `host:port` to be asked in the name of `agent`. Its calls raise NetworkError where it does not
    answer, SecurityError where one of the two does not trust the other."""
    if identity is None:
        channel = aio.insecure_channel(address, options=channel_options(LARGEST_REPLY, None))
    else:
        options = channel_options(LARGEST_REPLY, tls_name(peer))
        channel = aio.secure_channel(address, identity.channel_credentials(), options=options)
    async with channel:
        yield PeerQuery(peer, address, channel, agent, identity)
