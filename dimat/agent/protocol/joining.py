"""How a newcomer joins a running network: at which round, with whose weights.

Also decides whose basis an agent adopts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.inbox import Inbox
from dimat.agent.protocol.offers import ROUNDS_KEPT, PeerPublished
from dimat.agent.protocol.plan import Plan, Rules


@dataclass(frozen=True, slots=True)
class Choice:
    """How a newcomer joins.

    `round`: after which it begins: the network's, or less where that is not borne out; `adopt`: the snapshot whose
    weights it adopts, None if it keeps its own; `founds`: whether it has heard no network, and founds one.
    """

    round: int
    adopt: PeerPublished | None = None
    founds: bool = False


class Newcomer:
    """An agent that listens for a network, and then waits for the weights that it adopts.

    Its methods return actions; once `done` is set, listening is over and `done` says how the agent joins.
    """

    def __init__(self, agent: str, inbox: Inbox, plan: Plan, rules: Rules) -> None:
        self.done: Choice | None = None
        self._agent = agent
        self._inbox = inbox
        self._plan = plan
        self._rules = rules
        self._waited = False
        self._adopting: PeerPublished | None = None
        self._here = False  # what is adopted has arrived and is being taken over
        self._unfit: set[str] = set()  # snapshots that turned out to be of no use, by address

    def go_on(self) -> list[m.Action]:
        """Decide, unless it should still listen: some peers are not heard and the wait is not over."""
        if self.done is not None or self._adopting is not None:
            return []
        inbox, plan = self._inbox, self._plan
        heard = {peer: offer for peer in sorted(plan.peers) if (offer := inbox.offers.newest(peer)) is not None}
        silent = any(peer not in heard and peer not in inbox.lost for peer in plan.peers)
        if not self._waited and (not heard or silent):
            return []
        self._waited = True
        if not heard:
            self.done = Choice(0, founds=True)
            return []
        front = inbox.offers.front(list(heard))
        fit = [offer for offer in heard.values() if offer.round >= front and offer.root not in self._unfit]
        if self._rules.join == "align" or not fit:
            self.done = Choice(self._believed(front, heard.values(), in_hand=False))
            if self._rules.join == "align":
                return []
            return [
                self._warn("it joins with its own weights: it could get none of a neighbour at the network's round")
            ]
        chosen = min(fit, key=lambda offer: (offer.basis, -offer.round, offer.peer))
        self._adopting = chosen
        return [m.SetTimer(0, self._rules.deadline_s), m.Fetch(chosen.peer, chosen.round, chosen.root)]

    def arrived(self, event: m.SnapshotReady) -> list[m.Action]:
        """Adopt the weights that were asked for."""
        offer = self._awaited(event.peer, event.root)
        if offer is None:
            return []
        self._here = True
        return [m.AdoptWeights(offer.peer, offer.round, offer.root, offer.base)]

    def failed(self, event: m.FetchFailure) -> list[m.Action]:
        """The weights that were asked for could not be fetched."""
        offer = self._awaited(event.peer, event.root)
        return [] if offer is None else self._unusable(offer, event.reason)

    def lost(self, event: m.PeerLost) -> list[m.Action]:
        """A peer is gone; if its weights were in transit, another peer is chosen."""
        offer = self._adopting
        if offer is None or self._here or event.peer != offer.peer or event.last >= offer.round:
            return self.go_on()
        return [m.Release(offer.peer, offer.round, offer.root), *self._unusable(offer, event.reason)]

    def remapped(self, plan: Plan) -> list[m.Action]:
        """The map has changed: only the peers on the new one count."""
        self._plan = plan
        offer = self._adopting
        if offer is None or self._here or offer.peer in plan.peers:
            return self.go_on()
        return [m.Release(offer.peer, offer.round, offer.root), *self._unusable(offer, "it is no longer on the map")]

    def time_is_up(self) -> list[m.Action]:
        """The wait is over, for peers or for the weights that were asked for."""
        offer = self._adopting
        if offer is None:
            self._waited = True
            return self.go_on()
        return (
            []
            if self._here
            else [m.Release(offer.peer, offer.round, offer.root), *self._unusable(offer, "they do not arrive")]
        )

    def took_over(self, event: m.WeightsAdopted) -> list[m.Action]:
        """The weights were adopted, or could not be."""
        offer = self._adopting
        if offer is None or event.root != offer.root:
            return []
        release = m.Release(offer.peer, offer.round, offer.root)
        if event.fault:
            return [release, *self._unusable(offer, event.fault)]
        newest = [known for peer in self._plan.peers if (known := self._inbox.offers.newest(peer)) is not None]
        self.done = Choice(self._believed(offer.round, newest, in_hand=True), offer)
        return [release]

    def _believed(self, number: int, heard: Iterable[PeerPublished], *, in_hand: bool) -> int:
        """Return the round to join at: `number` where it is borne out, see `catching_up`, else less of it."""
        claims = sum(offer.round + ROUNDS_KEPT >= number for offer in heard)
        if claims > 1:
            return number
        last = number if self._rules.rounds is None else max(self._rules.rounds - 1, 0)
        if in_hand and len(self._plan.peers) == 1:
            return min(number, last)
        return self._inbox.take_word(min(number, last, ROUNDS_KEPT))

    def _awaited(self, peer: str, root: str) -> PeerPublished | None:
        offer = self._adopting
        return offer if offer is not None and (peer, root) == (offer.peer, offer.root) else None

    def _unusable(self, offer: PeerPublished, fault: str) -> list[m.Action]:
        self._adopting, self._here = None, False
        self._unfit.add(offer.root)
        return [self._warn(f"cannot join with the weights of {offer.peer}: {fault}"), *self.go_on()]

    def _warn(self, message: str) -> m.Emit:
        return m.Emit(events.Warned(message=message, agent=self._agent))


def better_basis(own: BasisId, offers: Iterable[PeerPublished], weight: Mapping[str, float]) -> PeerPublished | None:
    """Return the offer whose basis the agent should adopt; None if no basis is better.

    It has the smallest id below the agent's own, and among equal ids the most weight.
    """
    better = [offer for offer in offers if offer.basis < own]
    return min(better, key=lambda offer: (offer.basis, -weight[offer.peer], offer.peer), default=None)
