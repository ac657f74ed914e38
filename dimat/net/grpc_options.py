"""gRPC channel and server options: keep-alive, handshake, sizes; values from `limits`."""

from __future__ import annotations

from dimat.net.limits import (
    HANDSHAKE_S,
    KEEPALIVE_S,
    KEEPALIVE_TIMEOUT_S,
    MAX_METADATA_BYTES,
    MAX_REQUEST_BYTES,
    MIN_PING_INTERVAL_S,
    MOST_PING_STRIKES,
    MOST_STREAMS,
    Limits,
)


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Return the options of a server: the load that it accepts from strangers, and when a reader counts as gone."""
    return [
        *_keepalive(),
        # readers ping every `KEEPALIVE_S` even on a connection without calls
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(MIN_PING_INTERVAL_S)),
        ("grpc.http2.max_ping_strikes", MOST_PING_STRIKES),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MOST_STREAMS),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_S)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.so_reuseport", 0),  # else two agents would share a port, and each get half of the calls
    ]


def channel_options(largest_reply: int, target_name: str | None) -> list[tuple[str, int | str]]:
    """Return the options of a channel.

    `largest_reply`: bytes of the longest message to receive; `target_name`: the DNS name that the peer's certificate
    must have, None on an insecure network.
    """
    options: list[tuple[str, int | str]] = [
        *_keepalive(),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", largest_reply),
        ("grpc.use_local_subchannel_pool", 1),  # a new attempt does not inherit an earlier one's back-off
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]
    if target_name is not None:
        options.append(("grpc.ssl_target_name_override", target_name))
    return options


def _keepalive() -> list[tuple[str, int]]:
    # On a slow link a ping waits behind the data of transfers, longer than an agent should wait for a peer that is
    # gone. So gRPC's own pings only sweep up connections that are dead for a minute; a peer that has gone quiet is
    # noticed by its bytes and answers (`PeerLink`, `Limits.idle_s`, `Limits.quiet_s`).
    return [
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
        ("grpc.http2.ping_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
    ]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
