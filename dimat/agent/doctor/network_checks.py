"""Network checks of `dimat doctor`: port, peers, clocks, dial-back, DHT bootstraps."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from dimat.agent.doctor.check import Check, fail, failed, ok, warn
from dimat.errors import ConfigError, NetworkError, PeerError, SecurityError
from dimat.net.compatibility import Profile, doubtful, incompatibility
from dimat.net.limits import CLOCKS_DIFFER_S, DOCTOR_DIAL_S
from dimat.net.peers.query import query_peer
from dimat.net.pki.identity import Identity
from dimat.net.ports import dial, dial_error_text, owner_of, split_address
from dimat.net.transport import Neighbours
from dimat.wire.v1 import peer_pb2 as pb

_MULTIADDRESS = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d{1,5})(?:/.*)?")


@dataclass(frozen=True, slots=True)
class AgentEndpoint:
    """The agent that is checked. `listen`: its `host:port`; `running`: its process id, 0 where it does not run."""

    run: str
    agent: str
    identity: Identity | None
    profile: Profile
    listen: str
    running: int
    neighbours: Neighbours
    bootstraps: Sequence[str]


def check_network(endpoint: AgentEndpoint) -> Iterator[Check]:
    """Yield the checks of port, peers, clocks, dial-back and bootstraps."""
    with ExitStack() as stack:
        host, port = split_address(endpoint.listen)
        listening = True
        if endpoint.running:
            yield ok("port", f"{endpoint.listen} is held by the agent, process {endpoint.running}")
        else:
            try:
                own = stack.enter_context(closing(listen(host, port)))
                port = int(own.getsockname()[1])
                yield ok("port", f"{endpoint.listen} is free")
            except OSError as error:
                listening = False
                yield _port_taken(endpoint, port, error)
        yield from asyncio.run(_peers(endpoint, port if listening else 0))
    yield from asyncio.run(_bootstraps(endpoint.bootstraps))


def listen(host: str, port: int) -> socket.socket:
    """Listen on a port as the agent would; OSError where that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((host, port))
        own.listen()
    except OSError:
        own.close()
        raise
    return own


def _port_taken(endpoint: AgentEndpoint, port: int, error: OSError) -> Check:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    what = f"cannot listen on {endpoint.listen}: {reason}"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return fail("port", what, "set agent.listen to an address of this machine, or to 0.0.0.0", NetworkError)
    if error.errno == errno.EACCES:
        return fail("port", what, "take a port above 1023", NetworkError)
    owner = owner_of(port) or f"the program that uses it (ss -ltnp 'sport = :{port}' names it, as root)"
    mend = f"stop {owner}, or set agent.listen to another port"
    return fail("port", what, mend, NetworkError)


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────
async def _peers(endpoint: AgentEndpoint, port: int) -> list[Check]:
    """Check all peers at once. `port`: on which this agent can be dialled, 0 for none."""
    peers = sorted(endpoint.neighbours.peers)
    asked = await asyncio.gather(*(_peer(endpoint, peer) for peer in peers))
    checks = [check for check, _, _ in asked]
    apart = {peer: found for peer, (_, _, found) in zip(peers, asked, strict=True) if found is not None}
    checks += _clock(apart)
    there = {peer: address for peer, (_, address, _) in zip(peers, asked, strict=True) if address}
    if port and there:
        checks += await asyncio.gather(*(_back(endpoint, peer, at, port) for peer, at in there.items()))
    elif peers:
        checks.append(warn("dial-back", "not tried: there is no peer or no port for it", "see to those first"))
    return checks


async def _peer(endpoint: AgentEndpoint, peer: str) -> tuple[Check, str, float | None]:
    """Return a peer's check, the address that answers ("" for none), and how far its clock is ahead, seconds."""
    name = f"peer {peer}"
    addresses = sorted(endpoint.neighbours.addresses.get(peer, ()))
    if not addresses:
        if endpoint.bootstraps:
            return ok(name, "has no address on the map; only the DHT can give one"), "", None
        mend = "add its addresses to the map, or set dht.bootstraps"
        return fail(name, "has no address on the map", mend, ConfigError), "", None
    worst: Check | None = None
    for address in addresses:
        check, apart = await _at(endpoint, peer, address)
        if apart is not None:
            return check, address, apart
        worst = worst or check
    assert worst is not None
    return worst, "", None


