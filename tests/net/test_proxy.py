"""The proxy that spoils links, with raw sockets at both ends. What comes is what went, up to the fault."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator

import pytest

from tests.net.proxy import Fault, FaultProxy

pytestmark = pytest.mark.live

DATA = bytes(range(256)) * 400


@pytest.fixture
def target() -> Generator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


@pytest.fixture
def proxy(target: socket.socket) -> Generator[FaultProxy]:
    with FaultProxy(target.getsockname()[1]) as proxy:
        yield proxy


def dial(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def pair(proxy: FaultProxy, target: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Open a connection through the proxy and return both ends."""
    near = dial(proxy)
    far, _ = target.accept()
    far.settimeout(30)
    return near, far


def receive(end: socket.socket, amount: int) -> bytes:
    data = b""
    while len(data) < amount and (part := end.recv(amount - len(data))):
        data += part
    return data


def resets(proxy: FaultProxy) -> None:
    """A new connection is reset, which may be seen as early as it is made."""
    with pytest.raises(ConnectionResetError), dial(proxy) as end:
        end.recv(1)


def hears_nothing(end: socket.socket, wait_s: float = 0.3) -> bool:
    end.settimeout(wait_s)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(30)
    return False


def test_bytes_and_ends_go_through(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        near.sendall(DATA)
        assert receive(far, len(DATA)) == DATA
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        far.sendall(DATA[:1000])  # the other direction is still open
        assert receive(near, 1000) == DATA[:1000]
        far.close()
        assert near.recv(1) == b""
    assert proxy.connections == 1
    assert proxy.bytes == {"up": len(DATA), "down": 1000}


def test_reset_reaches_both_ends_and_new_connections(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.inject(Fault.RESET)
        for end in (near, far):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    resets(proxy)
    proxy.heal()
    near, far = pair(proxy, target)
    with near, far:
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_truncation_ends_in_order_after_so_many_bytes(proxy: FaultProxy, target: socket.socket) -> None:
    proxy.inject(Fault.TRUNCATE, "up", 1234)
    near, far = pair(proxy, target)
    with near, far:
        near.sendall(DATA[:5000])
        assert receive(far, 5000) == DATA[:1234]
        assert far.recv(1) == b""
    assert proxy.struck
    assert proxy.bytes["up"] == 1234


def test_a_reset_after_so_many_bytes(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    proxy.inject(Fault.RESET, "up", 1234)
    with near, far:
        near.sendall(DATA[:5000])
        with pytest.raises(ConnectionResetError):
            receive(near, 1)
        with pytest.raises(ConnectionResetError):
            receive(far, 5000)
    assert proxy.bytes["up"] == 1234


def test_a_black_hole_keeps_bytes_until_it_is_healed(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.inject(Fault.BLACK_HOLE, "up", 100)
        near.sendall(DATA[:300])
        assert receive(far, 100) == DATA[:100]
        assert hears_nothing(far)
        far.sendall(b"down")
        assert hears_nothing(near)
        with dial(proxy) as late:  # accepted
            late.sendall(b"late")
            later, _ = target.accept()
            with later:
                assert hears_nothing(later)
                proxy.heal()
                later.settimeout(30)
                assert receive(later, 4) == b"late"
        assert receive(far, 200) == DATA[100:300]
        assert receive(near, 4) == b"down"


def test_half_open_is_one_direction(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.inject(Fault.HALF_OPEN, "down")
        near.sendall(b"up")
        assert receive(far, 2) == b"up"
        far.sendall(b"down")
        assert hears_nothing(near)
        proxy.heal()
        assert receive(near, 4) == b"down"


def test_one_byte_is_flipped_in_each_connection(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.inject(Fault.FLIP, "up", 70_000)
        near.sendall(DATA)
        got = receive(far, len(DATA))
        assert [index for index, byte in enumerate(got) if byte != DATA[index]] == [70_000]
        far.sendall(DATA)
        assert receive(near, len(DATA)) == DATA
    near, far = pair(proxy, target)
    with near, far:
        near.sendall(DATA[:100])
        assert receive(far, 100) == bytes([DATA[0] ^ 0xFF]) + DATA[1:100]


def test_rate_and_latency(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.slow(bytes_s=50e3)
        began = time.monotonic()
        near.sendall(DATA[:50_000])
        assert receive(far, 50_000) == DATA[:50_000]
        assert time.monotonic() - began > 0.8
        proxy.slow(latency_s=0.3)
        began = time.monotonic()
        near.sendall(b"ping")
        far.sendall(receive(far, 4))
        assert receive(near, 4) == b"ping"
        assert time.monotonic() - began > 0.6
        near.sendall(DATA)  # held back at first, whole after
        proxy.heal()
        assert receive(far, len(DATA)) == DATA


def test_new_connections_are_refused_until_it_is_healed(proxy: FaultProxy, target: socket.socket) -> None:
    near, far = pair(proxy, target)
    with near, far:
        proxy.inject(Fault.REFUSE)
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
        near.sendall(b"still")
        assert receive(far, 5) == b"still"
        port = proxy.port
        proxy.heal()
        assert proxy.port == port
        late, later = pair(proxy, target)
        late.close()
        later.close()


def test_a_target_that_is_gone_resets(proxy: FaultProxy, target: socket.socket) -> None:
    target.close()
    resets(proxy)
