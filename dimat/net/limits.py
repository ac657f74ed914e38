"""Every bound of the network: timeouts, sizes, counts, rates, and lifetimes of DHT records.

`Limits` holds the bounds of a transport that a configuration or a test may set; the constants below it are the same for
every agent. Seconds end in `_s` or `_S`, bytes in `_bytes` or `_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
DISK_RESERVE_BYTES = 64 * MIB
"""Disk space that always stays free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The configurable bounds of one agent's transport, each described at its field. Those without a default are
    settings of the table [exchange] (`dimat/config/agent.py`)."""

    streams: int = 16
    """Concurrent uploads to all readers, each of which takes at most 8 MiB of memory; one to each reader is always
    possible."""
    streams_per_peer: int
    """Concurrent uploads to one reader."""
    polls_per_peer: int = 2
    """Concurrent calls of one reader that wait for news."""
    rate_mb_s: float | None
    """Upload rate in 10^6 bytes a second over all readers; None for no bound."""
    connections: int = 512
    """Concurrent connections to this agent."""
    fetches: int
    """Concurrent downloads from all peers, each of which takes at most three blocks of memory; slow ones give up their
    slot to peers that wait, and continue beside them."""
    fetches_per_peer: int = 2
    """Concurrent downloads from one peer."""
    disk_bytes: int = 64 * 1024 * MIB
    """Disk space for received snapshots; the oldest that are not needed are removed first."""
    disk_reserve_bytes: int = DISK_RESERVE_BYTES
    """Disk space that stays free."""
    idle_s: float
    """A stream on which no byte moves for longer is closed."""
    connect_s: float = 5.0
    """An address must answer a hello within this time, or the next one is tried."""
    call_s: float = 10.0
    """Timeout of a short call."""
    poll_s: float = 10.0
    """How long a call for news waits at the peer before it is answered without any."""
    quiet_s: float = 5.0
    """A connection counts as dead after `poll_s` and this time without an answer or a byte of a transfer."""
    lost_after_s: float
    """A peer that is out of reach for longer counts as lost."""
    refused_retry_s: float = 60.0
    """The wait between attempts at an incompatible peer."""
    backoff_first_s: float = 0.2
    """The first wait between attempts at a peer that does not answer; it doubles with each failure."""
    backoff_last_s: float = 15.0
    """The longest wait between attempts."""
    breaker_failures: int = 10
    """Failures in a row after which the circuit breaker opens."""
    breaker_open_s: float = 30.0
    """How long the breaker stays open, without any attempt."""


# ── connections and calls (gRPC's options are made of these in grpc_options.py) ────────────────────────
HANDSHAKE_S = 10.0
"""A caller must complete the TCP and TLS handshake within this time, or its connection is closed."""
MOST_STREAMS = 32
"""Concurrent HTTP/2 streams (calls) of one connection."""
MAX_METADATA_BYTES = 16 * 2**10
"""Size of the metadata (headers) of one call."""
MAX_REQUEST_BYTES = 64 * 2**10
"""Size of one request; none in the protocol is larger."""
MOST_CALLS = 1024
"""Concurrent calls that a server handles, more than all members make; further ones are refused at once."""
KEEPALIVE_S = 20.0
"""Interval of pings on a connection."""
KEEPALIVE_TIMEOUT_S = 60.0
"""A connection whose ping is not answered within this time is closed."""
MIN_PING_INTERVAL_S = 5.0
"""Pings without data at shorter intervals count as strikes against the caller."""
MOST_PING_STRIKES = 4
"""Strikes after which a server closes the connection."""
ABORT_S = 5.0
"""How long sending the refusal of a call may take."""
MAX_ERROR_TEXT = 200
"""Characters of gRPC's own error text that are passed on."""
CLOCKS_DIFFER_S = 60.0
"""Clocks of two agents that differ by more cause a warning."""
CLOCK_SKEW_S = 300.0
"""How far a clock may be off when dates of certificates and DHT records are checked."""

# ── notices of trouble ─────────────────────────────────────────────────────────────────────────────────
REMIND_FIRST_S = 60.0
"""Trouble of one topic is reported again after this time; it doubles with each reminder."""
REMIND_LAST_S = 3600.0
"""The longest time between two reminders."""
MOST_RETURNS = 3
"""Trouble that comes back so often is reported at once each time; more often, as rarely as trouble that lasts."""

