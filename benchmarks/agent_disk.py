"""What a real agent writes to its disk in a round, and how long its peers wait for that.

Two agents on loopback (mutual TLS), an MLP whose weights take 67 MB (`--quick`: 4 MB): SGD with momentum and Adam with
an fp32 exchange, and SGD with a bf16 exchange. Bytes are those that the process handed to write(2) (wchar of
/proc/self/io) in one round more, from two runs of different length; what it received from its peer is left out.
Reference: twice the model and once the state of its optimizer; where snapshots are encoded, also the encoded copy, the
own weights (no longer those that others read), and the peer's snapshot as decoded. Also: seconds from the end of
training to the offer of its snapshot, in which peers wait.

    python benchmarks/agent_disk.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from _agents import start, write_network
from _common import Result, finish, options, table

from dimat.tasks import ClassificationTask, TensorData, mlp, seeded

NAMES = ("lab-a", "lab-b")
ROUNDS = (2, 5)
WIDTH = int(os.environ.get("DIMAT_BENCH_WIDTH", "4096"))
OPTIMIZERS = {"sgd": 1, "adam": 2}
"""Tensors of the model's size in an optimizer's state."""
CASES = (("sgd", "fp32"), ("adam", "fp32"), ("sgd", "bf16"))
"""Optimizer and encoding of the exchange."""
MB = 1e6
EXPERIMENT = """
[train]
steps_per_round = 2
batch_size = 16
optimizer = {{ name = "{optimizer}", lr = 1e-3 }}
[merge]
method = "average"
[exchange]
encoding = "{encoding}"
[schedule]
rounds = {rounds}
round_deadline_s = 300
[agent]
founder = true
evaluate = "none"
"""


def task() -> ClassificationTask:
    """Random inputs with labels from a linear teacher, and a wide network."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, WIDTH, generator=generator)
    labels = (inputs @ torch.randn(WIDTH, 10, generator=generator)).argmax(1)
    data = TensorData(inputs, labels)
    return ClassificationTask(
        name="wide",
        model=seeded(lambda: mlp((WIDTH, WIDTH, 10))),
        train=data,
        test=data,
        probe=data,
        classes=tuple(map(str, range(10))),
    )


def agent(words: list[str]) -> None:
    """Run an agent in this process, and print what it has written."""
    from dimat.cli import main

    code = main(words)
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    print(json.dumps({"code": code, "wchar": int(counts["wchar"])}))


@dataclass(frozen=True)
class Run:
    """`written`, `received`: bytes of one agent; `model`: bytes of its snapshot; `waits_s`: from the end of a round's
    training to the offer of its snapshot; `round_s`: the last round."""

    written: int
    received: int
    model: int
    waits_s: list[float]
    round_s: float


def run(optimizer: str, encoding: str, rounds: int, width: int) -> Run:
    """Run the two agents to their end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = EXPERIMENT.format(optimizer=optimizer, encoding=encoding, rounds=rounds)
        file = write_network(folder, NAMES, "ring", Path(__file__), text)
        program, environment = (__file__, "--agent"), {"DIMAT_BENCH_WIDTH": str(width)}
        agents = [
            start(file, name, folder / name, program=program, environment=environment, stdout=subprocess.PIPE)
            for name in NAMES
        ]
        said = [json.loads(each.communicate()[0].splitlines()[-1]) for each in agents]
        assert [each["code"] for each in said] == [0, 0], said
        lines = (folder / NAMES[0] / "events.jsonl").read_text().splitlines()[1:]
        told = [json.loads(line) for line in lines]
    times = {(event["event"], event["round"]): event["time_s"] for event in told if "round" in event}
    return Run(
        said[0]["wchar"],
        sum(event["bytes"] for event in told if event["event"] == "SnapshotFetched"),
        next(event["bytes"] for event in told if event["event"] == "Published"),
        [times["Published", n] - times["Trained", n] for n in range(1, rounds + 1)],
        times["RoundFinished", rounds] - times["RoundStarted", rounds],
    )


def main() -> None:
    """Measure every case and print the table."""
    if sys.argv[1:2] == ["--agent"]:
        agent(sys.argv[2:])
        return
    arguments = options(__doc__ or "").parse_args()
    width = 1024 if arguments.quick else 4096
    rows: list[tuple[object, ...]] = []
    worst = 0.0
    for optimizer, encoding in CASES:
        short, long = (run(optimizer, encoding, rounds, width) for rounds in ROUNDS)
        more = ROUNDS[1] - ROUNDS[0]
        received = (long.received - short.received) / more
        written = (long.written - short.written) / more - received
        allowed = (2 + OPTIMIZERS[optimizer]) * long.model
        if encoding != "fp32":
            allowed += 2 * long.model + received  # the peer's encoded copy is as long as the own one
        worst = max(worst, written / allowed)
        waits_s = median(long.waits_s)
        rows.append((optimizer, encoding, long.model / MB, written / MB, allowed / MB, waits_s, long.round_s))
    head = ["optimizer", "exchange", "model MB", "written MB", "reference MB", "trained to offered s", "round s"]
    table(head, rows)
    # names, events and ledgers beside the numbers: 2 %, and at least what a small model's headers take
    finish(
        Result(
            "agent_disk",
            worst,
            1.0,
            worst,
            "at most 1.02 of two models, one state of the optimizer and what an encoding adds",
            worst <= 1.02,
        )
    )


if __name__ == "__main__":
    main()
