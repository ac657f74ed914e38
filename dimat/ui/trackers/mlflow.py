"""MLflow: a run per agent; the round is the step.

The network's run is a tag. Agents of a simulated run are below a parent run, which has the numbers over all agents.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from dimat.config import MlflowConfig
from dimat.ui.trackers.tracker import EACH_AT_MOST, MetricRow, TrackedRun

STATUS = {"done": "FINISHED", "target": "FINISHED", "time": "FINISHED", "stopped": "KILLED", "left": "KILLED"}


class MlflowBackend:
    """Writes to an MLflow server or store. `folder`: the base of a relative path in `config.tracking`."""

    def __init__(self, config: MlflowConfig, folder: Path) -> None:
        self._uri = config.tracking
        if "://" not in self._uri:
            self._uri = str((folder / self._uri).resolve())
            # MLflow wants to be told that a folder is meant; the configuration says so
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._experiment = config.experiment
        self._client: MlflowClient | None = None
        self._runs: dict[str, str] = {}

    def start(self, started: TrackedRun) -> None:
        """Begin the runs."""
        client = self._client = MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        tags = {"dimat.run": started.run}
        self._runs = {}
        if started.simulated:
            self._runs[""] = self._begin(experiment, started.run, tags, started)
            tags = {**tags, "mlflow.parentRunId": self._runs[""]}
        for agent in started.agents if len(started.agents) <= EACH_AT_MOST else ():
            self._runs[agent] = self._begin(experiment, agent, {**tags, "dimat.agent": agent}, started)

    def log(self, row: MetricRow) -> None:
        """Log a row."""
        assert self._client is not None
        run = self._runs.get(row.agent)
        if run is None:
            return
        at = int(1000 * row.time_s)
        metrics = [Metric(name, value, at, row.round) for name, value in row.values.items()]
        self._client.log_batch(run, metrics=metrics)

    def end(self, reason: str) -> None:
        """End the runs."""
        assert self._client is not None
        for run in self._runs.values():
            self._client.set_terminated(run, STATUS.get(reason, "FAILED"))
        self._runs = {}

    def _begin(self, experiment: str, name: str, tags: dict[str, str], started: TrackedRun) -> str:
        assert self._client is not None
        at = int(1000 * started.time_s)
        run = self._client.create_run(experiment, start_time=at, tags=tags, run_name=name)
        parameters = [Param(key, str(value)) for key, value in started.settings.items()]
        self._client.log_batch(run.info.run_id, params=parameters)
        return run.info.run_id
