"""One peer, as this agent follows it over gRPC: reach it, see that it fits, hear what it offers, and begin anew when
the connection breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
from grpc import aio

from dimat.errors import DimatError, NetworkError, PeerError, SecurityError
from dimat.net.backoff import Backoff, Breaker, Reminder
from dimat.net.identity import Identity, check_certificate, check_signature, tls_name
from dimat.net.limits import Limits
from dimat.net.manifests import MOST_FORMS, Bound, Check, Signed, unseal
from dimat.net.profile import (
    AGENT_HEADER,
    CHUNK_BYTES,
    CLOCKS_DIFFER_S,
    DATA_SERVICE,
    FETCH,
    PEER_SERVICE,
    Profile,
    channel_options,
    misfit,
    shown,
)
from dimat.net.transport import Hearing
from dimat.net.work import Signal, Threads
from dimat.version import __version__
from dimat.wire.v1 import peer_pb2 as pb

Code = grpc.StatusCode
Directory = Callable[[str], Awaitable[Sequence[str]]]
"""Gives further addresses of an agent, from wherever they are known."""

LATEST_REPLY_S = 600.0  # to a call for news, on a link where bytes of transfers come all the time
PAUSE_S = 0.05  # between two calls for news, whatever the peer answers
AWAKE_S = 1.0  # between two attempts because something was heard of the peer
OFFERED_AT_MOST = 64  # snapshots that a peer offers at a time


class RefusedError(Exception):
    """The peer is there and does not fit, or will not have us: trying again soon is of no use."""


class BrokenError(Exception):
    """The connection broke, or a call on it failed in a way that another attempt may mend."""


@dataclass(eq=False)
class Connection:
    """A channel to a peer that has said hello and fits. `check`: tells its signatures from others."""

    peer: str
    address: str
    channel: aio.Channel
    metadata: tuple[tuple[str, str], ...]
    reply: pb.HelloReply
    check: Check
    heard_s: float = 0.0  # when the last byte of it came, by the event loop's clock

    def heard(self) -> None:
        """A byte has come: it is alive."""
        self.heard_s = asyncio.get_running_loop().time()

    def fetch(self, root: str, first: int, blocks: int) -> Any:
        """Begin a transfer of a range of blocks; the call gives raw chunks."""
        method: Any = self.channel.unary_stream(
            f"/{DATA_SERVICE}/{FETCH}",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=None,
        )
        return method(
            pb.FetchRequest(root=bytes.fromhex(root), first_block=first, blocks=blocks), metadata=self.metadata
        )

    async def call(self, method: str, request: Any, reply: Any, timeout_s: float) -> Any:
        """Call a method of the peer's service."""
        return await _call(self.channel, method, request, reply, timeout_s, self.metadata)


