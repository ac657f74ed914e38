"""Checks that the packages that the dashboard needs are installed."""

from __future__ import annotations

from importlib.util import find_spec

from dimat.errors import ConfigError

NEEDED = ("starlette", "uvicorn")


def need_dashboard() -> None:
    """Raise ConfigError if the extra is not installed."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ConfigError(f"the dashboard needs {' and '.join(missing)}; do: pip install 'dimat[dashboard]'")
