"""Every bound of the network: timeouts, sizes, counts, rates, and how long DHT records live.

`Limits` holds the bounds of a transport that a configuration or a test may set; the constants below it are the same for
every agent. Seconds end in `_s` or `_S`, bytes in `_bytes` or `_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
DISK_RESERVE_BYTES = 64 * MIB
"""Disk that stays free, whatever is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one agent's transport that can be set; each field says what it bounds. Those without a default are
    settings of the table [exchange] (`dimat/config/agent.py`)."""

    streams: int = 16
    """Uploads at a time to all readers, each of which holds at most 8 MiB in memory; one to each reader is always
    possible."""
    streams_per_peer: int
    """Uploads at a time to one reader."""
    polls_per_peer: int = 2
    """Calls of one reader that wait for news at a time."""
    rate_mb_s: float | None
    """Upload rate in 10^6 bytes a second over all readers; None for no bound."""
    connections: int = 512
    """Connections open to this agent at a time."""
    fetches: int
    """Downloads at a time from all peers, each of which holds at most three blocks in memory; slow ones make room for
    peers that wait, and go on beside them."""
    fetches_per_peer: int = 2
    """Downloads at a time from one peer."""
    disk_bytes: int = 64 * 1024 * MIB
    """Disk that received snapshots may take; the oldest that are not needed go first."""
    disk_reserve_bytes: int = DISK_RESERVE_BYTES
    """Disk that stays free."""
    idle_s: float
    """A stream on which no byte moves for longer is broken off."""
    connect_s: float = 5.0
    """An address answers a hello within this time, or the next one is tried."""
    call_s: float = 10.0
    """Timeout of a short call."""
    poll_s: float = 10.0
    """How long a call for news waits at the peer until it is answered without any."""
    quiet_s: float = 5.0
    """Beyond `poll_s`, without an answer or a byte of a transfer, a connection counts as dead."""
    lost_after_s: float
    """A peer that is out of reach for longer counts as lost."""
    refused_retry_s: float = 60.0
    """Between attempts at a peer that does not fit."""
    backoff_first_s: float = 0.2
    """The first wait between attempts at a peer that does not answer; it doubles with each failure."""
    backoff_last_s: float = 15.0
    """The longest wait between attempts."""
    breaker_failures: int = 10
    """Failures in a row after which the circuit breaker opens."""
    breaker_open_s: float = 30.0
    """How long no attempt is made while the breaker is open."""


# ── connections and calls (gRPC's options are made of these in grpc_options.py) ────────────────────────
HANDSHAKE_S = 10.0
"""A caller completes the TCP and TLS handshake within this time, or its connection is closed."""
MOST_STREAMS = 32
"""Concurrent HTTP/2 streams (calls) of one connection."""
MAX_METADATA_BYTES = 16 * 2**10
"""Metadata (headers) of one call."""
MAX_REQUEST_BYTES = 64 * 2**10
"""One request; none of the protocol is longer."""
MOST_CALLS = 1024
"""Calls that a server works on at a time, more than all members make; further ones are refused at once."""
KEEPALIVE_S = 20.0
"""Interval of pings on a connection."""
KEEPALIVE_TIMEOUT_S = 60.0
"""A connection whose ping is not answered within this time is closed."""
MIN_PING_INTERVAL_S = 5.0
"""Pings without data that come faster count as strikes against the caller."""
MOST_PING_STRIKES = 4
"""Strikes after which a server closes the connection."""
ABORT_S = 5.0
"""How long a refusal of a call may take to send."""
MAX_ERROR_TEXT = 200
"""Characters of gRPC's own error text that are passed on."""
CLOCKS_DIFFER_S = 60.0
"""Clocks of two agents that differ by more are warned of."""
CLOCK_SKEW_S = 300.0
"""How far a clock may be off when dates of certificates and DHT records are checked."""

# ── notices of trouble ─────────────────────────────────────────────────────────────────────────────────
REMIND_FIRST_S = 60.0
"""Trouble of one topic is told again after this time; it doubles with each reminder."""
REMIND_LAST_S = 3600.0
"""The longest time between two reminders."""

