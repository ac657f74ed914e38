"""The table [monitor]: Prometheus metrics, trackers of experiments, the dashboard."""

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


class WandbConfig(Tree):
    """Weights & Biases (extra `wandb`)."""

    project: str = "dimat"
    """Project that runs are put into."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    """"offline": kept in the run's folder, for `wandb sync`; "online": sent; "disabled": nothing is done."""


class MlflowConfig(Tree):
    """MLflow (extra `mlflow`)."""

    tracking: str = "mlruns"
    """Tracking URI, such as "http://host:5000" (others than http need the whole mlflow package), or a folder; a path,
    relative to the file's folder."""
    experiment: str = "dimat"
    """Experiment that runs are put into."""


class MonitorConfig(Tree):
    """Watchers of an agent or a simulated run, off by default; none can stop a training."""

    metrics: Annotated[str | None, BeforeValidator(_local)] = None
    """`host:port` (a port alone: on loopback) where a real agent serves Prometheus metrics under /metrics. All who can
    reach it can read them: there is no password, and there are no secrets in them."""
    observe_s: Annotated[float, Field(ge=0.1)] = 15.0
    """Seconds after which a real agent tells its listeners anew how its network is; changes are told at once."""
    tensorboard: bool | str = False
    """Write TensorBoard event files (extra `tensorboard`): true for `tensorboard` in the run's folder, or a path,
    relative to the file's folder."""
    wandb: WandbConfig | None = None
    """Tell Weights & Biases; none by default."""
    mlflow: MlflowConfig | None = None
    """Tell MLflow; none by default."""

    dashboard: Annotated[str | None, BeforeValidator(_local)] = None
    """`host:port` (a port alone: on loopback) of a real agent's dashboard, a page for a browser. Hosts other than
    loopback need a token."""
    dashboard_token_file: str | None = None
    """File with the token that a reader of the dashboard must give; a path, relative to the file's folder."""

    @field_validator("metrics", "dashboard")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)
