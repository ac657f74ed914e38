"""Addresses of DHT nodes, good ones and those that cannot be."""

from __future__ import annotations

import pytest

from dimat.errors import ConfigError
from dimat.net.discovery.dht_addresses import check_bootstrap, port_of, split_listen


def test_addresses_that_cannot_be_are_named() -> None:
    assert split_listen("[::1]:7301") == ("::1", 7301)
    for listen in ("7301", "localhost:7301", "1.2.3.4:", "1.2.3.4:70000", ":::1"):
        with pytest.raises(ConfigError, match="is not IP:port"):
            split_listen(listen)
    peer = "QmTqiERyn26Mzop2zxUaTRvKMdYypMqW3LDKBb8ZBQfdR2"
    for good in (f"/ip4/1.2.3.4/tcp/7301/p2p/{peer}", f"/dns4/boot.example.org/tcp/7301/p2p/{peer}"):
        assert check_bootstrap(good) == good
    for bad in ("1.2.3.4:7301", "/ip4/1.2.3.4/tcp/7301", f"/ip4/1.2.3.4/tcp/7301/p2p/{peer} ", ""):
        with pytest.raises(ConfigError, match="is not an address as `dimat dht` prints it"):
            check_bootstrap(bad)


def test_the_port_is_that_of_the_first_address_that_has_one() -> None:
    assert port_of(["/ip4/1.2.3.4/udp/7300/quic", "/ip4/1.2.3.4/tcp/7301/p2p/Qm", "/ip4/1.2.3.4/tcp/7302"]) == 7301
    assert port_of([]) == 0
