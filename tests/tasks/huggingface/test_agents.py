"""LoRA between two real agents: processes, gRPC, mutual TLS, checkpoints. References: the files that they leave, the
best approximation of the mean product, and the check of a merge computed anew."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat.agent.learner.checkpoint import read_checkpoint
from dimat.agent.lineage.manifest_log import read_line
from dimat.agent.lineage.verify import verify_ledger
from dimat.agent.protocol.messages import MergeRecord
from dimat.config import load_experiment
from dimat.merge.lora.factors import find_pairs
from dimat.tasks import load_task
from dimat.train import Trainer
from dimat.weights.tensors import encode, schema_hash
from dimat.wire.v1 import peer_pb2 as pb
from tests.agent.conftest import free_ports  # noqa: F401  # a fixture
from tests.agent.processes import Network, check_ledgers, network
from tests.tasks.huggingface.samples import write_text

pytestmark = pytest.mark.live

PAIR = ("lab-a", "lab-b")
RANK = 2
TABLES = {
    "task": 'name = "hf-causal-lm"\npartition = { kind = "iid" }',
    "task.options": """
data = { name = "text.txt", tokenizer = "bytes", max_length = 32 }
probe = { count = 8 }

[task.options.model]
config = { model_type = "gpt2", n_embd = 64, n_layer = 2, n_head = 4, n_positions = 64 }
lora = { r = 2, targets = "all-linear" }
""",
    "train": 'steps_per_round = 10\nbatch_size = 8\noptimizer = { name = "adam", lr = 0.01 }',
    "merge": 'method = "average"\naccept = { name = "no-worse", options = { on = "probe", tolerance = 0.0 } }',
    "schedule": "rounds = 0\nround_deadline_s = 600",
    "exchange": "lost_after_s = 600",  # each waits for the other, however long it takes to load its libraries
    "agent": "founder = true\nkeep_checkpoints = 1000\nkeep_snapshots = 1000",
}
# lab-b learns in strides that spoil what it knows, and takes every merge; lab-a keeps those that serve
LAX = ("train.optimizer.lr=0.05", "merge.accept.options.tolerance=1.0")


class Left:
    """What an agent has left on disk, by round."""

    def __init__(self, net: Network, name: str) -> None:
        self.folder = net.folder / name
        self.records = {record["round"]: record for record in net.records(name)}
        self.published = {event["round"]: event for event in net.events(name, "Published")}
        self.fetched = net.events(name, "SnapshotFetched")

    def snapshot(self, number: int) -> dict[str, Tensor]:
        """What was published for a round."""
        return load_file(self.folder / "snapshots" / f"{self.published[number]['snapshot']}.safetensors")

    def checkpoint(self, number: int, stage: str) -> dict[str, dict[str, Tensor]]:
        """The trainer's tensors in a checkpoint: "model", "optimizer" and "rng"."""
        (file,) = self.folder.glob(f"checkpoints/*-{number:09d}-{stage}.*")
        held: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
        for name, tensor in read_checkpoint(file).trainer.tensors.items():
            kind, rest = name.split("/", 1)
            held[kind][rest] = tensor
        return held


