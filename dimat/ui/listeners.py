"""Opens whatever else watches a run besides console and log: the `[monitor]` table made into listeners.

This is the one place for it. `dimat agent` and `dimat simulate` use it; beside an own training loop it is used by hand:

    agent = dimat.Agent("lab-a.toml").attach(…)
    with open_listeners(agent.config, agent="lab-a") as watching:
        agent.listeners += watching.listeners
        with agent: …
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from dimat.config import ExperimentConfig
from dimat.events import Listener


class Listeners:
    """Listeners that are open until `close`. `listeners`: to be told every event; `said`: lines for a person, such as
    where metrics are served."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.said: list[str] = []
        self._open = ExitStack()

    def add(self, listener: Listener, close: Callable[[], object] | None = None) -> None:
        """Take a listener on, and what ends it."""
        self.listeners.append(listener)
        if close is not None:
            self._open.callback(close)

    def close(self) -> None:
        """End all, the newest first; closing twice is allowed."""
        self._open.close()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_listeners(config: ExperimentConfig, *, agent: str = "") -> Listeners:
    """Return the listeners that `config.monitor` asks for. `agent`: name of the real agent that they are for, "" for a
    simulated run, which is over before anybody would scrape it: `monitor.metrics` is passed over there.

    Raises NetworkError where metrics cannot be served, ConfigError where an extra is missing.
    """
    opened = Listeners()
    try:
        if config.monitor.metrics is not None and agent:
            _open_metrics(opened, config.run, agent, config.monitor.metrics)
    except BaseException:
        opened.close()
        raise
    return opened


def _open_metrics(opened: Listeners, run: str, agent: str, address: str) -> None:
    from dimat.ui.prometheus import MetricsServer, PrometheusListener

    listener = PrometheusListener(run, agent)
    server = MetricsServer(listener.registry, address)
    opened.add(listener, server.close)
    opened.said.append(f"metrics on http://{server.address}/metrics")
