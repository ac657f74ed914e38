"""The process that runs hivemind: one DHT node, which takes requests as JSON lines on stdin.

Run as `python -m dimat.net.discovery.dht_process PARENT_PID` by `dimat.net.discovery.dht`, in a process group of its
own. It answers on stdout: `{"id": …, "ok": true, …}` or `{"id": …, "ok": false, "kind": …, "error": …}`. It ends, with
its whole group, when stdin ends or the parent dies. It imports hivemind at the first request; the modules of dimat that
it imports load neither gRPC nor torch.

Requests, beside `id` and `op`; keys are hex, values base64:
    start   run, ca, host, port, identity, sockets    -> peer, addresses
    join    bootstraps                                -> failed: {address: reason}
    probe                                             -> peer, addresses, known (nodes), refused (records)
    store   key, value, expires                       -> stored (how many other nodes accepted it)
    get     key                                       -> own, others (values that this node and others hold)
    map     key                                       -> value (the newest valid map among these, or none)
    stop
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dimat.net.discovery.child_process import RequestError
from dimat.net.discovery.record_validator import RecordValidator
from dimat.net.limits import (
    DHT_ASKED,
    DHT_DIAL_S,
    DHT_LISTEN_S,
    DHT_RECORDS,
    DHT_REPLICAS,
    DHT_RPC_S,
    DHT_WORK_S,
    MAX_DHT_ADDRESSES,
    MAX_DHT_REASON,
    MAX_LINE_BYTES,
    MAX_MAP_BYTES,
    MAX_RECORD_BYTES,
)

_PR_SET_PDEATHSIG = 1


class DhtService:
    """Handles each request in a task of `tasks`, and writes replies with `write`."""

    def __init__(self, write: Callable[[bytes], None], tasks: asyncio.TaskGroup) -> None:
        self.sockets = ""
        self._write = write
        self._tasks = tasks
        self._node: Any = None
        self._validator = RecordValidator(None, None)

    def receive(self, line: bytes) -> None:
        """Begin to handle a request; a malformed one gets a reply, too."""
        self._tasks.create_task(self._answer(line))

    async def _answer(self, line: bytes) -> None:
        number: Any = None
        try:
            request = json.loads(line)
            number = request["id"]
            work = self._work(request["op"])
            async with asyncio.timeout(DHT_WORK_S[request["op"]]):
                done = await work(request)
            reply: dict[str, Any] = {"id": number, "ok": True, **done}
        except RequestError as refusal:
            reply = {"id": number, "ok": False, "kind": refusal.kind, "error": str(refusal)}
        except TimeoutError:
            reply = {"id": number, "ok": False, "kind": "late", "error": "it took too long"}
        except (KeyError, TypeError, ValueError) as error:
            reply = {"id": number, "ok": False, "kind": "request", "error": f"{type(error).__name__}: {error}"}
        except Exception as error:  # from hivemind: the parent decides what follows
            reply = {"id": number, "ok": False, "kind": "failed", "error": f"{type(error).__name__}: {error}"}
        self._write(json.dumps(reply).encode() + b"\n")
        if reply["ok"] and reply.get("stopped"):
            end_group(self.sockets)

    def _work(self, op: str) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
        works = {
            "start": self._start,
            "join": self._join,
            "probe": self._probe,
            "store": self._store,
            "get": self._get,
            "map": self._map,
            "stop": self._stop,
        }
        if op not in works:
            raise RequestError("request", f"unknown request {op!r}")
        if op not in ("start", "stop") and self._node is None:
            raise RequestError("request", f"{op} before start")
        return works[op]

    async def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        run, ca = request["run"], request["ca"]
        host, port, identity = str(request["host"]), int(request["port"]), Path(request["identity"])
        self.sockets = str(request["sockets"])
        self._validator = RecordValidator(None if ca is None else str(ca).encode(), None if run is None else str(run))
        if port:
            _check_port(host, port)
        self._node = await _make_node(self._validator, host, port, identity, self.sockets)
        return await self._probe(request)

    async def _probe(self, request: dict[str, Any]) -> dict[str, Any]:
        # of hivemind's calls, this one alone notices that p2pd is gone
        addresses = await self._node.get_visible_maddrs(latest=True)
        return {
            "peer": self._node.peer_id.to_base58(),
            "addresses": [str(address) for address in addresses][:MAX_DHT_ADDRESSES],
            "known": len(self._node.protocol.routing_table.uid_to_peer_id),
            "refused": self._validator.refused,
        }

    async def _join(self, request: dict[str, Any]) -> dict[str, Any]:
        addresses = [str(address) for address in request["bootstraps"]]
        reasons = await asyncio.gather(*map(self._join_one, addresses))
        if None in reasons:
            await self._node.find_nearest_nodes([self._node.node_id])
        failed = {address: why for address, why in zip(addresses, reasons, strict=True) if why}
        return {"failed": {address: why[:MAX_DHT_REASON] for address, why in failed.items()}}

    async def _join_one(self, address: str) -> str | None:
        """Introduce one bootstrap and this node to each other; return why that failed, None if it did not."""
        from hivemind.p2p import PeerID
        from hivemind.utils.multiaddr import Multiaddr

        where, _, peer = address.rpartition("/p2p/")
        try:
            peer_id = PeerID.from_base58(peer)
            if peer_id == self._node.peer_id:
                return None
            # a node that is given its first peers when it is made fails for good where they are down: so it is made
            # without any, and p2pd is told to dial them now
            async with asyncio.timeout(DHT_DIAL_S):
                await self._node.p2p._client.connect(peer_id, [Multiaddr(where)])
            answered = await self._node.protocol.call_ping(peer_id)
        except TimeoutError:
            return "no answer"
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__
        return None if answered is not None else "it listens, but no DHT node answers there"

    async def _store(self, request: dict[str, Any]) -> dict[str, Any]:
        key, value, expires = (
            _key(request),
            base64.b64decode(request["value"], validate=True),
            float(request["expires"]),
        )
        if len(value) > MAX_MAP_BYTES:
            raise RequestError("request", f"a record of {len(value)} bytes")
        if self._validator.admits(key.to_bytes(), value, expires, time.time()):
            self._node.protocol.storage.store(key, value, expires)
        nearest = await self._nearest(key, DHT_REPLICAS)
        stored = await asyncio.gather(
            *(self._node.protocol.call_store(peer, [key], [value], expires) for peer in nearest)
        )
        return {"stored": sum(1 for answer in stored if answer and answer[0])}

    async def _get(self, request: dict[str, Any]) -> dict[str, Any]:
        own, others = await self._held(_key(request))
        small = [value for value in others if len(value) <= MAX_RECORD_BYTES]  # a reply has to fit a line
        return {"own": _text(own), "others": [_text(value) for value in small]}

    async def _map(self, request: dict[str, Any]) -> dict[str, Any]:
        own, others = await self._held(_key(request))
        values = [*others, *([] if own is None else [own])]
        return {"value": _text(self._validator.newest_map(values, time.time()))}

    async def _held(self, key: Any) -> tuple[bytes | None, set[bytes]]:
        """Return the value that this node holds under a key, and those of others."""
        own = self._node.protocol.storage.get(key)
        nearest = await self._nearest(key, DHT_ASKED)
        answers = await asyncio.gather(*(self._node.protocol.call_find(peer, [key]) for peer in nearest))
        found = [answer[key][0] for answer in answers if answer and key in answer]
        others = {item.value for item in found if item is not None and isinstance(item.value, bytes)}
        return (None if own is None else own.value), others

    async def _nearest(self, key: Any, count: int) -> list[Any]:
        found = await self._node.find_nearest_nodes([key], k_nearest=count, exclude_self=True)
        return list(found[key].values())[:count]

    async def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._node is not None:
            await self._node.shutdown()
        return {"stopped": True}


async def _make_node(validator: RecordValidator, host: str, port: int, identity: Path, sockets: str) -> Any:
    """Return a DHT node that listens and does not know any other yet."""
    try:
        from hivemind.dht.node import DHTNode
        from hivemind.dht.protocol import DHTProtocol
        from hivemind.dht.storage import DHTLocalStorage
        from hivemind.dht.validation import RecordValidatorBase
        from hivemind.p2p import P2P
    except Exception as error:  # a broken torch below it raises other things than ImportError
        raise RequestError("missing", f"hivemind cannot be imported ({type(error).__name__}: {error})") from None

    class Validator(RecordValidatorBase):
        def validate(self, record: Any) -> bool:
            plain = record.subkey == DHTProtocol.IS_REGULAR_VALUE
            return plain and validator.admits(record.key, record.value, record.expiration_time, time.time())

    class Storage(DHTLocalStorage):
        """Holds plain values, each once: in hivemind's, an older value that arrives again ends a newer one's life."""

        def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
            held = self.get(key)
            if subkey is not None or not isinstance(value, bytes) or (held and held.expiration_time >= expiration_time):
                return False
            return super().store(key, value, expiration_time)

        def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
            return False

    _keep_identity(identity, P2P.generate_identity)
    setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{sockets}/")  # noqa: B010  (in /tmp they would stay after a kill)
    family = "ip6" if ":" in host else "ip4"
    node = await DHTNode.create(
        host_maddrs=[f"/{family}/{host}/tcp/{port}"],
        identity_path=str(identity),
        record_validator=Validator(),
        num_replicas=DHT_REPLICAS,
        wait_timeout=DHT_RPC_S,
        startup_timeout=DHT_LISTEN_S,
        cache_size=DHT_RECORDS,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        use_relay=False,
        auto_nat=False,
        nat_port_map=False,
    )
    node.protocol.storage, node.protocol.cache = Storage(DHT_RECORDS), Storage(DHT_RECORDS)
    return node


def _keep_identity(identity: Path, generate: Callable[[str], None]) -> None:
    """Make the node's key unless it exists; by rename, as a partly written file would stop the node for good."""
    if not identity.exists():
        fresh = identity.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        generate(str(fresh))
        os.replace(fresh, identity)


