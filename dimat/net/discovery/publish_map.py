"""`dimat keys publish-map`: signs a network map with the CA's key and stores it in the DHT."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dimat.config import TopologyConfig
from dimat.errors import ConfigError, DataError, NetworkError
from dimat.net.discovery.dht import DhtNode
from dimat.net.discovery.map_records import open_map, seal_map
from dimat.net.limits import DHT_FIND_S, PUBLISH_RETRY_S, PUBLISH_TRIES
from dimat.net.pki.key_files import read_file
from dimat.net.pki.keyring import authority_of
from dimat.topology import build_topology, load_map
from dimat.topology.network_map import check_alone, without_mixing


@dataclass(frozen=True, slots=True)
class PublishedMap:
    """A published map: its `agents`, the `nodes` that keep it, and until when they do (`until_s`, Unix time)."""

    version: int
    agents: int
    nodes: int
    until_s: float


async def publish_map(
    file: Path,
    keys: Path,
    run: str,
    bootstraps: Sequence[str],
    *,
    days: float,
    listen: str,
    notice: Callable[[str], None],
) -> PublishedMap:
    """Sign a network map with the CA's key in the folder `keys`, and store it in the DHT of a run.

    ConfigError or TopologyError for a map that agents could not use, that needs other files, is too large, or whose
    version is not above the published one; SecurityError without the CA's key; NetworkError if no node accepts it.
    """
    _, key = authority_of(keys)
    text, version, agents = _readable(file)
    ca = read_file(keys / "ca.crt")
    with tempfile.TemporaryDirectory(prefix="dimat-publish-") as folder:
        node = DhtNode(
            Path(folder),
            run=run,
            bootstraps=bootstraps,
            ca=ca,
            listen=listen,
            notice=notice,
            generator=random.Random(),
        )
        # checked before a process is started
        seal_map(run, version, text, time.time(), time.time() + days * 86_400, key)
        try:
            await node.start()
            await node.ready()
            async with asyncio.timeout(DHT_FIND_S):
                while not node.known:
                    node.changed.clear()
                    await node.changed.wait()
            now = time.time()
            expires_s = now + days * 86_400
            before = await node.lookup_map()
            if before is not None:
                if before[0].version > version or (before[0].version == version and before[0].text != text):
                    raise ConfigError(
                        f"{file} states version {version}, and version {before[0].version} of the map is published "
                        f"already; state version = {before[0].version + 1}"
                    )
                expires_s = max(expires_s, before[0].expires_s + 1.0)  # the DHT keeps the value that expires last
            sealed = seal_map(run, version, text, now, expires_s, key)
            record = open_map(sealed, ca=ca, run=run, now=now)  # as every node will
            for _ in range(PUBLISH_TRIES):
                nodes = await node.announce_map(sealed, record)
                if nodes:
                    break
                await asyncio.sleep(PUBLISH_RETRY_S)
            else:
                raise NetworkError(
                    "no node of the DHT accepted the network map: do the bootstraps run, for this run, with this CA, "
                    "in this version of dimat?"
                )
        except TimeoutError:
            raise NetworkError(
                f"no node of the DHT was found within {DHT_FIND_S:.0f} s: do the bootstraps run?"
            ) from None
        finally:
            await node.close()
    return PublishedMap(version, agents, nodes, expires_s)


def _readable(file: Path) -> tuple[str, int, int]:
    """Return a map's text, version and number of agents, after checking that agents can use it."""
    check_alone(file)
    version = load_map(file).version
    if not version:
        raise ConfigError(f"{file} states no version: put `version = 1` at its top, and more with each change")
    # agents know their sample counts, the organiser need not
    topology = build_topology(without_mixing(TopologyConfig(map=str(file.resolve()))))
    try:
        return file.read_text(encoding="utf-8"), version, len(topology.names)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