# ── calls for news, queries and dial-back ──────────────────────────────────────────────────────────────
LONGEST_POLL_S = 60.0
"""The longest that a server lets a call for news wait, whatever the reader asks for."""
POLL_REPLY_S = 600.0
"""Timeout of a call for news on a link where bytes of transfers come all the time."""
POLL_PAUSE_S = 0.05
"""The shortest time from one call for news to the next."""
WAKE_PAUSE_S = 1.0
"""The shortest time between two attempts that are made because the peer was heard of."""
READER_GONE_S = 2.0
"""A reader that has made no call for news for longer is gone; one that is there calls again at once."""
QUERY_S = 10.0
"""Timeout of one call of a person's tool."""
MAX_QUERY_REPLY_BYTES = 4 * MIB
"""Reply to a call of a person's tool."""
DIAL_BACK_S = 3.0
"""Timeout of each address that is dialled back."""
DOCTOR_DIAL_S = 5.0
"""Timeout of each address that `dimat doctor` dials."""
MOST_DIAL_BACKS = 8
"""Callers that are dialled back at a time."""
MOST_DIAL_BACK_ADDRESSES = 4
"""Addresses of the map that are dialled back for one caller."""

# ── lives of agents (lives.py) ─────────────────────────────────────────────────────────────────────────
LIVING_S = 60.0
"""A life counts as living for this time since its last call: peers call several times in that."""
LIVES_KEPT = 4
"""Lives of one name that are remembered."""
PASSED_ON_S = 600.0
"""For how long it is passed on that a name has two lives."""
AGAIN_S = 3600.0
"""After this time another word of the same name counts anew."""
MAX_LIFE_BYTES = 1000
"""A header that tells of lives."""

# ── manifests: the most that is read of a peer's ───────────────────────────────────────────────────────
MOST_OFFERED = 64
"""Snapshots that a peer offers at a time."""
MAX_TEXT_BYTES = 1024
"""One text, such as a name."""
MOST_FORMS = 4
"""Encoded forms of one snapshot beside the plain one."""
MOST_PARENTS = 10_000
"""Parents of one snapshot."""
MOST_PUSHED = 10_000
"""Readers that a push-sum weight is given to."""
MOST_METRICS = 1_000
"""Metrics."""
MIN_BLOCK_BYTES = 64 * 2**10
"""Smallest size of the blocks of a payload."""
MAX_BLOCK_BYTES = 16 * MIB
"""Largest size of the blocks of a payload."""
MAX_MANIFEST_REST_BYTES = 2 * MIB
"""A manifest without the hashes of its blocks, in the largest network."""
MANIFEST_REST_BYTES = 64 * 2**10
"""The same in a network without members, and"""
MANIFEST_MEMBER_BYTES = 512
"""what each member of the map adds to that."""
MOST_NOTICES = 8
"""Different faults of one peer that are told; further ones are counted in its state."""
SLOT_S = 2.0
"""A download that has its slot for longer, and no block in that time, makes room for one of another peer."""

# ── transfers ──────────────────────────────────────────────────────────────────────────────────────────
CHUNK_BYTES = MIB
"""The longest message of a transfer."""
MAX_REPLY_BYTES = 4 * CHUNK_BYTES
"""One reply to an agent's call; more only where all manifests that a peer may offer take more."""
MIN_CHUNK_BYTES = 64 * 2**10
"""The shortest message of a transfer, but for the end of a block; used on slow links."""
CHUNK_SLOW_S = 2.0
"""A message that takes longer to send is followed by ones of half its length."""
CHUNK_FAST_S = 0.5
"""A message that takes less is followed by ones of twice its length."""
READ_AHEAD_BYTES = 4 * CHUNK_BYTES
"""Bytes that an upload reads from the disk at a time, in a thread."""
RATE_BURST_S = 0.25
"""After a pause, as much may be sent at once as the rate allows in this time."""
FREED_KEPT_BYTES = 16 * CHUNK_BYTES
"""Freed memory that stays with the process, per arena: more than the chunks of two streams take."""
MAPPED_BYTES = 2 * CHUNK_BYTES
"""Allocations from this size on are mapped and freed on their own; a message of a transfer is smaller."""
WRITES_AHEAD = 2
"""Blocks of a download that are hashed and written while the next one comes."""
BLOCK_ATTEMPTS = 2
"""Times that a block may come with a wrong hash until the payload is given up."""
STALE_PART_S = 3600.0
"""A partly received payload that was not continued for longer is removed at the start."""
SERVED_CHECK_S = 0.1
"""Interval at which a leaving agent looks whether its readers have had its last snapshot."""

