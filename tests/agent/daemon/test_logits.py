"""Real agents with unlike models, which exchange logits. Reference: the simulator with the same seeds, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimat import run_simulation
from dimat.config import load_experiment
from dimat.merge.shared_logits import LogitLayout
from dimat.weights.tensors import encode
from tests.agent.processes import check_ledgers, network
from tests.tasks.huggingface.samples import sentences, write_byte_pairs

pytestmark = pytest.mark.live

AB = ("lab-a", "lab-b")
ROUNDS = 12
TABLES = {
    "task": (
        'name = "digits"\noptions = { probe = 120, width = 24 }\npartition = { kind = "dirichlet" }\n'
        '[[task.models]]\nagents = ["lab-b"]\noptions = { model = "mlp" }'
    ),
    "train": 'epochs_per_round = 1\ndevice = "cpu"',
    "merge": 'method = "distil"\ncombine = { name = "distil", options = { steps = 20, keep = 4 } }',
    "schedule": f"rounds = {ROUNDS}\nround_deadline_s = 120",
}


def test_unlike_real_agents_end_where_the_simulator_does(tmp_path: Path, free_ports: list[int]) -> None:
    """A CNN and an MLP, one of which is killed (-9) on the way and goes on from its checkpoint: final weights are the
    simulator's to the bit; what was sent are logits alone."""
    with network(tmp_path, AB, free_ports, **TABLES) as net:
        lives = {name: net.start(name) for name in AB}
        net.wait_for("lab-b", "Checkpointed", round=2)
        lives["lab-b"].process.kill()
        lives["lab-b"].wait()
        lives["lab-b"] = net.start("lab-b")
        assert [life.wait() for life in lives.values()] == [0, 0], "\n".join(v.text() for v in lives.values())
        assert len(net.events("lab-b", "Resumed")) == 1
        assert not any(net.events(name, "PeerRefused") for name in AB)
        assert all(net.events(name, "Merged")[-1]["heard"] == 1 for name in AB)
        check_ledgers(net)
        final = {name: load_file(tmp_path / name / "weights.safetensors") for name in AB}
        sent = {event["bytes"] for name in AB for event in net.events(name, "Published")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the agents have: more add up in another order
    try:
        results = run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)), out=tmp_path / "s")
    finally:
        torch.set_num_threads(threads)
    assert sent == {results.snapshot_bytes} == {len(encode(LogitLayout(120, 10, keep=4).sample()))}
    assert final["lab-a"].keys() != final["lab-b"].keys()
    for name, weights in final.items():
        simulated = load_file(tmp_path / "s" / "final" / f"{name}.safetensors")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in simulated.items())


TOKENS = {
    "task": """name = "hf-causal-lm"
partition = { kind = "iid" }
[task.options]
data = { name = "text.txt", test = "test.txt", tokenizer = "bytes", max_length = 48 }
model = { config = { model_type = "gpt2", n_embd = 32, n_layer = 1, n_head = 4, n_positions = 64 } }
probe = { name = "public.txt", count = 10000 }
[[task.models]]
agents = ["lab-b"]
options = { data = { tokenizer = "pairs", max_length = 24 } }
""",
    "train": 'steps_per_round = 10\nbatch_size = 8\ndevice = "cpu"',
    "merge": 'method = "distil"\ncombine = { name = "distil", options = { steps = 10 } }',
    "schedule": "rounds = 3\nround_deadline_s = 120",
}


def test_unlike_tokenizers_end_where_the_simulator_does(tmp_path: Path, free_ports: list[int]) -> None:
    """A model of bytes and one of byte pairs, each a real agent with half of a text: final weights are the simulator's
    to the bit, each has heard the other in every round, and nobody was refused."""
    for name, texts in (("text", sentences(60)), ("test", sentences(10, seed=5)), ("public", sentences(15, seed=9))):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    write_byte_pairs(tmp_path / "pairs", sentences(60))
    with network(tmp_path, AB, free_ports, **TOKENS) as net:
        lives = [net.start(name) for name in AB]
        assert [life.wait() for life in lives] == [0, 0], "\n".join(life.text() for life in lives)
        assert not any(net.events(name, "PeerRefused") for name in AB)
        assert all([event["heard"] for event in net.events(name, "Merged")] == [1, 1, 1] for name in AB)
        final = {name: load_file(tmp_path / name / "weights.safetensors") for name in AB}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_simulation(load_experiment(tmp_path / "agents.toml", ("simulate.workers=1",)), out=tmp_path / "s")
    finally:
        torch.set_num_threads(threads)
    assert len(final["lab-a"]["transformer.wte.weight"]) == 257 < len(final["lab-b"]["transformer.wte.weight"])
    for name, weights in final.items():
        simulated = load_file(tmp_path / "s" / "final" / f"{name}.safetensors")
        assert simulated.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in simulated.items())
