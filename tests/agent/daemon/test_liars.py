"""Members that lie, with valid keys, on the real wire, to real agents. Reference: what docs/threat-model.md says that a
member cannot do; the honest agents' own ledgers, logs and exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimat.agent.protocol.offers import ROUNDS_KEPT
from dimat.net.limits import MOST_NOTICES
from tests.agent.daemon.test_daemon import ABC, command
from tests.agent.processes import Network, check_ledgers, network

pytestmark = pytest.mark.live

HONEST, EVE = ABC[:2], ABC[2]
ROUNDS = 8
SCHEDULE = f"rounds = {ROUNDS}\nround_deadline_s = 20\njoin_wait_s = 3"


def run(net: Network, attack: str) -> None:
    """Let one agent lie to two others until these are through."""
    lives = [net.start(name) for name in HONEST]
    net.start(EVE, driver=("tests.agent.liar", attack, HONEST[0]))
    assert [life.wait() for life in lives] == [0, 0], "\n".join(life.text() for life in lives)


def together(net: Network, name: str) -> int:
    """Return in how many rounds an honest agent has merged with the other one."""
    return sum(
        set(HONEST) <= {part["agent"] for part in merge["contributions"]} for merge in net.events(name, "Merged")
    )


@pytest.mark.parametrize("method", ["average", "dimat"])
def test_one_that_makes_weights_grow(tmp_path: Path, free_ports: list[int], method: str) -> None:
    """It keeps just within the bound by its victim's own norm, every round: it is refused, the others learn the task in
    all rounds but one at most, and their weights are no larger than training makes them."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, merge=f'method = "{method}"') as net:
        run(net, "growing")
        for name in HONEST:
            refused = net.events(name, "PeerRefused", peer=EVE)
            assert len(refused) >= ROUNDS - 2
            assert all("larg" in event["reason"] for event in refused)
            assert together(net, name) >= ROUNDS - 1
            merges = net.events(name, "Merged")
            assert merges[-1]["after"]["accuracy"] > 0.6
            weights = load_file(tmp_path / name / "weights.safetensors")
            norm = math.hypot(*(float(t.double().norm()) for t in weights.values() if t.is_floating_point()))
            assert all(bool(torch.isfinite(t).all()) for t in weights.values())
            assert norm < 30, "three times what this task's training makes"
        check_ledgers(net, HONEST)


def test_one_that_bends_its_tensors(tmp_path: Path, free_ports: list[int]) -> None:
    """Another type, shape or size of one tensor, NaN, the largest numbers: refused each time with the tensor's name,
    and the honest agents merge with each other as if it were not there."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, merge='method = "average"') as net:
        run(net, "bending")
        for name in HONEST:
            refused = [event["reason"] for event in net.events(name, "PeerRefused", peer=EVE)]
            assert len(refused) >= ROUNDS - 1
            assert all(reason.startswith(f"{EVE}: tensor '") for reason in refused), refused
            assert together(net, name) == ROUNDS
            assert net.events(name, "Merged")[-1]["after"]["accuracy"] > 0.6
        check_ledgers(net, HONEST)


def test_one_that_copies_another_agent(tmp_path: Path, free_ports: list[int]) -> None:
    """Its weights are the victim's, under its own name and signature: they count as a neighbour's by its own mixing
    weight, and the ledgers say whose name they came under; nobody's snapshot is merged twice in a round."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, merge='method = "average"') as net:
        run(net, "copying")
        for name in HONEST:
            assert together(net, name) == ROUNDS
            for merge in net.events(name, "Merged"):
                parts = {part["agent"]: part["weight"] for part in merge["contributions"]}
                assert len(parts) == len(merge["contributions"])
                assert parts.get(EVE, 1 / 3) == pytest.approx(1 / 3)
        check_ledgers(net, HONEST)


def test_one_that_lies_in_its_manifests(tmp_path: Path, free_ports: list[int]) -> None:
    """Two contents of a round, rounds beyond all bounds, thousands of parents, forty faults at once, every round: told
    a few times, kept in no ledger; nobody ends early, waits or loses more than a round, and only members are shown."""
    # rounds that take a while: the status is asked for in the middle of the run
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train="epochs_per_round = 20\nbatch_size = 8") as net:
        lives = [net.start(name) for name in HONEST]
        net.start(EVE, driver=("tests.agent.liar", "lying", HONEST[0]))
        net.wait_for(HONEST[0], "Merged", 2)
        status = json.loads(command("status", tmp_path / HONEST[0], "--json"))
        assert set(status["peers"]) <= set(ABC)
        assert "stranger-" not in json.dumps(status)
        assert str(tmp_path) not in json.dumps({k: v for k, v in status.items() if k != "folder"})
        assert [life.wait() for life in lives] == [0, 0], "\n".join(life.text() for life in lives)
        for name in HONEST:
            conflicts = [
                event for event in net.events(name, "PeerRefused", peer=EVE) if "another snapshot" in event["reason"]
            ]
            assert len(conflicts) == 1, "an equivocator is told once"
            told = [
                event
                for event in net.events(name)
                if EVE in json.dumps(event) and event["event"] in ("Warned", "PeerRefused")
            ]
            assert len(told) <= MOST_NOTICES + 4
            assert together(net, name) >= ROUNDS - 1 - sum(
                e["round"] - e["first"] for e in net.events(name, "RoundsSkipped")
            )
            assert sum(e["round"] - e["first"] for e in net.events(name, "RoundsSkipped")) <= ROUNDS_KEPT
            assert net.events(name, "AgentLeft")[-1]["reason"] == "done"
            assert (tmp_path / name / "manifests.jsonl").stat().st_size < 100_000
            assert "stranger-" not in (tmp_path / name / "manifests.jsonl").read_text()
            assert "stranger-" not in (tmp_path / name / "lineage.jsonl").read_text()