# ── calls for news, queries and dial-back ──────────────────────────────────────────────────────────────
LONGEST_POLL_S = 60.0
"""The longest time that a server lets a call for news wait, whatever the reader asks for."""
POLL_REPLY_S = 600.0
"""Timeout of a call for news on a link on which bytes of transfers arrive all the time."""
POLL_PAUSE_S = 0.05
"""The shortest time from one call for news to the next."""
WAKE_PAUSE_S = 1.0
"""The shortest time between two attempts that are made because the peer said hello."""
READER_GONE_S = 2.0
"""A reader that has made no call for news for longer is gone; others call again at once."""
QUERY_S = 10.0
"""Timeout of one call by a command-line tool."""
MAX_QUERY_REPLY_BYTES = 4 * MIB
"""Size of the reply to a call by a command-line tool."""
DIAL_BACK_S = 3.0
"""Timeout of each address that is dialled back."""
DOCTOR_DIAL_S = 5.0
"""Timeout of each address that `dimat doctor` dials."""
MOST_DIAL_BACKS = 8
"""Callers that are dialled back concurrently."""
MOST_DIAL_BACK_ADDRESSES = 4
"""Addresses of the map that are dialled back for one caller."""

# ── lives of agents (lives.py) ─────────────────────────────────────────────────────────────────────────
LIVING_S = 60.0
"""A process counts as alive for this time after its last call: peers call several times within it."""
LIVES_KEPT = 4
"""Processes of one name that are remembered."""
PASSED_ON_S = 600.0
"""How long the news that a name has two processes is passed on."""
AGAIN_S = 3600.0
"""After this time, news of the same name counts again."""
MAX_LIFE_BYTES = 1000
"""Size of a header about processes of a name."""

# ── manifests: the most that is read of a peer's ───────────────────────────────────────────────────────
MOST_OFFERED = 64
"""Snapshots that a peer may offer at the same time."""
MAX_TEXT_BYTES = 1024
"""Size of one text, such as a name."""
MOST_FORMS = 4
"""Encoded forms of one snapshot beside the plain one."""
MOST_PARENTS = 10_000
"""Parents of one snapshot."""
MOST_PUSHED = 10_000
"""Readers that a push-sum weight is sent to."""
MOST_METRICS = 1_000
"""Metrics of one snapshot."""
MIN_BLOCK_BYTES = 64 * 2**10
"""Smallest size of the blocks of a payload."""
MAX_BLOCK_BYTES = 16 * MIB
"""Largest size of the blocks of a payload."""
MAX_MANIFEST_REST_BYTES = 2 * MIB
"""Size of a manifest without the hashes of its blocks, in the largest network."""
MANIFEST_REST_BYTES = 64 * 2**10
"""The same size in a network without members."""
MANIFEST_MEMBER_BYTES = 512
"""The size that each member of the map adds."""
MOST_NOTICES = 8
"""Different faults of one peer that are reported; further ones are counted in its state."""
SLOT_S = 2.0
"""A download that has had its slot for longer without a block in that time gives it up to another peer."""

# ── transfers ──────────────────────────────────────────────────────────────────────────────────────────
CHUNK_BYTES = MIB
"""The longest message of a transfer."""
MAX_REPLY_BYTES = 4 * CHUNK_BYTES
"""Size of one reply to an agent's call; larger only if all manifests that a peer may offer need more."""
MIN_CHUNK_BYTES = 64 * 2**10
"""The shortest message of a transfer, except at the end of a block; used on slow links."""
CHUNK_SLOW_S = 2.0
"""If a message takes longer to send, the next ones have half its length."""
CHUNK_FAST_S = 0.5
"""If a message takes less time to send, the next ones have twice its length."""
READ_AHEAD_BYTES = 4 * CHUNK_BYTES
"""Bytes that an upload reads from the disk at once, in a thread."""
RATE_BURST_S = 0.25
"""After a pause, the amount that the rate allows in this time may be sent at once."""
FREED_KEPT_BYTES = 16 * CHUNK_BYTES
"""Freed memory that the process keeps, per arena: more than the chunks of two streams take."""
MAPPED_BYTES = 2 * CHUNK_BYTES
"""Allocations from this size on are mapped and freed individually; a message of a transfer is smaller."""
WRITES_AHEAD = 2
"""Blocks of a download that are hashed and written while the next one arrives."""
BLOCK_ATTEMPTS = 2
"""Times that a block may arrive with a wrong hash before the payload is given up."""
STALE_PART_S = 3600.0
"""A partly received payload that is older than this is removed at the start."""
SERVED_CHECK_S = 0.1
"""Interval at which a leaving agent checks whether its readers have received its last snapshot."""

