"""Keys of a running agent: warned of before they end, read anew. References: the certificates' dates, and the files."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dimat import events
from dimat.agent.daemon.key_watch import KeyWatch, certificate_facts
from dimat.agent.daemon.status_socket import ask
from dimat.cli import main
from dimat.net.pki.identity import load_identity
from dimat.net.pki.keyring import issue
from dimat.ui.trackers.prometheus import PrometheusListener
from tests.agent.processes import network
from tests.net.keys import Authority, save

AB = ("lab-a", "lab-b")
SCHEDULE = "rounds = 0\nround_deadline_s = 20\njoin_wait_s = 3"
SLOW = "epochs_per_round = 20\nbatch_size = 8"


class Watched:
    """A watch over lab-a's keys at a time that is set by hand."""

    def __init__(self, folder: Path, days: float, ca_days: float = 3650) -> None:
        self.folder = folder
        self.authority = Authority(days=ca_days)
        save(self.authority.issue("lab-a", days=days), folder)
        self.identity = load_identity(folder, "lab-a")
        self.now = datetime.now(UTC)
        self.said: list[str] = []
        self.renewed: list[tuple[bool, bool]] = []
        self.watch = KeyWatch(self.identity, folder, self._renewed, self.said.append, lambda: self.now)

    async def _renewed(self, key: bool, ca: bool) -> None:
        self.renewed.append((key, ca))


@pytest.mark.parametrize(("days", "ca_days"), [(60, 3650), (365, 60)])
def test_warnings_begin_thirty_days_before_the_end(tmp_path: Path, days: float, ca_days: float) -> None:
    """By hand: of 60 days 29.9 are left, one warning a day; the CA's end counts too, and so does one that is past."""
    watched = Watched(tmp_path, days, ca_days)
    start = watched.now
    for hours in (0, 24 * 29):
        watched.now = start + timedelta(hours=hours)
        watched.watch.look()
    assert not watched.said
    for hours in (24 * 30 + 2, 24 * 30 + 5, 24 * 31 + 3):
        watched.now = start + timedelta(hours=hours)
        watched.watch.look()
    assert [re.search(r"ends in (\d+) days", message)[1] for message in watched.said] == ["29", "28"]  # pyright: ignore[reportOptionalSubscript]
    assert "dimat keys issue lab-a --renew" in watched.said[0]
    watched.now = start + timedelta(days=70)
    watched.watch.look()
    assert "has ended at" in watched.said[-1]


@pytest.mark.anyio
async def test_files_are_taken_over_or_told_of(tmp_path: Path) -> None:
    """The same files change nothing; new ones are everybody's at once; damaged ones are told, the old keys stand."""
    watched = Watched(tmp_path, 20)
    watched.watch.look()
    await watched.watch.read_anew()
    assert not watched.renewed
    before = certificate_facts(watched.identity)
    save(watched.authority.issue("lab-a", days=300), tmp_path)
    await watched.watch.read_anew()
    assert watched.renewed == [(True, False)]
    assert certificate_facts(watched.identity) == certificate_facts(load_identity(tmp_path, "lab-a")) != before
    said = list(watched.said)
    watched.watch.look()
    assert watched.said == said, "300 days are left"
    (tmp_path / "lab-a.crt").write_bytes(b"nothing")
    await watched.watch.read_anew()
    assert watched.said[-1].startswith("the new keys are not used: ")
    assert watched.said[-1].endswith("; the current ones stay in use")
    assert len(watched.renewed) == 1


def test_the_metric_tells_when_the_keys_end() -> None:
    """What was read last counts; an agent without keys tells nothing."""
    listener, name = PrometheusListener("r", "a"), "dimat_certificate_expires_timestamp_seconds"
    labels = {"agent": "a", "run": "r"}
    assert listener.registry.get_sample_value(name, labels) is None
    for until_s in (1e9, 2e9):
        listener(events.KeysRead(agent="a", round=1, fingerprint="ab", until_s=until_s))
    assert listener.registry.get_sample_value(name, labels) == 2e9


@pytest.mark.live
@pytest.mark.slow
def test_sighup_reads_the_keys_without_a_lost_connection(
    tmp_path: Path, free_ports: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A certificate that ends in 10 days is warned of and renewed in the files. doctor says that the process goes by
    another one until SIGHUP; peers stay connected all the while, merge on, and the metric tells the new date."""
    with network(tmp_path, AB, free_ports, schedule=SCHEDULE, train=SLOW) as net:
        issue(tmp_path / "keys", {"lab-a": None}, 10, renew=True)
        for name in AB:
            net.start(name, *([f"monitor.metrics=127.0.0.1:{free_ports[6]}"] if name == "lab-a" else []))
        net.until(lambda: net.partners("lab-a") == net.partners("lab-b") == set(AB), "both merge")
        assert [event for event in net.events("lab-a", "Warned") if "ends in 9 days" in event["message"]]

        def examined() -> dict[str, str]:
            main(["doctor", str(tmp_path / "agents.toml"), "--name", "lab-a", "--json", *sets])
            found = json.loads(capsys.readouterr().out)["findings"]
            return {check["name"]: f"{check['level']}: {check['what']} {check['mend']}" for check in found}

        sets = ("--set", f"agent.folder={tmp_path / 'lab-a'}", "--set", f"agent.listen={net.address('lab-a')}")
        assert examined()["keys in use"].startswith("ok: ")
        issue(tmp_path / "keys", {"lab-a": None}, 300, renew=True)
        told = examined()["keys in use"]
        assert told.startswith("warn: process")
        assert f"kill -HUP {ask(tmp_path / 'lab-a')['pid']}" in told
        net.lives[0].signal(signal.SIGHUP)
        (_, read) = net.wait_for("lab-a", "KeysRead", 2)
        assert read["fingerprint"] == load_identity(tmp_path / "keys", "lab-a").fingerprint
        assert examined()["keys in use"].startswith("ok: ")
        since = len(net.events("lab-b", "Merged"))
        net.until(lambda: len(net.events("lab-b", "Merged")) > since + 2, "they merge on")
        assert net.partners("lab-b") == set(AB)
        for name in AB:
            assert not [event for event in net.events(name, "NetworkObserved")[1:-1] if not event["connected"]]
        with urllib.request.urlopen(f"http://127.0.0.1:{free_ports[6]}/metrics", timeout=10) as answer:
            page = answer.read().decode()
        value = re.search(r"^dimat_certificate_expires_timestamp_seconds\{.*\} (\S+)$", page, re.MULTILINE)
        assert value is not None
        assert float(value[1]) == pytest.approx(read["until_s"])
        for life in net.lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in net.lives] == [143] * 2
