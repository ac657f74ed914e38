"""Methods that are more than a merge: D-PSGD and SGP also say how long a round trains and how weights are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from dimat.config.tree import NamedConfig

ONE_STEP = ("dpsgd", "sgp")
"""Methods that merge after every optimizer step."""
PUSH_SUM = "push-sum"


def apply_preset(values: Any) -> Any:
    """Return an experiment's values with what its merge method sets in other tables; what is given there stands.

    "dpsgd" and "sgp": one step a round; "sgp": push-sum mixing. Raises ValueError where sgp is given another mixing.
    """
    if not isinstance(values, Mapping):
        return values
    tree: dict[str, Any] = dict(cast("Mapping[str, Any]", values))
    method = _get(tree.get("merge"), "method")
    if method not in ONE_STEP:
        return tree
    train = tree.get("train")
    if all(_get(train, key) is None for key in ("steps_per_round", "epochs_per_round")):
        tree["train"] = _with(train, "steps_per_round", 1)
    if method == "sgp":
        tree["topology"] = _push_sum(tree.get("topology"), "topology.mixing")
        changes = _get(tree.get("schedule"), "changes")
        if isinstance(changes, list | tuple) and changes:
            entries = [
                _with(change, "topology", _push_sum(_get(change, "topology"), f"schedule.changes[{i}].topology.mixing"))
                for i, change in enumerate(cast("list[Any]", changes))
            ]
            tree["schedule"] = _with(tree["schedule"], "changes", tuple(entries))
    return tree


def _push_sum(topology: Any, where: str) -> Any:
    if _get(topology, "map") is not None:  # the map says how weights are mixed
        return topology
    if _given(topology, "mixing"):
        mixing = _get(topology, "mixing")
        name = mixing if isinstance(mixing, str) else _get(mixing, "name")
        if name != PUSH_SUM:
            raise ValueError(f'method "sgp" mixes by push-sum, but {where} is {name!r}; leave it out')
        return topology
    return _with(topology, "mixing", NamedConfig(name=PUSH_SUM))


def _get(table: Any, key: str) -> Any:
    if isinstance(table, BaseModel):
        return getattr(table, key, None)
    return cast("Mapping[str, Any]", table).get(key) if isinstance(table, Mapping) else None


def _given(table: Any, key: str) -> bool:
    if isinstance(table, BaseModel):
        return key in table.model_fields_set
    return isinstance(table, Mapping) and key in table


def _with(table: Any, key: str, value: Any) -> Any:
    """Return a table with one more key; what is no table is left to validation."""
    if isinstance(table, BaseModel):
        return table.model_copy(update={key: value})
    if table is None or isinstance(table, Mapping):
        return {**cast("Mapping[str, Any]", table or {}), key: value}
    return table
