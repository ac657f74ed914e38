"""A real Prometheus with this project's configuration and rules, scraping real agents. References: what it answers to
the dashboard's own queries."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.agent.processes import PATIENCE_S, network
from tests.deploy.test_monitoring import FOLDER, PANELS, RULES, VARIABLES
from tests.deploy.tools import tool

pytestmark = pytest.mark.live

SLOW = "rounds = 0\nround_deadline_s = 60\njoin_wait_s = 3"
SELDOM = {"DHT nodes", "Refused and late, by peer", "Failed fetches and new attempts"}
"""Panels that show something only where there is a DHT, or something went wrong."""


def asked(port: int, path: str, **query: str) -> Any:
    """Ask Prometheus; None while it does not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:  # it begins
                return None
            raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:
        return None


def test_prometheus_sees_what_the_dashboard_shows(tmp_path: Path, free_ports: list[int]) -> None:
    """Two agents are scraped, all alerts are loaded, and every panel that has something to show shows it."""
    program = tool("prometheus")
    ports = free_ports[2:5]
    setup = tmp_path / "monitoring"
    shutil.copytree(FOLDER, setup, ignore=shutil.ignore_patterns("targets"))
    (setup / "targets").mkdir()
    (setup / "targets" / "agents.yml").write_text(
        json.dumps([{"targets": [f"127.0.0.1:{port}" for port in ports[:2]]}])
    )
    config = setup / "prometheus.yml"
    config.write_text(config.read_text().replace("interval: 15s", "interval: 1s"))
    names = ("lab-a", "lab-b")
    tables = {
        "schedule": SLOW,
        "train": "epochs_per_round = 10\nbatch_size = 8",
        "agent": 'founder = true\nevaluate = "all"',
    }
    with network(tmp_path, names, free_ports, **tables) as net:
        for name, port in zip(names, ports):
            net.start(name, f'monitor.metrics="127.0.0.1:{port}"', "monitor.observe_s=0.5")
        words = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with (tmp_path / "prometheus.err").open("wb") as said:
            server = subprocess.Popen(
                [program, *words, f"--web.listen-address=127.0.0.1:{ports[2]}"], stdout=said, stderr=said
            )
        try:

            def value(query: str) -> list[Any]:
                found = asked(ports[2], "query", query=query)
                return [] if found is None else found["result"]

            net.until(lambda: len(value('up{job="dimat"} == 1')) == 2, "both agents are scraped")
            net.until(lambda: len(value("dimat_rounds_total > 2")) == 2, "both have finished rounds")
            groups = asked(ports[2], "rules")["groups"]
            loaded = [rule for group in groups for rule in group["rules"]]
            assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in RULES}
            assert all(rule["health"] != "err" for rule in loaded), loaded
            ends = time.monotonic() + PATIENCE_S
            while (empty := nothing_to_show(value) - SELDOM) and time.monotonic() < ends:
                time.sleep(0.5)
            assert not empty
        finally:
            server.terminate()
            server.wait()


def nothing_to_show(value: Any) -> set[str]:
    """Return the titles of panels of which no query has a result."""
    found: set[str] = set()
    for panel in PANELS:
        queries = [target["expr"] for target in panel["targets"]]
        for name, chosen in VARIABLES.items():
            queries = [query.replace(name, chosen) for query in queries]
        if not any(value(query) for query in queries):
            found.add(panel["title"])
    return found
