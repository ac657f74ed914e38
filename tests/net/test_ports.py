"""Who holds a port, from a real process that listens there."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dimat.errors import NetworkError
from dimat.net.ports import owner_of
from tests.forks import dimat

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only root is told whose a socket is")

LISTENS = "import socket, sys; s = socket.create_server((sys.argv[1], 0), family=int(sys.argv[2])); \
print(s.getsockname()[1], flush=True); sys.stdin.read()"


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_names_the_process_that_listens(host: str, family: int) -> None:
    """Reference: another process, which says its port; once it is gone, nobody is named."""
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    words = [sys.executable, "-c", LISTENS, host, str(int(family))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        said = process.stdout.readline()
        if not said:
            pytest.skip(f"{host} cannot be listened on here")
        assert owner_of(int(said)).startswith(f"process {process.pid} ({sys.executable} -c import socket")
        process.stdin.close()
    assert owner_of(int(said)) == ""


@pytest.mark.live
def test_an_agent_that_cannot_listen_says_who_does(tmp_path: Path) -> None:
    """Reference: this very process, which holds the port that the agent wants; exit code 3 of network faults."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        (tmp_path / "a.toml").write_text(
            'run = "r"\n[task]\nname = "digits"\n[topology]\ngraph = "ring"\nagents = 2\n'
            f'[agent]\nname = "agent-0"\ninsecure = true\nlisten = "127.0.0.1:{port}"\n'
        )
        run = subprocess.run(
            [dimat(), "agent", str(tmp_path / "a.toml")],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
        )
    last = run.stderr.splitlines()[-1]
    assert f"cannot listen on 127.0.0.1:{port}: in use by process " in last
    assert last.endswith("; stop it, or choose another port")
    assert run.returncode == NetworkError.exit_code
