"""An agent's events as Prometheus metrics, and a small HTTP server for scrapers.

Names and labels are an interface: dashboards and alerts depend on them. All metrics have the labels `agent` and `run`,
and those named in `METRICS`. Labels of peers are agents on the map, so their number is bounded; all other names count
under `unlisted`. The metrics are of this process: counters begin at 0 when it starts.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from dimat import events
from dimat.errors import NetworkError
from dimat.events.view import AgentView
from dimat.ui.text import clean
from dimat.version import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

METRICS: Mapping[str, str] = {
    "dimat_info": "1, with the version of dimat",
    "dimat_up_since_timestamp_seconds": "When this process of the agent began, Unix time",
    "dimat_round": "Round that the agent is in; rounds count from 1",
    "dimat_rounds_total": "Finished rounds",
    "dimat_phase": "1 for the phase of the round that the agent is in, 0 for the others",
    "dimat_phase_seconds_total": "Seconds spent in each phase, including the current one",
    "dimat_loss": "Mean training loss of the newest local training",
    "dimat_metric": "Test metrics of the newest merge, before and after it, if they were evaluated",
    "dimat_samples_total": "Examples seen in training",
    "dimat_peers": "Peers that are followed, connected now, and heard and expected in the newest merge",
    "dimat_peer_last_heard_timestamp_seconds": "When the peer's last byte arrived, Unix time",
    "dimat_bytes_total": "Bytes of snapshots sent to and received from peers",
    "dimat_fetches_total": "Snapshots of peers that arrived completely, or failed for good",
    "dimat_fetch_retries_total": "Attempts to fetch a peer's snapshot after the first one",
    "dimat_screen_total": "Peers' snapshots by outcome: merged, refused, or not there in time",
    "dimat_accept_total": "Merges with peers, by whether the check after them kept all, a part or nothing",
    "dimat_accepted_share": "Share of the way from own to merged weights that the newest merge went",
    "dimat_basis_changes_total": "Times that the agent has permuted its units into a peer's basis",
    "dimat_certificate_expires_timestamp_seconds": "When the agent's certificate, or its CA's, expires, Unix time",
    "dimat_dht_up": "Whether the agent's DHT node is up",
    "dimat_dht_restarts_total": "Restarts of the DHT node",
    "dimat_checkpoint_timestamp_seconds": "When the newest checkpoint of each stage was written, Unix time",
    "dimat_snapshot_disk_bytes": "Disk space of snapshots",
    "dimat_warnings_total": "Warnings",
    "dimat_left": "1 once the agent has left, with the reason",
}
"""Descriptions of all metrics, by name."""

LABELS: Mapping[str, tuple[str, ...]] = {
    "dimat_info": ("version",),
    "dimat_phase": ("phase",),
    "dimat_phase_seconds_total": ("phase",),
    "dimat_metric": ("metric", "stage"),
    "dimat_peers": ("state",),
    "dimat_peer_last_heard_timestamp_seconds": ("peer",),
    "dimat_bytes_total": ("direction", "peer", "encoding"),
    "dimat_fetches_total": ("peer", "outcome"),
    "dimat_fetch_retries_total": ("peer",),
    "dimat_screen_total": ("peer", "verdict"),
    "dimat_accept_total": ("verdict",),
    "dimat_checkpoint_timestamp_seconds": ("stage",),
    "dimat_snapshot_disk_bytes": ("kind",),
    "dimat_left": ("reason",),
}
"""Labels beside `agent` and `run`, by name."""

PHASES = ("join", "train", "wait", "merge")
"""Phases of `dimat.events.PhaseStarted`, except the end."""
VERDICTS = ("merged", "refused", "late")
ACCEPTS = ("accepted", "partly", "refused")
REASONS = ("done", "target", "time", "stopped", "left")
"""Reasons for which an agent leaves in good order; all others count as "failed"."""
UNLISTED = "unlisted"
REQUEST_S = 10.0
"""Seconds that a scraper may take to send its request, and to receive the reply."""


class PrometheusListener:
    """Keeps the state of one agent, and counts; a listener that any thread may call. `registry`: exports both."""

    def __init__(self, run: str, agent: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._who = (clean(agent), clean(run))
        self._lock = threading.Lock()
        self._view = AgentView(agent, run)
        self._counts: Counter[tuple[str, ...]] = Counter()  # by name and labels
        self._accepted: float | None = None
        for name in METRICS:
            if name.endswith("_total") and name not in LABELS and name != "dimat_dht_restarts_total":
                self._counts[name,] = 0
        for verdict in ACCEPTS:
            self._counts["dimat_accept_total", verdict] = 0
        self.registry.register(self)

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────
    def __call__(self, event: events.Event) -> None:
        """Process one event."""
        with self._lock:
            self._view.take(event, time.monotonic())
            match event:
                case events.AgentStarted() | events.MapRead():
                    self._map()
                case events.Warned():
                    self._counts["dimat_warnings_total",] += 1
                case events.RoundFinished():
                    self._counts["dimat_rounds_total",] += 1
                    self._merged(event)
                case events.Trained(result=events.TrainResult(samples=samples)):
                    # not of RoundFinished: a round that goes on after a restart is trained in one life, ends in another
                    self._counts["dimat_samples_total",] += samples
                case events.BasisAdopted():
                    self._counts["dimat_basis_changes_total",] += 1
                case events.SnapshotFetched(peer=peer):
                    self._counts["dimat_fetches_total", self._named(peer), "ok"] += 1
                case events.FetchFailed(peer=peer):
                    self._counts["dimat_fetches_total", self._named(peer), "failed"] += 1
                case events.PeerLate(peer=peer):
                    self._counts["dimat_screen_total", self._named(peer), "late"] += 1
                case events.PeerRefused(peer=peer):
                    self._counts["dimat_screen_total", self._named(peer), "refused"] += 1
                case _:
                    pass

    def _map(self) -> None:
        """Note the agents on the map; those no longer on it are not counted any more."""
        names = {*map(clean, (*self._view.members, *self._view.peers)), UNLISTED}
        for name, *labels in list(self._counts):
            if "peer" in (known := LABELS.get(name, ())) and labels[known.index("peer")] not in names:
                del self._counts[name, *labels]
        for peer in map(self._named, self._view.peers):
            for outcome in ("ok", "failed"):
                self._counts["dimat_fetches_total", peer, outcome] += 0
            for verdict in VERDICTS:
                self._counts["dimat_screen_total", peer, verdict] += 0

    def _merged(self, event: events.RoundFinished) -> None:
        others = [part for part in event.contributions if part.agent != event.agent and part.weight > 0]
        for part in others:
            self._counts["dimat_screen_total", self._named(part.agent), "merged"] += 1
        if others:
            self._accepted = accepted = event.accepted
            verdict = "accepted" if accepted >= 1 else "partly" if accepted > 0 else "refused"
            self._counts["dimat_accept_total", verdict] += 1

    def _named(self, peer: str) -> str:
        return clean(peer) if peer in self._view.members or peer in self._view.peers else UNLISTED

    # ── export ───────────────────────────────────────────────────────────────────────────────────────────────
    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, in the registry's form."""
        held: defaultdict[str, defaultdict[tuple[str, ...], float]]
        held = defaultdict(lambda: defaultdict(float))
        with self._lock:
            for (name, *labels), value in [*self._counts.items(), *self._state()]:
                key, counts = tuple(labels), name.endswith("_total")
                held[name][key] = value + counts * held[name][key]  # peers that are not on the map are one
        for name, help_ in METRICS.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, help_, labels=("agent", "run", *LABELS.get(name, ())))
            for labels, value in held[name].items():
                family.add_metric((*self._who, *labels), value)
            if held[name]:
                yield family

    def _state(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield the view's values: name and labels, and the value."""
        view = self._view
        yield ("dimat_info", __version__), 1
        for phase in PHASES:
            yield ("dimat_phase", phase), phase == view.phase
            yield ("dimat_phase_seconds_total", phase), view.seconds(phase, time.monotonic())
        if view.started is not None:
            yield ("dimat_up_since_timestamp_seconds",), view.started.time_s
            yield ("dimat_round",), view.round
            yield ("dimat_peers", "listened"), len(view.peers)
        if view.loss is not None:
            yield ("dimat_loss",), view.loss
        for stage, metrics in (("before", view.before), ("after", view.after)):
            for metric, value in metrics.items():
                yield ("dimat_metric", clean(metric), stage), value
        if self._accepted is not None:
            yield ("dimat_accepted_share",), self._accepted
        for stage, checkpoint in view.checkpoints.items():
            yield ("dimat_checkpoint_timestamp_seconds", clean(stage)), checkpoint.time_s
        if view.finished is not None:
            yield ("dimat_peers", "heard"), view.finished.heard
            yield ("dimat_peers", "expected"), view.finished.expected
        if view.keys is not None:
            yield ("dimat_certificate_expires_timestamp_seconds",), view.keys.until_s
        if view.left:
            yield ("dimat_left", view.left if view.left in REASONS else "failed"), 1
        retries = {} if view.network is None else view.network.retries
        for peer in {*view.peers, *retries}:
            yield ("dimat_fetch_retries_total", self._named(peer)), retries.get(peer, 0)
        if view.network is not None:
            yield from self._network(view.network)

    def _network(self, network: events.NetworkObserved) -> Iterator[tuple[tuple[str, ...], float]]:
        yield ("dimat_peers", "connected"), len(network.connected)
        for peer, at in network.heard_at_s.items():
            yield ("dimat_peer_last_heard_timestamp_seconds", self._named(peer)), at
        for direction, counts in (("sent", network.sent), ("received", network.received)):
            for peer, by_encoding in counts.items():
                for encoding, count in by_encoding.items():
                    yield ("dimat_bytes_total", direction, self._named(peer), clean(encoding)), count
        if network.dht_up is not None:
            yield ("dimat_dht_up",), network.dht_up
            yield ("dimat_dht_restarts_total",), network.dht_restarts
        yield ("dimat_snapshot_disk_bytes", "own"), network.own_disk_bytes
        yield ("dimat_snapshot_disk_bytes", "received"), network.received_disk_bytes


class MetricsServer:
    """Serves a registry under /metrics from a thread, until `close`. `address`: `host:port`, port 0 for any free one;
    afterwards the actual address. NetworkError if it cannot listen."""

    def __init__(self, registry: CollectorRegistry, address: str) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            self._server = _Server((host, int(port)), _Handler, family=family)
        except OSError as error:
            raise NetworkError(
                f"cannot serve metrics on {address}: {error.strerror or error}; choose another address with "
                "monitor.metrics or --metrics"
            ) from error
        self._server.registry = registry
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; closing twice is allowed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a scraper that hangs does not keep the agent from ending
    registry: CollectorRegistry

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], family: socket.AddressFamily
    ) -> None:
        self.address_family = family
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for this host's name, as the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing about a scraper that disconnected during its request."""


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server_version = "dimat"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            status, data = 200, encode(cast("_Server", self.server).registry)
        else:
            status, data, content_type = 404, b"metrics are under /metrics\n", "text/plain; charset=utf-8"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Write no line per scrape."""
