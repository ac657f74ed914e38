"""Replays a run's trace on this version's round machines, and compares their actions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dimat.agent.setup.machine import machine_for
from dimat.errors import DataError
from dimat.simulate.folder import TRACE, read_experiment
from dimat.simulate.trace import Replay, replay
from dimat.simulate.world.scenario import prepare


def replay_run(run_dir: Path) -> Replay:
    """Hand the events that a run's trace holds to machines made anew for its experiment; compare what they ask for.

    Raises DataError where the folder is no run's or holds no trace, ConfigError where its experiment cannot be made
    again (a file that it names is gone, say).
    """
    config = read_experiment(run_dir)
    trace = run_dir / TRACE
    if not trace.exists():
        raise DataError(
            f"{run_dir} holds no {TRACE}; record one by running the experiment with "
            "--set simulate.trace=true --overwrite"
        )
    # nothing is trained: a trace from a machine with a GPU replays on one without
    train = config.train.model_copy(update={"device": "cpu"})
    scenario = prepare(config.model_copy(update={"train": train}))
    return replay(trace, partial(machine_for, scenario.schedule))
