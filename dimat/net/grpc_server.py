"""The gRPC server: identifies each caller, checks its rights, and answers its calls.

Callers are identified by their certificates. On an insecure network, which is bound to loopback, the header
`dimat-agent` names the caller without proof: any program that reaches the port can use any name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import time as clock
from typing import Any, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha import reflection

from dimat.errors import DataError, NetworkError, SecurityError
from dimat.json_text import to_json
from dimat.net.compatibility import Profile, incompatibility, quoted
from dimat.net.grpc_options import server_options
from dimat.net.limits import (
    ABORT_S,
    DIAL_BACK_S,
    LONGEST_POLL_S,
    MAX_ERROR_TEXT,
    MOST_CALLS,
    MOST_DIAL_BACK_ADDRESSES,
    MOST_DIAL_BACKS,
    READER_GONE_S,
    Limits,
)
from dimat.net.peers.lives import Life, Lives, header_of
from dimat.net.pki.identity import Identity, agent_of
from dimat.net.ports import dial, dial_error_text, is_loopback, owner_of, split_address
from dimat.net.throttle import FullError, Slots
from dimat.net.transfer.outbox import Outbox
from dimat.net.transfer.upload import SlowReaderError, Uploader
from dimat.net.transport import Neighbours, Status
from dimat.weights.snapshot import SnapshotStore
from dimat.wire import AGENT_HEADER, DATA_SERVICE, FETCH, LIFE_HEADER, PEER_SERVICE, QUERY_HEADER, TWIN_HEADER
from dimat.wire.v1 import peer_pb2 as pb

Context = aio.ServicerContext[Any, Any]
T = TypeVar("T")
Code = grpc.StatusCode


class GrpcServer:
    """Answers calls of the map's members. `heard(agent)` is called when a compatible member says hello."""

    def __init__(
        self,
        *,
        run: str,
        agent: str,
        identity: Identity | None,
        profile: Profile,
        outbox: Outbox,
        uploader: Uploader,
        store: SnapshotStore,
        limits: Limits,
        status: Status,
        heard: Callable[[str], None],
        noticed: Callable[[str], None],
        lives: Lives,
    ) -> None:
        self._lives = lives
        self.neighbours = Neighbours((), (), (), {})
        self._run = run
        self._agent = agent
        self._identity = identity
        self._profile = profile
        self._outbox = outbox
        self._uploader = uploader
        self._store = store
        self._limits = limits
        self._status = status
        self._heard = heard
        self._noticed = noticed
        self._hellos: dict[str, str] = {}  # by caller the reason why it does not fit, "" where it does
        self._polls = Slots("calls for news", MOST_CALLS, limits.polls_per_peer)
        self._dials = Slots("dials", MOST_DIAL_BACKS, 1)
        self._received: dict[str, set[str]] = {}  # by reader the payloads that it has received to their end
        self._polled: dict[str, float] = {}  # by reader when its last call for news ended, by the loop's clock
        self._closing = False
        self._server: aio.Server | None = None
        self._health: Any = health_aio.HealthServicer()

    async def start(self, listen: str) -> int:
        """Listen on `host:port` and return the port. NetworkError if it is in use."""
        if self._identity is None and not loopback(listen):
            raise SecurityError(
                f"cannot listen on {listen} without keys: an insecure network is bound to loopback; "
                "listen on 127.0.0.1, or issue keys"
            )
        server = aio.server(options=server_options(self._limits), maximum_concurrent_rpcs=MOST_CALLS)
        peer = {
            "Hello": _unary(self.hello, pb.HelloRequest),
            "Manifests": _unary(self.manifests, pb.ManifestsRequest),
            "Status": _unary(self.status, pb.StatusRequest),
            "DialBack": _unary(self.dial_back, pb.DialBackRequest),
        }
        # no serializer: raw bytes, which no message wraps
        data: Any = grpc.unary_stream_rpc_method_handler(
            cast("Any", _checked(self.fetch)), request_deserializer=_parser(pb.FetchRequest)
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(PEER_SERVICE, peer),
                grpc.method_handlers_generic_handler(DATA_SERVICE, {FETCH: data}),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (PEER_SERVICE, DATA_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection((PEER_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
        try:
            if self._identity is None:
                port = server.add_insecure_port(listen)
            else:
                port = server.add_secure_port(listen, self._identity.server_credentials())
        except RuntimeError as error:
            raise NetworkError(_cannot_listen(listen, _cause(error))) from error
        if not port:
            raise NetworkError(_cannot_listen(listen, "no port was given"))
        await server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        return port

    async def close(self, grace_s: float) -> None:
        """Accept no new calls, answer calls that wait for news, and give transfers `grace_s` to end."""
        self._closing = True
        self._outbox.changed.fire()
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)

    def waiting(self, reader: str, roots: Collection[str]) -> bool:
        """Return whether a reader still polls for news and has received none of `roots`, a snapshot's payloads."""
        here = asyncio.get_running_loop().time() - self._polled.get(reader, -math.inf) < READER_GONE_S
        return here and self._received.get(reader, set()).isdisjoint(roots)

    # ── calls ────────────────────────────────────────────────────────────────────────────────────────────────
    async def hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloReply:
        caller = await self._member(context)
        await self._meet(caller, context)
        if request.agent != caller:
            await _abort(context, Code.PERMISSION_DENIED, f"{caller} says hello as {quoted(request.agent)}")
        if not any(key == QUERY_HEADER for key, _ in context.invocation_metadata() or ()):
            self._hellos[caller] = incompatibility(self._profile, self._run, request)
            if not self._hellos[caller]:
                self._heard(caller)
        return pb.HelloReply(
            **self._profile.fields(self._run, self._agent),
            certificate=b"" if self._identity is None else self._identity.certificate_der,
            max_streams=self._limits.streams_per_peer,
            time_s=clock(),
        )

    async def manifests(self, request: pb.ManifestsRequest, context: Context) -> pb.ManifestsReply:
        reader = await self._reader(context)
        await self._meet(reader, context)
        try:
            with self._polls.take(reader):
                self._polled[reader] = math.inf
                wait_s = min(request.wait_ms / 1000, LONGEST_POLL_S)
                try:
                    async with asyncio.timeout(wait_s):
                        while not (self._closing or self._outbox.news(request.seen, request.session)):
                            await self._outbox.changed.wait()
                except TimeoutError:
                    pass  # nothing new: the same offers are sent again
        except FullError as full:
            await _abort(context, Code.RESOURCE_EXHAUSTED, str(full))
        finally:
            self._polled[reader] = asyncio.get_running_loop().time()
        await self._reader(context)  # it may be off the map by now
        context.set_trailing_metadata(self._lives.trailer)
        return self._outbox.reply()

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        await self._member(context)
        return pb.StatusReply(json=to_json(dict(self._status()), default=str))

    async def dial_back(self, request: pb.DialBackRequest, context: Context) -> pb.DialBackReply:
        caller = await self._member(context)
        if not 1 <= request.port <= 65535:
            await _abort(context, Code.INVALID_ARGUMENT, f"{request.port} is not a port")
        hosts = [(host, request.port) for host in [_host(context.peer())] if host]
        for address in list(self.neighbours.addresses.get(caller, ()))[:MOST_DIAL_BACK_ADDRESSES]:
            host, _, port = address.rpartition(":")
            if port.isdecimal() and 1 <= int(port) <= 65535:
                hosts.append((host.strip("[]"), int(port)))
        try:
            with self._dials.take(caller):
                reason = "it has no address"
                dialled = ""
                for host, port in hosts:
                    dialled = f"{host}:{port}"
                    error = await dial(host, port, DIAL_BACK_S)
                    if error is None:
                        return pb.DialBackReply(reached=True, address=dialled)
                    reason = dial_error_text(error, DIAL_BACK_S)
                return pb.DialBackReply(reached=False, address=dialled, reason=reason)
        except FullError as full:
            await _abort(context, Code.RESOURCE_EXHAUSTED, str(full))

    async def fetch(self, request: pb.FetchRequest, context: Context) -> None:
        reader = await self._reader(context)
        root = request.root.hex()
        payload = self._outbox.payload(root)
        if payload is None:
            lacking = f"{self._agent} does not offer snapshot {root[:12]}…, or no longer does"
            await _abort(context, Code.NOT_FOUND, lacking)
        if request.blocks < 1 or request.first_block + request.blocks > len(payload.blocks):
            await _abort(
                context,
                Code.OUT_OF_RANGE,
                f"blocks {request.first_block} to {request.first_block + request.blocks} of {len(payload.blocks)}",
            )
        if self._closing:
            await _abort(context, Code.UNAVAILABLE, f"{self._agent} stops")
        try:
            with self._uploader.slots.take(reader):
                self._store.hold(root)
                try:
                    await self._uploader.stream(
                        reader,
                        self._store.path(root),
                        payload,
                        request.first_block,
                        request.blocks,
                        context.write,
                        self._outbox.encoding(root),
                    )
                finally:
                    self._store.release(root)
                if request.first_block + request.blocks == len(payload.blocks):
                    had = self._received.get(reader, set())
                    self._received[reader] = {known for known in had if self._outbox.payload(known)} | {root}
        except FullError as full:
            await _abort(context, Code.RESOURCE_EXHAUSTED, str(full))
        except SlowReaderError:
            await _abort(context, Code.ABORTED, f"{reader} took no bytes for {self._limits.idle_s:g} s")
        except DataError as error:
            self._noticed(f"{reader} could not be served: {error}")
            await _abort(context, Code.DATA_LOSS, f"snapshot {root[:12]}… is damaged at {self._agent}")

    # ── callers ────────────────────────────────────────────────────────────────────────────────────────────
    async def _member(self, context: Context) -> str:
        """Return the caller's name if it is on the map; abort the call otherwise."""
        caller = self._name(context)
        if caller is None:
            await _abort(context, Code.UNAUTHENTICATED, "the certificate must name an agent")
        if caller not in self.neighbours.members:
            await _abort(context, Code.PERMISSION_DENIED, f"{quoted(caller)} is not on the map of {self._agent}")
        return caller

    async def _meet(self, caller: str, context: Context) -> None:
        """Note which process calls under a name; refuse the younger one if there are two."""
        life = Life.parse(header_of(context.invocation_metadata(), LIFE_HEADER))
        older = None if life is None else self._lives.heard(caller, life)
        if older is not None:
            await _abort(
                context,
                Code.PERMISSION_DENIED,
                f"another process runs as {caller}, and began before this one",
                ((TWIN_HEADER, older.text()),),
            )

    async def _reader(self, context: Context) -> str:
        """Return the caller's name if it may read and is compatible by its hello; abort the call otherwise."""
        caller = await self._member(context)
        if caller not in self.neighbours.readers:
            await _abort(context, Code.PERMISSION_DENIED, f"{caller} is not a neighbour that reads from {self._agent}")
        reason = self._hellos.get(caller)
        if reason is None:
            await _abort(context, Code.FAILED_PRECONDITION, "say hello first")
        if reason:
            await _abort(context, Code.FAILED_PRECONDITION, f"{caller} does not fit {self._agent}: {reason}")
        return caller

    def _name(self, context: Context) -> str | None:
        if self._identity is not None:
            return agent_of(context.auth_context())
        for key, value in context.invocation_metadata() or ():
            if key == AGENT_HEADER and isinstance(value, str):
                return value
        return None


def _unary(method: Callable[[Any, Context], Awaitable[Message]], request: type[Message]) -> Any:
    """Return the gRPC handler of a method with one request and one reply."""
    return grpc.unary_unary_rpc_method_handler(
        cast("Any", _checked(method)),
        request_deserializer=_parser(request),
        response_serializer=_serialized,
    )


def _serialized(reply: Message) -> bytes:
    return reply.SerializeToString()


def _parser(request: type[Message]) -> Callable[[bytes], Message | None]:
    """Return a parser of messages that returns None for malformed ones: gRPC would log a traceback for each."""

    def read(data: bytes) -> Message | None:
        try:
            return request.FromString(data)
        except DecodeError:
            return None

    return read


def _checked(method: Callable[[Any, Context], Awaitable[T]]) -> Callable[[Any, Context], Awaitable[T]]:
    """Return a method that aborts a call whose request is malformed."""

    async def checked(request: Any, context: Context) -> T:
        if request is None:
            await _abort(context, Code.INVALID_ARGUMENT, "not a message of this protocol")
        return await method(request, context)

    return checked


async def _abort(
    context: Context, code: grpc.StatusCode, details: str, trailer: Sequence[tuple[str, str]] = ()
) -> NoReturn:
    async with asyncio.timeout(ABORT_S):
        await context.abort(code, details, tuple(trailer))
    raise AssertionError("an aborted call continues")


def _host(peer: str) -> str:
    """Return the host in gRPC's name of a peer, `ipv4:10.0.0.1:7300` or `ipv6:%5B::1%5D:7300`; "" for others."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    return host if kind in ("ipv4", "ipv6") else ""


def loopback(listen: str) -> bool:
    """Return whether only this machine can reach `host:port`."""
    return is_loopback(split_address(listen)[0])


def _cannot_listen(listen: str, cause: str) -> str:
    owner = owner_of(split_address(listen)[1])
    if owner:
        return f"cannot listen on {listen}: in use by {owner}; stop it, or choose another port"
    return f"cannot listen on {listen}: {cause}; is another agent running there?"


def _cause(error: Exception) -> str:
    """Return the first line of gRPC's error text."""
    return (str(error).splitlines() or ["no reason given"])[0][:MAX_ERROR_TEXT]
