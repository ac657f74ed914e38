"""Metrics of real agents, scraped over HTTP. Reference: what the agents' own event logs say, and the Prometheus text
format as prometheus_client and promtool read it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from dimat.ui.trackers.prometheus import LABELS, METRICS, UNLISTED
from dimat.version import __version__
from tests.agent.processes import ROOT, Network, network
from tests.forks import dimat

pytestmark = pytest.mark.live

AB = ("lab-a", "lab-b")
TRAIN = "steps_per_round = 20\nbatch_size = 16"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def get(address: str, path: str = "/metrics", accept: str = "") -> tuple[str, str]:
    """Return the answer to a GET and its content type."""
    request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def scrape(address: str) -> Samples:
    """Return all samples by name and labels, but for those that all have."""
    text, kind = get(address)
    assert kind.startswith("text/plain")
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert (sample.labels["agent"], sample.labels["run"]) == ("lab-a", "tiny")
            own = {key: value for key, value in sample.labels.items() if key not in ("agent", "run")}
            assert set(own) == set(LABELS.get(sample.name, ()))
            assert family.documentation == METRICS[sample.name]
            samples[sample.name, tuple(sorted(own.items()))] = sample.value
    return samples


def pick(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def total(net: Network, kind: str, key: str) -> int:
    return sum(event[key] for event in net.events("lab-a", kind))


def test_a_pair_is_scraped(tmp_path: Path, free_ports: list[int]) -> None:
    """All metrics but the DHT's are there while two agents run, and say what the log says."""
    address = f"127.0.0.1:{free_ports[2]}"
    schedule = "rounds = 0\nround_deadline_s = 30"
    tables = {
        "schedule": schedule,
        "train": TRAIN,
        "task": 'name = "digits"',
        "exchange": 'encoding = "bf16"\nlost_after_s = 60',
    }
    began = time.time()
    with network(tmp_path, AB, free_ports, **tables) as net:
        a = net.start("lab-a", f"monitor.metrics={address}", "monitor.observe_s=0.5", "agent.evaluate=all")
        net.until(lambda: f"metrics on http://{address}/metrics" in a.text(), "metrics are served")
        b = net.start("lab-b")
        net.wait_for("lab-a", "RoundFinished", 3)
        net.until(lambda: any(e["received"] and e["sent"] for e in net.events("lab-a", "NetworkObserved")), "bytes")
        samples = scrape(address)
        text, _ = get(address)
        other, kind = get(address, accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        assert {family.name for family in open_metrics(other)} <= {name.removesuffix("_total") for name in METRICS}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address, "/")
        status = scrape(address)
        a.signal(signal.SIGTERM)
        b.signal(signal.SIGTERM)
        assert (a.wait(), b.wait()) == (143, 143)
        found = {name for name, _ in samples}
        assert set(METRICS) - found == {"dimat_dht_up", "dimat_dht_restarts_total", "dimat_left"}
        assert pick(samples, "dimat_info", version=__version__) == 1
        assert began < pick(samples, "dimat_up_since_timestamp_seconds") < time.time()
        assert 3 <= pick(samples, "dimat_rounds_total") <= pick(status, "dimat_rounds_total")
        assert pick(samples, "dimat_round") >= pick(samples, "dimat_rounds_total")
        phases = [pick(samples, "dimat_phase", phase=phase) for phase in ("join", "train", "wait", "merge")]
        assert sorted(phases) == [0, 0, 0, 1]
        spent = {phase: pick(status, "dimat_phase_seconds_total", phase=phase) for phase in ("train", "wait", "merge")}
        assert all(seconds > 0 for seconds in spent.values())
        assert sum(spent.values()) < time.time() - began
        assert all(spent[phase] >= pick(samples, "dimat_phase_seconds_total", phase=phase) for phase in spent)
        for metric in ("before", "after"):
            assert 0 <= pick(samples, "dimat_metric", metric="accuracy", stage=metric) <= 1
        assert 0 < pick(samples, "dimat_samples_total") <= total(net, "Trained", "samples")
        peers = {state: pick(samples, "dimat_peers", state=state) for state in ("listened", "connected", "expected")}
        assert peers == {"listened": 1, "connected": 1, "expected": 1}
        assert began < pick(samples, "dimat_peer_last_heard_timestamp_seconds", peer="lab-b") < time.time()
        for direction in ("sent", "received"):
            count = pick(samples, "dimat_bytes_total", direction=direction, peer="lab-b", encoding="bf16")
            told = [
                event[direction]["lab-b"]["bf16"]
                for event in net.events("lab-a", "NetworkObserved")
                if event[direction]
            ]
            assert 0 < count <= told[-1]
        assert pick(samples, "dimat_fetches_total", peer="lab-b", outcome="ok") >= 3
        assert pick(samples, "dimat_fetches_total", peer="lab-b", outcome="failed") == 0
        assert pick(samples, "dimat_screen_total", peer="lab-b", verdict="merged") >= 3
        assert pick(samples, "dimat_accept_total", verdict="accepted") >= 3
        assert pick(samples, "dimat_accepted_share") == 1
        for stage in ("trained", "merged"):
            assert began < pick(samples, "dimat_checkpoint_timestamp_seconds", stage=stage) < time.time()
        assert pick(samples, "dimat_snapshot_disk_bytes", kind="own") > 0
        assert pick(samples, "dimat_snapshot_disk_bytes", kind="received") > 0
        assert not any(UNLISTED in dict(labels).values() for _, labels in samples)
        if shutil.which("promtool"):
            checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
            assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_port_that_is_taken(tmp_path: Path, free_ports: list[int]) -> None:
    """One line and exit code 3, before anything is trained or written; a bare port is one of loopback."""
    with network(tmp_path, AB, free_ports), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["agent", str(tmp_path / "agents.toml"), "--name", "lab-a", "--metrics", str(port)]
        done = subprocess.run(
            [dimat(), *words, "--set", f"agent.folder={tmp_path / 'lab-a'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3
        assert done.stderr.splitlines() == [
            f"dimat: cannot serve metrics on 127.0.0.1:{port}: Address already in use; choose another address with "
            "monitor.metrics or --metrics"
        ]
        assert not (tmp_path / "lab-a").exists()


def test_without_being_asked_nothing_listens(tmp_path: Path, free_ports: list[int]) -> None:
    """An agent by default has no server for metrics."""
    with network(tmp_path, AB[:1], free_ports, schedule="rounds = 1\njoin_wait_s = 1") as net:
        a = net.start("lab-a")
        assert a.wait() == 0
        assert "metrics" not in a.text()
