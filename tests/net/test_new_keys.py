"""Keys that are replaced while agents run: no connection is lost, and whoever connects anew sees the new ones."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from pathlib import Path

import pytest

from tests.net.agents import join, make, started, weights
from tests.net.keys import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.live]


async def test_readers_go_on_with_new_keys_on_the_connection_that_is_there(tmp_path: Path) -> None:
    """a gets another key and certificate, and signs what it offers again. b, which holds the old certificate, asks for
    the new one on the same connection, takes the next snapshot, and fetches it."""
    authority = Authority()
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    async with started(a, b):
        join(a, b)
        a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        link = b.transport._links["a"]
        connection = link._connection
        assert connection is not None
        identity = a.transport._identity
        assert identity is not None
        identity.take_over(authority.issue("a"))
        a.transport.sign_again()
        manifest = a.publish(2, weights(2))
        await b.ears.offer("a", 2)
        fetched = await b.transport.fetch("a", 2, manifest.payload.root)
        assert fetched.certificate == identity.certificate_der
        assert link._connection is connection
        assert not b.ears.losses
        assert not b.ears.notices


async def test_new_connections_are_made_with_new_keys(tmp_path: Path) -> None:
    """The CA is replaced: a trusts both for a while and has a certificate of the new one, which alone c trusts. The
    server was started with the old one."""
    old, new = Authority("old"), Authority("new")
    both = old.pem + new.pem
    a, b = (make(tmp_path / name, name, identity=old.issue(name, ca=both)) for name in "ab")
    c = make(tmp_path / "c", "c", identity=new.issue("c"))
    async with started(a, b, c):
        join(a, b, c)
        a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        await c.ears.until(lambda: [peer for peer, _, _ in c.ears.losses if peer == "a"])
        identity = a.transport._identity
        assert identity is not None
        identity.take_over(new.issue("a", ca=both))
        a.transport.sign_again()
        await c.ears.offer("a", 1)
        a.publish(2, weights(2))
        for reader in (b, c):
            await reader.ears.offer("a", 2)
        assert "a" not in {peer for peer, _, _ in b.ears.losses}