# ── records in the DHT ─────────────────────────────────────────────────────────────────────────────────
RECORD_LIFE_S = 600.0
"""How long an agent's address record is valid without renewal; it is renewed after a third of this time."""
ANNOUNCE_RETRY_S = 5.0
"""The wait before a record that no node accepted is announced again."""
RECORD_FRESH_S = 30.0
"""How long a record that was found is used without another lookup."""
LOOKUP_S = 5.0
"""How long a lookup may make its caller wait."""
RECORD_SAMPLE = 8
"""Members that an agent looks up in each round of announcing."""
MAX_RECORD_BYTES = 4096
"""Size of a sealed address record; hivemind breaks at about 60 KB, and a reader holds many."""
MAX_RECORD_ADDRESSES = 8
"""Addresses in one record."""
MAX_RECORD_LIFE_S = 86_400.0
"""The longest life that a record may claim."""
MAX_MAP_BYTES = 32 * 2**10
"""Size of a sealed network map; hivemind breaks at about 60 KB."""
MAX_MAP_TEXT_BYTES = MIB
"""Size of a network map's text, inflated."""
MAX_MAP_LIFE_S = 366 * 86_400.0
"""The longest life that a published network map may claim."""
DHT_FIND_S = 60.0
"""How long `dimat keys publish-map` looks for nodes of the DHT."""
PUBLISH_TRIES = 5
"""Attempts to store a network map in the DHT before giving up."""
PUBLISH_RETRY_S = 1.0
"""The wait between these attempts."""

# ── the DHT's process ──────────────────────────────────────────────────────────────────────────────────
DHT_START_S = 60.0
"""How long the DHT's process may take to import hivemind and to listen."""
DHT_REQUEST_S = 20.0
"""How long it may take to answer any other request; its own limits are shorter."""
DHT_WORK_S = {"start": 40.0, "join": 15.0, "probe": 5.0, "store": 15.0, "get": 15.0, "map": 15.0, "stop": 3.0}
"""How long the process itself may work on each kind of request."""
DHT_STOP_S = DHT_WORK_S["stop"] + 1.0
"""How long the process may take to stop by itself."""
DHT_LISTEN_S = 30.0
"""How long hivemind may take to listen, within `DHT_WORK_S["start"]`."""
DHT_GONE_S = 2.0
"""How long the killed process and its children may take to be gone."""
DHT_PROBE_S = 10.0
"""Interval of probes of the process."""
DHT_MISSES = 3
"""Consecutive probes that may be late before the process is replaced."""
DHT_RESTART_FIRST_S = 1.0
"""The first wait before it is restarted; it doubles with each failure."""
DHT_RESTART_S = 300.0
"""The longest wait before it is restarted."""
DHT_STEADY_S = 60.0
"""A process that ran for longer resets this wait."""
DHT_RPC_S = 3.0
"""Timeout of one call of another node."""
DHT_DIAL_S = 2 * DHT_RPC_S
"""Timeout of dialling a bootstrap."""
DHT_JOIN_FIRST_S = 2.0
"""The first wait between attempts at a bootstrap that is out of reach; it doubles with each failure."""
DHT_JOIN_LAST_S = 60.0
"""The longest wait between these."""
DHT_REPLICAS = 5
"""Nodes that store a record."""
DHT_ASKED = 8
"""Nodes that are asked for a record."""
DHT_RECORDS = 4096
"""Records that a node keeps."""
DHT_SEEN = 10_000
"""Keys whose newest record a node remembers; above that, expired ones are dropped."""
MAX_DHT_ADDRESSES = 64
"""A node's own addresses in a reply of the process."""
MAX_DHT_REASON = 300
"""Characters in the reason why a bootstrap was not joined."""
MAX_LINE_BYTES = 65_536
"""Size of a request to the process, or of its reply."""
MAX_WAITING_REQUESTS = 256
"""Concurrent requests to the process."""
MAX_LOG_BYTES = 1_000_000
"""Size of its log at which a new one is begun."""

# ── keys and certificates ──────────────────────────────────────────────────────────────────────────────
MAX_CERTIFICATE_BYTES = 16 * 2**10
"""Size of a certificate (DER); an agent's takes less than 1 KiB."""
MAX_CERTIFICATE_HOSTS = 32
"""Addresses in one certificate."""
MAX_NAME_BYTES = 64
"""A name in a certificate (X.520 allows no longer common name): an agent's, or the collaboration's."""
MAX_KEY_FILE_BYTES = MIB
"""Size of a file of keys or certificates."""
MAX_CA_BYTES = 32_768
"""Size of the CA's certificates (PEM) that are passed to the DHT's process."""
