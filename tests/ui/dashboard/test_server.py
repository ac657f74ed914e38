"""The dashboard's server over real sockets. References: RFC 9110 (Host, 401), RFC 6750 (Bearer), RFC 6265bis (cookies),
and the HTML standard's server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dimat.cli import main
from dimat.errors import DataError, NetworkError, SecurityError
from dimat.events import RoundStarted, Trained, TrainResult
from dimat.ui.dashboard.guard import check_exposure, open_socket, read_token
from dimat.ui.dashboard.run_source import FolderSource
from dimat.ui.dashboard.server import Server
from dimat.ui.jsonl import JsonlListener
from tests.ui.dashboard.runs import told, write_log, write_run
from tests.ui.dashboard.serving import until

TOKEN = "a-token-of-some-length"


@contextmanager
def running(source: FolderSource, token: str | None = None) -> Iterator[str]:
    """Serve a source in a thread, and give the address."""
    with open_socket("127.0.0.1", 0) as opened:
        server = Server(source, opened, "127.0.0.1", token)
        thread = threading.Thread(target=lambda: asyncio.run(server.run()))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


def messages(address: str, many: int, **given: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the first messages of the stream: their ids and what they hold."""
    found: list[tuple[str, dict[str, Any]]] = []
    mark = ""
    with httpx.stream("GET", f"{address}/api/events", timeout=60, **given) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("id: "):
                mark = line[4:]
            elif line.startswith("data: "):
                found.append((mark, json.loads(line[6:])))
                if len(found) == many:
                    break
    return found


def test_pages_and_what_they_are_made_of(tmp_path: Path) -> None:
    with running(FolderSource(write_run(tmp_path / "run"))) as address, httpx.Client(base_url=address) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert "<script>" not in page.text
        assert "style=" not in page.text
        for part in ("app.js", "style.css", "vendor/cytoscape.esm.min.mjs", "vendor/uPlot.iife.min.js"):
            assert client.get(f"/static/{part}").status_code == 200, part
        assert client.get("/healthz").text == "ok\n"
        assert client.get("/static/../server.py").status_code == 404
        assert client.get("/static/%2e%2e/server.py").status_code == 404
        assert client.post("/api/state").status_code == 405
        state = client.get("/api/state").json()
        assert [agent["name"] for agent in state["agents"]] == ["lab-a", "lab-b", "lab-c"]
        assert client.get("/api/merges", params={"agent": "lab-a", "limit": 1}).json()["merges"][0]["agent"] == "lab-a"
        assert client.get("/api/merges", params={"round": "x"}).status_code == 400
        assert client.get("/api/lineage", params={"agent": "nobody"}).status_code == 404
        (adoption,) = client.get("/api/alignment").json()["adoptions"]
        assert (adoption["moved"], adoption["groups"]) == (0.75, {"conv": 0.5})


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:8300", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8300", 421),
        ("", 421),
    ],
)
def test_names_that_are_not_ours_are_refused(tmp_path: Path, host: str, code: int) -> None:
    """A page of another site that lets its name resolve to this machine gets nothing."""
    with running(FolderSource(write_run(tmp_path / "run"))) as address:
        assert httpx.get(f"{address}/api/state", headers={"host": host}).status_code == code