class Link:
    """Follows `peer` from `start` to `stop`."""

    def __init__(
        self,
        peer: str,
        *,
        run: str,
        agent: str,
        identity: Identity | None,
        profile: Profile,
        bound: Bound,
        limits: Limits,
        generator: Random,
        hearing: Hearing,
        directory: Directory | None,
        threads: Threads,
    ) -> None:
        self.peer = peer
        self.streams = asyncio.Semaphore(limits.fetches_per_peer)
        self._run = run
        self._agent = agent
        self._identity = identity
        self._profile = profile
        self._bound = bound
        self._limits = limits
        self._hearing = hearing
        self._directory = directory
        self._threads = threads
        self._backoff = Backoff(limits.backoff_first_s, limits.backoff_last_s, generator)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_open_s)
        self._generator = generator
        self._addresses: list[str] = []
        self._last_good = ""
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._offers: dict[tuple[int, str], Signed] = {}
        self._refusal = ""
        self._stopped = False
        self._changed = Signal()
        self._wake = Signal()
        self._dropped: asyncio.Event = asyncio.Event()
        self._lost_timer: asyncio.TimerHandle | None = None
        self._told_lost = False
        self._reason = "it was not reached yet"
        self._unreached = Reminder()
        self._clock_said = Reminder()
        self._said: set[str] = set()
        self._awoken = float("-inf")

    # ── what the transport asks ──────────────────────────────────────────────────────────────────────────────
    def start(self) -> None:
        """Begin to follow the peer."""
        self._out_of_reach()
        self._task = asyncio.create_task(self._follow(), name=f"link to {self.peer}")

    async def stop(self) -> None:
        """Let go of the peer; whoever waits for it is told."""
        self._stopped = True
        self._changed.fire()
        self._in_reach()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def arrange(self, addresses: Sequence[str]) -> None:
        """Take over where the peer is reached, by a new map, and try at once if it is not reached now."""
        self._addresses = list(addresses)
        if self._task is not None:
            self.awake()

    def awake(self) -> None:
        """The peer is likely there now: try at once, whatever failed before."""
        now = asyncio.get_running_loop().time()
        # two that dial each other, and both fail, must not drive each other on
        if self._connection is None and now - self._awoken >= AWAKE_S:
            self._awoken = now
            self._backoff.reset()
            self._breaker.succeeded()
            self._wake.fire()

    def find(self, round_: int, root: str) -> Signed | None:
        """Return the manifest of a snapshot that the peer offers now."""
        return self._offers.get((round_, root))

    async def connection(self) -> Connection:
        """Wait for a connection on which the peer has said what it offers; NetworkError where it will not come."""
        while True:
            if self._stopped:
                raise NetworkError(f"{self.peer} is not followed any more")
            if self._refusal:
                raise NetworkError(f"{self.peer}: {self._refusal}")
            if self._connection is not None:
                return self._connection
            await self._changed.wait()

    def drop(self, connection: Connection, reason: str) -> None:
        """A call on a connection has failed: make another one."""
        if connection is self._connection:
            self._reason = reason
            self._connection = None
            self._dropped.set()

    @property
    def state(self) -> dict[str, object]:
        """What `status` shows of the peer."""
        return {
            "connected": self._connection is not None,
            "address": self._connection.address if self._connection else self._last_good,
            "trouble": "" if self._connection else self._refusal or self._reason,
            "rounds": sorted(round_ for round_, _ in self._offers),
        }

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────
    async def _follow(self) -> None:
        while True:
            wait_s = 0.0
            try:
                async with self._reach() as connection:
                    await self._listen(connection)
            except RefusedError as refused:
                self._refuse(str(refused))
                wait_s = self._limits.refused_retry_s * self._generator.uniform(0.5, 1.0)
            except (BrokenError, aio.AioRpcError) as error:
                self._reason = words(error)
                self._breaker.failed()
                wait_s = self._breaker.wait_s(self._backoff.next())
                now = asyncio.get_running_loop().time()
                if self._told_lost and self._unreached.due(now):
                    self._hearing.noticed(f"{self.peer} is out of reach: {self._reason}; it is tried on")
            except Exception as error:  # a fault of ours must not end the following, nor hide
                self._reason = f"{type(error).__name__}: {error}"
                self._breaker.failed()
                wait_s = self._breaker.wait_s(self._backoff.next())
                self._say(f"following {self.peer} failed: {self._reason}")
            self._out_of_reach()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    @asynccontextmanager
    async def _reach(self) -> AsyncGenerator[Connection]:
        """Connect to the first address that answers as the peer; RefusedError or BrokenError where none does."""
        known = list(dict.fromkeys([*self._addresses, *await self._look_up()]))
        known.sort(key=lambda address: address != self._last_good)
        if not known:
            raise BrokenError("no address of it is known")
        trouble: list[str] = []
        for address in known:
            channel = self._channel(address)
            try:
                try:
                    connection = await self._hello(address, channel)
                except (BrokenError, aio.AioRpcError) as error:
                    trouble.append(f"{address}: {words(error)}")
                    continue
                self._last_good = address
                yield connection
                return
            finally:
                await channel.close()
        raise BrokenError("; ".join(trouble))

    def _channel(self, address: str) -> aio.Channel:
        # what a reply may take: all manifests that a peer offers
        largest = max(4 * CHUNK_BYTES, MOST_FORMS * self._bound.manifest_bytes)
        if self._identity is None:
            return aio.insecure_channel(address, options=channel_options(largest, None))
        options = channel_options(largest, tls_name(self.peer))
        return aio.secure_channel(address, self._identity.channel_credentials(), options=options)

    async def _look_up(self) -> Sequence[str]:
        if self._directory is None:
            return ()
        try:
            async with asyncio.timeout(self._limits.connect_s):
                return await self._directory(self.peer)
        except TimeoutError:
            return ()
        except DimatError as error:
            self._say(f"no addresses of {self.peer} were found: {error}")
            return ()

    async def _hello(self, address: str, channel: aio.Channel) -> Connection:
        metadata = ((AGENT_HEADER, self._agent),) if self._identity is None else ()
        own = self._profile
        request = pb.HelloRequest(
            protocol=own.protocol,
            dimat=__version__,
            run=self._run,
            agent=self._agent,
            schema=own.schema,
            base=own.base,
            encodings=own.encodings,
        )
        before = time.time()
        try:
            reply: pb.HelloReply = await _call(
                channel, "Hello", request, pb.HelloReply, self._limits.connect_s, metadata
            )
        except aio.AioRpcError as error:
            if error.code() in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.UNIMPLEMENTED):
                raise RefusedError(f"it will not have this agent: {words(error)}") from None
            raise
        apart_s = max(before - reply.time_s, reply.time_s - time.time())
        if reply.agent != self.peer:
            raise BrokenError(f"{shown(reply.agent)} answers there, not {self.peer}")
        reason = misfit(own, self._run, reply)
        if reason:
            raise RefusedError(reason)
        try:
            check = self._checker(reply.certificate)
        except SecurityError as error:
            raise RefusedError(str(error)) from None
        if apart_s > CLOCKS_DIFFER_S and self._clock_said.due(asyncio.get_running_loop().time()):
            self._hearing.noticed(
                f"the clocks of {self.peer} and this machine differ by {apart_s:.0f} s; set both by NTP"
            )
        return Connection(self.peer, address, channel, metadata, reply, check)

    def _checker(self, certificate: bytes) -> Check:
        """Return what tells the peer's signatures from others; SecurityError where its certificate is not its own."""
        if self._identity is None:
            return _unsigned
        key = check_certificate(certificate, self._identity.ca, self.peer)
        return lambda data, signature: check_signature(key, data, signature)

    async def _listen(self, connection: Connection) -> None:
        """Ask for news until the connection breaks."""
        self._dropped = asyncio.Event()
        dropped = asyncio.create_task(self._dropped.wait())
        poll: asyncio.Task[pb.ManifestsReply] | None = None
        told: set[tuple[int, str]] = set()
        seen, session = 0, ""
        left = False
        try:
            while True:
                poll = asyncio.create_task(self._poll(connection, seen, session))
                await asyncio.wait([poll, dropped], return_when=asyncio.FIRST_COMPLETED)
                if dropped.done() or poll.cancelled():
                    raise BrokenError(self._reason if dropped.done() else "the connection was closed")
                reply = poll.result()
                if session and reply.session != session:
                    raise BrokenError("it was restarted")
                seen, session = reply.sequence, reply.session
                await self._take(connection, reply, told)
                if reply.leaving and not left:
                    left = True
                    self._left(reply.leaving)
                await asyncio.sleep(PAUSE_S)
        finally:
            self._connection = None
            tasks: list[asyncio.Task[Any]] = [dropped] if poll is None else [dropped, poll]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, connection: Connection, seen: int, session: str) -> pb.ManifestsReply:
        wait_s = self._limits.poll_s
        most_s = wait_s + self._limits.quiet_s
        request = pb.ManifestsRequest(seen=seen, session=session, wait_ms=int(wait_s * 1000))
        connection.heard()
        call = asyncio.create_task(connection.call("Manifests", request, pb.ManifestsReply, LATEST_REPLY_S))
        try:
            # on a slow link an answer waits behind the data of a transfer, which shows that the peer is there
            while not call.done():
                quiet_s = asyncio.get_running_loop().time() - connection.heard_s
                if quiet_s >= most_s:
                    raise BrokenError(f"no answer for {most_s:g} s")
                await asyncio.wait([call], timeout=most_s - quiet_s)
            return call.result()
        except aio.AioRpcError as error:
            if error.code() is Code.PERMISSION_DENIED:
                raise RefusedError(f"it will not have this agent: {words(error)}") from None
            raise
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    async def _take(self, connection: Connection, reply: pb.ManifestsReply, told: set[tuple[int, str]]) -> None:
        """Take over what the peer offers, tell what is new on this connection."""
        if len(reply.offered) > OFFERED_AT_MOST:
            raise RefusedError(f"it offers {len(reply.offered):,} snapshots, at most {OFFERED_AT_MOST} are read")
        offers: dict[tuple[int, str], Signed] = {}
        for offered in reply.offered:
            try:
                # long manifests are parsed off the event loop
                signed = await self._threads.submit(
                    unseal,
                    offered.manifest,
                    offered.signature,
                    connection.check,
                    publisher=self.peer,
                    run=self._run,
                    bound=self._bound,
                )
                if signed.manifest.schema != self._profile.schema:
                    raise PeerError(f"manifest of {self.peer} refused: it is of another model than it said hello with")
            except (PeerError, SecurityError) as error:
                self._say(f"{self.peer} offers what cannot be taken: {error}")
                continue
            offers[signed.manifest.round, signed.manifest.payload.root] = signed
        self._offers = offers
        if self._connection is None:
            self._connection = connection
            self._refusal = ""
            self._in_reach()
        oldest = min((round_ for round_, _ in offers), default=0)
        for key, signed in sorted(offers.items()):
            if key not in told:
                told.add(key)
                self._hearing.offered(signed.manifest, oldest)
        told.intersection_update(offers)
        self._changed.fire()

    # ── in reach or not ──────────────────────────────────────────────────────────────────────────────────────
    def _in_reach(self) -> None:
        self._backoff.reset()
        self._breaker.succeeded()
        self._unreached.reset()
        self._told_lost = False
        if self._lost_timer is not None:
            self._lost_timer.cancel()
            self._lost_timer = None

    def _out_of_reach(self) -> None:
        if self._lost_timer is None and not self._told_lost and not self._stopped:
            self._lost_timer = asyncio.get_running_loop().call_later(self._limits.lost_after_s, self._lose)

    def _lose(self) -> None:
        self._lost_timer = None
        self._told_lost = True
        self._hearing.lost(self.peer, self._refusal or self._reason, 0)

    def _left(self, reason: str) -> None:
        self._told_lost = True
        last = max((round_ for round_, _ in self._offers), default=0)
        self._hearing.lost(self.peer, f"it has left ({shown(reason)})", last)

    def _refuse(self, reason: str) -> None:
        if reason != self._refusal:
            self._refusal = reason
            self._hearing.refused(self.peer, reason)
        self._changed.fire()

    def _say(self, message: str) -> None:
        """Say something once."""
        if message not in self._said:
            if len(self._said) > 1000:
                self._said.clear()
            self._said.add(message)
            self._hearing.noticed(message)


def _unsigned(data: bytes, signature: bytes) -> None:
    """On an insecure network nothing is signed."""


async def _call(
    channel: aio.Channel, method: str, request: Any, reply: Any, timeout_s: float, metadata: Sequence[tuple[str, str]]
) -> Any:
    """Call a method of the service of `peer.proto`."""
    call: Any = channel.unary_unary(
        f"/{PEER_SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=reply.FromString,
    )
    try:
        async with asyncio.timeout(timeout_s + 1.0):
            return await call(request, timeout=timeout_s, metadata=metadata)
    except TimeoutError:
        raise BrokenError("no answer in time") from None


def words(error: Exception) -> str:
    """Return what a failed call says, in one line."""
    if not isinstance(error, aio.AioRpcError):
        return str(error)
    details = " ".join((error.details() or "").split())[:200]
    if error.code() is Code.DEADLINE_EXCEEDED:
        return "no answer in time"
    if "handshake" in details.lower() or "certificate" in details.lower():
        return f"no TLS connection: is its certificate of the same CA, and valid? ({details})"
    return details or error.code().name
