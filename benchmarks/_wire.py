"""The processes of `wire.py`: each end of each path, and the agents of each way of averaging."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

MIB = 2**20
SECONDS = 90


def numbers(megabytes: int) -> Any:
    """Return a flat fp32 tensor of so many 10^6 bytes."""
    import torch

    return torch.randn(megabytes * 250_000, generator=torch.Generator().manual_seed(1))


# ── raw TCP ──────────────────────────────────────────────────────────────────────────────────────────────────
def tcp_server(pipe: Any, megabytes: int, repeats: int, keys: str) -> None:
    """Send a buffer to whoever connects, so many times."""
    del keys
    data = memoryview(numbers(megabytes).numpy()).cast("B")
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        for _ in range(repeats):
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)
            pipe.send(cpu_s())


def tcp_client(port: int, megabytes: int, keys: str) -> Any:
    """Yield a function that receives once into a buffer that is there."""
    del keys
    buffer = memoryview(bytearray(megabytes * 1_000_000))

    async def receive() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            got = 0
            while got < len(buffer):
                got += connection.recv_into(buffer[got:])

    return receive, None, None


# ── plain grpc.aio, mutual TLS: protobuf messages into memory, and bare bytes that nobody keeps ────────────────
def protobuf_server(pipe: Any, megabytes: int, repeats: int, keys: str) -> None:
    """Stream a buffer in protobuf messages of 1 MiB."""
    from google.protobuf.wrappers_pb2 import BytesValue

    _plain_server(
        pipe, megabytes, repeats, keys, lambda data: BytesValue(value=data), serializer=BytesValue.SerializeToString
    )


def bytes_server(pipe: Any, megabytes: int, repeats: int, keys: str) -> None:
    """Stream a buffer in messages of 1 MiB that are nothing but its bytes."""
    _plain_server(pipe, megabytes, repeats, keys, lambda data: data, serializer=None)


def _plain_server(
    pipe: Any, megabytes: int, repeats: int, keys: str, wrap: Callable[[bytes], Any], serializer: Any
) -> None:
    import grpc

    data = memoryview(numbers(megabytes).numpy()).cast("B")

    async def stream(request: bytes, context: Any) -> None:
        del request
        for start in range(0, len(data), MIB):
            await context.write(wrap(bytes(data[start : start + MIB])))

    async def serve() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(stream, response_serializer=serializer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Data", {"Fetch": handler}),))
        port = server.add_secure_port("127.0.0.1:0", identity(keys, "a").server_credentials())
        await server.start()
        pipe.send(port)
        for _ in range(repeats):
            await asyncio.to_thread(pipe.recv)
            pipe.send(cpu_s())
        await server.stop(0)

    asyncio.run(serve())


def protobuf_client(port: int, megabytes: int, keys: str) -> Any:
    """Return a function that receives once into a buffer that is there."""
    from google.protobuf.wrappers_pb2 import BytesValue

    buffer = memoryview(bytearray(megabytes * 1_000_000))

    def keep(got: int, message: BytesValue) -> int:
        buffer[got : got + len(message.value)] = message.value
        return len(message.value)

    return _plain_client(port, megabytes, keys, keep, BytesValue.FromString), None, None


def bytes_client(port: int, megabytes: int, keys: str) -> Any:
    """Return a function that receives once and keeps nothing."""
    return _plain_client(port, megabytes, keys, lambda got, message: len(message), None), None, None


def _plain_client(
    port: int, megabytes: int, keys: str, keep: Callable[[int, Any], int], deserializer: Any
) -> Callable[[], Any]:
    import grpc

    from dimat.net.pki.certificates import tls_name

    own = identity(keys, "b")

    async def receive() -> None:
        options = [("grpc.ssl_target_name_override", tls_name("a")), ("grpc.max_receive_message_length", 2 * MIB)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", own.channel_credentials(), options) as channel:
            call = channel.unary_stream("/bench.Data/Fetch", response_deserializer=deserializer)(b"")
            got = 0
            async for message in call:
                got += keep(got, message)
            assert got == megabytes * 1_000_000

    return receive


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────
class Ears:
    """Waits for the offers of peers."""

    def __init__(self) -> None:
        self.offers: asyncio.Queue[Any] = asyncio.Queue()

    def offered(self, manifest: Any, oldest: int) -> None:
        self.offers.put_nowait(manifest)

    def lost(self, peer: str, reason: str, last: int) -> None:
        print(f"{peer} lost: {reason}", file=sys.stderr)

    def refused(self, peer: str, reason: str) -> None:
        print(f"{peer} refused: {reason}", file=sys.stderr)

    def noticed(self, message: str) -> None:
        print(message, file=sys.stderr)


def transport(folder: Path, name: str, keys: str, schema: str, megabytes: int) -> Any:
    """Return an agent's transport and its store."""
    from dimat.net.compatibility import Profile
    from dimat.net.grpc_transport import GrpcTransport
    from dimat.net.manifest import ManifestLimits
    from dimat.weights.snapshot import SnapshotStore

    store = SnapshotStore(folder / "own", keep=2)
    made = GrpcTransport(
        run="wire",
        agent=name,
        identity=identity(keys, name),
        store=store,
        received=folder / "received",
        profile=Profile(schema),
        manifest_limits=ManifestLimits(2 * megabytes * 1_000_000),
        listen="127.0.0.1:0",
        generator=Random(0),
        durable=False,
    )
    return made, store