def test_token(tmp_path: Path) -> None:
    """Without the token nothing is told; it comes as Bearer, or once in the address and then as a cookie."""
    source = FolderSource(write_run(tmp_path / "run"))
    with running(source, TOKEN) as address, httpx.Client(base_url=address) as client:
        for path in ("/", "/api/state", "/api/events", "/static/app.js", "/?token=wrong", f"/?token={TOKEN}x"):
            refused = client.get(path)
            assert refused.status_code == 401, path
            assert "content-security-policy" in refused.headers
            assert "set-cookie" not in refused.headers
        assert client.get("/healthz").status_code == 200
        assert client.get("/api/state", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert client.get("/api/state", headers={"authorization": f"Basic {TOKEN}"}).status_code == 401
        assert client.get("/api/state", headers={"authorization": "Bearer \xe9".encode("latin-1")}).status_code == 401
        first = client.get(f"/?token={TOKEN}&x=1")
        assert (first.status_code, first.headers["location"]) == (303, "/?x=1")
        cookie = first.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert TOKEN not in cookie
        assert client.get("/api/state").status_code == 200, "the cookie is enough now"
        assert httpx.get(f"{address}//evil.example/?token={TOKEN}").headers["location"] == "/evil.example/"


def test_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    """Who comes back with the last id is told what changed since; with another server's, or none, everything."""
    log = write_run(tmp_path / "run") / "events.jsonl"
    with running(FolderSource(tmp_path / "run")) as address:
        ((first, all_of_it),) = messages(address, 1)
        assert all_of_it["since"] == 0
        assert len(all_of_it["agents"]) == 3
        write_log(
            log,
            [
                RoundStarted(agent="lab-b", round=9),
                Trained(agent="lab-b", round=9, result=TrainResult(loss=1, samples=1), train_s=1),
            ],
        )
        ((second, news),) = messages(address, 1, headers={"last-event-id": first})
        assert (news["since"], second != first) == (all_of_it["version"], True)
        assert [agent["name"] for agent in news["agents"]] == ["lab-b"]
        assert news["curves"]["lab-b"] == [[9, 1, None, None]]
        ((_, again),) = messages(address, 1, params={"since": second, "x": ""}, headers={"last-event-id": "other-7"})
        assert again["since"] == 0
        for strange in ("-", "7", f"{first}9", "x" * 5000, f"{first.split('-')[0]}-²"):
            ((_, told_again),) = messages(address, 1, headers={"last-event-id": strange.encode()})
            assert told_again["since"] == 0, strange


def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run") / "events.jsonl"
    with log.open("ab") as file:
        file.write(b'{"event": "Tr\n[1, 2]\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    write_log(log, [Trained(agent="lab-a", round=8, result=TrainResult(loss=0.25, samples=1), train_s=1)])
    source = FolderSource(tmp_path / "run")
    assert source.damaged == 4
    assert source.state.agents["lab-a"].view.loss == 0.25
    with running(source) as address:
        assert httpx.get(f"{address}/api/state").json()["run"]["damaged"] == 4


def test_a_log_that_is_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run") / "events.jsonl"
    source = FolderSource(tmp_path / "run")
    whole = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"event":"Trained","agent":"lab-a","round":7,"lo')
    assert not source.read(), "half a line is left for later"
    with log.open("ab") as file:
        file.write(b'ss":0.5}\n')
    assert source.read()
    assert source.state.agents["lab-a"].view.loss == 0.5
    log.unlink()
    assert not source.read()
    log.write_bytes(whole)
    assert source.read()
    assert source.damaged == 0


def test_agents_folders_are_found_as_they_come(tmp_path: Path) -> None:
    first, *rest = told()
    write_log(tmp_path / "lab-a" / "events.jsonl", [first])
    source = FolderSource(tmp_path)
    assert source.several
    write_log(tmp_path / "lab-b" / "events.jsonl", rest)
    assert source.read()
    assert source.state.agents["lab-b"].points


def test_a_log_of_another_schema_hides_no_other(tmp_path: Path) -> None:
    """It is refused by name; while the dashboard runs the page says so, and shows the other agents."""
    first, *rest = told()
    write_log(tmp_path / "lab-b" / "events.jsonl", [first])
    source = FolderSource(tmp_path)
    strange = tmp_path / "lab-a" / "events.jsonl"
    strange.parent.mkdir()
    strange.write_text('{"format": 3, "kind": "dimat.events"}\n')
    write_log(tmp_path / "lab-b" / "events.jsonl", rest)
    with running(source) as address:
        until(lambda: str(strange) in httpx.get(f"{address}/api/state").json()["run"]["notice"], "the notice")
        assert source.state.agents["lab-b"].points
    with pytest.raises(DataError, match=r"lab-a.*is not a dimat event log"):
        FolderSource(tmp_path)


def test_folders_that_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has one line, and exit code 5."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    JsonlListener(tmp_path / "bare" / "events.jsonl").close()
    for run in ("one", "two"):
        (write_run(tmp_path / "runs" / run) / "experiment.json").write_text("{}")
    for folder, words in (
        ("nowhere", "no folder"),
        ("empty", "has no events"),
        ("bare", "has no events yet"),
        ("runs", "holds several runs"),
    ):
        with pytest.raises(DataError, match=words):
            FolderSource(tmp_path / folder)
        assert main(["dashboard", str(tmp_path / folder), "--listen", "127.0.0.1:0"]) == 5
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert words in said


def test_what_may_not_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Port in use: 3; open to others without a token, or with a bad one: 4; no address: 2."""
    run = str(write_run(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NetworkError, match="choose another port"):
            open_socket("127.0.0.1", port)
        assert main(["dashboard", run, "--listen", f"127.0.0.1:{port}"]) == 3
    assert main(["dashboard", run, "--listen", "0.0.0.0:0"]) == 4
    assert main(["dashboard", run, "--listen", "nonsense"]) == 2
    token = tmp_path / "token"
    assert main(["dashboard", run, "--token-file", str(token)]) == 4
    token.write_text("short")
    token.chmod(0o600)
    assert main(["dashboard", run, "--token-file", str(token)]) == 4
    token.write_text(TOKEN)
    token.chmod(0o644)
    assert main(["dashboard", run, "--token-file", str(token)]) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 6
    assert TOKEN not in said
    token.chmod(0o600)
    assert read_token(token) == TOKEN
    check_exposure("0.0.0.0", TOKEN)
    for own in ("127.0.0.1", "::1", "localhost", "127.8.9.1"):
        check_exposure(own, None)
    for other in ("0.0.0.0", "::", "192.0.2.1", "lab-a.example.org", ""):
        with pytest.raises(SecurityError, match="token"):
            check_exposure(other, None)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dimat.ui.dashboard.available.NEEDED", ("starlette_is_not_here",))
    assert main(["dashboard", str(write_run(tmp_path / "run"))]) == 2
    assert "pip install 'dimat[dashboard]'" in capsys.readouterr().err


def test_too_many_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimat.ui.dashboard.server.MOST_READERS", 1)
    with running(FolderSource(write_run(tmp_path / "run"))) as address:
        with httpx.stream("GET", f"{address}/api/events", timeout=60) as answer:
            lines = answer.iter_lines()  # held: its end would end the answer
            assert next(lines)
            assert httpx.get(f"{address}/api/events").status_code == 503

        def free() -> bool:
            with httpx.stream("GET", f"{address}/api/events", timeout=60) as again:
                return again.status_code == 200

        until(free, "a place for another reader")
