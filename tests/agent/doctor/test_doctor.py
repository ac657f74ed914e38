"""What `dimat doctor` finds. Reference: real servers, sockets, keys and folders that are as they should be, or not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from dimat.agent.doctor.check import Check, exit_code, fail, failed, ok, warn
from dimat.agent.doctor.network_checks import AgentEndpoint, check_network
from dimat.agent.learner.checkpoint_store import look
from dimat.errors import ConfigError, DataError, NetworkError, SecurityError
from dimat.net.compatibility import Profile
from dimat.net.transport import Neighbours
from tests.agent.processes import ROOT, Network, network
from tests.forks import dimat
from tests.net.agents import RUN, SCHEMA, make, started, update_neighbours, weights
from tests.net.keys import Authority

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"run": "another"}, "it is in run 'another'"),
    "schema": ({"profile": Profile("c" * 64)}, "schema"),
    "base": ({"profile": Profile(SCHEMA, base="d" * 64)}, "base"),
    "protocol": ({"profile": Profile(SCHEMA, protocol=2)}, "protocol 2"),
    "groups": ({"profile": Profile(SCHEMA, groups="e" * 64)}, "symmetry groups"),
    "settings": ({"profile": Profile(SCHEMA, settings={"heads": "8"})}, "its heads is '8', here '4'"),
}
"""Peers that do not fit, by what differs; and what is said of them."""


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> AsyncGenerator[dict[str, str]]:
    """Addresses of agents that run all the while, for tests that only ask them: b, who fits; those of `UNFIT`; odd, who
    may be meant to differ; c, whose map lacks a; a stranger of another CA."""
    folder = tmp_path_factory.mktemp("peers")
    others: dict[str, dict[str, Any]] = {
        "b": {},
        "odd": {"profile": Profile(SCHEMA, settings={"heads": "4", "probe": "b"})},
    }
    others |= {name: differs for name, (differs, _) in UNFIT.items()}
    members = [make(folder / name, name, identity=authority.issue(name), **more) for name, more in others.items()]
    c = make(folder / "c", "c", identity=authority.issue("c"))
    stranger = make(folder / "stranger", "stranger", identity=Authority("other").issue("stranger"))
    async with started(*members, c, stranger):
        for agent in members:
            update_neighbours([agent], {"a": "127.0.0.1:9", agent.name: agent.address})
        yield {agent.name: agent.address for agent in (*members, c, stranger)}


def around(authority: Authority | None, peers: dict[str, str], **more: Any) -> AgentEndpoint:
    """Agent a, which does not run, on a map with these peers."""
    known = {name: [address] for name, address in peers.items()}
    neighbours = Neighbours(list(known), (), ["a", *known], known)
    identity = None if authority is None else authority.issue("a")
    values: dict[str, Any] = {
        "run": RUN,
        "agent": "a",
        "identity": identity,
        "profile": Profile(SCHEMA, groups="d" * 64, settings={"heads": "4", "probe": "a"}),
        "listen": "127.0.0.1:0",
    }
    return AgentEndpoint(**(values | {"running": 0, "neighbours": neighbours, "bootstraps": ()} | more))


async def found(place: AgentEndpoint) -> dict[str, Check]:
    findings = await anyio.to_thread.run_sync(lambda: list(check_network(place)))
    return {finding.name: finding for finding in findings}


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────
async def test_peers_that_fit_and_reach_back(authority: Authority, peers: dict[str, str]) -> None:
    """With an agent that runs here and one that does not, each peer is well, and dials back."""
    told = await found(around(authority, {"b": peers["b"]}))
    assert {name: finding.level for name, finding in told.items()} == dict.fromkeys(
        ("port", "peer b", "clock", "dial-back b", "dht"), "ok"
    )
    with closing(socket.create_server(("127.0.0.1", 0))) as own:
        at = f"127.0.0.1:{own.getsockname()[1]}"
        told = await found(around(authority, {"b": peers["b"]}, running=7, listen=at))
    assert "process 7" in told["port"].what
    assert at in told["dial-back b"].what


@pytest.mark.parametrize("name", UNFIT)
async def test_peers_that_do_not_fit(authority: Authority, peers: dict[str, str], name: str) -> None:
    """What differs is named, and how to mend it."""
    finding = (await found(around(authority, {name: peers[name]})))[f"peer {name}"]
    assert (finding.level, finding.code) == ("fail", 2)
    assert UNFIT[name][1] in finding.what
    assert finding.mend


async def test_peers_that_are_not_trusted_or_not_there(authority: Authority, peers: dict[str, str]) -> None:
    """Another CA, another agent at the address, not on the peer's map, nobody there, a name that is none: each has a
    line of its own, and the others are asked all the same."""
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        asked = {
            "stranger": peers["stranger"],
            "d": peers["b"],
            "c": peers["c"],
            "gone": f"127.0.0.1:{nobody.getsockname()[1]}",
            "unnamed": "nobody.invalid:7300",
            "b": peers["b"],
        }
        told = await found(around(authority, asked))
    assert {name: told[f"peer {name}"].code for name in asked} == {
        "stranger": SecurityError.exit_code,
        "d": SecurityError.exit_code,
        "c": SecurityError.exit_code,
        "gone": NetworkError.exit_code,
        "unnamed": NetworkError.exit_code,
        "b": 0,
    }
    assert "not on the map" in told["peer c"].what
    assert "refused" in told["peer gone"].what
    assert "resolved" in told["peer unnamed"].what
    assert all(told[f"peer {name}"].mend for name in asked if name != "b")


async def test_a_peer_that_may_be_meant_to_differ(authority: Authority, peers: dict[str, str]) -> None:
    finding = (await found(around(authority, {"odd": peers["odd"]})))["peer odd"]
    assert (finding.level, finding.mend) == ("warn", "give both the same, unless that is meant")
    assert "its probe is 'b', here 'a'" in finding.what


async def test_a_peer_that_cannot_reach_back(authority: Authority, peers: dict[str, str]) -> None:
    """The agent is said to run, and nobody listens at its port."""
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{nobody.getsockname()[1]}"
        finding = (await found(around(authority, {"b": peers["b"]}, running=7, listen=at)))["dial-back b"]
    assert (finding.level, finding.code) == ("fail", 3)
    assert "firewall" in finding.mend


async def test_a_wrong_hello_of_the_doctor_does_not_stop_the_agent(tmp_path: Path, authority: Authority) -> None:
    """Agent a runs and is followed by b; a doctor whose configuration has another model asks b in a's name meanwhile.
    What a fetches after that still comes."""
    a = make(tmp_path / "a", "a", identity=authority.issue("a"))
    b = make(tmp_path / "b", "b", identity=authority.issue("b"))
    async with started(a, b):
        update_neighbours([a, b], {"a": a.address, "b": b.address})
        b.publish(1, weights(1))
        await a.ears.offer("b", 1)
        wrong = around(authority, {"b": b.address}, profile=Profile("c" * 64), running=7, listen=a.address)
        assert (await found(wrong))["peer b"].level == "fail"
        b.publish(2, weights(2))
        manifest = await a.ears.offer("b", 2)
        got = await a.transport.fetch("b", 2, manifest.payload.root)
        assert got.certificate
        assert a.ears.refusals == b.ears.refusals == []


async def test_without_keys_on_loopback(tmp_path: Path) -> None:
    """An insecure network is looked at as well."""
    b = make(tmp_path / "b", "b")
    async with started(b):
        update_neighbours([b], {"a": "127.0.0.1:9", "b": b.address})
        told = await found(around(None, {"b": b.address}))
    assert told["peer b"].level == told["dial-back b"].level == "ok"


async def test_own_port_and_bootstraps() -> None:
    """A port that another program has, and DHT nodes of which one answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other, closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        there, gone = (each.getsockname()[1] for each in (other, nobody))
        nodes = (f"/ip4/127.0.0.1/tcp/{there}/p2p/Qm", f"/ip4/127.0.0.1/tcp/{gone}/p2p/Qm", "nonsense")
        place = around(None, {}, listen=f"127.0.0.1:{there}", bootstraps=nodes)
        findings = await anyio.to_thread.run_sync(lambda: list(check_network(place)))
    port = next(finding for finding in findings if finding.name == "port")
    assert (port.level, port.code) == ("fail", 3)
    assert f":{there}" in port.what
    if sys.platform == "linux":  # elsewhere only root is told whose a port is
        assert port.mend.startswith(f"stop process {os.getpid()} (")
    dht = [finding for finding in findings if finding.name == "dht"]
    assert [finding.level for finding in dht] == ["ok", "warn", "warn"]


