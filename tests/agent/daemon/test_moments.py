"""Real agents that merge their optimizers' moments. Reference: the simulator with the same seeds, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimat import run_simulation
from dimat.config import load_experiment
from tests.agent.processes import check_ledgers, network
from tests.simulate.helpers import TINY_TASK

pytestmark = pytest.mark.live

ABC = ("lab-a", "lab-b", "lab-c")
ROUNDS = 30
TRAIN = """
epochs_per_round = 1
batch_size = 16
initialisation = "shared"
optimizer = { name = "adam", lr = 0.01 }
optimizer_state = "merged"
device = "cpu"
"""


def test_real_agents_end_where_the_simulator_does(tmp_path: Path, free_ports: list[int]) -> None:
    """Three agents, one of which is killed (-9) on the way and goes on from its checkpoint: final weights are the
    simulator's to the bit, moments in 8 bits; what is published again has the content it had."""
    tables = {"merge": 'method = "average"', "schedule": f"rounds = {ROUNDS}\nround_deadline_s = 120"}
    with network(tmp_path, ABC, free_ports, train=TRAIN, **tables) as net:
        (tmp_path / "tiny_task.py").write_text(TINY_TASK.replace("12, 8", "64, 32"))
        lives = {name: net.start(name) for name in ABC}
        net.wait_for("lab-b", "Checkpointed", round=2)
        lives["lab-b"].process.kill()
        lives["lab-b"].wait()
        lives["lab-b"] = net.start("lab-b")
        assert [life.wait() for life in lives.values()] == [0, 0, 0], "\n".join(v.text() for v in lives.values())
        assert len(net.events("lab-b", "Resumed")) == 1
        assert not any(net.events(name, kind) for name in ABC for kind in ("Warned", "PeerRefused"))
        assert all(net.events(name, "Merged")[-1]["heard"] == 2 for name in ABC)
        check_ledgers(net)
        final = {name: load_file(tmp_path / name / "weights.safetensors") for name in ABC}
        sent = {event["bytes"] for name in ABC for event in net.events(name, "Published")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the agents have: more add up in another order
    try:
        results = run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)), out=tmp_path / "s")
    finally:
        torch.set_num_threads(threads)
    assert sent == {results.snapshot_bytes}
    for name, weights in final.items():
        simulated = load_file(tmp_path / "s" / "final" / f"{name}.safetensors")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in simulated.items())