def products(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {pair.key: weights[pair.b].double() @ weights[pair.a].double() for pair in find_pairs(weights)}


def best(matrix: Tensor) -> Tensor:
    """The closest matrix of rank `RANK` in the Frobenius norm (Eckart and Young)."""
    u, sigma, v = torch.linalg.svd(matrix)
    return (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]


def test_two_agents_exchange_adapters(tmp_path: Path, free_ports: list[int]) -> None:  # noqa: F811
    """One is killed with -9 on its way and goes on. On the wire are adapters and nothing else; merges are of products,
    and kept where the check says so; checkpoints hold adapters and their moments."""
    write_text(tmp_path / "text.txt", 200)
    with network(tmp_path, PAIR, free_ports, loads=("tests.tasks.huggingface.loaded",), **TABLES) as net:
        net.write_map(graph="complete")
        doomed, other = net.start("lab-a"), net.start("lab-b", *LAX)
        config = load_experiment(tmp_path / "agents.toml")
        task = load_task(config.task, tmp_path)
        judge = Trainer(task, task.data("train"), config.train, seed=0)
        net.wait_for("lab-a", "Checkpointed", round=3, stage="trained")
        doomed.signal(signal.SIGKILL)
        assert doomed.wait() == -signal.SIGKILL
        told = len(net.events("lab-a"))
        left = net.events("lab-a", "Checkpointed")[-1]
        again = net.start("lab-a")
        (resumed,) = net.wait_for("lab-a", "Resumed")
        assert (resumed["round"], resumed["stage"]) == (left["round"], left["stage"])
        net.until(lambda: net.events("lab-a", "Merged", round=left["round"] + 2), "lab-a merges on")
        for life in (again, other):
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in (again, other)] == [143, 143], again.text() + other.text()
        assert {event["heard"] for name in PAIR for event in net.events(name, "Merged")} == {1}
        check_ledgers(net)
        a, b = (Left(net, name) for name in PAIR)
        for event in net.events("lab-a")[told:]:  # the network kept what the first life had published
            if event["event"] == "Published" and event["round"] == left["round"] and left["stage"] == "trained":
                assert event["snapshot"] == net.events("lab-a", "Published", round=left["round"])[0]["snapshot"]

    model = judge.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    for mine, peer in ((a, b), (b, a)):
        check_wire(mine, peer, tmp_path / "keys", trained, base)
        check_merges(mine, peer)
    for number, record in a.records.items():
        before, after = (judge.evaluate(task.data("probe"), w) for w in (a.snapshot(number), merged(a, number)))
        assert after[task.metric] >= before[task.metric]
        whole = judge.evaluate(task.data("probe"), mean(a, b, number, before=a.snapshot(number)))
        assert (record["accepted"] == 1) == (whole[task.metric] >= before[task.metric])
    assert {record["accepted"] for record in b.records.values()} == {1}


def check_wire(mine: Left, peer: Left, keys: Path, trained: set[str], base: int) -> None:
    """Check what came from the peer: snapshots of adapters alone, signed as such, a small part of the base's bytes."""
    ledger = mine.folder / "manifests.jsonl"
    checked = verify_ledger(ledger, keys, [MergeRecord.from_dict(record) for record in mine.records.values()])
    assert checked.faults == ()
    assert checked.checked >= len(mine.records)
    for number, line in enumerate(ledger.read_text().splitlines(), 1):
        if not line or number in checked.torn:  # what a kill has left
            continue
        said = pb.Manifest.FromString(read_line(line).manifest)
        adapters = peer.snapshot(said.round)
        assert set(adapters) == trained
        assert said.schema == schema_hash(adapters)
        assert said.payload.bytes == len(encode(adapters))
    crossed: Counter[str] = Counter()
    for event in mine.fetched:
        crossed[event["snapshot"]] += event["bytes"]  # what a life holds is not sent to the next one again
    for size in crossed.values():
        assert size == len(encode(peer.snapshot(1)))
        assert size < base / 15


def merged(mine: Left, number: int) -> dict[str, Tensor]:
    return mine.checkpoint(number, "merged")["model"]


def mean(mine: Left, peer: Left, number: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The merge by definition, as factors under the names of `before`."""
    ours, theirs = products(before), products(peer.snapshot(number))
    found: dict[str, Tensor] = {}
    for pair in find_pairs(before):
        u, sigma, v = torch.linalg.svd((ours[pair.key] + theirs[pair.key]) / 2)
        found[pair.a], found[pair.b] = v[:RANK].float(), (u[:, :RANK] * sigma[:RANK]).float()
    return found


def check_merges(mine: Left, peer: Left) -> None:
    """Check every merge against what it was made of, and what its checkpoints hold."""
    for number, record in mine.records.items():
        before, after = mine.checkpoint(number, "trained"), mine.checkpoint(number, "merged")
        sent = mine.snapshot(number)
        assert all(torch.equal(before["model"][name], tensor) for name, tensor in sent.items())
        assert set(before["model"]) == set(sent) == {name.rpartition("/")[0] for name in before["optimizer"]}
        assert {name.rpartition("/")[2] for name in before["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
        assert {int(t) for name, t in before["optimizer"].items() if name.endswith("/step")} == {10 * number}
        if record["accepted"] == 0:
            assert all(torch.equal(after["model"][name], tensor) for name, tensor in sent.items())
        if (
            record["accepted"] == 1 and not record["refused"]
        ):  # in its strides lab-b may outgrow what lab-a's screen takes
            ours, theirs, found = (products(w) for w in (sent, peer.snapshot(number), after["model"]))
            for key, product in found.items():
                torch.testing.assert_close(product, best((ours[key] + theirs[key]) / 2), atol=1e-6, rtol=1e-4)
