"""An agent's events as Prometheus metrics, and a small HTTP server that they are scraped from.

Names and labels are an interface: dashboards and alerts rest on them. All have the labels `agent` and `run`, the ones
in `METRICS` those named there too. Labels of peers are agents on the map, so their number is bounded; whatever else is
named counts under `unlisted`. The metrics are of this process: counters begin at 0 when it starts.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from dimat import events
from dimat.errors import NetworkError
from dimat.ui.text import clean
from dimat.version import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

METRICS: Mapping[str, str] = {
    "dimat_info": "1, with the version of dimat",
    "dimat_up_since_timestamp_seconds": "When this process of the agent began, Unix time",
    "dimat_round": "Round that the agent is in; rounds count from 1",
    "dimat_rounds_total": "Rounds that were finished",
    "dimat_phase": "1 for the phase of the round that the agent is in, 0 for the others",
    "dimat_phase_seconds_total": "Seconds spent in each phase, the one that goes on included",
    "dimat_loss": "Mean training loss of the newest local training",
    "dimat_metric": "Test metrics of the newest merge, before and after it, where they were evaluated",
    "dimat_samples_total": "Examples seen in training",
    "dimat_peers": "Peers that are listened to, connected now, and heard and expected in the newest merge",
    "dimat_peer_last_heard_timestamp_seconds": "When the peer's last byte came, Unix time",
    "dimat_bytes_total": "Bytes of snapshots sent to and received from peers",
    "dimat_fetches_total": "Snapshots of peers that came whole, or cannot be had for good",
    "dimat_fetch_retries_total": "Attempts to bring a peer's snapshot after the first one",
    "dimat_screen_total": "What became of peers' snapshots: merged, refused, or not there in time",
    "dimat_accept_total": "Merges with peers, by whether the check after them kept all, a part or nothing",
    "dimat_accepted_share": "Share of the way from own to merged weights that the newest merge went",
    "dimat_basis_changes_total": "Times that the agent has permuted itself into a peer's basis",
    "dimat_dht_up": "Whether the agent's DHT node serves",
    "dimat_dht_restarts_total": "Times that the DHT node was started again",
    "dimat_checkpoint_timestamp_seconds": "When the newest checkpoint of each stage was written, Unix time",
    "dimat_snapshot_disk_bytes": "What snapshots take on disk",
    "dimat_warnings_total": "Warnings",
    "dimat_left": "1 once the agent has left, with the reason",
}
"""All metrics and what they say, by name."""

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
"""Phases of `dimat.events.PhaseStarted`, but for the end."""
VERDICTS = ("merged", "refused", "late")
ACCEPTS = ("accepted", "partly", "refused")
REASONS = ("done", "target", "time", "stopped", "left")
"""Why an agent leaves in good order; whatever else counts as "failed"."""
UNLISTED = "unlisted"
REQUEST_S = 10.0
"""Seconds that a scraper may take to send its request, and to take what it gets."""


class PrometheusListener:
    """Keeps the newest numbers of one agent; a listener that any thread may call. `registry`: what exports them."""

    def __init__(self, run: str, agent: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._who = (clean(agent), clean(run))
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in METRICS}
        self._members: frozenset[str] = frozenset()
        self._phase, self._phase_began = "", 0.0
        self._set("dimat_info", 1, __version__)
        for name in METRICS:
            if name.endswith("_total") and name not in LABELS and name != "dimat_dht_restarts_total":
                self._set(name, 0)
        for phase in PHASES:
            self._set("dimat_phase", 0, phase)
            self._set("dimat_phase_seconds_total", 0, phase)
        for verdict in ACCEPTS:
            self._set("dimat_accept_total", 0, verdict)
        self.registry.register(self)

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────
    def __call__(self, event: events.Event) -> None:
        """Take one event in."""
        with self._lock:
            if isinstance(event, events.AgentEvent) and not isinstance(event, events.AgentLeft):
                self._set("dimat_round", event.round)
            match event:
                case events.AgentStarted():
                    self._set("dimat_up_since_timestamp_seconds", event.time_s)
                    self._map(event.members, event.peers)
                case events.MapRead():
                    self._map(event.members, event.peers)
                case events.Warned():
                    self._add("dimat_warnings_total", 1)
                case events.PhaseStarted() | events.Checkpointed() | events.AgentLeft() | events.RoundFinished():
                    self._turn(event)
                case events.Trained() | events.Merged() | events.BasisAdopted():
                    self._learned(event)
                case events.SnapshotFetched() | events.FetchFailed() | events.PeerLate() | events.PeerRefused():
                    self._heard(event)
                case events.NetworkObserved():
                    self._network(event)
                case _:
                    pass

    def _map(self, members: Iterable[str], peers: tuple[str, ...]) -> None:
        """Take over who is on the map; what is no more is not told any more."""
        self._members = frozenset((*members, *peers))
        names = {clean(member) for member in self._members} | {UNLISTED}
        for metric, labels in LABELS.items():
            if "peer" in labels:
                place = labels.index("peer")
                kept = {key: value for key, value in self._values[metric].items() if key[place] in names}
                self._values[metric] = kept
        self._set("dimat_peers", len(peers), "listened")
        for peer in map(self._named, peers):
            self._add("dimat_fetch_retries_total", 0, peer)
            for outcome in ("ok", "failed"):
                self._add("dimat_fetches_total", 0, peer, outcome)
            for verdict in VERDICTS:
                self._add("dimat_screen_total", 0, peer, verdict)

    def _turn(self, event: events.AgentEvent) -> None:
        match event:
            case events.PhaseStarted(phase=phase):
                self._pass_time()
                self._phase, self._phase_began = phase, time.monotonic()
                for known in PHASES:
                    self._set("dimat_phase", float(known == phase), known)
            case events.Checkpointed(stage=stage, time_s=at):
                self._set("dimat_checkpoint_timestamp_seconds", at, clean(stage))
            case events.AgentLeft(reason=reason):
                self._set("dimat_left", 1, reason if reason in REASONS else "failed")
            case events.RoundFinished(heard=heard, expected=expected):
                self._add("dimat_rounds_total", 1)
                self._set("dimat_peers", heard, "heard")
                self._set("dimat_peers", expected, "expected")
            case _:
                pass

    def _learned(self, event: events.AgentEvent) -> None:
        match event:
            case events.Trained(result=events.TrainResult(loss=loss, samples=samples)):
                self._set("dimat_loss", loss)
                self._add("dimat_samples_total", samples)
            case events.Merged():
                for stage, metrics in (("before", event.result.before), ("after", event.result.after)):
                    for metric, value in metrics.items():
                        self._set("dimat_metric", value, clean(metric), stage)
                others = [part for part in event.contributions if part.agent != event.agent and part.weight > 0]
                for part in others:
                    self._add("dimat_screen_total", 1, self._named(part.agent), "merged")
                if others:
                    accepted = event.result.accepted
                    verdict = "accepted" if accepted >= 1 else "partly" if accepted > 0 else "refused"
                    self._add("dimat_accept_total", 1, verdict)
                    self._set("dimat_accepted_share", accepted)
            case events.BasisAdopted():
                self._add("dimat_basis_changes_total", 1)
            case _:
                pass

    def _heard(self, event: events.AgentEvent) -> None:
        match event:
            case events.SnapshotFetched(peer=peer):
                self._add("dimat_fetches_total", 1, self._named(peer), "ok")
            case events.FetchFailed(peer=peer):
                self._add("dimat_fetches_total", 1, self._named(peer), "failed")
            case events.PeerLate(peer=peer):
                self._add("dimat_screen_total", 1, self._named(peer), "late")
            case events.PeerRefused(peer=peer):
                self._add("dimat_screen_total", 1, self._named(peer), "refused")
            case _:
                pass

    def _network(self, event: events.NetworkObserved) -> None:
        self._set("dimat_peers", len(event.connected), "connected")
        for peer, at in event.heard_at_s.items():
            self._set("dimat_peer_last_heard_timestamp_seconds", at, self._named(peer))
        for direction, counts in (("sent", event.sent), ("received", event.received)):
            for peer, by_encoding in counts.items():
                for encoding, count in by_encoding.items():
                    self._set("dimat_bytes_total", count, direction, self._named(peer), clean(encoding))
        for peer, count in event.retries.items():
            self._set("dimat_fetch_retries_total", count, self._named(peer))
        if event.dht_up is not None:
            self._set("dimat_dht_up", float(event.dht_up))
            self._set("dimat_dht_restarts_total", event.dht_restarts)
        self._set("dimat_snapshot_disk_bytes", event.own_disk_bytes, "own")
        self._set("dimat_snapshot_disk_bytes", event.received_disk_bytes, "received")

    def _named(self, peer: str) -> str:
        return clean(peer) if peer in self._members else UNLISTED

    def _pass_time(self) -> None:
        """Count the seconds of the phase that goes on."""
        if self._phase in PHASES:
            now = time.monotonic()
            self._add("dimat_phase_seconds_total", now - self._phase_began, self._phase)
            self._phase_began = now

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._values[name][labels] = value

    def _add(self, name: str, amount: float, *labels: str) -> None:
        values = self._values[name]
        values[labels] = values.get(labels, 0.0) + amount

    # ── export ───────────────────────────────────────────────────────────────────────────────────────────────
    def collect(self) -> Iterator[Metric]:
        """Yield all that is known, as the registry wants it."""
        with self._lock:
            self._pass_time()
            held = {name: dict(values) for name, values in self._values.items() if values}
        for name, values in held.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, METRICS[name], labels=("agent", "run", *LABELS.get(name, ())))
            for labels, value in values.items():
                family.add_metric((*self._who, *labels), value)
            yield family


class MetricsServer:
    """Serves a registry under /metrics from a thread, until `close`. `address`: `host:port`, port 0 for any free one;
    it is then where the server listens. NetworkError where it cannot."""

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
        """Say nothing of a scraper that went away in the midst of it."""


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
