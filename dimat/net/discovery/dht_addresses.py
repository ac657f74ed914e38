"""Addresses of DHT nodes: multiaddresses by which others join one, and IP:port to listen on."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from dimat.errors import ConfigError

_BOOTSTRAP = re.compile(r"(/(ip4|ip6|dns|dns4|dns6)/[^/\s]{1,253})/tcp/[0-9]{1,5}/p2p/[1-9A-HJ-NP-Za-km-z]{20,80}")


def check_bootstrap(address: str) -> str:
    """Return a bootstrap node's address unchanged; ConfigError unless it is a multiaddress with a peer's identity."""
    if not _BOOTSTRAP.fullmatch(address):
        raise ConfigError(
            f"DHT bootstrap {address!r} is not an address as `dimat dht` prints it: /ip4/HOST/tcp/PORT/p2p/IDENTITY"
        )
    return address


def split_listen(listen: str) -> tuple[str, int]:
    """Return host and port of `host:port`; ConfigError unless the host is an IP address (IPv6 in brackets)."""
    host, _, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
        if not (port.isdecimal() and int(port) < 65536 and bracketed == (address.version == 6)):
            raise ValueError
    except ValueError:
        raise ConfigError(f"DHT listen address {listen!r} is not IP:port, e.g. 0.0.0.0:7301") from None
    return str(address), int(port)


def port_of(addresses: Sequence[str]) -> int:
    """Return the TCP port of the first multiaddress that has one, 0 if none has."""
    for address in addresses:
        match = re.search(r"/tcp/([0-9]+)/", address)
        if match is not None:
            return int(match[1])
    return 0
