"""Weights & Biases: a run per real agent; the round is the step.

Runs are grouped by the network's run; a simulated run is one, with each agent's numbers under its name. The library's
own process sends the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import wandb

from dimat.config import WandbConfig
from dimat.errors import ConfigError
from dimat.ui.trackers.tracker import EACH_AT_MOST, MetricRow, TrackedRun

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

GOOD = ("done", "target", "time")


class WandbBackend:
    """Logs to W&B; its files are in `folder`. ConfigError if runs should be sent and there is no key."""

    def __init__(self, config: WandbConfig, folder: Path) -> None:
        if config.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError('monitor.wandb.mode = "online" needs a key: run `wandb login`, or use "offline"')
        self._config = config
        self._folder = folder
        self._run: Run | None = None
        self._simulated = False
        self._each: Sequence[str] = ()
        self._pending: dict[int, dict[str, float]] = {}

    def start(self, started: TrackedRun) -> None:
        """Begin a run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._simulated = started.simulated
        self._each = started.agents if len(started.agents) <= EACH_AT_MOST else ()
        # it neither reads the terminal nor watches the machine, the code and the repository
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=self._config.project,
            group=started.run,
            name=started.run if started.simulated else started.agents[0],
            job_type="simulation" if started.simulated else "agent",
            dir=str(self._folder),
            mode=self._config.mode,
            config=dict(started.settings),
            settings=settings,
            reinit="create_new",
        )

    def log(self, row: MetricRow) -> None:
        """Log a row; those of a simulated round are sent together, with the row over all agents."""
        assert self._run is not None
        if not self._simulated:
            self._run.log(dict(row.values), step=row.round)
        elif row.agent in self._each:
            values = {f"{row.agent}/{name}": value for name, value in row.values.items()}
            self._pending.setdefault(row.round, {}).update(values)
        elif not row.agent:
            self._run.log({**row.values, **self._pending.pop(row.round, {})}, step=row.round)

    def end(self, reason: str) -> None:
        """End the run, as failed if it was not completed."""
        assert self._run is not None
        for number, values in sorted(self._pending.items()):
            self._run.log(values, step=number)
        self._pending = {}
        self._run.summary["reason"] = reason or "unknown"
        self._run.finish(exit_code=0 if reason in GOOD else 1)
        self._run = None
