"""The table [monitor]: Prometheus metrics, experiment trackers, the dashboard."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from dimat.config.agent import check_address
from dimat.config.tree import Tree


def _local(value: Any) -> Any:
    """Return `host:port`; a port alone is one of this host's loopback."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.removeprefix(":").isdecimal():
        return f"127.0.0.1:{value.removeprefix(':')}"
    return value


def _on_or_off(value: Any) -> Any:
    """Return the empty table for true, None for false."""
    return ({} if value else None) if isinstance(value, bool) else value


class WandbConfig(Tree):
    """Weights & Biases (extra `wandb`)."""

    project: str = "dimat"
    """Project in which runs are stored."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    """"offline": kept in the run's folder, for `wandb sync`; "online": sent; "disabled": nothing is done."""


class MlflowConfig(Tree):
    """MLflow (extra `mlflow`)."""

    tracking: str = "mlruns"
    """Tracking URI, such as "http://host:5000" (schemes other than http need the full mlflow package), or the path of a
    folder, relative to the file's folder."""
    experiment: str = "dimat"
    """Experiment in which runs are stored."""


class MonitorConfig(Tree):
    """Monitors of an agent or a simulated run, off by default; a failing monitor never stops training."""

    metrics: Annotated[str | None, BeforeValidator(_local)] = None
    """`host:port` (a port alone: on loopback) where a real agent serves Prometheus metrics under /metrics. Anybody
    who can reach it can read them without a password; they hold no secrets."""
    observe_s: Annotated[float, Field(ge=0.1)] = 15.0
    """Seconds between a real agent's reports on the state of its network; it reports changes at once."""
    tensorboard: bool | str = False
    """Write TensorBoard event files (extra `tensorboard`): true for `tensorboard` in the run's folder, or a path,
    relative to the file's folder."""
    wandb: Annotated[WandbConfig | None, BeforeValidator(_on_or_off)] = None
    """Log to Weights & Biases: true, or a table; off by default."""
    mlflow: Annotated[MlflowConfig | None, BeforeValidator(_on_or_off)] = None
    """Log to MLflow: true, or a table; off by default."""
    dashboard: Annotated[str | None, BeforeValidator(_local)] = None
    """`host:port` (a port alone: on loopback) of a real agent's dashboard, a web page. Hosts other than loopback need a
    token."""
    dashboard_token_file: str | None = None
    """File with the token that a reader of the dashboard must give; a path, relative to the file's folder."""

    @field_validator("metrics", "dashboard")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)
