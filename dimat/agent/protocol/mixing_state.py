"""The mixing weights that a merge actually uses, and the parts that a snapshot is made of.

They are computed only here, staleness included."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import MergeAction, MergePart, MergeRecord
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import RoundPlan, Rules
from dimat.agent.protocol.push_sum import PushSum
from dimat.agent.protocol.state import MachineState
from dimat.events import Contribution, Merged, MergeResult
from dimat.topology.mixing import renormalise


class MixingState:
    """An agent's mixing weights from round to round, and its snapshot's parts.

    `state`: of the checkpoint that it continues from.

    `root`: address of its newest snapshot; `parents`: the parts from which that snapshot's training started, or after a
    merge that of the next one; `push`: its push-sum weight and where it went.
    """

    def __init__(self, agent: str, rules: Rules, state: MachineState | None = None) -> None:
        self.root = "" if state is None else state.root
        self.parents = () if state is None else state.parents
        self.push = PushSum.from_dict(state.push) if state is not None and state.push else PushSum()
        self._agent = agent
        self._rules = rules
        self._taking: dict[str, float] = {}
        self._taken: PeerPublished | None = None  # whose weights stand in the place of own ones, until the merge

    def push_weight(self, plan: RoundPlan) -> float | None:
        """Return the agent's push-sum weight; None if the plan has none."""
        return self.push.weight if plan.push is not None else None

    def trained(self, root: str, plan: RoundPlan) -> None:
        """Note the snapshot of a round's training, and the push-sum weight that it sends out."""
        self.root = root
        if plan.push is not None:
            self.push.push(plan.push)

    def took_over(self, offer: PeerPublished, number: int) -> MergeRecord:
        """Note that the weights are now a peer's; return the record of joining at round `number`."""
        taken = Contribution(agent=offer.peer, snapshot=offer.root, round=offer.round, weight=1.0, verdict="adopted")
        self.parents = (taken,)
        return MergeRecord(self._agent, number, "", self.parents, kind="join")

    def rebased(self, number: int, offer: PeerPublished) -> None:
        """Note whose basis was adopted in a round, with its weights if the rules say so."""
        self._taken = offer if number <= self._rules.adopt_rounds else None

    def merge(self, number: int, plan: RoundPlan, usable: Mapping[str, PeerPublished], basis: BasisId) -> MergeAction:
        """Return the merge of a round, of the agent's own snapshot with those in `usable`.

        If a peer's weights were adopted, a newer snapshot of it comes too late: one of its snapshots is in the merge.
        """
        taken = self._taken
        if taken is not None and taken.peer in usable and usable[taken.peer].root != taken.root:
            usable = {peer: offer for peer, offer in usable.items() if peer != taken.peer}
        own, mixing = shares(self._rules, plan, self.push, self._agent, number, usable)
        parts = tuple(
            MergePart(peer, offer.round, offer.root, mixing[peer], offer.basis == basis)
            for peer, offer in sorted(usable.items())
            if mixing.get(peer, 0.0) > 0
        )
        self._taking = {part.peer: usable[part.peer].pushed for part in parts}
        return MergeAction(number, own, parts)

    def merged(
        self, merge: MergeAction, result: MergeResult, plan: RoundPlan, expected: int
    ) -> tuple[Merged, MergeRecord]:
        """Note how a merge went; return its event and its record.

        `expected`: peers in the plan.
        """
        # a refused peer's push-sum weight counts for self, as its mixing weight does
        self.push.take(self._taking if plan.push is not None else {})
        whole = merge.round <= self._rules.adopt_rounds
        self.parents = contributions(self._agent, self.root, merge, result, whole=whole, taken=self._taken)
        self._taken = None
        told = Merged(
            agent=self._agent,
            round=merge.round,
            contributions=self.parents,
            heard=len(merge.parts),
            expected=expected,
            result=result,
            push_weight=self.push_weight(plan),
        )
        return told, MergeRecord(self._agent, merge.round, self.root, self.parents, result, trained=plan.learn)


def shares(
    rules: Rules, plan: RoundPlan, push: PushSum, agent: str, number: int, usable: Mapping[str, PeerPublished]
) -> tuple[float, dict[str, float]]:
    """Return the agent's own mixing weight and that of each peer in `usable`; they sum to 1.

    As planned, with missing weight added to the agent's own; in asynchronous mode W_ij · decay^staleness, with the
    difference added to its own; with push-sum by the shares that are sent with the snapshots.
    """
    if plan.push is not None:
        return push.mixing({peer: offer.pushed for peer, offer in usable.items()})
    mixing = renormalise(plan.mixing, usable, agent)
    if rules.mode == "sync":
        return mixing.pop(agent), mixing
    peers = {p: mixing[p] * rules.staleness_decay ** max(number - offer.round, 0) for p, offer in usable.items()}
    return 1.0 - math.fsum(peers.values()), peers


def contributions(
    agent: str,
    root: str,
    merge: MergeAction,
    result: MergeResult,
    *,
    whole: bool = False,
    taken: PeerPublished | None = None,
) -> tuple[Contribution, ...]:
    """Return the parts of a merge, the agent's own first.

    The weight left over from refused peers and an accept rule goes to the agent itself; with `whole` (bases are adopted
    with weights) also that of peers in another basis. `taken`: the adopted snapshot, if any, which then gets the
    agent's own share.
    """
    merged = [part for part in merge.parts if part.peer not in result.refused and (part.same_basis or not whole)]
    kept = [(part, part.weight * result.accepted) for part in merged]
    own, instead = 1.0 - math.fsum(weight for _, weight in kept), ()
    if taken is not None:
        own += math.fsum(weight for part, weight in kept if part.root == taken.root and part.peer == taken.peer)
        kept = [(part, weight) for part, weight in kept if part.peer != taken.peer]
        adopted = Contribution(agent=taken.peer, snapshot=taken.root, round=taken.round, weight=own, verdict="adopted")
        own, instead = 0.0, (adopted,)
    return (
        Contribution(agent=agent, snapshot=root, round=merge.round, weight=own, verdict="own"),
        *instead,
        *(
            Contribution(
                agent=part.peer,
                snapshot=part.root,
                round=part.round,
                weight=weight,
                verdict="same basis" if part.same_basis else "other basis",
            )
            for part, weight in kept
            if weight > 0
        ),
    )
