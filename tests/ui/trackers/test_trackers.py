"""Experiment trackers, offline. Reference: what TensorBoard, W&B and MLflow themselves read back from what was written,
against the events handed in; and that a tracker which fails never reaches who emits."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dimat import events
from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError
from dimat.ui import listeners as module
from dimat.ui.listeners import open_listeners
from dimat.ui.trackers.tracker import QUEUED, MetricRow, RowReader, RunEnded, TrackedRun, Tracker, need
from tests.agent.processes import PATIENCE_S, ROOT

ROUNDS = 3
ACCURACY = "accuracy"


def config(folder: Path, **monitor: Any) -> ExperimentConfig:
    """Return an experiment's configuration that is watched."""
    return build(ExperimentConfig, {"run": "r", "folder": str(folder), "monitor": monitor}, "test")


def a_round(agent: str, number: int, at: float) -> list[events.Event]:
    """Return the events of a round whose numbers follow from it."""
    who: dict[str, Any] = {"run": "r", "agent": agent, "round": number, "time_s": at}
    return [
        events.RoundStarted(**who),
        events.Trained(result=events.TrainResult(loss=1 / number, samples=10 * number), train_s=2.0, **who),
        events.PhaseStarted(phase="merge", previous="wait", previous_s=0.25, **who),
        events.Merged(
            contributions=(),
            result=events.MergeResult(
                before={ACCURACY: 0.25}, after={ACCURACY: 0.5}, accepted=0.75, cpu_s={"merge": 0.5}
            ),
            **who,
        ),
        events.RoundFinished(
            heard=1,
            expected=2,
            bytes_sent=100 * number,
            bytes_received=7,
            loss=1 / number,
            samples=10 * number,
            contributions=(events.Contribution(agent=agent, snapshot="s", round=number, weight=1.0),),
            before={ACCURACY: 0.25},
            after={ACCURACY: 0.5},
            accepted=0.75,
            seconds={"train": 2.0, "wait": 0.25, "merge": 0.5},
            **who,
        ),
    ]


def an_agent(first: int = 1, last: int = ROUNDS) -> list[events.Event]:
    """Return the events of a real agent's life."""
    who: dict[str, Any] = {"run": "r", "agent": "lab-a", "time_s": 1_700_000_000.0 + first}
    begun = events.AgentStarted(
        round=first - 1,
        address="127.0.0.1:1",
        peers=("b",),
        samples=10,
        parameters=5,
        secure=True,
        rounds=ROUNDS,
        **who,
    )
    rounds = [event for number in range(first, last + 1) for event in a_round("lab-a", number, who["time_s"] + number)]
    return [begun, *rounds, events.AgentLeft(round=last, reason="done", **who)]


def a_simulation(agents: Sequence[str] = ("agent-0", "agent-1")) -> list[events.Event]:
    """Return the events of a simulated run."""
    begun = events.RunStarted(
        run="r", method="dimat", seed=3, agents=tuple(agents), edges=(), rounds=ROUNDS, parameters=5, snapshot_bytes=20
    )
    told: list[events.Event] = [begun]
    for number in range(1, ROUNDS + 1):
        for agent in agents:
            told += a_round(agent, number, float(number))
        told.append(
            events.RoundSummary(
                run="r", time_s=float(number), round=number, rounds=ROUNDS, loss=0.5, before_mean=None, after_mean=0.5,
                after_min=0.4, after_max=0.6, consensus_distance=0.1, bases=1, heard=2, expected=2, mb_sent=1.5,
            )
        )  # fmt: skip
    told += [events.AgentLeft(run="r", agent=agent, round=ROUNDS, reason="done") for agent in agents]
    return [*told, events.RunFinished(run="r", reason="done", rounds_done=ROUNDS, wall_s=1.0)]


def watch(settings: ExperimentConfig, folder: Path, events: Sequence[events.Event], agent: str = "") -> list[str]:
    """Let the configuration's listeners watch; return what they warn of."""
    warned: list[str] = []
    with open_listeners(settings, folder, agent=agent) as watching:
        watching.warned.append(lambda event: warned.append(getattr(event, "message")))  # noqa: B009
        for event in events:
            for listener in watching.listeners:
                listener(event)
    return warned


EXPECTED = {
    "loss": [1.0, 1 / 2, 1 / 3],
    "samples": [10, 20, 30],
    "accuracy/before": [0.25] * 3,
    "accuracy/after": [0.5] * 3,
    "accepted_share": [0.75] * 3,
    "bytes/sent": [100, 200, 300],
    "bytes/received": [7] * 3,
    "seconds/train": [2.0] * 3,
    "seconds/wait": [0.25] * 3,
    "seconds/merge": [0.5] * 3,
    "peers/heard": [1] * 3,
    "peers/expected": [2] * 3,
}