async def publish(made: Any, store: Any, name: str, round_: int, weights: Mapping[str, Any]) -> None:
    """Record weights, in a thread, and offer them."""
    from dimat.weights.snapshot import Manifest, record_bytes
    from dimat.weights.tensors import encode, schema_hash

    payload = await asyncio.to_thread(record_bytes, store.folder, encode(weights), durable=False)
    made.publish(Manifest("wire", name, round_, f"0:{name}:0", schema_hash(weights), payload))


def neighbours(addresses: Mapping[str, str], name: str, *, follow: bool = True) -> Any:
    """Return a map on which all are neighbours; without `follow` this one only serves."""
    from dimat.net.transport import Neighbours

    others = [other for other in addresses if other != name]
    return Neighbours(
        others if follow else [], others, list(addresses), {agent: [at] for agent, at in addresses.items()}
    )


def dimat_server(pipe: Any, megabytes: int, repeats: int, keys: str) -> None:
    """Offer one snapshot a repeat, all different."""
    from dimat.weights.tensors import schema_hash

    weights = {"x": numbers(megabytes)}

    async def serve(folder: Path) -> None:
        made, store = transport(folder, "a", keys, schema_hash(weights), megabytes)
        made.update_neighbours(neighbours({"a": "127.0.0.1:1", "b": "127.0.0.1:1"}, "a", follow=False))
        await made.start(Ears())
        pipe.send(made.port)
        for round_ in range(1, repeats + 1):
            weights["x"].add_(1.0)
            await publish(made, store, "a", round_, weights)
            pipe.send(cpu_s())  # recording and hashing are not the wire's
            await asyncio.to_thread(pipe.recv)
            pipe.send(cpu_s())
        await made.close(0)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(Path(folder)))


def dimat_client(port: int, megabytes: int, keys: str) -> Any:
    """Return a function that fetches the next snapshot, block by block verified, into a file; what prepares; and
    what closes."""
    from dimat.weights.tensors import schema_hash

    folder = tempfile.TemporaryDirectory()
    held: dict[str, Any] = {}

    async def ready() -> None:
        if not held:
            import torch

            schema = schema_hash({"x": torch.empty(megabytes * 250_000, device="meta")})
            made, _ = transport(Path(folder.name), "b", keys, schema, megabytes)
            held["ears"], held["made"], held["folder"] = Ears(), made, folder
            made.update_neighbours(neighbours({"a": f"127.0.0.1:{port}", "b": "127.0.0.1:1"}, "b"))
            await made.start(held["ears"])
        held["round"] = held.get("round", 0) + 1
        manifest = await held["ears"].offers.get()
        while manifest.round != held["round"]:
            manifest = await held["ears"].offers.get()
        held["manifest"] = manifest

    async def receive() -> None:
        manifest = held["manifest"]
        fetched = await held["made"].fetch("a", manifest.round, manifest.payload.root)
        assert fetched.bytes == manifest.payload.bytes
        held["made"].release("a", manifest.round, manifest.payload.root)

    async def close() -> None:
        await held["made"].close(0)

    return receive, ready, close


