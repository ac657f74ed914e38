"""Opens the listeners that the `[monitor]` table asks for, beside console and log.

`dimat agent` and `dimat simulate` use it; with your own training loop, call it yourself:

    agent = dimat.Agent("lab-a.toml").attach(…)
    with open_listeners(agent.config, Path("watched"), agent="lab-a") as watching:
        agent.listeners += watching.listeners
        with agent: …
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from dimat.config import ExperimentConfig
from dimat.errors import DataError
from dimat.events import Listener, Warned
from dimat.ui.trackers.tracker import Backend, Tracker, need


class Listeners:
    """Listeners that are open until `close`. `listeners`: receive every event; `messages`: lines for a person, such as
    the address of the metrics; `warned`: receive a `Warned`, from any thread, if one of the listeners has failed."""

    def __init__(self, run: str, agent: str) -> None:
        self.listeners: list[Listener] = []
        self.messages: list[str] = []
        self.warned: list[Listener] = []
        self._run = run
        self._agent = agent
        self._open = ExitStack()

    def add(self, listener: Listener, close: Callable[[], object] | None = None) -> None:
        """Add a listener, and the function that ends it."""
        self.listeners.append(listener)
        if close is not None:
            self._open.callback(close)

    def track(self, name: str, backend: Backend) -> None:
        """Add a tracker."""
        tracker = Tracker(name, backend, self._warn)
        self.add(tracker, tracker.close)

    def close(self) -> None:
        """End all, the newest first; closing twice is allowed."""
        self._open.close()

    def _warn(self, message: str) -> None:
        event = Warned(run=self._run, time_s=time.time(), message=message, agent=self._agent)
        for listener in self.warned:
            with suppress(DataError):  # a log on a full disk: the writer of the next event there is told
                listener(event)

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_listeners(config: ExperimentConfig, folder: Path, *, agent: str = "") -> Listeners:
    """Return the listeners that `config.monitor` asks for. `folder`: the run's, or the agent's, in which trackers keep
    their files by default; it is made when needed. `agent`: name of the real agent that they are for, "" for a
    simulated run, which is over before anybody would scrape it: `monitor.metrics` is ignored there.

    Raises NetworkError if metrics cannot be served, ConfigError if an extra is missing.
    """
    opened = Listeners(config.run, agent)
    try:
        if config.monitor.metrics is not None and agent:
            _open_metrics(opened, config.run, agent, config.monitor.metrics)
        _open_trackers(opened, config, folder)
    except BaseException:
        opened.close()
        raise
    return opened


def _open_metrics(opened: Listeners, run: str, agent: str, address: str) -> None:
    from dimat.ui.trackers.prometheus import MetricsServer, PrometheusListener

    listener = PrometheusListener(run, agent)
    server = MetricsServer(listener.registry, address)
    opened.add(listener, server.close)
    opened.warned.append(listener)
    opened.messages.append(f"metrics on http://{server.address}/metrics")


def _open_trackers(opened: Listeners, config: ExperimentConfig, folder: Path) -> None:
    """Open the trackers. Their libraries are imported here, so that no round waits for that."""
    monitor, base = config.monitor, Path(config.folder)
    if monitor.tensorboard:
        need("tensorboard", "tensorboard")
        from dimat.ui.trackers.tensorboard import TensorBoardBackend

        own = folder / "tensorboard"
        shared = None if monitor.tensorboard is True else base / monitor.tensorboard / config.run
        opened.track("TensorBoard", TensorBoardBackend(own if shared is None else shared))
        opened.messages.append(f"tensorboard --logdir {own if shared is None else shared.parent}")
    if monitor.wandb is not None and monitor.wandb.mode != "disabled":
        need("wandb", "wandb")
        from dimat.ui.trackers.wandb import WandbBackend

        opened.track("W&B", WandbBackend(monitor.wandb, folder))
    if monitor.mlflow is not None:
        need("mlflow", "mlflow")
        from dimat.ui.trackers.mlflow import MlflowBackend

        opened.track("MLflow", MlflowBackend(monitor.mlflow, base))
