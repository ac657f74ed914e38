"""First merges of agents that start from different weights: `schedule.first_merge`.

With "align" an agent permutes its own weights into the basis that it adopts. With "adopt" and "adopt-distil" it adopts
the peer's weights with the basis, and no merge mixes bases: peers in another basis are left out, until they adopt this
agent's basis or it adopts theirs. This holds in the first rounds (`first_merge_rounds`); later rounds are as with
"align". With "adopt-distil" an agent that has adopted weights, or has left out peers, learns after the merge from its
own labels and from the logits of its old model and of all peers of that round, for `schedule.distil.steps` steps on its
own examples: this transfers their knowledge, whatever their order of units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dimat.config import ScheduleConfig
from dimat.errors import ConfigError
from dimat.merge import Peer
from dimat.merge.stages import Weights
from dimat.train.base import ModelTrainer
from dimat.train.lesson import check_teachable
from dimat.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class PeerSplit:
    """The peers of a merge. `left_out`: in another basis, so not merged; `unfit`: those of them that do not pass the
    screen, with the reason."""

    merged: list[Peer]
    left_out: list[Peer]
    unfit: dict[str, str]

    @property
    def left_out_weight(self) -> float:
        """The mixing weight of the peers that are left out, which goes to the agent itself."""
        return sum(peer.weight for peer in self.left_out)

    def refused(self, by_merge: Mapping[str, str]) -> dict[str, str]:
        """Return all refused peers with the reason, given those among the peers to merge."""
        return {**by_merge, **self.unfit}


@dataclass(slots=True)
class FirstMerge:
    """State from the moment at which weights are adopted to the merge that follows.

    `former`: the agent's own weights before, None if it adopted none; `source`: the peer whose weights it adopted.
    """

    config: ScheduleConfig
    former: dict[str, Tensor] | None = None
    source: str = ""
    notes: list[str] = field(default_factory=list[str])

    def adopts(self, number: int) -> bool:
        """Whether in a round weights are adopted with a basis."""
        return number <= self.config.adopt_rounds

    def check(self, trainer: ModelTrainer) -> None:
        """Raise ConfigError where the model cannot be taught as the configuration says."""
        if self.config.first_merge != "adopt-distil":
            return
        key = 'schedule.first_merge = "adopt-distil"'
        if not isinstance(trainer, Trainer):
            raise ConfigError(f'{key} trains by itself, but here your own loop trains; use "adopt"')
        check_teachable(trainer.task, key)

    def took_over(self, former: dict[str, Tensor], source: str) -> None:
        """Note that a peer's weights have replaced the agent's own."""
        self.former, self.source = former, source
        self.notes = [f"adopted the weights of {source} with its basis, in place of its own"]

    def split(self, number: int, peers: Sequence[Peer], fault_of: Callable[[str, Weights], str]) -> PeerSplit:
        """Split the peers of a round into those that are merged and those that are left out.

        `fault_of`: why a peer's weights do not pass the screen, "" if they do.
        """
        merged = [peer for peer in peers if peer.same_basis or not self.adopts(number)]
        left_out = [peer for peer in peers if not peer.same_basis and self.adopts(number)]
        if left_out:
            names = ", ".join(peer.name for peer in left_out)
            self.notes.append(f"not merged, because they have another basis: {names} (schedule.first_merge)")
        faults = {peer.name: fault_of(peer.name, peer.weights) for peer in left_out}
        return PeerSplit(merged, left_out, {name: fault for name, fault in faults.items() if fault})

    def teaches(self, split: PeerSplit) -> bool:
        """Whether this merge is followed by distillation."""
        teaches_left_out = any(peer.name not in split.unfit for peer in split.left_out)
        return self.config.first_merge == "adopt-distil" and (self.former is not None or teaches_left_out)

    def teach(
        self, trainer: ModelTrainer, number: int, own: Weights, split: PeerSplit, refused: Mapping[str, str]
    ) -> None:
        """Distil the agent's former model and its peers' models into the current one.

        `own`: the agent's weights before the merge, used if it adopted none; `refused`: peers that teach
        nothing.
        """
        assert isinstance(trainer, Trainer)
        fit = (peer.weights for peer in (*split.merged, *split.left_out) if peer.name not in refused)
        teachers = [own if self.former is None else self.former, *fit]
        report = trainer.distil(number, teachers, self.config.distil)
        self.notes.append(
            f"learned for {report.steps} steps from its own labels and from the outputs of "
            f"{len(teachers)} models on its own examples"
        )

    def done(self) -> tuple[str, ...]:
        """Clear the state; return the remarks on the merge for people."""
        notes, self.notes = tuple(self.notes), []
        self.former, self.source = None, ""
        return notes
