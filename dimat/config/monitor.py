"""The table of what watches a real agent."""

from __future__ import annotations

from pydantic import field_validator

from dimat.config.agent import check_address
from dimat.config.tree import Tree


class MonitorConfig(Tree):
    """What tells how a real agent is, beside its log. No result depends on it."""

    dashboard: str | None = None
    """`host:port` of its dashboard, a page for a browser; none by default. Other hosts than this one need a token."""
    dashboard_token_file: str | None = None
    """File with the token that whoever looks must give; a path, relative to the file's folder."""

    @field_validator("dashboard")
    @classmethod
    def _dashboard(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)