# ── averaging among four ─────────────────────────────────────────────────────────────────────────────────────
def dimat_averager(index: int, count: int, barrier: Any, ports: Any, results: Any, job: tuple[int, int, str]) -> None:
    """Average with all others: publish, fetch three, take the mean. Puts the wall seconds of each step.

    No two blocks are equal, of any agents or rounds: content that is held already would not travel.
    """
    import torch
    from safetensors.torch import load_file

    from dimat.weights.tensors import schema_hash

    torch.set_num_threads(1)
    megabytes, repeats, keys = job
    name = "abcd"[index]
    start = numbers(megabytes)
    weights = {"x": start.clone()}

    async def run(folder: Path) -> list[float]:
        made, store = transport(folder, name, keys, schema_hash(weights), megabytes)
        ears = Ears()
        await made.start(ears)
        ports[index] = made.port
        await asyncio.to_thread(barrier.wait, SECONDS)
        made.update_neighbours(neighbours({n: f"127.0.0.1:{ports[i]}" for i, n in enumerate("abcd"[:count])}, name))
        times: list[float] = []
        for round_ in range(1, repeats + 1):
            expected = float(start[0]) + sum(range(count)) / count + count * round_
            torch.add(start, index + count * round_, out=weights["x"])
            await asyncio.to_thread(barrier.wait, SECONDS)
            begun = time.perf_counter()
            await publish(made, store, name, round_, weights)
            fetches: list[asyncio.Task[Any]] = []
            while len(fetches) < count - 1:
                manifest = await ears.offers.get()
                if manifest.round == round_:
                    root = manifest.payload.root
                    fetches.append(asyncio.create_task(made.fetch(manifest.agent, round_, root)))
            paths = [(await fetch).path for fetch in fetches]

            def mean(paths: list[Path] = paths) -> None:
                for path in paths:
                    weights["x"].add_(load_file(path)["x"])
                weights["x"].div_(count)

            await asyncio.to_thread(mean)
            times.append(time.perf_counter() - begun)
            assert abs(float(weights["x"][0]) - expected) < 1e-4
            assert sum(made.received_bytes.values()) > round_ * (count - 1) * megabytes * 1_000_000
        await asyncio.to_thread(barrier.wait, SECONDS)
        await made.close(0)
        return times

    with tempfile.TemporaryDirectory() as folder:
        results.put(asyncio.run(run(Path(folder))))


def hivemind_averager(
    index: int, count: int, barrier: Any, ports: Any, results: Any, job: tuple[int, int, str]
) -> None:
    """Average with all others through hivemind. `ports` carries nothing: peers meet at the first one's address."""
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # of its own processes: it cannot do otherwise
    import hivemind
    import torch
    from hivemind.averaging import DecentralizedAverager

    del ports
    torch.set_num_threads(1)
    megabytes, repeats, shared = job
    addresses = Path(shared)
    local = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "start": True, "use_ipfs": False}
    if index == 0:
        dht = hivemind.DHT(**local)
        addresses.write_text("\n".join(map(str, dht.get_visible_maddrs())))
        barrier.wait(SECONDS)
    else:
        barrier.wait(SECONDS)
        dht = hivemind.DHT(initial_peers=addresses.read_text().split(), **local)
    tensor = numbers(megabytes) * 0 + index
    averager = DecentralizedAverager(
        [tensor],
        dht=dht,
        prefix="bench",
        target_group_size=count,
        min_group_size=count,
        min_matchmaking_time=2.0,
        request_timeout=1.0,
        start=True,
    )
    times: list[float] = []
    barrier.wait(SECONDS)
    for _ in range(repeats):
        # matchmaking is left out: the group is formed ahead, and begins at once when all are ready
        control = averager.step(wait=False, require_trigger=True, timeout=120)
        barrier.wait(SECONDS)
        time.sleep(4.0)
        barrier.wait(SECONDS)
        begun = time.perf_counter()
        control.allow_allreduce()
        outcome = control.result(120)
        assert outcome is not None
        times.append(time.perf_counter() - begun)
        barrier.wait(SECONDS)
    results.put(times)
    barrier.wait(SECONDS)
    averager.shutdown()
    dht.shutdown()


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────
def identity(keys: str, name: str) -> Any:
    """Return an agent's keys."""
    from dimat.net.pki.identity import load_identity

    return load_identity(Path(keys), name)


def cpu_s() -> float:
    """Return this process's CPU-seconds."""
    spent = os.times()
    return spent.user + spent.system
