"""The transport of a real agent, as its configuration asks for it."""

from __future__ import annotations

import random
from pathlib import Path

from torch import nn

from dimat.agent.setup.prepare import PreparedAgent
from dimat.net.grpc_transport import GrpcTransport
from dimat.net.limits import Limits
from dimat.net.manifest import ManifestLimits
from dimat.net.peers.link import AddressLookup
from dimat.net.pki.identity import Identity
from dimat.net.transport import Status
from dimat.seeds import derive_seed
from dimat.weights.snapshot import SnapshotStore


def make_transport(
    setup: PreparedAgent,
    identity: Identity | None,
    model: nn.Module,
    store: SnapshotStore,
    received: Path,
    *,
    snapshot_bytes: int,
    disk_bytes: int,
    status: Status,
    address_lookup: AddressLookup | None,
) -> GrpcTransport:
    """Return an agent's transport, which is not started.

    `model`: identity that peers' models must share; `store`, `received`: folders of own and received snapshots, of at
    most `snapshot_bytes` each; `disk_bytes`: for the received ones; the rest is as in `GrpcTransport`.
    """
    exchange = setup.config.exchange
    return GrpcTransport(
        run=setup.config.run,
        agent=setup.name,
        identity=identity,
        store=store,
        received=received,
        profile=setup.profile(model),
        manifest_limits=ManifestLimits(snapshot_bytes),
        limits=Limits(
            fetches=exchange.transfers,
            streams_per_peer=exchange.transfers,
            rate_mb_s=exchange.rate_limit_mb_s,
            idle_s=exchange.idle_s,
            lost_after_s=exchange.lost_after_s,
            disk_bytes=disk_bytes,
        ),
        listen=setup.listen_address(),
        generator=random.Random(derive_seed(setup.config.seed, "jitter", setup.name)),
        status=status,
        address_lookup=address_lookup,
    )
