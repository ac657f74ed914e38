"""Real agents, end to end: processes, gRPC, mutual TLS, checkpoints. References: the simulator with the same seeds, and
what the round promises (docs/what-happens-when.md)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from dimat import run_simulation
from dimat.agent.daemon.folder import AgentFolder
from dimat.config import load_experiment
from tests.agent.processes import ROOT, Network, check_ledgers, network, write_config
from tests.forks import dimat
from tests.simulate.helpers import TINY_TASK

pytestmark = pytest.mark.live

ABC = ("lab-a", "lab-b", "lab-c")
SLOW = "epochs_per_round = 20\nbatch_size = 8"  # endless runs of a tiny task would make hundreds of rounds a second

# the units of the first hidden layer have a factor each, by their number: they cannot change places
NUMBERED = """
from torch import nn

class Numbered(nn.Sequential):
    def forward(self, x):
        for number, layer in enumerate(self):
            x = layer(x * torch.arange(1.0, 13.0) if number == 2 else x)
        return x
"""


def command(*words: object, code: int = 0) -> str:
    """Run a command of dimat; return what it says."""
    done = subprocess.run([dimat(), *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def finish(net: Network, names: tuple[str, ...] = ABC, *, anew: bool = False) -> None:
    """Start agents and wait until all are through; `anew`: see `Network.start`."""
    lives = [net.start(name, anew=anew) for name in names]
    assert [life.wait() for life in lives] == [0] * len(names), "\n".join(life.text() for life in lives)


def test_three_agents_as_in_the_simulator(tmp_path: Path, free_ports: list[int]) -> None:
    """Three agents with own initialisations do what the simulator does: who merged whom with what weight, one basis,
    and the accuracies within a few test examples (threads add up in another order)."""
    with network(tmp_path, ABC, free_ports) as net:
        finish(net, anew=True)
        results = run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)))
        simulated = {(row.agent, row.round): row for row in results.rows}
        for name in ABC:
            merges = net.events(name, "Merged")
            assert [merge["round"] for merge in merges] == [1, 2, 3, 4]
            for merge in merges:
                assert {part["agent"]: part["weight"] for part in merge["contributions"]} == pytest.approx(
                    dict.fromkeys(ABC, 1 / 3)
                )
                assert merge["after"]["accuracy"] == pytest.approx(simulated[name, merge["round"]].after, abs=0.05)
            assert not net.events(name, "Warned")
        bases = {net.events(name, "Published")[-1]["basis"] for name in ABC}
        assert bases == {row.basis for row in results.rows if row.round == 4}
        assert len(bases) == 1
        check_ledgers(net)
        vouched = [json.loads(line) for line in (tmp_path / "lab-a" / "manifests.jsonl").read_text().splitlines()]
        assert {(line["agent"], line["round"]) for line in vouched} == {(p, r) for p in ABC[1:] for r in (1, 2, 3, 4)}
        assert all(line["signature"] for line in vouched)
        told = command("report", tmp_path / "lab-a", "--verify", "--keys", tmp_path / "keys")
        assert "8 signed manifests checked, 0 faults" in told
        record = net.records("lab-a")[-1]
        assert set(record["manifests"]) == set(ABC[1:])
        assert record["after"] == net.events("lab-a", "Merged")[-1]["after"]


def test_weights_are_taken_over_and_taught_as_in_the_simulator(tmp_path: Path, free_ports: list[int]) -> None:
    """`first_merge = "adopt-distil"`: whose weights they are after the first merge, and the accuracies."""
    schedule = 'rounds = 3\nround_deadline_s = 60\nfirst_merge = "adopt-distil"\ndistil = { steps = 10 }'
    with network(tmp_path, ABC, free_ports, schedule=schedule) as net:
        finish(net)
        results = run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)))
        simulated = {(row.agent, row.round): row.after for row in results.rows}
        bases = {net.events(name, "Published")[-1]["basis"] for name in ABC}
        (founder,) = {basis.split(":")[1] for basis in bases}
        for name in ABC:
            first, *later = net.events(name, "Merged")
            taken = {founder: 1.0} if name == founder else {name: 0.0, founder: 1.0}
            assert {part["agent"]: part["weight"] for part in first["contributions"]} == pytest.approx(taken)
            assert any("learned for 10 steps" in note and "3 models" in note for note in first["notes"])
            for merge in (first, *later):
                assert merge["after"]["accuracy"] == pytest.approx(simulated[name, merge["round"]], abs=0.05)
            for merge in later:
                assert [part["weight"] for part in merge["contributions"]] == pytest.approx([1 / 3] * 3)
        check_ledgers(net)


def test_projection_on_a_shared_base_and_in_no_step(tmp_path: Path, free_ports: list[int]) -> None:
    """`opcm` with a base that all draw from one seed, and `average` asynchronously: all come through, and take from
    each other."""
    shared = {"merge": 'method = "opcm"\nbase = { seed = 0 }', "schedule": "rounds = 3\nround_deadline_s = 60"}
    train = 'epochs_per_round = 1\nbatch_size = 16\ninitialisation = "shared"'
    with network(tmp_path, ABC, free_ports, train=train, **shared) as net:
        finish(net)
        for name in ABC:
            assert [merge["heard"] for merge in net.events(name, "Merged")] == [2, 2, 2]
        check_ledgers(net)
        for name in ABC:
            shutil.rmtree(tmp_path / name)
        loose = {
            "merge": 'method = "average"',
            "schedule": 'rounds = 8\nround_deadline_s = 60\nmode = "async"\nmin_peers = 1',
        }
        write_config(tmp_path / "agents.toml", run="loose", train=train, **loose)
        finish(net)
        taken = sum(len(merge["contributions"]) - 1 for name in ABC for merge in net.events(name, "Merged"))
        assert taken > 0
        check_ledgers(net)


def test_stop_resume_and_status(tmp_path: Path, free_ports: list[int]) -> None:
    """SIGTERM ends an agent with 143 and Ctrl-C with 130; each goes on from its checkpoint with the next round, and its
    peers go on meanwhile. `dimat status` shows one that runs."""
    schedule = "rounds = 0\nround_deadline_s = 5"
    with network(tmp_path, ABC, free_ports, schedule=schedule, train=SLOW, exchange="lost_after_s = 2") as net:
        a, b, c = (net.start(name) for name in ABC)
        net.wait_for("lab-a", "Checkpointed", round=2, stage="merged")
        status = json.loads(command("status", tmp_path / "lab-b", "--json"))
        assert (status["agent"], status["run"], status["secure"]) == ("lab-b", "tiny", True)
        assert set(status["peers"]) == {"lab-a", "lab-c"}
        a.signal(signal.SIGTERM)
        b.signal(signal.SIGINT)
        assert (a.wait(), b.wait()) == (143, 130)
        kept = {name: net.events(name, "Checkpointed") for name in ("lab-a", "lab-b")}
        left = {name: [e["round"] for e in told if e["stage"] != "training"][-1] for name, told in kept.items()}
        before = net.events("lab-c", "Checkpointed")[-1]["round"]
        net.wait_for("lab-c", "Checkpointed", round=before + 2, stage="merged")  # alone
        again = [net.start("lab-a"), net.start("lab-b")]
        for name in ("lab-a", "lab-b"):
            resumed = net.wait_for(name, "Resumed")[0]
            assert resumed["round"] == left[name]
        net.until(lambda: all(net.partners(name) == set(ABC) for name in ABC), "all merge all again")
        for life in (*again, c):
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in (*again, c)] == [143] * 3
        check_ledgers(net)
        assert "no agent answers" in command("status", tmp_path / "lab-b", code=5)


@pytest.mark.parametrize("join", ["adopt", "align"])
def test_newcomer_and_changed_map(tmp_path: Path, free_ports: list[int], join: str) -> None:
    """Two agents run; the map is given a third, they read it anew on SIGHUP, and the newcomer takes part: at the
    network's round, in the network's basis. Then one is taken off the map, and is left out."""
    schedule = f'rounds = 0\nround_deadline_s = 5\njoin_wait_s = 3\njoin = "{join}"'
    with network(tmp_path, ABC, free_ports, schedule=schedule, train=SLOW) as net:
        net.write_map(ABC[:2])
        a, b = net.start("lab-a"), net.start("lab-b")
        net.wait_for("lab-a", "Checkpointed", round=2, stage="merged")
        net.write_map(ABC)
        for life in (a, b):
            life.signal(signal.SIGHUP)
        c = net.start("lab-c", "agent.founder=false")
        (joined,) = net.wait_for("lab-c", "Joined")
        assert joined["how"] == join
        assert joined["round"] > 2
        net.until(lambda: all(net.partners(name) == set(ABC) for name in ABC), "all merge all")
        assert len({net.events(name, "Published")[-1]["basis"] for name in ABC[:2]}) == 1
        net.write_map(ABC[1:])
        for life in (b, c):
            life.signal(signal.SIGHUP)
        net.until(lambda: all(net.partners(name) == set(ABC[1:]) for name in ABC[1:]), "lab-a is left out")
        for life in (a, b, c):
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in (a, b, c)] == [143] * 3
        check_ledgers(net)


REFUSED = {
    "a folder in use": (5, "lab-a", (), ("in use", str(os.getpid()))),
    "a port in use": (3, "lab-b", ("agent.listen=127.0.0.1:{taken}",), ("cannot listen", "{taken}")),
    "no keys": (4, "lab-b", ("agent.keys=elsewhere",), ("keys", "lab-b.key")),
    "a folder of another run": (5, "lab-b", ("run=other",), ("another agent.folder", "'tiny'")),
    "no such agent": (2, "lab-x", (), ("lab-x", "did you mean")),
    "insecure in public": (4, "lab-c", ("agent.insecure=true", "agent.listen=0.0.0.0:0"), ("insecure",)),
}


@pytest.mark.parametrize(("code", "name", "sets", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run(
    tmp_path: Path, free_ports: list[int], code: int, name: str, sets: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """One line and a stable exit code for each. lab-a's folder is held by this process, lab-b's is there already."""
    with network(tmp_path, ABC, free_ports) as net, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        net.ports = {**net.ports, "lab-x": free_ports[4]}
        AgentFolder(tmp_path / "lab-b", "tiny", "lab-b").close()
        held = AgentFolder(tmp_path / "lab-a", "tiny", "lab-a")
        try:
            life = net.start(name, *(each.replace("{taken}", port) for each in sets))
            assert life.wait() == code, life.text()
        finally:
            held.close()
        last = life.text().strip().splitlines()[-1]
        assert last.startswith("dimat: "), life.text()
        assert all(word.replace("{taken}", port) in last for word in words), last


def warned(net: Network, name: str, words: str) -> list[str]:
    """Return the warnings of an agent that have these words in them."""
    return [event["message"] for event in net.events(name, "Warned") if words in event["message"]]


def test_the_same_name_twice(tmp_path: Path, free_ports: list[int]) -> None:
    """From another folder and port: nobody dials it, and the first one goes on unharmed. lab-b hears both: the younger
    one leaves, with the exit code of wrong keys, which no service manager starts again, and all are told."""
    with network(tmp_path, ABC[:2], free_ports, schedule="rounds = 0\nround_deadline_s = 600", train=SLOW) as net:
        running = net.start("lab-a")
        net.wait_for("lab-a", "AgentStarted")
        twin = net.start("lab-a", f"agent.folder={tmp_path / 'twin'}", f"agent.listen=127.0.0.1:{free_ports[5]}")
        net.until(lambda: "listens on" in twin.text(), "the twin is up")
        peer = net.start("lab-b")
        net.wait_for("lab-b", "SnapshotFetched", peer="lab-a")
        fetched = net.events("lab-b", "SnapshotFetched")[0]["snapshot"]
        assert fetched == net.events("lab-a", "Published")[0]["snapshot"]
        assert twin.wait() == 4, twin.text()
        assert twin.text().strip().splitlines()[-1].startswith("dimat: another process runs as lab-a, since ")
        for name in ABC[:2]:
            net.until(lambda name=name: warned(net, name, "two processes run as lab-a"), f"{name} is told")
        for life in (running, peer):
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in (running, peer)] == [143] * 2


def test_damaged_checkpoints(tmp_path: Path, free_ports: list[int]) -> None:
    """The newest checkpoint is damaged: the one before is used, and that is said. All are: exit 5, nothing touched."""
    with network(tmp_path, ABC[:1], free_ports, schedule="rounds = 2\nround_deadline_s = 5") as net:
        finish(net, ABC[:1])
        folder = tmp_path / "lab-a" / "checkpoints"
        files = sorted(folder.glob("*.safetensors"))
        files[-1].write_bytes(files[-1].read_bytes()[:-7] + b"damaged")
        life = net.start("lab-a", "schedule.rounds=3")
        assert life.wait() == 0, life.text()
        assert [w for w in net.events("lab-a", "Warned") if "damaged" in w["message"]]
        assert net.events("lab-a", "Resumed")[-1]["stage"] == "trained"
        check_ledgers(net)
        for file in folder.glob("*.safetensors"):
            file.write_bytes(b"nothing")
        held = sorted(path.name for path in folder.iterdir())
        life = net.start("lab-a", "schedule.rounds=4")
        assert life.wait() == 5
        assert "can be read" in life.text()
        assert sorted(path.name for path in folder.iterdir()) == held


def test_peers_that_do_not_fit(tmp_path: Path, free_ports: list[int]) -> None:
    """A peer of another run, one with another model, and one whose model has equal tensors but is wired otherwise are
    named and left out; the others go on with each other."""
    names = (*ABC, "lab-d", "lab-e")
    schedule = "rounds = 0\nround_deadline_s = 20"
    with network(tmp_path, names, free_ports, schedule=schedule, train=SLOW) as net:
        net.write_map(graph="complete")
        write_config(tmp_path / "other.toml", run="other", schedule=schedule, train=SLOW)
        (tmp_path / "wide_task.py").write_text(TINY_TASK.replace("(6, 12, 8, 4)", "(6, 13, 8, 4)"))
        numbered = TINY_TASK.replace("mlp((6, 12, 8, 4))", "Numbered(*mlp((6, 12, 8, 4)))") + NUMBERED
        (tmp_path / "numbered_task.py").write_text(numbered)
        lives = [net.start("lab-c", file="other.toml"), net.start("lab-d", "task.hook=wide_task.py:task")]
        lives += [net.start("lab-e", "task.hook=numbered_task.py:task"), net.start("lab-a"), net.start("lab-b")]
        for name, other in (ABC[:2], ABC[1::-1]):
            for stranger in names[2:]:
                net.wait_for(name, "PeerRefused", peer=stranger)
            net.until(lambda name=name: net.partners(name) == set(ABC[:2]), f"{name} merges {other}")
        for life in lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [143] * 5, "\n".join(life.text() for life in lives)
        for name in ABC[:2]:
            reasons = {event["peer"]: event["reason"] for event in net.events(name, "PeerRefused")}
            assert "run" in reasons["lab-c"]
            assert "names, shapes or types" in reasons["lab-d"]
            assert "dimat symmetry diff" in reasons["lab-e"]
            assert {len(merge["contributions"]) for merge in net.events(name, "Merged")} <= {1, 2}