def _check_port(host: str, port: int) -> None:
    """Raise RequestError if a port is in use: p2pd would share it silently with the other process."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RequestError("port", f"cannot listen on {host} port {port}: {error.strerror}") from None


def _key(request: dict[str, Any]) -> Any:
    from hivemind.dht.routing import DHTID

    key = bytes.fromhex(request["key"])
    if len(key) != DHTID.HASH_NBYTES:
        raise RequestError("request", f"a key of {len(key)} bytes")
    return DHTID.from_bytes(key)


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def end_group(sockets: str) -> NoReturn:
    """End this process and those that it started, above all p2pd."""
    if sockets:
        shutil.rmtree(sockets, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve one parent until it stops this process, closes stdin, or dies."""
    parent = int(sys.argv[1])
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)  # the whole group is killed in the end, so it must hold nothing else
    os.umask(0o077)
    replies = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not come between the replies

    async def serve(tasks: asyncio.TaskGroup) -> None:
        service = DhtService(lambda line: _write_all(replies, line), tasks)
        loop = asyncio.get_running_loop()

        def terminate(number: int, _: FrameType | None) -> None:
            # of the parent's death the kernel tells too (SIGHUP), as stdin stays open where the parent's forked workers
            # hold it; it says so as well when only the thread ended that started this process
            if number == signal.SIGTERM or os.getppid() != parent:
                end_group(service.sockets)

        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGHUP, terminate)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != parent:
            end_group(service.sockets)

        def listen() -> None:
            while (line := sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
                loop.call_soon_threadsafe(service.receive, line)
            end_group(service.sockets)  # from this thread, so that it works whatever holds the loop up

        threading.Thread(target=listen, name="requests", daemon=True).start()
        await asyncio.Event().wait()

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            await serve(tasks)

    asyncio.run(run())


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


if __name__ == "__main__":
    main()
