"""Real agents that find each other over the DHT: their map holds names, no addresses. References: the simulator with
the same seeds, and the kernel's list of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dimat import run_simulation
from dimat.config import load_experiment
from tests.agent.processes import Network, check_ledgers, network, write_config
from tests.forks import Process, start
from tests.net.nodes import needs_hivemind, processes, token_of

pytestmark = [needs_hivemind, pytest.mark.slow, pytest.mark.live]

RING = ("lab-a", "lab-b", "lab-c", "lab-d", "lab-e")
ROUNDS = 6
DIGITS = {
    "task": 'name = "digits"\npartition = { kind = "iid" }',
    "train": 'epochs_per_round = 2\ninitialisation = "own"',
    "schedule": f"rounds = {ROUNDS}\nround_deadline_s = 120",
    "exchange": "lost_after_s = 120",  # they are found one after the other
}


@contextmanager
def bootstrap(net: Network, run: str) -> Iterator[tuple[subprocess.Popen[bytes] | Process, str]]:
    """Run `dimat dht` for a run; give its process and its address."""
    said = net.folder / "bootstrap.json"
    words = [
        "-m",
        "dimat.cli",
        "dht",
        "--listen",
        "127.0.0.1:0",
        "--folder",
        str(net.folder / "bootstrap"),
        "--run",
        run,
        "--json",
    ]
    with said.open("wb") as stream, (net.folder / "bootstrap.err").open("wb") as errors:
        process = start(words, env=os.environ, stdout=stream.fileno(), stderr=errors.fileno())
    try:
        net.until(lambda: said.read_bytes().endswith(b"\n"), "the bootstrap's address")
        yield process, json.loads(said.read_text())["addresses"][0]
    finally:
        process.kill()
        process.wait()


def nothing_left(net: Network, tokens: list[str]) -> None:
    net.until(lambda: not any(pids for token in tokens for pids in processes(token).values()), "the end of all nodes")


def test_five_agents_of_a_ring_find_each_other(tmp_path: Path, free_ports: list[int]) -> None:
    """Five agents learn digits from initialisations of their own and know nothing but a bootstrap, which is killed with
    -9 after their first round, and one agent's own node with it: each merges exactly its neighbours in every round, in
    one basis at the end, and is as good as in the simulator. Nothing of any node is left behind."""
    with network(tmp_path, RING, free_ports, **DIGITS) as net, bootstrap(net, "five") as (first, address):
        net.write_map(addresses=False)
        dht = f"bootstraps = [{json.dumps(address)}]\nlisten = '127.0.0.1:0'"
        write_config(tmp_path / "agents.toml", run="five", dht=dht, **DIGITS)
        lives = [net.start(name) for name in RING]
        net.wait_for("lab-a", "Merged")
        first.kill()
        nodes = processes(token_of(tmp_path / "lab-a" / "dht"))
        assert {what: len(pids) for what, pids in nodes.items()} == {"p2pd": 1, "python": 1}
        for pid in (*nodes["p2pd"], *nodes["python"]):
            os.kill(pid, signal.SIGKILL)
        assert len(net.events("lab-a", "Merged")) < ROUNDS
        tokens = [token_of(tmp_path / name / "dht") for name in RING] + [token_of(tmp_path / "bootstrap")]
        assert [life.wait() for life in lives] == [0] * len(RING), "\n".join(life.text() for life in lives)

        results = run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)))
        simulated = {(row.agent, row.round): row for row in results.rows}
        for index, name in enumerate(RING):
            neighbours = {RING[index - 1], name, RING[(index + 1) % len(RING)]}
            merges = net.events(name, "Merged")
            assert [merge["round"] for merge in merges] == list(range(1, ROUNDS + 1))
            for merge in merges:
                assert {part["agent"]: part["weight"] for part in merge["contributions"]} == pytest.approx(
                    dict.fromkeys(neighbours, 1 / 3)
                )
                assert merge["after"]["accuracy"] == pytest.approx(simulated[name, merge["round"]].after, abs=0.03)
        bases = {net.events(name, "Published")[-1]["basis"] for name in RING}
        assert bases == {row.basis for row in results.rows if row.round == ROUNDS}
        assert len(bases) == 1
        check_ledgers(net)
        nothing_left(net, tokens)


def test_a_bootstrap_that_is_not_there(tmp_path: Path, free_ports: list[int]) -> None:
    """Nobody answers at the bootstrap's address: agents say so, by address, and go on with the peers whose addresses
    are on the map; one that knows no address of anybody trains alone."""
    names = RING[:2]
    gone = f"/ip4/127.0.0.1/tcp/{free_ports[7]}/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    dht = f"bootstraps = [{json.dumps(gone)}]\nlisten = '127.0.0.1:0'"
    schedule = "rounds = 0\nround_deadline_s = 60"
    train = "epochs_per_round = 60\nbatch_size = 8"
    with network(tmp_path, names, free_ports, dht=dht, schedule=schedule, train=train) as net:

        def complaints(name: str) -> int:
            return sum(str(free_ports[7]) in event["message"] for event in net.events(name, "Warned"))

        lives = [net.start(name) for name in names]
        net.until(lambda: all(complaints(name) for name in names), "both say that the bootstrap is not there")
        since = {name: len(net.events(name, "Merged")) for name in names}
        net.until(lambda: all(len(net.events(name, "Merged")) > since[name] + 3 for name in names), "both go on")
        assert {merge["heard"] for name in names for merge in net.events(name, "Merged")} == {1}
        tokens = [token_of(tmp_path / name / "dht") for name in names]
        for life in lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [143, 143]
        net.write_map(addresses=False)
        before, said = len(net.events("lab-a", "Merged")), complaints("lab-a")
        alone = net.start("lab-a", "exchange.lost_after_s=1", "agent.linger_s=0")
        net.until(lambda: complaints("lab-a") > said, "it says so again")
        tokens.append(token_of(tmp_path / "lab-a" / "dht"))
        held = len(net.events("lab-a", "Merged"))
        net.until(lambda: len(net.events("lab-a", "Merged")) > held + 3, "it trains alone")
        assert {merge["heard"] for merge in net.events("lab-a", "Merged")[before:]} == {0}
        alone.signal(signal.SIGTERM)
        assert alone.wait() == 143, alone.text()
        check_ledgers(net)
        nothing_left(net, tokens)
