"""The round machine's part of a checkpoint: plain values to continue from after a crash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.events import Contribution
from dimat.reading import as_type

Stage = Literal["trained", "merged", "joined"]


@dataclass(frozen=True, slots=True)
class MachineState:
    """The machine at a checkpoint.

    `stage`: "trained" (in `round`, not merged yet), "merged", or "joined" (has adopted a network's round, and
    perhaps its weights; round 0: there from the beginning). `root`: the agent's snapshot of the round; `parents`:
    the parts of the merge from which its training started; `base`: address of the base of task vectors;
    `push`: the push-sum ledger; `offers`: the peers'; `leaves`: why the agent leaves afterwards, if it does.
    """

    run: str
    agent: str
    round: int
    stage: Stage
    basis: BasisId
    root: str = ""
    parents: tuple[Contribution, ...] = ()
    base: str = ""
    push: Mapping[str, Any] = field(default_factory=dict[str, Any])
    offers: tuple[PeerPublished, ...] = ()
    leaves: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "run": self.run,
            "agent": self.agent,
            "round": self.round,
            "stage": self.stage,
            "basis": str(self.basis),
            "root": self.root,
            "parents": [asdict(part) for part in self.parents],
            "base": self.base,
            "push": dict(self.push),
            "offers": [{**asdict(offer), "basis": str(offer.basis)} for offer in self.offers],
            "leaves": self.leaves,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MachineState:
        """Rebuild the state from `to_dict`; raises KeyError, TypeError or ValueError for other values."""
        if missing := MachineState.__dataclass_fields__.keys() - values.keys() - {"leaves"}:
            raise KeyError(min(missing))
        offers = [{**offer, "basis": BasisId.parse(as_type(str, offer["basis"]))} for offer in values["offers"]]
        basis = BasisId.parse(as_type(str, values["basis"]))
        return as_type(MachineState, {**values, "basis": basis, "offers": offers})


@dataclass(frozen=True, slots=True)
class Restored:
    """The machine's part of the newest checkpoint that can be read.

    `published`: the last round that a checkpoint of stage "trained" was ever made for, readable or not; `passed_over`:
    why newer ones could not be read; `note`: the changes since, "" for none.
    """

    state: MachineState
    published: int
    passed_over: tuple[str, ...] = ()
    note: str = ""
