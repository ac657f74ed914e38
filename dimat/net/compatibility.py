"""What two agents must have in common, and the terms on which they talk: versions, sizes, options of connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dimat.net.limits import MIB, Limits
from dimat.version import __version__
from dimat.wire.v1 import peer_pb2 as pb

PROTOCOL = 1
CHUNK_BYTES = MIB  # of one message of a transfer, at most
SMALLEST_CHUNK_BYTES = 64 * 2**10  # and at least, but for the end of a block: what is sent on a slow link
FETCH = "Fetch"
DATA_SERVICE = "dimat.wire.v1.Data"
PEER_SERVICE = "dimat.wire.v1.Peer"
AGENT_HEADER = "dimat-agent"  # who calls, on an insecure network, where nothing vouches for it
QUERY_HEADER = "dimat-asking"  # a person's tool calls in an agent's name: its hello is not the agent's
CLOCKS_DIFFER_S = 60.0
LONGEST_POLL_S = 60.0
SMALLEST_ASKING_BYTES = 64 * 2**10  # no request is longer


@dataclass(frozen=True, slots=True)
class Profile:
    """What an agent brings to a run. `schema`: hash of its weights' names, shapes and types; `base`: address of the
    weights that deltas are taken from, "" for none; `encodings`: that it can read, by preference none; `groups`:
    hash of its model's symmetry groups, "" where its method rests on none."""

    schema: str
    base: str = ""
    encodings: tuple[str, ...] = ("fp32",)
    protocol: int = PROTOCOL
    groups: str = ""

    def fields(self, run: str, agent: str) -> dict[str, Any]:
        """Return what an agent with this profile says of itself in a hello: fields that request and reply share."""
        return {
            "protocol": self.protocol,
            "dimat": __version__,
            "run": run,
            "agent": agent,
            "schema": self.schema,
            "base": self.base,
            "encodings": self.encodings,
            "groups": self.groups,
        }


def incompatibility(profile: Profile, run: str, other: pb.HelloRequest | pb.HelloReply) -> str:
    """Say why two agents cannot work together, as the one with `profile` sees it; "" if they can."""
    if other.protocol != profile.protocol:
        return (
            f"it speaks protocol {other.protocol} (dimat {shown(other.dimat)}), this agent speaks {profile.protocol} "
            f"(dimat {__version__}); bring both to one version"
        )
    if other.run != run:
        return f"it is in run {shown(other.run)}, this agent in {shown(run)}; give both the same run"
    if other.schema != profile.schema:
        return (
            f"its model has other names, shapes or types (schema {shown(other.schema, 12)}, here "
            f"{shown(profile.schema, 12)}); give both the same task and model"
        )
    # an agent that aligns nothing says none, and so does one of a version that did not know of them
    if other.groups and profile.groups and other.groups != profile.groups:
        return (
            f"its model has the same tensors in other symmetry groups (groups {shown(other.groups, 12)}, here "
            f"{shown(profile.groups, 12)}), so it is wired otherwise; find the difference with `dimat symmetry diff`, "
            "and give both the same model and rules"
        )
    if other.base != profile.base:
        return (
            f"its base is {shown(other.base, 12) if other.base else 'none'}, here "
            f"{shown(profile.base, 12) if profile.base else 'none'}; name the same base file or seed in both"
        )
    return ""


def shown(text: str, longest: int = 60) -> str:
    """Return a peer's text as it may stand in a message: one line, short, quoted."""
    return repr(text if len(text) <= longest else text[:longest] + "…")


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Return the options of a server: what it takes from strangers, and how soon it sees that a reader is gone."""
    return [
        *_alive(),
        # readers ping every 20 s even where nothing is on its way
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 4),
        ("grpc.max_receive_message_length", SMALLEST_ASKING_BYTES),
        ("grpc.max_metadata_size", 16 * 2**10),
        ("grpc.absolute_max_metadata_size", 16 * 2**10),
        ("grpc.max_concurrent_streams", 32),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.so_reuseport", 0),  # else two agents would share a port, and each get half of the calls
    ]


def channel_options(largest_reply: int, target_name: str | None) -> list[tuple[str, int | str]]:
    """Return the options of a channel. `target_name`: that the peer's certificate must bear."""
    options: list[tuple[str, int | str]] = [
        *_alive(),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", largest_reply),
        ("grpc.use_local_subchannel_pool", 1),  # a new attempt is one, not an old one's back-off
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]
    if target_name is not None:
        options.append(("grpc.ssl_target_name_override", target_name))
    return options


def _alive() -> list[tuple[str, int]]:
    # On a slow link a ping waits behind the data that is on its way, for longer than one should wait for a peer that
    # is gone. So gRPC's own pings only sweep up what is dead for a minute; that a peer has gone quiet is seen by its
    # bytes and answers (`Link`, `Limits.idle_s`, `Limits.quiet_s`).
    return [
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 60_000),
        ("grpc.http2.ping_timeout_ms", 60_000),
    ]
