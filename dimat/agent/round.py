"""The round: train → record → publish → gather → merge → checkpoint, as a state machine without I/O.

`RoundMachine.handle(event)` takes what happened and returns what to do, in order. It reads no clock (the
driver turns `SetTimer` into a `Deadline`), opens no socket, and draws no random number. The simulator drives
it here, a daemon will, and so does whatever test wants to delay, drop or reorder its events.

What it promises: a round ends, whichever peers are dead, no later than its deadline allows; a peer's snapshot
enters a merge whole or not at all and at most once per round; mixing weights are renormalised over what
arrived, the missing mass going to self; late, repeated, foreign or unknown messages change nothing.

A driver carries actions out in the order given, and `Publish` only after the `Checkpoint` before it is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from dimat import events as facts
from dimat.agent.basis import BasisId
from dimat.agent.messages import (
    Action,
    AdoptBasis,
    BasisChanged,
    Checkpoint,
    Deadline,
    Event,
    Exit,
    Fetch,
    FetchFailed,
    Merge,
    MergeDone,
    Part,
    PeerLost,
    PeerPublished,
    Publish,
    Report,
    SetTimer,
    SnapshotReady,
    Started,
    Stop,
    Train,
    TrainingDone,
)
from dimat.topology.mixing import renormalise

# An honest peer is at most one round ahead in synchronous mode; the rest is room for reordering, and a bound.
OFFERS_KEPT = 4


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round as planned. `mixing`: weight by agent, self included, summing to 1; `learn`: train before it."""

    mixing: Mapping[str, float]
    learn: bool = True


class Phase(Enum):
    """Where in a round the machine is."""

    IDLE = "idle"
    TRAINING = "training"
    GATHERING = "gathering"
    ADOPTING = "adopting"
    MERGING = "merging"
    DONE = "done"