async def _at(endpoint: AgentEndpoint, peer: str, address: str) -> tuple[Check, float | None]:
    """Try a peer at one address: name, TCP, TLS, hello. The clock's difference comes with a hello that was answered."""
    name = f"peer {peer}"
    fault = await dial(*split_address(address), DOCTOR_DIAL_S)
    if fault is not None:
        mend = "check that it runs, and that address, port and firewalls let this agent through; then try again"
        if isinstance(fault, socket.gaierror):
            return fail(
                name, f"{address}: its name cannot be resolved", "correct it on the map, or see to DNS", NetworkError
            ), None
        return fail(
            name, f"{address}: no TCP connection ({dial_error_text(fault, DOCTOR_DIAL_S)})", mend, NetworkError
        ), None
    before = time.time()
    try:
        async with query_peer(peer, address, endpoint.agent, endpoint.identity) as asked:
            reply = await asked.hello(endpoint.run, endpoint.profile)
    except SecurityError as error:
        mend = (
            f"are both certificates of the same CA and valid, and is {endpoint.agent} on {peer}'s map? "
            "(dimat keys show)"
        )
        return failed(name, error, mend), None
    except PeerError as error:
        return failed(name, error, "correct the address of one of the two on the map"), None
    except NetworkError as error:
        return failed(
            name, error, "TCP works, gRPC does not: is it a dimat agent, and does it use keys as this agent does?"
        ), None
    apart = max(before - reply.time_s, reply.time_s - time.time(), 0.0)
    ahead = apart if reply.time_s > before else -apart
    fault_of_fit = incompatibility(endpoint.profile, endpoint.run, reply)
    if fault_of_fit:
        what, _, mend = fault_of_fit.rpartition("; ")
        return fail(name, f"{address}: {what}", mend, ConfigError), ahead
    if note := doubtful(endpoint.profile, reply):
        what, _, mend = note.rpartition("; ")
        return warn(name, f"{address}: {what}", mend), ahead
    return ok(name, f"{address}: answers, and fits (dimat {_plain(reply)}, schema {reply.schema[:12]})"), ahead


def _plain(reply: pb.HelloReply) -> str:
    return reply.dimat[:20] if reply.dimat.isprintable() else "?"


def _clock(apart: dict[str, float]) -> list[Check]:
    if not apart:
        return [warn("clock", "not compared: no peer answered", "see to the peers first")]
    worst = max(apart, key=lambda peer: abs(apart[peer]))
    seconds = apart[worst]
    if abs(seconds) < CLOCKS_DIFFER_S:
        return [ok("clock", f"within {max(abs(seconds), 0.1):.1f} s of the clocks of {', '.join(sorted(apart))}")]
    side = "behind" if seconds > 0 else "ahead of"
    what = f"{abs(seconds):,.0f} s {side} that of {worst}"
    return [
        warn("clock", what, "let NTP set the clocks of both (timedatectl): certificates and the DHT depend on them")
    ]


async def _back(endpoint: AgentEndpoint, peer: str, address: str, port: int) -> Check:
    """Let a peer dial this agent's port."""
    name = f"dial-back {peer}"
    try:
        async with query_peer(peer, address, endpoint.agent, endpoint.identity) as asked:
            reply = await asked.dial_back(port)
    except (NetworkError, SecurityError) as error:
        return failed(name, error, "try again; a peer dials one caller at a time")
    where = reply.address if reply.address.isprintable() else "an address"
    if reply.reached:
        return ok(name, f"reaches this agent at {where}")
    said = reply.reason if reply.reason.isprintable() else "no reason"
    mend = f"let TCP port {port} in (firewall, NAT), and put on the map the address that others see"
    return fail(name, f"cannot reach this agent at {where}: {said}", mend, NetworkError)


# ── the DHT ──────────────────────────────────────────────────────────────────────────────────────────────────
async def _bootstraps(bootstraps: Sequence[str]) -> list[Check]:
    if not bootstraps:
        return [ok("dht", "none: peers are found by the map's addresses")]
    checks: list[Check] = []
    answering = 0
    for address, fault in zip(bootstraps, await asyncio.gather(*map(_bootstrap, bootstraps)), strict=True):
        if not fault:
            answering += 1
            checks.append(ok("dht", f"{address} answers"))
        else:
            mend = "is that node running (dimat dht), and is this the address that it prints?"
            checks.append(warn("dht", f"{address}: {fault}", mend))
    if not answering:
        # the map's addresses do, where it has them; each peer without one has a line of its own
        checks.append(warn("dht", "no bootstrap answers", "the agent goes by the map alone until one does"))
    return checks


async def _bootstrap(address: str) -> str:
    match = _MULTIADDRESS.fullmatch(address)
    if match is None:
        return "no address of a DHT node, such as /ip4/10.0.0.1/tcp/7301/p2p/…"
    fault = await dial(match[1], int(match[2]), DOCTOR_DIAL_S)
    return "" if fault is None else f"no TCP connection ({dial_error_text(fault, DOCTOR_DIAL_S)})"
