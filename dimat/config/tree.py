"""What configuration tables are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Options = dict[str, Any]


class Tree(BaseModel):
    """Base of all configuration tables: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def as_stage(value: Any) -> Any:
    """Return the table of what was given by name alone; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


class NamedConfig(Tree):
    """Something chosen by name with options of its own: `"adam"` or `{ name = "adam", options = { … } }`."""

    name: str
    """Registered name."""
    options: Options = Field(default_factory=dict)
    """Keyword options of what is named; its documentation lists them."""


Named = Annotated[NamedConfig, BeforeValidator(as_stage)]