# ── TensorBoard ──────────────────────────────────────────────────────────────────────────────────────────────
def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard reads: by tag, values by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: {point.step: point.value for point in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_tensorboard_of_an_agent(tmp_path: Path) -> None:
    """All numbers of all rounds; a second life that does rounds anew takes the place of the first one's."""
    settings = config(tmp_path, tensorboard=True)
    assert watch(settings, tmp_path / "lab-a", an_agent(), "lab-a") == []
    folder = tmp_path / "lab-a" / "tensorboard" / "lab-a"
    found = scalars(folder)
    assert set(found) == set(EXPECTED)
    for tag, values in EXPECTED.items():
        assert found[tag] == pytest.approx(dict(enumerate(values, 1)))
    assert watch(settings, tmp_path / "lab-a", an_agent(first=2, last=2), "lab-a") == []
    assert len(list(folder.iterdir())) == 2
    assert sorted(scalars(folder)["loss"]) == [1, 2]


def test_tensorboard_of_a_simulation(tmp_path: Path) -> None:
    """A folder per agent and one over all, below a folder that several runs may share."""
    settings = config(tmp_path, tensorboard="shared")
    assert watch(settings, tmp_path / "run", a_simulation()) == []
    base = tmp_path / "shared" / "r"
    assert {path.name for path in base.iterdir()} == {"agent-0", "agent-1", "all agents"}
    assert scalars(base / "agent-1")["bytes/sent"] == {1: 100, 2: 200, 3: 300}
    over_all = scalars(base / "all agents")
    assert over_all["accuracy/after_max"] == pytest.approx(dict.fromkeys((1, 2, 3), 0.6))
    assert "accuracy/before_mean" not in over_all
    assert over_all["bytes/sent_total"] == dict.fromkeys((1, 2, 3), 1.5e6)


# ── W&B ──────────────────────────────────────────────────────────────────────────────────────────────────────
def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; pieces with
    CRC, length and type: 1 whole, 2 first, 3 middle, 4 last)."""
    assert data.startswith(b":W&B")
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def wandb_runs(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, float]], dict[str, str]]]:
    """Return what lies in W&B's offline runs: the run, its rows, and its summary as JSON by key."""
    from wandb.proto import wandb_internal_pb2 as pb

    runs: list[tuple[dict[str, Any], list[dict[str, float]], dict[str, str]]] = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        told: dict[str, Any] = {}
        rows: list[dict[str, float]] = []
        summary: dict[str, str] = {}
        for data in wandb_records(file.read_bytes()):
            record = pb.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                told |= {"project": record.run.project, "group": record.run.run_group, "name": record.run.display_name}
                told |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
            elif kind == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if key == "_step" or key[0] != "_"})
            elif kind == "summary":
                summary |= {item.key: item.value_json for item in record.summary.update}
            elif kind == "exit":
                told["exit"] = record.exit.exit_code
        runs.append((told, rows, summary))
    return runs


def wandb_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, str]]:
    """Return the one run that lies in a folder, once W&B's own process has written it to its end, which it does after
    it has said that it has."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        runs = wandb_runs(folder)
        if len(runs) == 1 and "exit" in runs[0][0]:
            return runs[0]
        assert time.monotonic() < ends, runs
        time.sleep(0.1)


def test_wandb_of_an_agent(tmp_path: Path) -> None:
    """One offline run, named after the agent and grouped by the network's run, with a row a round."""
    settings = config(tmp_path, wandb={"project": "labs", "mode": "offline"})
    assert watch(settings, tmp_path / "lab-a", an_agent(), "lab-a") == []
    told, rows, summary = wandb_run(tmp_path / "lab-a")
    assert told | {"project": "labs", "group": "r", "name": "lab-a", "exit": 0} == told
    assert told["parameters"] == 5
    assert [row["_step"] for row in rows] == [1, 2, 3]
    for key, values in EXPECTED.items():
        assert [row[key] for row in rows] == pytest.approx(values)
    assert summary["reason"] == '"done"'


def test_wandb_of_a_simulation(tmp_path: Path) -> None:
    """One run, each agent's numbers under its name; with many agents what is over all of them alone."""
    settings = config(tmp_path, wandb={})
    assert watch(settings, tmp_path / "few", a_simulation()) == []
    told, rows, _ = wandb_run(tmp_path / "few")
    assert told["name"] == "r"
    assert [row["agent-1/loss"] for row in rows] == pytest.approx(EXPECTED["loss"])
    assert [row["accuracy/after_min"] for row in rows] == pytest.approx([0.4] * 3)
    assert watch(settings, tmp_path / "many", a_simulation([f"agent-{i}" for i in range(40)])) == []
    _, rows, _ = wandb_run(tmp_path / "many")
    assert len(rows) == ROUNDS
    assert not any(key.startswith("agent-") for key in rows[0])


def test_wandb_without_a_key(tmp_path: Path) -> None:
    """Online without a key is said in one line before anything begins, and nothing asks on the terminal."""
    code = (
        "from pathlib import Path; from dimat.config import load_experiment\n"
        "from dimat.ui.listeners import open_listeners\n"
        f"open_listeners(load_experiment({str(tmp_path / 'x.toml')!r}), Path({str(tmp_path)!r}))"
    )
    (tmp_path / "x.toml").write_text('[monitor.wandb]\nmode = "online"\n')
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=home, capture_output=True, text=True)
    assert "ConfigError" in done.stderr
    assert "run `wandb login`" in done.stderr


