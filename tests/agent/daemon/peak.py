"""Memory of an agent's rounds: `python -m tests.agent.daemon.peak FOLDER WIDTH PEERS ROUNDS key=value …`.

One learner does what the daemon has it do: it takes up the newest checkpoint, where there is one, or else goes through
rounds, with snapshots of peers that were recorded before. Prints JSON: the estimate, bytes of the model, the process's
peak of resident memory beyond what it had before there was a model (VmHWM of /proc/self/status), and its anonymous
memory at each round's end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dimat.agent.daemon.mid_round import MidRound
from dimat.agent.daemon.resources import peak_bytes, state_share
from dimat.agent.daemon.worker import AgentWorker
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.learner.learner import Learner
from dimat.agent.lineage.compaction import Compaction
from dimat.agent.lineage.manifest_log import LEDGER_BYTES, ManifestLedger
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.net.grpc_transport import keep_freed
from dimat.tasks import ClassificationTask, TensorData, mlp, seeded
from dimat.train.trainer import Trainer
from dimat.weights.tensors import encode, record_tensors
from tests.simulate.helpers import tiny_experiment


def wide(width: int) -> ClassificationTask:
    """Few examples, and a network whose largest tensor is a fifth of it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, width, generator=generator)
    data = TensorData(inputs, torch.randint(0, 10, (64,), generator=generator))
    model = seeded(lambda: mlp((*[width] * 6, 10)))
    return ClassificationTask("wide", model, data, data, data, tuple("0123456789"))


def resident(what: str) -> int:
    """Return a line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main(folder: Path, width: int, peers: int, rounds: int, *optimizer: str) -> None:
    """Do rounds and print what they took."""
    keep_freed()  # as the daemon does
    settings = dict(pair.split("=") for pair in optimizer)
    train = {"steps_per_round": 2, "batch_size": 8, "optimizer": {"lr": 0.001, **settings}}
    config = tiny_experiment(folder, train=train, merge={"method": "average"})
    for name in ("snapshots", "peers"):
        (folder / name).mkdir(exist_ok=True)
    small = wide(8)
    warm = Trainer(small, small.data("train"), config.train, seed=0)  # what torch loads when it first trains
    warm.train(1)
    encode(warm.weights())
    before = resident("VmRSS")
    task = wide(width)
    learner = Learner("a", config, task, torch.arange(64), folder / "snapshots", None, durable=False)
    store = CheckpointStore(folder / "checkpoints", elsewhere=(folder / "snapshots",), durable=False)
    lineage = folder / "lineage.jsonl"
    middle = MidRound(learner, store, None, print)
    compaction = Compaction("a", lineage, ManifestLedger(folder / "manifests.jsonl"), LEDGER_BYTES)
    work = AgentWorker(learner, "tiny", store, lineage, "all", folder / "weights.safetensors", middle, compaction)
    held = learner.trainer.model.state_dict()
    size = sum(tensor.nbytes for tensor in held.values())
    state = int(state_share(learner.trainer.optimizer) * size)
    estimate = peak_bytes(learner.trainer.model, state, peers)
    held = [] if work.restore()() is not None else _rounds(learner, work, folder, peers, rounds)
    print(json.dumps({"estimate": estimate, "model": size, "peak": resident("VmHWM") - before, "anonymous": held}))


def _rounds(learner: Learner, work: AgentWorker, folder: Path, peers: int, rounds: int) -> list[int]:
    held = learner.trainer.model.state_dict()
    moved = [{name: tensor * (1 - i / 100) for name, tensor in held.items()} for i in range(1)]
    others = [record_tensors(folder / "peers", weights, durable=False).root for weights in moved] * peers
    del moved
    share = 1 / (1 + peers)
    anonymous: list[int] = []
    for number in range(1, rounds + 1):
        work.train(m.Train(number, True))()
        recorded = work.record(m.Train(number, True))()
        state = MachineState("tiny", "a", number, "trained", BasisId(0, "a", "00"), root=recorded.payload.root)
        work.checkpoint(m.CheckpointAction(number, "trained", state))()
        parts = tuple(m.MergePart(f"p{i}", number, root, share, True) for i, root in enumerate(others))
        files = {part.peer: folder / "peers" / f"{part.root}.safetensors" for part in parts}
        result = work.merge(m.MergeAction(number, share, parts), files)()
        assert not result.refused, result
        work.checkpoint(m.CheckpointAction(number, "merged", replace(state, stage="merged")))()
        work.save_weights()()
        for file in (folder / "snapshots").glob("*"):  # as the store lets go of them
            if file.stem != recorded.payload.root:
                file.unlink()
        anonymous.append(resident("RssAnon"))
    return anonymous


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
