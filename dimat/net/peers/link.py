"""The link to one peer: connects, polls the snapshots that it offers, reconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from grpc import aio

from dimat.errors import DimatError, NetworkError, PeerError, SecurityError
from dimat.net.backoff import Backoff, Breaker, FaultNotices, Reminders
from dimat.net.compatibility import Profile
from dimat.net.limits import (
    CLOCKS_DIFFER_S,
    MOST_OFFERED,
    POLL_PAUSE_S,
    POLL_REPLY_S,
    WAKE_PAUSE_S,
    Limits,
)
from dimat.net.manifest import ManifestLimits, SignedManifest, unseal
from dimat.net.peers.connection import Code, Connection, ConnectionBrokenError, Connector, PeerRefusedError, error_text
from dimat.net.peers.presence import Presence
from dimat.net.threads import BackgroundTasks, Notifier, Threads
from dimat.net.transport import PeerListener
from dimat.wire.v1 import peer_pb2 as pb

AddressLookup = Callable[[str], Awaitable[Sequence[str]]]
"""Returns further addresses of an agent, beside those on the map."""


class PeerLink:
    """Follows `peer` from `start` to `stop`, and passes news of it to `listener`."""

    def __init__(
        self,
        peer: str,
        *,
        run: str,
        connector: Connector,
        profile: Profile,
        manifest_limits: ManifestLimits,
        limits: Limits,
        generator: Random,
        listener: PeerListener,
        address_lookup: AddressLookup | None,
        threads: Threads,
    ) -> None:
        self.peer = peer
        self.streams = asyncio.Semaphore(limits.fetches_per_peer)
        self._run = run
        self._connector = connector
        self._profile = profile
        self.manifest_limits = manifest_limits
        """The most that its manifests may claim, by the current map."""
        self._limits = limits
        self._listener = listener
        self._address_lookup = address_lookup
        self._threads = threads
        self._backoff = Backoff(limits.backoff_first_s, limits.backoff_last_s, generator)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_open_s)
        self._generator = generator
        self.certificate = b""
        """The peer's certificate (DER) on the newest connection."""
        self._addresses: list[str] = []
        self._last_good = ""
        self._heard_s: float | None = None  # when the last connection brought its last byte, by the loop's clock
        self._task: asyncio.Task[None] | None = None
        self._draining = 0  # connections that take no calls, and last until their transfers have ended
        self._connection: Connection | None = None
        self._offers: dict[tuple[int, str], SignedManifest] = {}
        self._refusal = ""
        self._stopped = False
        self._changed = Notifier()
        self._wake = Notifier()
        self._dropped: asyncio.Event = asyncio.Event()
        self._unreached = False  # whether the last attempt to reach it has failed
        self._reason = "it has not been reached yet"
        self._presence = Presence(peer, limits.lost_after_s, listener.lost, lambda: self._refusal or self._reason)
        self._reminders = Reminders(listener.noticed)
        self._faults = FaultNotices(peer, listener.noticed)
        self._woken_s = float("-inf")

    # ── for the transport ─────────────────────────────────────────────────────────────────────────────────────
    def start(self, tasks: BackgroundTasks) -> None:
        """Begin to follow the peer, in one of `tasks`."""
        self._presence.out_of_reach()
        self._task = tasks.start(self._follow(), f"link to {self.peer}")

    async def stop(self) -> None:
        """Stop following the peer; calls that wait for a connection raise NetworkError."""
        self._stopped = True
        self._changed.fire()
        self._in_reach()
        self._presence.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def update_addresses(self, addresses: Sequence[str]) -> None:
        """Use the addresses of a new map, and try them at once if the peer is not connected."""
        self._addresses = list(addresses)
        if self._task is not None:
            self.wake()

    def wake(self) -> None:
        """Try at once, whatever failed before: the peer is probably there."""
        now = asyncio.get_running_loop().time()
        # two agents whose calls to each other fail must not wake each other in a rush
        if self._connection is None and now - self._woken_s >= WAKE_PAUSE_S:
            self._woken_s = now
            self._backoff.reset()
            self._breaker.succeeded()
            self._wake.fire()

    def offer(self, round_: int, root: str) -> SignedManifest | None:
        """Return the manifest of a snapshot that the peer offers now; None if it does not offer it."""
        return self._offers.get((round_, root))

    async def connection(self) -> Connection:
        """Wait for a connection on which the peer has sent its offers; NetworkError if none can be expected."""
        while True:
            if self._stopped:
                raise NetworkError(f"{self.peer} is not followed any more")
            if self._refusal:
                raise NetworkError(f"{self.peer}: {self._refusal}")
            if self._connection is not None:
                return self._connection
            if self._presence.gone:
                raise NetworkError(f"{self.peer} is gone: {self._presence.gone}")
            await self._changed.wait()

    def drop(self, connection: Connection, reason: str) -> None:
        """Replace a connection on which a call has failed."""
        if connection is self._connection:
            self._reason = reason
            self._connection = None
            self._dropped.set()

    @property
    def state(self) -> dict[str, object]:
        """State of the link for `dimat status`. `heard_s`: seconds since the last byte arrived, None before the
        first."""
        last_s = self._heard_s if self._connection is None else self._connection.heard_s
        return {
            "connected": self._connection is not None,
            "address": self._connection.address if self._connection else self._last_good,
            "trouble": "" if self._connection else self._refusal or self._reason,
            "rounds": sorted(round_ for round_, _ in self._offers),
            "faults": self._faults.count,
            "heard_s": None if last_s is None else asyncio.get_running_loop().time() - last_s,
        }

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────
    async def _follow(self) -> None:
        """Keep a connection to the peer, until cancelled; draining connections end with it."""
        async with asyncio.TaskGroup() as drains:
            await self._keep_connected(drains)

    async def _keep_connected(self, drains: asyncio.TaskGroup) -> None:
        while True:
            wait_s = 0.0
            self._unreached = True
            try:
                async with self._reach(drains) as connection:
                    self._unreached = False
                    await self._poll_offers(connection)
            except PeerRefusedError as refused:
                self._refuse(str(refused))
                wait_s = self._limits.refused_retry_s * self._generator.uniform(0.5, 1.0)
            except (ConnectionBrokenError, aio.AioRpcError) as error:
                self._reason = error_text(error)
                self._breaker.failed()
                wait_s = self._breaker.wait_s(self._backoff.next())
                if self._presence.lost:
                    self._reminders.tell("reach", f"{self.peer} is out of reach: {self._reason}; attempts continue")
            except Exception as error:  # a bug must not end the loop, nor hide
                self._reason = f"{type(error).__name__}: {error}"
                self._breaker.failed()
                wait_s = self._breaker.wait_s(self._backoff.next())
                self._faults.tell(f"following {self.peer} failed: {self._reason}")
            self._disconnected()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    @asynccontextmanager
    async def _reach(self, drains: asyncio.TaskGroup) -> AsyncGenerator[Connection]:
        """Connect to the first address that answers as the peer.

        PeerRefusedError if it is incompatible, ConnectionBrokenError if no address answers.
        """
        known = list(dict.fromkeys([*self._addresses, *await self._look_up()]))
        known.sort(key=lambda address: address != self._last_good)
        if not known:
            raise ConnectionBrokenError("no address of it is known")
        trouble: list[str] = []
        for address in known:
            try:
                connection = await self._connector.connect(self.peer, address)
            except (ConnectionBrokenError, aio.AioRpcError) as error:
                trouble.append(f"{address}: {error_text(error)}")
                continue
            kept = False
            try:
                self._last_good = address
                if connection.clock_offset_s > CLOCKS_DIFFER_S:
                    self._reminders.tell(
                        "clock",
                        f"the clocks of {self.peer} and this machine differ by {connection.clock_offset_s:.0f} s; "
                        "set both by NTP",
                    )
                if connection.note:
                    self._reminders.tell("settings", f"{self.peer}: {connection.note}")
                yield connection
            except aio.AioRpcError:
                # a peer that stops takes no calls any more, and lets its transfers end
                kept = connection.transfers.count > 0
                raise
            finally:
                if kept:
                    self._draining += 1
                    drains.create_task(self._drain(connection), name=f"last transfers of {self.peer}")
                else:
                    await connection.close()
            return
        raise ConnectionBrokenError("; ".join(trouble))

    async def _drain(self, connection: Connection) -> None:
        """Close a connection once its transfers have ended; a peer that still sends is not out of reach."""
        try:
            await connection.transfers.none()
        finally:
            await connection.close()
            self._draining -= 1
            if self._connection is None:
                self._disconnected()

    async def _look_up(self) -> Sequence[str]:
        if self._address_lookup is None:
            return ()
        try:
            async with asyncio.timeout(self._limits.connect_s):
                return await self._address_lookup(self.peer)
        except TimeoutError:
            return ()
        except DimatError as error:
            self._faults.tell(f"no addresses of {self.peer} were found: {error}")
            return ()

    async def _poll_offers(self, connection: Connection) -> None:
        """Poll the peer for news until the connection breaks."""
        self._dropped = asyncio.Event()
        # plain tasks, which end below: a group would wrap the errors that `_keep_connected` tells apart
        dropped = asyncio.create_task(self._dropped.wait())
        poll: asyncio.Task[pb.ManifestsReply] | None = None
        told: set[tuple[int, str]] = set()
        seen, session = 0, ""
        left = False
        try:
            while True:
                began_s = asyncio.get_running_loop().time()
                poll = asyncio.create_task(self._poll(connection, seen, session))
                await asyncio.wait([poll, dropped], return_when=asyncio.FIRST_COMPLETED)
                if dropped.done() or poll.cancelled():
                    raise ConnectionBrokenError(self._reason if dropped.done() else "the connection was closed")
                reply = poll.result()
                if session and reply.session != session:
                    raise ConnectionBrokenError("it was restarted")
                seen, session = reply.sequence, reply.session
                await self._take(connection, reply, told)
                if reply.leaving and not left:
                    left = True
                    self._presence.leaves(reply.leaving, max((round_ for round_, _ in self._offers), default=0))
                # a peer that answers at once with nothing new must not be polled in a rush
                await asyncio.sleep(began_s + POLL_PAUSE_S - asyncio.get_running_loop().time())
        finally:
            self._connection = None
            self._heard_s = connection.heard_s or self._heard_s
            tasks: list[asyncio.Task[Any]] = [dropped] if poll is None else [dropped, poll]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, connection: Connection, seen: int, session: str) -> pb.ManifestsReply:
        wait_s = self._limits.poll_s
        most_s = wait_s + self._limits.quiet_s
        request = pb.ManifestsRequest(seen=seen, session=session, wait_ms=int(wait_s * 1000))
        connection.heard()
        # a plain task, which ends below: it may be cancelled with its connection, which a group would not tell
        call = asyncio.create_task(connection.call("Manifests", request, pb.ManifestsReply, POLL_REPLY_S))
        try:
            # on a slow link an answer waits behind the data of a transfer, which shows that the peer is alive
            while not call.done():
                quiet_s = asyncio.get_running_loop().time() - connection.heard_s
                if quiet_s >= most_s:
                    raise ConnectionBrokenError(f"no answer for {most_s:g} s")
                await asyncio.wait([call], timeout=most_s - quiet_s)
            return call.result()
        except aio.AioRpcError as error:
            if error.code() is Code.PERMISSION_DENIED:
                raise PeerRefusedError(f"it refuses this agent: {error_text(error)}") from None
            raise
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    async def _take(self, connection: Connection, reply: pb.ManifestsReply, told: set[tuple[int, str]]) -> None:
        """Store the peer's offers, and tell the listener about those that are new on this connection."""
        if len(reply.offered) > MOST_OFFERED:
            raise PeerRefusedError(f"it offers {len(reply.offered):,} snapshots, at most {MOST_OFFERED} are read")
        offers: dict[tuple[int, str], SignedManifest] = {}
        greeted = False
        for offered in reply.offered:
            try:
                try:
                    signed = await self._unseal(connection, offered)
                except SecurityError:
                    # its keys may be new ones; it is asked once for each of its replies
                    if greeted:
                        raise
                    greeted = True
                    if not await self._connector.greet_again(connection):
                        raise
                    self.certificate = connection.certificate
                    signed = await self._unseal(connection, offered)
                if signed.manifest.schema != self._profile.schema:
                    raise PeerError(f"manifest of {self.peer} refused: it is of another model than that of its hello")
            except (PeerError, SecurityError) as error:
                self._faults.tell(f"{self.peer} offers what cannot be taken: {error}")
                continue
            offers[signed.manifest.round, signed.manifest.payload.root] = signed
        if self._dropped.is_set():
            # while the manifests were read: a connection that is given up must not pass for one made anew
            raise ConnectionBrokenError(self._reason)
        self._offers = offers
        if self._connection is None:
            self._connection = connection
            self.certificate = connection.certificate
            self._refusal = ""
            self._in_reach()
        oldest = min((round_ for round_, _ in offers), default=0)
        for key, signed in sorted(offers.items()):
            if key not in told:
                told.add(key)
                self._listener.offered(signed.manifest, oldest)
        told.intersection_update(offers)
        self._changed.fire()

    async def _unseal(self, connection: Connection, offered: pb.SignedManifest) -> SignedManifest:
        # long manifests are parsed off the event loop
        return await self._threads.submit(
            unseal,
            offered.manifest,
            offered.signature,
            connection.verify,
            publisher=self.peer,
            run=self._run,
            limits=self.manifest_limits,
        )

    # ── reachability ──────────────────────────────────────────────────────────────────────────────────────────
    def _in_reach(self) -> None:
        self._backoff.reset()
        self._breaker.succeeded()
        self._reminders.over("reach")
        self._presence.in_reach()

    def _disconnected(self) -> None:
        """Count the peer as out of reach, unless transfers still drain."""
        if self._draining:
            return
        self._presence.out_of_reach()
        if self._unreached and self._presence.unanswered():
            self._changed.fire()

    def _refuse(self, reason: str) -> None:
        if reason != self._refusal:
            self._refusal = reason
            self._listener.refused(self.peer, reason)
        self._changed.fire()