# ── records in the DHT ─────────────────────────────────────────────────────────────────────────────────
RECORD_LIFE_S = 600.0
"""How long an agent's address record holds without renewal; it is renewed after a third of it."""
ANNOUNCE_RETRY_S = 5.0
"""Until a record that nobody took is announced again."""
RECORD_FRESH_S = 30.0
"""How long a record that was found is used without another lookup."""
LOOKUP_S = 5.0
"""How long a lookup may keep its caller waiting."""
RECORD_SAMPLE = 8
"""Members that an agent looks up in each round of announcing."""
MAX_RECORD_BYTES = 4096
"""A sealed address record; hivemind breaks at about 60 KB, and a reader holds many."""
MAX_RECORD_ADDRESSES = 8
"""Addresses in one record."""
MAX_RECORD_LIFE_S = 86_400.0
"""The longest life that a record may claim."""
MAX_MAP_BYTES = 32 * 2**10
"""A sealed network map; hivemind breaks at about 60 KB."""
MAX_MAP_TEXT_BYTES = MIB
"""Text of a network map, inflated."""
MAX_MAP_LIFE_S = 366 * 86_400.0
"""The longest life that a published network map may claim."""
DHT_FIND_S = 60.0
"""How long `dimat keys publish-map` looks for nodes of the DHT."""
PUBLISH_TRIES = 5
"""Times that a network map is handed to the DHT until it is given up."""
PUBLISH_RETRY_S = 1.0
"""Between these."""

# ── the DHT's process ──────────────────────────────────────────────────────────────────────────────────
DHT_START_S = 60.0
"""How long the process may take to import hivemind and to listen."""
DHT_REQUEST_S = 20.0
"""How long it may take to answer any other request; its own limits are shorter."""
DHT_WORK_S = {"start": 40.0, "join": 15.0, "probe": 5.0, "store": 15.0, "get": 15.0, "map": 15.0, "stop": 3.0}
"""How long the process itself works on each kind of request."""
DHT_STOP_S = DHT_WORK_S["stop"] + 1.0
"""How long the process may take to stop by itself."""
DHT_LISTEN_S = 30.0
"""Within `DHT_WORK_S["start"]`, how long hivemind may take to listen."""
DHT_GONE_S = 2.0
"""How long the killed process and those that it started may take to be gone."""
DHT_PROBE_S = 10.0
"""Interval of probes of the process."""
DHT_MISSES = 3
"""Probes in a row that may be late until the process is replaced."""
DHT_RESTART_FIRST_S = 1.0
"""The first wait until it is started again; it doubles with each failure."""
DHT_RESTART_S = 300.0
"""The longest wait until it is started again."""
DHT_STEADY_S = 60.0
"""A process that ran for longer resets that wait."""
DHT_RPC_S = 3.0
"""Timeout of one call of another node."""
DHT_DIAL_S = 2 * DHT_RPC_S
"""Timeout of dialling a bootstrap."""
DHT_JOIN_FIRST_S = 2.0
"""The first wait between attempts at a bootstrap that is out of reach; it doubles with each failure."""
DHT_JOIN_LAST_S = 60.0
"""The longest wait between these."""
DHT_REPLICAS = 5
"""Nodes that keep a record."""
DHT_ASKED = 8
"""Nodes that are asked for a record."""
DHT_RECORDS = 4096
"""Records that a node keeps."""
DHT_SEEN = 10_000
"""Keys whose newest record a node remembers, until those that have ended are dropped."""
MAX_DHT_ADDRESSES = 64
"""A node's own addresses in a reply of the process."""
MAX_DHT_REASON = 300
"""Characters of the reason why a bootstrap was not joined."""
MAX_LINE_BYTES = 65_536
"""A request to the process, or its reply."""
MAX_WAITING_REQUESTS = 256
"""Requests that wait for its reply at a time."""
MAX_LOG_BYTES = 1_000_000
"""Its log, when it is begun afresh."""

# ── keys and certificates ──────────────────────────────────────────────────────────────────────────────
MAX_CERTIFICATE_BYTES = 16 * 2**10
"""A certificate (DER); an agent's own takes less than 1 KiB."""
MAX_CERTIFICATE_HOSTS = 32
"""Addresses in one certificate."""
MAX_NAME_BYTES = 64
"""A name in a certificate (X.520 allows no longer common name): an agent's, or the collaboration's."""
MAX_KEY_FILE_BYTES = MIB
"""A file of keys or certificates."""
MAX_CA_BYTES = 32_768
"""The CA's certificates (PEM) that the DHT's process is given."""
