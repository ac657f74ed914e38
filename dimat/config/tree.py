"""The base of all configuration tables, and of things chosen by name with options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Options = dict[str, Any]


class Tree(BaseModel):
    """Base of all configuration tables: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def as_stage(value: Any) -> Any:
    """Return a name alone as the table { name = … }; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


class NamedConfig(Tree):
    """A named choice with options: `"adam"` or `{ name = "adam", options = { … } }`."""

    name: str
    """Registered name."""
    options: Options = Field(default_factory=dict)
    """Keyword options of the named function; its documentation lists them."""


Named = Annotated[NamedConfig, BeforeValidator(as_stage)]