async def test_clocks_that_differ(authority: Authority, peers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose clock is two minutes ahead is named."""
    import time

    monkeypatch.setattr("dimat.net.grpc_server.clock", lambda: time.time() + 120)
    finding = (await found(around(authority, {"b": peers["b"]})))["clock"]
    assert finding.level == "warn"
    assert "behind that of b" in finding.what
    assert "NTP" in finding.mend


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────
def doctor(net: Network, name: str, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run `dimat doctor` for an agent of a network; return the exit code and the findings by name."""
    port = net.ports.get(name, 0)
    own = [f"agent.folder={net.folder / name}", f"agent.listen=127.0.0.1:{port}"]
    sets = [word for one in own for word in ("--set", one)]
    command = [dimat(), "doctor", str(net.folder / "agents.toml"), "--name", name, "--json"]
    done = subprocess.run([*command, *sets, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == done.returncode
    return done.returncode, {finding["name"]: finding for finding in answer["findings"]}


@pytest.mark.live
def test_doctor_and_status_of_real_agents(tmp_path: Path, free_ports: list[int]) -> None:
    """Two agents that run: all is well. One is stopped: the other one's doctor says so, and its own says what it would
    go on from; a damaged checkpoint, lost keys and a folder of another are told."""
    slow = "epochs_per_round = 20\nbatch_size = 8"
    schedule = "rounds = 0\nround_deadline_s = 30"
    with network(tmp_path, ("lab-a", "lab-b"), free_ports, train=slow, schedule=schedule) as net:
        lives = {name: net.start(name) for name in net.names}
        for name in net.names:
            net.wait_for(name, "Checkpointed", stage="merged")
        code, told = doctor(net, "lab-a")
        assert code == 0, told
        assert {name for name, finding in told.items() if finding["level"] != "ok"} == set()
        assert str(lives["lab-a"].process.pid) in told["port"]["what"]
        assert "reaches this agent" in told["dial-back lab-b"]["what"]
        asked = [dimat(), "status", str(tmp_path / "agents.toml"), "--name", "lab-a"]
        done = subprocess.run(
            [*asked, "--peer", "lab-b", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        status = json.loads(done.stdout)
        assert status["agent"] == "lab-b"
        assert not status.keys() & {"pid", "folder"}  # another member's
        done = subprocess.run([*asked, "--peer", "lab-b"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "connected" in done.stdout
        done = subprocess.run([*asked, "--peer", "lab-x"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        lives["lab-b"].process.terminate()
        lives["lab-b"].wait()
        done = subprocess.run([*asked, "--peer", "lab-b"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        code, told = doctor(net, "lab-a")
        assert (code, told["peer lab-b"]["level"]) == (3, "fail")
        code, told = doctor(net, "lab-b")
        assert code == 0, told
        assert "can be read" in told["checkpoint"]["what"]
        newest = tmp_path / "lab-b" / "checkpoints" / look(tmp_path / "lab-b" / "checkpoints")[0][0]
        data = bytearray(newest.read_bytes())
        data[-1] ^= 1
        newest.write_bytes(data)
        code, told = doctor(net, "lab-b")
        assert (code, told["checkpoint"]["level"]) == (0, "warn")
        lives["lab-a"].process.terminate()
        lives["lab-a"].wait()
        for file in (tmp_path / "lab-b" / "checkpoints").glob("*.safetensors"):
            file.write_bytes(b"nothing")
        assert doctor(net, "lab-b")[0] == DataError.exit_code
        assert doctor(net, "lab-b", "--set", f"agent.folder={tmp_path / 'lab-a'}")[0] == DataError.exit_code
        (tmp_path / "keys" / "lab-b.key").unlink()
        code, told = doctor(net, "lab-b")
        assert (code, told["keys"]["level"]) == (SecurityError.exit_code, "fail")
        assert "dimat keys" in told["keys"]["mend"]
        code, told = doctor(net, "nobody")
        assert (code, told["config"]["level"]) == (ConfigError.exit_code, "fail")


def test_a_fault_is_what_decides() -> None:
    """The first fault's exit code; warnings are none. An error's advice is what stands after its last semicolon."""
    findings = [ok("a", "x"), warn("b", "x", "y"), fail("c", "x", "y", DataError), fail("d", "x", "y", ConfigError)]
    assert exit_code(findings) == 5
    assert exit_code(findings[:2]) == 0
    split = failed("e", ConfigError("one; two; do that"))
    assert (split.what, split.mend, split.code) == ("one; two", "do that", 2)