# ── MLflow ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_mlflow_of_an_agent_and_a_simulation(tmp_path: Path) -> None:
    """A run per agent with a step per round; a simulated run's are below a parent, which has what is over all."""
    from mlflow import MlflowClient

    settings = config(tmp_path, mlflow={"tracking": "store", "experiment": "labs"})
    assert watch(settings, tmp_path / "lab-a", an_agent(), "lab-a") == []
    client = MlflowClient(tracking_uri=str(tmp_path / "store"))
    experiment = client.get_experiment_by_name("labs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["dimat.run"]) == ("lab-a", "FINISHED", "r")
    assert run.data.params["samples"] == "10"
    for key, values in EXPECTED.items():
        history = client.get_metric_history(run.info.run_id, key)
        assert {point.step: point.value for point in history} == pytest.approx(dict(enumerate(values, 1)))
    assert watch(settings, tmp_path / "run", a_simulation()) == []
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"lab-a", "r", "agent-0", "agent-1"}
    assert runs["agent-0"].data.tags["mlflow.parentRunId"] == runs["r"].info.run_id
    assert runs["r"].data.metrics["accuracy/after_max"] == pytest.approx(0.6)
    assert {found.info.status for found in runs.values()} == {"FINISHED"}


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────
class Faulty:
    """Fails at its second row."""

    def __init__(self) -> None:
        self.rows = 0

    def start(self, started: TrackedRun) -> None:
        pass

    def log(self, row: MetricRow) -> None:
        self.rows += 1
        if self.rows == 2:
            raise OSError(28, "No space left on device")

    def end(self, reason: str) -> None:
        raise AssertionError("it is off")


def test_a_tracker_that_fails_is_switched_off() -> None:
    """One warning, said once; the listener goes on to take events, and hands none of them over."""
    warned: list[str] = []
    backend = Faulty()
    tracker = Tracker("Faulty", backend, warned.append)
    for event in an_agent(last=50):
        tracker(event)
    tracker.close()
    assert backend.rows == 2
    assert len(warned) == 1
    assert warned[0].startswith("Faulty failed and is switched off; the training continues: OSError: ")


def test_a_tracker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who emits never waits: rows are let go once too many wait, with one warning, and the end is not held up."""
    import threading

    from dimat.ui.trackers import tracker as tracking

    free = threading.Event()

    class Stuck(Faulty):
        def log(self, row: MetricRow) -> None:
            free.wait()

        def end(self, reason: str) -> None:
            pass

    monkeypatch.setattr(tracking, "CLOSE_S", 0.1)
    warned: list[str] = []
    tracker = Tracker("Stuck", Stuck(), warned.append)
    for event in an_agent(last=QUEUED + 10):
        tracker(event)
    tracker.close()
    free.set()
    assert len(warned) == 1
    assert "rows wait for it" in warned[0]


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """TensorBoard's folder is a file: one warning, and nothing else happens."""
    (tmp_path / "tensorboard").write_text("")
    (warning,) = watch(config(tmp_path, tensorboard=True), tmp_path, an_agent(), "lab-a")
    assert "TensorBoard failed" in warning


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's server is out of reach: one warning, and nothing else happens."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (warning,) = watch(config(tmp_path, mlflow={"tracking": "http://127.0.0.1:9"}), tmp_path, an_agent(), "lab-a")
    assert "MLflow failed" in warning


@pytest.mark.parametrize(("monitor", "extra"), [({"tensorboard": True}, "tensorboard"), ({"mlflow": {}}, "mlflow")])
def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: dict[str, Any], extra: str) -> None:
    """One line with the command that installs it."""

    def needed(name: str, what: str) -> None:
        need(f"no_such_{name}", what)

    monkeypatch.setattr(module, "need", needed)
    with pytest.raises(ConfigError, match=rf"pip install 'dimat\[{extra}\]'"):
        open_listeners(config(tmp_path, **monitor), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_a_reader() -> None:
    """What is not finite is left out; a round that an agent did not finish makes no row."""
    reader = RowReader()
    read: Callable[[events.Event], list[Any]] = lambda event: list(reader.read(event))  # noqa: E731
    who: dict[str, Any] = {"run": "r", "agent": "a", "round": 1}
    assert read(events.Trained(result=events.TrainResult(loss=float("nan"), samples=1), train_s=1.0, **who)) == []
    common = {"heard": 0, "expected": 0, "bytes_sent": 0, "bytes_received": 0}
    (row,) = read(events.RoundFinished(loss=float("nan"), samples=1, **common, **who))
    assert "loss" not in row.values
    assert row.values["samples"] == 1
    assert read(events.AgentLeft(reason="stopped", **who)) == [RunEnded("stopped")]