class RoundMachine:
    """The round of one agent. `plan(round)` gives mixing weights; `rounds` is the last round.

    `basis_gossip`: adopt the smallest basis id seen among the peers of a round before merging with them.
    """

    def __init__(
        self,
        agent: str,
        plan: Callable[[int], RoundPlan],
        *,
        rounds: int,
        basis: BasisId,
        basis_gossip: bool,
        deadline_s: float,
    ) -> None:
        self.agent = agent
        self.basis = basis
        self.round = 0
        self.phase = Phase.IDLE
        self._plan = plan
        self._rounds = rounds
        self._gossip = basis_gossip
        self._deadline_s = deadline_s
        self._current = RoundPlan({agent: 1.0})
        self._own_root = ""
        self._offers: dict[str, dict[int, PeerPublished]] = {}
        self._fetching: set[str] = set()
        self._ready: dict[str, PeerPublished] = {}
        self._lost: dict[str, str] = {}
        self._adopting = ""
        self._unfit: set[str] = set()  # peers of this round whose snapshots cannot be aligned to
        self._silent: set[str] = set()  # missed a deadline and have not been heard since
        self._expired = False
        self._merge: Merge | None = None
        self._parents: tuple[facts.Contribution, ...] = ()

    def handle(self, event: Event) -> list[Action]:
        """Take one event in, give the actions that follow from it."""
        if self.phase is Phase.DONE:
            return []
        match event:
            case Started():
                return self._begin(event.round) if self.phase is Phase.IDLE else []
            case TrainingDone():
                return self._trained(event)
            case PeerPublished():
                return self._offered(event)
            case SnapshotReady():
                return self._arrived(event)
            case FetchFailed():
                if self._awaits(event):
                    return self._lose(event.peer, event.reason)
                return []
            case PeerLost():
                return self._lose(event.peer, "lost")
            case Deadline():
                return self._deadline(event)
            case BasisChanged():
                return self._rebased(event)
            case MergeDone():
                return self._merged(event)
            case Stop():
                self.phase = Phase.DONE
                return [Exit(event.reason)]

    def _begin(self, number: int) -> list[Action]:
        self.round = number
        self.phase = Phase.TRAINING
        self._current = self._plan(number)
        self._ready, self._merge, self._unfit = {}, None, set()
        # a dead peer costs its neighbours one deadline, not one in every round
        self._lost = dict.fromkeys(self._silent, "silent since an earlier round")
        self._fetching = set()
        self._expired = False
        actions: list[Action] = [
            Report(facts.RoundStarted(agent=self.agent, round=number)),
            SetTimer(number, self._deadline_s),
            Train(number, self._current.learn),
        ]
        for peer, offers in self._offers.items():
            for old in [r for r in offers if r < number]:
                del offers[old]
            if number in offers and peer in self._current.mixing:
                actions += self._fetch(offers[number])
        return actions

    def _trained(self, event: TrainingDone) -> list[Action]:
        if event.round != self.round or self.phase is not Phase.TRAINING:
            return []
        self.phase = Phase.GATHERING
        self._own_root = event.root
        actions: list[Action] = [
            Checkpoint(self.round, "trained"),
            Publish(self.round, event.root, self.basis, self._parents),
        ]
        return actions + self._maybe_merge()

    def _offered(self, event: PeerPublished) -> list[Action]:
        """Note an offer. Only a mixing neighbour's counts, and a (peer, round) has one content for ever."""
        if event.peer in self._silent:
            self._silent.remove(event.peer)
            self._lost.pop(event.peer, None)
        if event.peer == self.agent or event.round < self.round or event.round > self._rounds:
            return []
        plan = self._current if event.round == self.round else self._plan(event.round)
        if event.peer not in plan.mixing:
            return []
        offers = self._offers.setdefault(event.peer, {})
        known = offers.get(event.round)
        if known is not None:
            if known.root == event.root:
                # a peer that was given up and is back: one more try, which the deadline bounds
                again = event.round == self.round and event.peer in self._lost
                gathering = self.phase in (Phase.TRAINING, Phase.GATHERING)
                return self._fetch(event) if again and gathering else []
            message = (
                f"{event.peer} offers another snapshot for round {event.round} ({event.root[:12]}…) than before "
                f"({known.root[:12]}…); the first one counts"
            )
            return [Report(facts.Warned(message=message, agent=self.agent))]
        offers[event.round] = event
        for surplus in sorted(offers)[OFFERS_KEPT:]:
            del offers[surplus]
        if event.round == self.round and self.phase in (Phase.TRAINING, Phase.GATHERING):
            return self._fetch(event)
        return []

    def _fetch(self, offer: PeerPublished) -> list[Action]:
        self._fetching.add(offer.peer)
        self._lost.pop(offer.peer, None)
        return [Fetch(offer.peer, offer.round, offer.root)]

    def _awaits(self, event: SnapshotReady | FetchFailed) -> bool:
        offer = self._offers.get(event.peer, {}).get(self.round)
        return (
            event.round == self.round
            and event.peer in self._fetching
            and offer is not None
            and offer.root == event.root
            and self.phase in (Phase.TRAINING, Phase.GATHERING)
        )

    def _arrived(self, event: SnapshotReady) -> list[Action]:
        if not self._awaits(event):
            return []
        self._fetching.discard(event.peer)
        self._silent.discard(event.peer)
        self._ready[event.peer] = self._offers[event.peer][self.round]
        self._lost.pop(event.peer, None)
        return self._maybe_merge()

    def _lose(self, peer: str, reason: str) -> list[Action]:
        if peer not in self._current.mixing or peer in self._ready or peer == self.agent:
            return []
        self._fetching.discard(peer)
        self._lost[peer] = reason
        return self._maybe_merge()

    def _deadline(self, event: Deadline) -> list[Action]:
        if event.round != self.round or self.phase not in (Phase.TRAINING, Phase.GATHERING):
            return []
        # from here on nobody is waited for; what arrives before own training ends is still welcome
        self._expired = True
        self._silent |= {peer for peer in self._expected() if peer not in self._ready and peer not in self._lost}
        return self._maybe_merge()

    def _expected(self) -> list[str]:
        return [peer for peer, weight in self._current.mixing.items() if peer != self.agent and weight > 0]

    def _maybe_merge(self) -> list[Action]:
        """Go on to the merge once every expected peer has arrived or is given up."""
        expected = self._expected()
        missing = [peer for peer in expected if peer not in self._ready]
        waiting = not self._expired and any(peer not in self._lost for peer in missing)
        if self.phase is not Phase.GATHERING or waiting:
            return []
        actions: list[Action] = [
            Report(
                facts.PeerLate(agent=self.agent, round=self.round, peer=peer, reason=self._lost.get(peer, "deadline"))
            )
            for peer in missing
        ]
        if expected and not self._ready:
            message = f"no peer was heard in round {self.round}; own weights are kept"
            actions.append(Report(facts.Warned(message=message, agent=self.agent)))
        return actions + self._adopt_or_merge()

    def _adopt_or_merge(self) -> list[Action]:
        best = self._best_basis()
        if best is None:
            return self._start_merge()
        self.phase = Phase.ADOPTING
        self._adopting = best.peer
        return [AdoptBasis(self.round, best.peer, best.root, best.basis)]

    def _best_basis(self) -> PeerPublished | None:
        """Return the peer whose basis is to be adopted: the smallest id, of equals the one with most weight."""
        if not self._gossip:
            return None
        fit = (offer for offer in self._ready.values() if offer.peer not in self._unfit)
        better = [offer for offer in fit if offer.basis < self.basis]
        weight = self._current.mixing
        return min(better, key=lambda offer: (offer.basis, -weight[offer.peer], offer.peer), default=None)

    def _rebased(self, event: BasisChanged) -> list[Action]:
        if event.round != self.round or self.phase is not Phase.ADOPTING:
            return []
        if event.basis == self.basis:
            self._unfit.add(self._adopting)
            return self._adopt_or_merge()
        self.basis = event.basis
        adopted = facts.BasisAdopted(
            agent=self.agent, round=self.round, peer=self._adopting, basis=str(event.basis), moved=event.moved
        )
        return [Report(adopted), *self._start_merge()]

    def _start_merge(self) -> list[Action]:
        self.phase = Phase.MERGING
        mixing = renormalise(self._current.mixing, self._ready, self.agent)
        parts = tuple(
            Part(peer, offer.root, mixing[peer], offer.basis == self.basis)
            for peer, offer in sorted(self._ready.items())
            if mixing.get(peer, 0.0) > 0
        )
        self._merge = Merge(self.round, mixing[self.agent], parts)
        return [self._merge]

    def _merged(self, event: MergeDone) -> list[Action]:
        merge = self._merge
        if event.round != self.round or self.phase is not Phase.MERGING or merge is None:
            return []
        actions: list[Action] = [
            Report(facts.PeerRefused(agent=self.agent, round=self.round, peer=peer, reason=reason))
            for peer, reason in sorted(event.refused.items())
        ]
        # what the accept stage backed off by belongs to self: the record says what is in the weights
        kept = [(p, p.weight * event.accepted) for p in merge.parts if p.peer not in event.refused]
        own = 1.0 - sum(weight for _, weight in kept)
        self._parents = (
            facts.Contribution(agent=self.agent, snapshot=self._own_root, round=self.round, weight=own),
            *(
                facts.Contribution(agent=p.peer, snapshot=p.root, round=self.round, weight=weight)
                for p, weight in kept
                if weight > 0
            ),
        )
        merged = facts.Merged(
            agent=self.agent,
            round=self.round,
            contributions=self._parents,
            heard=len(merge.parts),
            expected=len(self._expected()),
            before=event.before or {},
            after=event.after or {},
            accepted=event.accepted,
            merge_s=event.merge_s,
            notes=event.notes,
        )
        actions += [Report(merged), Checkpoint(self.round, "merged")]
        if self.round >= self._rounds:
            self.phase = Phase.DONE
            return [*actions, Exit("done")]
        return actions + self._begin(self.round + 1)
