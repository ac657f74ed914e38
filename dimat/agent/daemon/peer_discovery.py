"""How an agent finds its peers: by the map's addresses and, with bootstraps, by the DHT."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.net.discovery.address_records import seal_record
from dimat.net.discovery.dht import DhtNode
from dimat.net.discovery.resolver import AddressResolver, Announcement
from dimat.net.pki.identity import Identity
from dimat.net.transport import Neighbours
from dimat.seeds import derive_seed


class PeerDiscovery:
    """The DHT node of an agent, in its own process, and the addresses found through it.

    Made before torch works on several threads and before gRPC runs; the rest belongs to the event loop.
    """

    def __init__(
        self, config: ExperimentConfig, agent: str, folder: Path, identity: Identity, notice: Callable[[str], None]
    ) -> None:
        generator = random.Random(derive_seed(config.seed, "dht", agent))
        self._announced = config.dht.announce
        self._agent = agent
        self._told = Announcement()
        self.dht = DhtNode(
            folder,
            run=config.run,
            bootstraps=config.dht.bootstraps,
            ca=identity.ca,
            listen=config.dht.listen,
            notice=notice,
            generator=generator,
            seal=lambda record: seal_record(record, identity.sign, identity.certificate_der),
        )
        self._resolver = AddressResolver(
            run=config.run,
            agent=agent,
            static={},
            members=(),
            dht=self.dht,
            folder=folder,
            notice=notice,
            generator=generator,
        )
        self.dht.spawn()

    async def start(self, neighbours: Neighbours, listens: str) -> None:
        """Begin to watch the node and to announce this agent, which listens at `host:port`."""
        self.update_neighbours(neighbours)
        addresses = self._announced or tuple(neighbours.addresses.get(self._agent, ())) or (listens,)
        self._told = Announcement(addresses=tuple(addresses))
        await self.dht.start()
        await self._resolver.start()
        self._resolver.announce(self._told)

    async def update_ca(self, ca: bytes) -> None:
        """Use other CA certificates from now on."""
        await self.dht.update_ca(ca)

    def update_neighbours(self, neighbours: Neighbours) -> None:
        """Use a new map from now on."""
        self._resolver.update_members(neighbours.addresses, neighbours.members)

    def tell(self, number: int, root: str) -> None:
        """Announce the newest snapshot."""
        self._told = Announcement(self._told.addresses, number, root)
        self._resolver.announce(self._told)

    async def addresses(self, peer: str) -> Sequence[str]:
        """Return a peer's addresses, from the map and the DHT."""
        return await self._resolver.addresses(peer)

    async def close(self) -> None:
        """Stop the node; its announcements expire by themselves."""
        await self._resolver.close()
        await self.dht.close()

    @property
    def state(self) -> dict[str, object]:
        """State of the DHT, for `dimat status`."""
        return {
            "healthy": self.dht.healthy,
            "restarts": self.dht.restarts,
            "nodes": self.dht.known,
            "addresses": list(self.dht.addresses),
            "agents": sorted(self._resolver.visible),
        }


def check_discovery(config: ExperimentConfig) -> bool:
    """Return whether the agent uses a DHT; raises ConfigError if it cannot."""
    if not config.dht.bootstraps:
        return False
    if config.agent.insecure:
        raise ConfigError("a DHT needs keys, since its records are signed; drop dht.bootstraps, or agent.insecure")
    return True
