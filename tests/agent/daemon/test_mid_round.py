"""Agents that are stopped or killed in the middle of a round. Reference: the agent that nobody stops, bit for bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.agent.processes import Network, network
from tests.simulate.helpers import TINY_TASK

pytestmark = pytest.mark.live

ALONE = ("lab-a",)
SCHEDULE = "rounds = 2\nround_deadline_s = 5"
TRAIN = 'epochs_per_round = 3\nbatch_size = 16\noptimizer = { name = "adam", lr = 0.01 }'
STEPWISE = """
import time
from pathlib import Path

SLEEP_S = Path(__file__).with_name("sleep_s")

def sleepy(loss):
    def slow(outputs, targets):
        time.sleep(float(SLEEP_S.read_text()))
        return loss(outputs, targets)
    return slow

whole = task

def task():
    made = whole()
    object.__setattr__(made, "loss", sleepy(made.loss))
    return made
"""


def stepwise(net: Network, sleep_s: float) -> None:
    """Let each step, 30 a round, and each batch of an evaluation take a time."""
    (net.folder / "tiny_task.py").write_text(TINY_TASK + STEPWISE)
    (net.folder / "new").write_text(str(sleep_s))
    (net.folder / "new").replace(net.folder / "sleep_s")


def wait_for_the_middle(net: Network) -> None:
    """Wait until some steps of round 2 are done."""
    net.wait_for("lab-a", "PhaseStarted", round=2, phase="train")
    time.sleep(0.5)


@pytest.mark.slow
def test_the_next_life_goes_on_in_the_middle_of_the_round(tmp_path: Path, free_ports: list[int]) -> None:
    """Stopped by each of the signals, and killed where it saves as it goes: the round's loss, and the last weights."""
    (tmp_path / "whole").mkdir()
    with network(tmp_path / "whole", ALONE, free_ports, schedule=SCHEDULE, train=TRAIN) as net:
        stepwise(net, 0.0)
        assert net.start("lab-a").wait() == 0
        weights = (net.folder / "lab-a" / "weights.safetensors").read_bytes()
        trained = net.wait_for("lab-a", "Trained", 2)[1]
    for number, code, sets in (
        (signal.SIGTERM, 143, ()),
        (signal.SIGUSR1, 138, ()),
        (signal.SIGKILL, -9, ("agent.checkpoint_every_s=0.1",)),
    ):
        folder = tmp_path / number.name
        folder.mkdir()
        with network(folder, ALONE, free_ports, schedule=SCHEDULE, train=TRAIN) as net:
            stepwise(net, 0.1)
            life = net.start("lab-a", *sets)
            wait_for_the_middle(net)
            life.signal(number)
            assert life.wait(20) == code, life.text()
            assert net.events("lab-a", "Checkpointed", stage="training", round=2)
            assert not net.events("lab-a", "Trained", round=2)
            stepwise(net, 0.0)
            assert net.start("lab-a").wait() == 0, net.lives[-1].text()
            resumed = [(event["round"], event["stage"]) for event in net.events("lab-a", "Resumed")]
            assert resumed == [(1, "merged"), (2, "training")]
            (again,) = net.events("lab-a", "Trained", round=2)
            assert (again["loss"], again["samples"]) == (trained["loss"], trained["samples"])
            assert (folder / "lab-a" / "weights.safetensors").read_bytes() == weights
            assert not list((folder / "lab-a" / "checkpoints").glob("training.*"))


def test_a_step_that_takes_longer_than_the_drain_is_told(tmp_path: Path, free_ports: list[int]) -> None:
    """The agent does not wait for it, and says which keys help; the next life begins the round anew."""
    with network(tmp_path, ALONE, free_ports, schedule=SCHEDULE, train=TRAIN) as net:
        stepwise(net, 0.1)  # its 30 steps last until the next line is read
        life = net.start("lab-a", "agent.drain_s=0.2")
        net.wait_for("lab-a", "PhaseStarted", round=1, phase="train")
        stepwise(net, 30)
        time.sleep(0.5)
        life.signal(signal.SIGTERM)
        assert life.wait(20) == 143
        warned = [event["message"] for event in net.events("lab-a", "Warned")]
        assert any("take longer than agent.drain_s (0.2 s)" in message for message in warned), life.text()


def test_a_round_of_other_settings_begins_anew(tmp_path: Path, free_ports: list[int]) -> None:
    """What was saved in the middle of a round of other length is told of and left; the checkpoint before counts."""
    with network(tmp_path, ALONE, free_ports, schedule=SCHEDULE, train=TRAIN) as net:
        stepwise(net, 0.1)
        life = net.start("lab-a")
        wait_for_the_middle(net)
        life.signal(signal.SIGTERM)
        assert life.wait(20) == 143
        stepwise(net, 0.0)
        assert net.start("lab-a", "train.epochs_per_round=1").wait() == 0
        assert [event["stage"] for event in net.events("lab-a", "Resumed")] == ["merged"]
        warned = [event["message"] for event in net.events("lab-a", "Warned")]
        assert any("the state is of the middle of round 2, which had 30 steps" in message for message in warned)
