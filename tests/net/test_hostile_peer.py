"""A peer that speaks the protocol and lies: real gRPC servers on loopback that answer what a test lets them answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from dimat.errors import NetworkError
from dimat.net.manifest import seal
from dimat.net.pki.identity import Identity
from dimat.weights.snapshot import Manifest, Payload
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import QUICK, RUN, SCHEMA, Agent, make, record, started, update_neighbours, weights

pytestmark = [pytest.mark.anyio, pytest.mark.live]
MIB = 2**20


class Liar:
    """Agent a, as it pleases. `offered`: (manifest bytes, signature); `chunks`: of every transfer; `asked`: how often
    it was for a transfer."""

    def __init__(self) -> None:
        self.hello = pb.HelloReply(protocol=1, run=RUN, agent="a", schema=SCHEMA, time_s=0.0)
        self.offered: list[tuple[bytes, bytes]] = []
        self.chunks: Callable[[pb.FetchRequest], Sequence[bytes]] = lambda request: ()
        self.asked = 0
        self.polled = 0
        self.session = 0

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        return self.hello

    async def Manifests(self, request: pb.ManifestsRequest, context: Any) -> pb.ManifestsReply:
        self.polled += 1
        if request.session == "s" and request.seen == 1:
            await asyncio.sleep(5)
        offered = [pb.SignedManifest(manifest=data, signature=signature) for data, signature in self.offered]
        return pb.ManifestsReply(sequence=1, session="s", offered=offered)

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> None:
        self.asked += 1
        for chunk in self.chunks(request):
            await context.write(chunk)


@asynccontextmanager
async def against(
    liar: Liar, reader: Agent, identity: Identity | None = None, others: Mapping[str, str] | None = None
) -> AsyncGenerator[None]:
    """Start the liar, with the keys of a, and an agent b that follows it, and others at their addresses."""
    server = aio.server(options=[("grpc.so_reuseport", 0)])

    def unary(method: Any, request: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(method, request.FromString, lambda reply: reply.SerializeToString())

    methods = {"Hello": unary(liar.Hello, pb.HelloRequest), "Manifests": unary(liar.Manifests, pb.ManifestsRequest)}
    data = {"Fetch": grpc.unary_stream_rpc_method_handler(liar.Fetch, pb.FetchRequest.FromString)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("dimat.wire.v1.Peer", methods),
            grpc.method_handlers_generic_handler("dimat.wire.v1.Data", data),
        )
    )
    if identity is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        liar.hello.certificate = identity.certificate_der
        port = server.add_secure_port("127.0.0.1:0", identity.server_credentials())
    await server.start()
    try:
        async with started(reader):
            update_neighbours([reader], {"a": f"127.0.0.1:{port}", "b": reader.address} | dict(others or {}))
            yield
    finally:
        await server.stop(0)


def sealed(manifest: Manifest) -> tuple[bytes, bytes]:
    signed = seal(manifest, lambda data: b"")
    return signed.data, signed.signature


def honest(folder: Path, round_: int = 1) -> Manifest:
    (folder / "lies").mkdir(exist_ok=True)
    return record(folder / "lies", "a", round_, weights(round_))


async def test_a_claim_beyond_the_bound_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    from blake3 import blake3

    blocks = tuple("ab" * 32 for _ in range(1000))
    size = 1000 * 16 * MIB
    root = blake3(bytes.fromhex("".join(blocks)) + size.to_bytes(8, "big")).hexdigest()
    good = honest(tmp_path)
    liar = Liar()
    liar.offered = [sealed(replace(good, round=2, payload=Payload(root, size, blocks, 16 * MIB))), sealed(good)]
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        # the other one is taken
        assert (await b.ears.offer("a", 1)).payload == good.payload
        assert [manifest.round for manifest, _ in b.ears.offers] == [1]
        [notice] = [notice for notice in b.ears.notices if "clocks" not in notice]
        assert "a offers what cannot be taken" in notice
        assert f"{size:,}" in notice
        with pytest.raises(NetworkError, match="does not offer snapshot"):
            await b.transport.fetch("a", 2, root)
        assert not liar.asked
        assert not b.stored()


async def test_manifests_that_do_not_belong_here_are_named_and_passed_over(
    tmp_path: Path,
) -> None:
    good = honest(tmp_path)
    liar = Liar()
    liar.offered = [
        (b"\xff" * 100, b""),
        (b"", b""),
        sealed(replace(good, agent="c", basis="1:c:0")),
        sealed(replace(good, run="another")),
        sealed(replace(good, schema="another")),
        sealed(good),
    ]
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        await b.ears.offer("a", 1)
        assert len(b.ears.offers) == 1
        notices = [notice for notice in b.ears.notices if "clocks" not in notice]
        assert len(notices) == 5
        assert all(notice.startswith("a offers what cannot be taken: manifest of a refused") for notice in notices)


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        (lambda data: [data[: MIB // 2], data[MIB // 2 :]], "sends a chunk of"),
        (lambda data: [bytes(1)] * 10, "sends a chunk of 1 bytes"),
        (lambda data: [data[:65536], b""], "sends a chunk of 0 bytes"),
        (lambda data: [bytes(65536)] * 17, "sends other content than it promised: block 0"),
    ],
)
async def test_a_stream_of_other_bytes_than_were_promised_ends_the_fetch(
    tmp_path: Path, chunks: Callable[[bytes], Sequence[bytes]], says: str
) -> None:
    good = honest(tmp_path)
    data = (tmp_path / "lies" / f"{good.payload.root}.safetensors").read_bytes()
    liar = Liar()
    liar.offered = [sealed(good)]
    liar.chunks = lambda request: chunks(data)
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        await b.ears.offer("a", 1)
        with pytest.raises(NetworkError, match=f"^a {says}"):
            await b.transport.fetch("a", 1, good.payload.root)
        assert liar.asked <= 2
        assert not b.stored()


async def test_more_than_was_asked_for_ends_the_fetch(tmp_path: Path) -> None:
    good = honest(tmp_path)
    data = (tmp_path / "lies" / f"{good.payload.root}.safetensors").read_bytes()
    liar = Liar()
    liar.offered = [sealed(good)]
    blocks = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    liar.chunks = lambda request: [*blocks, b"more"]
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        await b.ears.offer("a", 1)
        with pytest.raises(NetworkError, match=r"^a sends more than it was asked for"):
            await b.transport.fetch("a", 1, good.payload.root)


async def test_streams_that_end_early_are_gone_on_with(tmp_path: Path) -> None:
    good = honest(tmp_path)
    data = (tmp_path / "lies" / f"{good.payload.root}.safetensors").read_bytes()
    liar = Liar()
    liar.offered = [sealed(good)]
    block = good.payload.block_bytes

    def three(request: pb.FetchRequest) -> list[bytes]:
        first = request.first_block
        return [data[i * block : (i + 1) * block] for i in range(first, min(first + request.blocks, first + 3))]

    liar.chunks = three
    b = make(tmp_path / "b", "b", limits=replace(QUICK, backoff_first_s=0.01))
    async with against(liar, b):
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, good.payload.root)
        assert fetched.path.read_bytes() == data
        assert fetched.bytes == len(data)
        assert liar.asked == 6  # 17 blocks, three at a time


async def test_too_many_offers_and_too_long_replies_are_no_burden(tmp_path: Path) -> None:
    good = honest(tmp_path)
    liar = Liar()
    liar.offered = [sealed(replace(good, round=round_)) for round_ in range(1, 1000)]
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        await b.ears.until(lambda: b.ears.refusals)
        assert "it offers 999 snapshots" in b.ears.refusals[0][1]
        assert not b.ears.offers
    liar.offered = [(bytes(30 * MIB), b"")]
    c = make(tmp_path / "c", "b")
    async with against(liar, c):
        # on a busy machine the peer is lost before it has answered for the first time: then a notice says why
        await c.ears.until(
            lambda: any("larger than max" in why for why in [*c.ears.notices, *(loss[1] for loss in c.ears.losses)])
        )


async def test_a_peer_that_answers_at_once_and_says_nothing_new_is_not_asked_in_a_rush(tmp_path: Path) -> None:
    liar = Liar()
    liar.offered = [sealed(honest(tmp_path))]
    liar.Manifests = _rushed(liar)  # type: ignore[method-assign]
    b = make(tmp_path / "b", "b")
    async with against(liar, b):
        await b.ears.offer("a", 1)
        before = liar.polled
        await asyncio.sleep(2.0)
        assert liar.polled - before <= 41
        assert len(b.ears.offers) == 1


def _rushed(liar: Liar) -> Any:
    async def manifests(request: pb.ManifestsRequest, context: Any) -> pb.ManifestsReply:
        liar.polled += 1
        [(data, signature)] = liar.offered
        return pb.ManifestsReply(
            sequence=1, session="s", offered=[pb.SignedManifest(manifest=data, signature=signature)]
        )

    return manifests
