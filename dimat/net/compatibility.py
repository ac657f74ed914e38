"""The facts that two agents compare when they connect, and their reasons to refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from dimat.version import __version__
from dimat.wire import PROTOCOL
from dimat.wire.v1 import peer_pb2 as pb

MAY_DIFFER = frozenset({"inputs", "probe"})
"""Settings that may differ, at a cost in quality: the scaling of inputs, and the probe set on which networks are
compared."""
OPTIMIZER_STATE = "train.optimizer_state"
"""The setting that says whether an agent's snapshots hold moments of its optimizer ("merged"), or not ("own")."""
CLASSES = "classes"
"""The setting that holds the names of the classes in label order, as a list in JSON."""

PROBE_SET = "probe set"
"""The setting that holds the hash of the inputs that logits are of, where agents exchange those."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The facts about an agent that peers compare with their own.

    `schema`: hash of the names, shapes and types of its weights; `base`: address of the weights to which deltas are
    taken, "" for none; `encodings`: those that it can read, in any order; `protocol`: version of the wire protocol;
    `groups`: hash of its model's symmetry groups, "" if its method needs none; `settings`: the other settings that give
    its weights their meaning, as text by name (classes, tokenizer, heads, …).
    """

    schema: str
    base: str = ""
    encodings: tuple[str, ...] = ("fp32",)
    protocol: int = PROTOCOL
    groups: str = ""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])

    def fields(self, run: str, agent: str) -> dict[str, Any]:
        """Return the fields that a hello's request and reply share, for an agent with this profile."""
        return {
            "protocol": self.protocol,
            "dimat": __version__,
            "run": run,
            "agent": agent,
            "schema": self.schema,
            "base": self.base,
            "encodings": self.encodings,
            "groups": self.groups,
            "settings": dict(self.settings),
        }


def incompatibility(profile: Profile, run: str, other: pb.HelloRequest | pb.HelloReply) -> str:
    """Return why an agent with `profile` cannot work with the one that sent `other`; "" if it can.

    It compares, in this order: protocol, run, schema, symmetry groups, base, and settings that both state.
    """
    if other.protocol != profile.protocol:
        return (
            f"it speaks protocol {other.protocol} (dimat {quoted(other.dimat)}), this agent speaks {profile.protocol} "
            f"(dimat {__version__}); bring both to one version"
        )
    if other.run != run:
        return f"it is in run {quoted(other.run)}, this agent in {quoted(run)}; give both the same run"
    if other.schema != profile.schema:
        return (
            f"its model has other names, shapes or types (schema {quoted(other.schema, 12)}, here "
            f"{quoted(profile.schema, 12)}); give both the same task and model"
        )
    # an agent that aligns nothing sends none, and neither does one of a version that did not know of groups
    if other.groups and profile.groups and other.groups != profile.groups:
        return (
            f"its model has the same tensors in other symmetry groups (groups {quoted(other.groups, 12)}, here "
            f"{quoted(profile.groups, 12)}), so it is wired differently; find the difference with "
            "`dimat symmetry diff`, and give both the same model and rules"
        )
    if other.base != profile.base:
        return (
            f"its base is {quoted(other.base, 12) if other.base else 'none'}, here "
            f"{quoted(profile.base, 12) if profile.base else 'none'}; name the same base file or seed in both"
        )
    found = _differences(profile, other)
    if (told := found.pop(OPTIMIZER_STATE, "")) != "":
        return f"one of the two sends its optimizer's moments, the other does not: {told}; give both the same"
    if (told := found.pop(PROBE_SET, "")) != "":
        return (
            f"its logits are of other inputs: {told}; give both the same task.options of the data, and language models "
            "with other tokenizers a probe text of its own with a probe.count that takes all of it"
        )
    differ = [told for name, told in found.items() if name not in MAY_DIFFER]
    if differ:
        more = f", and {len(differ) - 1} more such setting{'s' * (len(differ) > 2)}" if len(differ) > 1 else ""
        return f"the same weights mean something else to it: {differ[0]}{more}; give both the same"
    return ""


def doubtful(profile: Profile, other: pb.HelloRequest | pb.HelloReply) -> str:
    """Return the settings of a compatible agent that differ, though that may be intended; "" if there are none."""
    differ = [told for name, told in _differences(profile, other).items() if name in MAY_DIFFER]
    return f"it fits, but {' and '.join(differ)}; give both the same, unless that is meant" if differ else ""


def _differences(profile: Profile, other: pb.HelloRequest | pb.HelloReply) -> dict[str, str]:
    """Return in words the settings that both state and that differ, by name."""
    found: dict[str, str] = {}
    for name, own in sorted(profile.settings.items()):
        theirs = other.settings[name] if name in other.settings else own
        if theirs == own:
            continue
        found[name] = f"its {name} is {quoted(theirs)}, here {quoted(own)}"
        if name == CLASSES and (lists := (_listed(theirs), _listed(own))) != ([], []):
            found[name] = _class_difference(*lists)
    return found


def _class_difference(theirs: list[str], own: list[str]) -> str:
    if len(theirs) != len(own):
        return f"it has {len(theirs)} classes, this agent has {len(own)}"
    place = next((i for i, pair in enumerate(zip(theirs, own, strict=True)) if pair[0] != pair[1]), 0)
    order = " (the same classes in another order)" if sorted(theirs) == sorted(own) else ""
    return f"class {place} is {quoted(theirs[place])} there, {quoted(own[place])} here{order}"


def _listed(text: str) -> list[str]:
    """Return the names in a list of classes, none if it is not a list; a peer may send anything."""
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [str(name) for name in cast("list[Any]", names)] if isinstance(names, list) else []


def quoted(text: str, longest: int = 60) -> str:
    """Return a peer's text in a form that is safe in a message: one line, quoted, at most `longest` characters."""
    return repr(text if len(text) <= longest else text[:longest] + "…")
