"""The base of all configuration tables, and named choices with options."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Options = dict[str, Any]


class Tree(BaseModel):
    """Base of all configuration tables, which are frozen. Unknown keys are errors, and so are numbers that are not
    finite, unless a field says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false in fields that are not boolean: pydantic would read them as 1 and 0."""
        if _holds_truth(value) and not _takes_truth(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must not be true or false")
        return value


def _holds_truth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_truth, value))
    if isinstance(value, dict):
        return any(map(_holds_truth, value.values()))
    return isinstance(value, bool)


@cache
def _takes_truth(annotation: Any) -> bool:
    """Tell whether a field's value may hold true or false somewhere; nested tables check their own fields."""
    if annotation in (bool, Any) or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return True
    return any(map(_takes_truth, get_args(annotation)))


def as_stage(value: Any) -> Any:
    """Return a bare name as the table { name = … }; anything else unchanged."""
    return {"name": value} if isinstance(value, str) else value


class NamedConfig(Tree):
    """A named choice with options: `"adam"` or `{ name = "adam", options = { … } }`."""

    name: str
    """Registered name."""
    options: Options = Field(default_factory=dict)
    """Keyword options of the named function; its documentation lists them."""


Named = Annotated[NamedConfig, BeforeValidator(as_stage)]
