"""Members that lie, with valid keys, on the real wire, to real agents. Reference: what docs/threat-model.md says that a
member cannot do; the honest agents' own ledgers, logs and exit codes."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimat.agent.protocol.offers import ROUNDS_KEPT
from dimat.agent.protocol.plan import LAST_ROUND
from dimat.net.limits import MOST_NOTICES
from tests.agent.daemon.test_daemon import ABC, SLOW, command
from tests.agent.daemon.test_daemon_faults import WIDE, comes_in, doomed, widen
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


def test_one_that_gives_a_round_two_contents(tmp_path: Path, free_ports: list[int]) -> None:
    """Every round: told once, counted in the status that a person and a program get, merged in neither content but the
    one that it published; the honest agents merge with each other in every round."""
    schedule = "rounds = 0\nround_deadline_s = 20\njoin_wait_s = 3"
    with network(tmp_path, ABC, free_ports, schedule=schedule, train=SLOW) as net:
        lives = [net.start(name) for name in HONEST]
        net.start(EVE, driver=("tests.agent.liar", "equivocating", HONEST[0]))
        for name in HONEST:
            net.wait_for(name, "Merged", ROUNDS)
            status = json.loads(command("status", tmp_path / name, "--json"))["peers"]
            assert ROUNDS - 1 <= status[EVE]["refused_offers"] <= len(net.events(EVE, "Published"))
            assert {status[peer]["refused_offers"] for peer in HONEST if peer != name} == {0}
            assert "refused offers: " in command("status", tmp_path / name)
        for life in lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [143, 143], "\n".join(life.text() for life in lives)
        for name in HONEST:
            refused = [event["reason"] for event in net.events(name, "PeerRefused", peer=EVE)]
            assert len([reason for reason in refused if "another snapshot for round" in reason]) == 1, refused
            assert together(net, name) >= len(net.events(name, "Merged")) - 1, "the last may have been made alone"
            assert not net.events(name, "RoundsSkipped")
        check_ledgers(net, HONEST)


@pytest.mark.parametrize("claim", [ROUNDS_KEPT * 3, 1000, LAST_ROUND + 1], ids=["within", "beyond", "nobody's"])
def test_a_lone_peers_round_without_its_snapshot(tmp_path: Path, free_ports: list[int], claim: int) -> None:
    """A network of two. What the other says moves an agent by no more than a few rounds once, and by none where that
    round is beyond the schedule: the number alone, without the snapshot, which nobody can have."""
    rounds = ROUNDS_KEPT * 4
    schedule = f"rounds = {rounds}\nround_deadline_s = 0.5\njoin_wait_s = 3"
    with network(tmp_path, ABC[:2], free_ports, schedule=schedule, exchange="lost_after_s = 1") as net:
        life = net.start(ABC[0])
        net.start(ABC[1], driver=("tests.agent.liar", "ahead", str(claim)))
        net.wait_for(ABC[0], "Merged", ROUNDS_KEPT)
        if claim < rounds:
            net.wait_for(ABC[0], "RoundsSkipped")
        life.signal(signal.SIGTERM)
        assert life.wait() == 143, life.text()
        skipped = [event["round"] - event["first"] for event in net.events(ABC[0], "RoundsSkipped")]
        assert sum(skipped) <= (ROUNDS_KEPT if claim < rounds else 0)
        assert all(event["round"] < claim for event in net.events(ABC[0], "Merged"))
        refused = [event["reason"] for event in net.events(ABC[0], "PeerRefused", peer=ABC[1])]
        assert any("which nobody could offer" in reason for reason in refused) == (claim > LAST_ROUND)


def test_a_lone_peers_round_with_its_snapshot(tmp_path: Path, free_ports: list[int]) -> None:
    """Its snapshot in hand, the only neighbour is believed: the agent goes to its round, and not past the schedule."""
    rounds = ROUNDS_KEPT * 4
    schedule = f"rounds = {rounds}\nround_deadline_s = 0.5\njoin_wait_s = 3"
    with network(tmp_path, ABC[:2], free_ports, schedule=schedule, exchange="lost_after_s = 1") as net:
        life = net.start(ABC[0])
        net.start(ABC[1], driver=("tests.agent.liar", "far", str(rounds - 2)))
        assert life.wait() == 0, life.text()
        skipped = net.events(ABC[0], "RoundsSkipped")
        assert max(event["round"] - event["first"] for event in skipped) > ROUNDS_KEPT, "at once, by its snapshot"
        assert skipped[-1]["round"] == rounds - 2
        assert net.events(ABC[0], "Merged")[-1]["round"] == rounds
        assert net.events(ABC[0], "AgentLeft")[-1]["reason"] == "done"


@pytest.mark.slow
@pytest.mark.more  # 25 s of waiting; slots are fair on real transports in each run (tests/net)
def test_four_slow_neighbours_leave_room_for_a_fifth(tmp_path: Path, free_ports: list[int]) -> None:
    """A star whose middle fetches four snapshots at a time. Four neighbours send 20 kB a second, so that each snapshot
    of 1.5 MB takes longer than the deadline; the fifth begins when all four are on their way, and is merged alone."""
    middle, quick, *slow = names = ("lab-a", "lab-f", "lab-b", "lab-c", "lab-d", "lab-e")
    schedule = "rounds = 1\nround_deadline_s = 25\njoin_wait_s = 3"
    with network(tmp_path, names, free_ports, schedule=schedule, train=WIDE, merge='method = "average"') as net:
        widen(net)
        net.write_map(graph="star")
        for name in slow:
            net.start(name, "exchange.rate_limit_mb_s=0.02", "agent.linger_s=60")
        life = net.start(middle)
        net.until(lambda: all(comes_in(net, middle, name) for name in slow), "four snapshots are on their way")
        net.start(quick)
        (fetched,) = net.wait_for(middle, "SnapshotFetched", peer=quick)
        assert all(comes_in(net, middle, name) for name in slow)
        (offered,) = net.events(quick, "Published")
        assert fetched["time_s"] - offered["time_s"] < 15
        net.wait_for(middle, "Merged")
        assert net.partners(middle) == {middle, quick}
        assert life.wait() == 0, life.text()


def test_a_restart_after_a_doubtful_merge(tmp_path: Path, free_ports: list[int]) -> None:
    """One neighbour makes the last layer four times as large, which the victim's own test set likes: the merge is made,
    and doubted. Three rounds later the victim's weights are not finite when it dies. Started again, it says so, goes on
    from the checkpoint before that merge with finite weights, and publishes no round anew."""
    victim, eve = ABC[:2]
    schedule = "rounds = 0\nround_deadline_s = 20\njoin_wait_s = 3"
    train = 'epochs_per_round = 1\nbatch_size = 16\noptimizer = { name = "adam", lr = 0.003 }'
    with network(tmp_path, ABC[:2], free_ports, schedule=schedule, train=train, merge='method = "average"') as net:
        net.start(eve, driver=("tests.agent.liar", "swelling", victim))
        life = doomed(net, victim, "spoiled", 3)
        assert life.wait() == -signal.SIGKILL, life.text()
        assert [*(tmp_path / victim / "checkpoints").glob("trusted.*")]
        last = net.events(victim, "Published")[-1]["round"]
        before = len(net.events(victim))
        life = net.start(victim)
        net.until(lambda: [e for e in net.events(victim)[before:] if e["event"] == "Published"], "it publishes again")
        life.signal(signal.SIGTERM)
        assert life.wait() == 143, life.text()
        after = net.events(victim)[before:]
        spoiled, ignored, *_ = [event["message"] for event in after if event["event"] == "Warned"]
        assert f"-{last:09}-merged." in spoiled
        assert "not finite; the previous one is used" in spoiled
        assert ignored.startswith(f"all checkpoints since the doubtful merge of round {last - 3} are ignored")
        assert spoiled in life.text()
        resumed = next(event for event in after if event["event"] == "Resumed")
        assert (resumed["round"], resumed["stage"]) == (last - 3, "trained")
        assert min(event["round"] for event in after if event["event"] == "Published") > last
        weights = load_file(tmp_path / victim / "weights.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
        check_ledgers(net, [victim])
