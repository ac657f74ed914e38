"""Asks another agent of the map for its status, with this agent's keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from dimat.agent.setup.prepare import addresses_on_map
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError, NetworkError, unknown_agent
from dimat.net.peers.query import query_peer
from dimat.net.pki.identity import Identity, load_identity


def ask_peer(config: ExperimentConfig, peer: str) -> dict[str, Any]:
    """Return the status of an agent on the map, from the first of its addresses that answers.

    Raises ConfigError if the map has no such agent or no address of it, NetworkError or SecurityError if it does not
    answer.
    """
    name = config.agent.name
    if name is None:
        raise ConfigError("which agent asks? set agent.name to its name on the network map, or give --name")
    known = addresses_on_map(config)
    if peer not in known:
        raise ConfigError(unknown_agent("--peer", peer, tuple(known)))
    if not known[peer]:
        raise ConfigError(f"the map has no address of {peer}; add one, or ask on its own machine")
    identity = None if config.agent.insecure else load_identity(Path(config.folder) / config.agent.keys, name)
    return asyncio.run(_ask(peer, list(known[peer]), name, identity))


async def _ask(peer: str, addresses: list[str], name: str, identity: Identity | None) -> dict[str, Any]:
    fault: NetworkError | None = None
    for address in addresses:
        try:
            async with query_peer(peer, address, name, identity) as asked:
                return await asked.status()
        except NetworkError as error:
            fault = fault or error
    assert fault is not None
    raise fault
