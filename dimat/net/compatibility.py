"""The facts that two agents compare when they meet, and their reasons to refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dimat.version import __version__
from dimat.wire import PROTOCOL
from dimat.wire.v1 import peer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Profile:
    """The facts about an agent that peers compare with their own.

    `schema`: hash of the names, shapes and types of its weights; `base`: address of the weights that deltas are taken
    from, "" for none; `encodings`: those that it can read, in no order; `protocol`: version of the wire protocol;
    `groups`: hash of its model's symmetry groups, "" where its method needs none.
    """

    schema: str
    base: str = ""
    encodings: tuple[str, ...] = ("fp32",)
    protocol: int = PROTOCOL
    groups: str = ""

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
        }


def incompatibility(profile: Profile, run: str, other: pb.HelloRequest | pb.HelloReply) -> str:
    """Return why an agent with `profile` cannot work with the one that sent `other`; "" if it can.

    Compared are, in this order: protocol, run, schema, symmetry groups, base.
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
            f"{quoted(profile.groups, 12)}), so it is wired otherwise; find the difference with `dimat symmetry diff`, "
            "and give both the same model and rules"
        )
    if other.base != profile.base:
        return (
            f"its base is {quoted(other.base, 12) if other.base else 'none'}, here "
            f"{quoted(profile.base, 12) if profile.base else 'none'}; name the same base file or seed in both"
        )
    return ""


def quoted(text: str, longest: int = 60) -> str:
    """Return a peer's text as it may stand in a message: one line, quoted, of at most `longest` characters."""
    return repr(text if len(text) <= longest else text[:longest] + "…")
