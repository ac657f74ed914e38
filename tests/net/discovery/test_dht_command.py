"""`dimat dht` as a person meets it: a real process, its addresses, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dimat.cli import main
from tests.forks import dimat
from tests.net.nodes import needs_hivemind, processes, token_of

pytestmark = pytest.mark.live


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    line = [dimat(), "dht", "--folder", str(folder), *arguments]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@needs_hivemind
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_prints_its_addresses_keeps_them_and_stops(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    with command(tmp_path, "--listen", "127.0.0.1:0", "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        (address,) = told["addresses"]
        port = address.split("/")[4]
        assert address == f"/ip4/127.0.0.1/tcp/{port}/p2p/{told['peer']}"
        token = token_of(tmp_path)

        with command(tmp_path / "other", "--listen", f"127.0.0.1:{port}") as second:
            _, errors = second.communicate(timeout=120)
            assert second.returncode == 3
            assert errors.splitlines()[-1] == (
                f"dimat: the DHT node does not start: cannot listen on 127.0.0.1 port {port}: Address already in use"
            )

        process.send_signal(sent)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert output == ""
        assert errors.splitlines()[-1] == "dimat: stopping"
        assert "Warning" not in errors
        assert "Traceback" not in errors
    if Path("/proc/self/environ").exists():
        assert processes(token) == {"p2pd": [], "python": []}
    assert not (tmp_path / "dht.pid").exists()
    assert os.stat(tmp_path / "dht.key").st_mode & 0o077 == 0
    with command(tmp_path, "--listen", f"127.0.0.1:{port}") as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == address, "the same identity under the same port"


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.crt").write_text("")
    for arguments, message in [
        (["--listen", "here:7301"], "DHT listen address 'here:7301' is not IP:port"),
        (["--bootstrap", "1.2.3.4:7301"], "DHT bootstrap '1.2.3.4:7301' is not an address as `dimat dht` prints it"),
        (["--ca", str(tmp_path / "ca.crt")], "--ca needs --run NAME"),
        (["--ca", str(tmp_path / "none.crt"), "--run", "r"], f"there is no file {tmp_path / 'none.crt'} for --ca"),
    ]:
        assert main(["dht", "--folder", str(tmp_path), *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert message in said.err
    assert main(["dht", "--folder", str(tmp_path), "--ca", str(tmp_path / "ca.crt"), "--run", "r"]) == 4
    assert "CA certificate" in capsys.readouterr().err
