"""Agents for tests of the network: small models, real transports on loopback, and what they hear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import torch
from grpc import aio
from torch import Tensor

from dimat.net.compatibility import Profile
from dimat.net.grpc_transport import GrpcTransport
from dimat.net.limits import Limits
from dimat.net.manifest import ManifestLimits
from dimat.net.pki.identity import Identity
from dimat.net.transport import Neighbours
from dimat.weights.durable import write_bytes
from dimat.weights.snapshot import Form, Manifest, SnapshotStore, checksum
from dimat.weights.tensors import encode, schema_hash
from dimat.wire.v1 import peer_pb2 as pb

RUN = "test-run"
BLOCK = 64 * 2**10
WIDTH = 512  # one tensor of 1 MiB: 17 blocks with the header
QUICK = Limits(
    streams_per_peer=2,
    rate_mb_s=None,
    fetches=4,
    idle_s=15.0,
    lost_after_s=1.0,
    backoff_first_s=0.05,
    backoff_last_s=0.5,
    breaker_open_s=0.5,
    refused_retry_s=0.5,
)


def weights(seed: int, width: int = WIDTH) -> dict[str, Tensor]:
    """Draw the weights of a model of `width` × `width` numbers."""
    return {"layer.weight": torch.randn(width, width, generator=torch.Generator().manual_seed(seed))}


SCHEMA = schema_hash(weights(0))


@dataclass
class Ears:
    """Writes down what a transport hears; `heard` grows with each."""

    offers: list[tuple[Manifest, int]] = field(default_factory=list)
    losses: list[tuple[str, str, int]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def offered(self, manifest: Manifest, oldest: int) -> None:
        self.offers.append((manifest, oldest))
        self._changed.set()

    def lost(self, peer: str, reason: str, last: int) -> None:
        self.losses.append((peer, reason, last))
        self._changed.set()

    def refused(self, peer: str, reason: str) -> None:
        self.refusals.append((peer, reason))
        self._changed.set()

    def noticed(self, message: str) -> None:
        self.notices.append(message)
        self._changed.set()

    async def until(self, true: Callable[[], Any], timeout_s: float = 60.0) -> None:
        """Wait until a condition on what was heard holds."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def offer(self, agent: str, round_: int) -> Manifest:
        """Wait until an agent's snapshot of a round was offered, and return its manifest."""
        await self.until(lambda: any(m.agent == agent and m.round == round_ for m, _ in self.offers))
        return next(m for m, _ in reversed(self.offers) if m.agent == agent and m.round == round_)


@dataclass
class Agent:
    """A transport, what it hears, and its own store."""

    name: str
    store: SnapshotStore
    transport: GrpcTransport
    ears: Ears
    folder: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.transport.port}"

    def stored(self) -> list[str]:
        """Return the kinds of files among what was received; what is being removed is not among them."""
        return sorted(path.suffix for path in (self.folder / "received").iterdir() if not path.name.startswith("."))

    def publish(self, round_: int, tensors: Mapping[str, Tensor], **more: Any) -> Manifest:
        """Record weights and offer them."""
        manifest = record(self.store.folder, self.name, round_, tensors, **more)
        self.transport.publish(manifest)
        return manifest


def record(
    folder: Path, name: str, round_: int, tensors: Mapping[str, Tensor], *, block: int = BLOCK, **more: Any
) -> Manifest:
    """Write weights into a store folder and return their manifest."""
    data = encode(tensors)
    payload = checksum(data, block)
    write_bytes(folder / f"{payload.root}.safetensors", data, durable=False)
    values = {"run": RUN, "agent": name, "round": round_, "basis": f"1:{name}:0", "schema": schema_hash(tensors)}
    return Manifest(**(values | {"payload": payload} | more))


def form(folder: Path, data: bytes, encoding: str, after: str = "", block: int = BLOCK) -> Form:
    """Write the payload of a form into a store folder and return the form."""
    payload = checksum(data, block)
    write_bytes(folder / f"{payload.root}.safetensors", data, durable=False)
    return Form(encoding, payload, after)


def make(
    folder: Path,
    name: str,
    *,
    identity: Identity | None = None,
    limits: Limits = QUICK,
    profile: Profile | None = None,
    bound: int = 16 * 2**20,
    listen: str = "127.0.0.1:0",
    keep: int = 2,
    **more: Any,
) -> Agent:
    """Make an agent in a folder; its transport is not started."""
    ears = Ears()
    store = SnapshotStore(folder / "own", keep)
    transport = GrpcTransport(
        **(
            {
                "run": RUN,
                "agent": name,
                "identity": identity,
                "store": store,
                "received": folder / "received",
                "profile": profile or Profile(SCHEMA),
                "manifest_limits": ManifestLimits(bound),
                "listen": listen,
                "generator": Random(0),
                "limits": limits,
                "durable": False,
            }
            | more
        )
    )
    return Agent(name, store, transport, ears, folder)


@asynccontextmanager
async def started(*agents: Agent, grace_s: float = 0.0) -> AsyncGenerator[None]:
    """Start agents, and close them."""
    try:
        for agent in agents:
            await agent.transport.start(agent.ears)
        yield
    finally:
        for agent in agents:
            await agent.transport.close(grace_s)


@asynccontextmanager
async def pair(folder: Path, **more: Any) -> AsyncGenerator[tuple[Agent, Agent]]:
    """Start agents a and b, each other's neighbours, and close them. `more`: what b, who reads, is made with."""
    a, b = make(folder / "a", "a"), make(folder / "b", "b", **more)
    async with started(a, b):
        join(a, b)
        yield a, b


def join(*agents: Agent) -> None:
    """Make all agents each other's neighbours."""
    update_neighbours(agents, {agent.name: agent.address for agent in agents})


def update_neighbours(
    agents: Sequence[Agent], addresses: Mapping[str, str], *, readers: Sequence[str] | None = None
) -> None:
    """Give agents a map on which all that have an address are members, and neighbours of each other."""
    for agent in agents:
        others = [name for name in addresses if name != agent.name]
        agent.transport.update_neighbours(
            Neighbours(
                peers=others,
                readers=others if readers is None else readers,
                members=list(addresses),
                addresses={name: [address] for name, address in addresses.items()},
            )
        )


async def call(channel: aio.Channel, method: str, request: Any, reply: Any, agent: str = "") -> Any:
    """Call a method of the peer's service as an agent would, and return the reply."""
    handle = channel.unary_unary(
        f"/dimat.wire.v1.Peer/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=reply.FromString,
    )
    return await handle(request, timeout=30, metadata=(("dimat-agent", agent),) if agent else ())


async def ends_with(stream: Any) -> grpc.StatusCode:
    """Read a stream to its end and return the code that it ends with."""
    async with asyncio.timeout(60):
        try:
            while await stream.read() is not aio.EOF:
                pass
        except aio.AioRpcError as error:
            return error.code()
        return await stream.code()


async def code_of(answer: Any) -> grpc.StatusCode:
    """Return the code that a call with one answer ends with."""
    try:
        await answer
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def hello(agent: str, **other: Any) -> pb.HelloRequest:
    """Return the hello of an agent that fits, but for what is given."""
    return pb.HelloRequest(**({"protocol": 1, "dimat": "test", "run": RUN, "agent": agent, "schema": SCHEMA} | other))
