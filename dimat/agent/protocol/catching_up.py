"""How far peers' round numbers move an agent: fully where members bear them out.

A number is borne out by two or more members that claim it, or by the only neighbour that there is once a snapshot of it
has been fetched. Any other number is one peer's word: it moves an agent by at most `ROUNDS_KEPT` rounds beyond what it
has counted itself or that peer has proved with a snapshot, and never into the last round of the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dimat.agent.protocol.messages import Action, Fetch, Release
from dimat.agent.protocol.offers import ROUNDS_KEPT, Offers, PeerPublished
from dimat.agent.protocol.plan import Rules


class CatchingUp:
    """What is known of rounds ahead: by peer the newest round that it has proved, and the proof that is on its way."""

    def __init__(self, offers: Offers, rules: Rules) -> None:
        self._offers = offers
        self._rules = rules
        self._proved: dict[str, int] = {}
        self._coming: dict[str, PeerPublished] = {}
        self.moved = 0
        """Rounds by which one peer's word has moved the agent since it was in step."""
        self._doubted: list[str] = []  # whose word did not take it all the way

    def target(self, front: int, number: int, heard: Sequence[str], peers: Collection[str]) -> int:
        """Return the round to go on with, from `number` to `front`, which some of the peers `heard` claim.

        `peers`: everybody whom the agent may hear.
        """
        self._doubted = []
        claim = [peer for peer in heard if self._offers.range(peer)[1] >= front]
        if len(claim) > 1:
            self.moved = 0
            return front
        proved = max((self._proved.get(peer, 0) for peer in claim), default=0)
        if len(peers) == 1 and proved > number:
            self.moved = 0
            return max(number, min(front, proved + ROUNDS_KEPT))
        word = min(max(proved, number - self.moved), number) + ROUNDS_KEPT
        last = front if self._rules.rounds is None else self._rules.rounds - 1
        target = max(number, min(front, word, last))
        self.moved += target - number
        self._doubted = claim if word < min(front, last) else []
        return target

    def proofs(self) -> list[Action]:
        """Fetch the newest snapshots of the peers whose word did not take the agent to where they say they are."""
        wanted = [self._offers.farthest(peer) for peer in self._doubted]
        new = [offer for offer in wanted if offer is not None and offer.peer not in self._coming]
        self._coming |= {offer.peer: offer for offer in new}
        return [Fetch(offer.peer, offer.round, offer.root) for offer in new]

    def take(self, offer: PeerPublished) -> bool:
        """Give a proof that is on its way up to the round that wants the same snapshot; whether it was."""
        if self._coming.get(offer.peer) != offer:
            return False
        del self._coming[offer.peer]
        return True

    def arrived(self, peer: str, number: int, root: str) -> list[Action] | None:
        """Note that a snapshot is here; None where it is no proof that was asked for."""
        offer = self._coming.get(peer)
        if offer is None or (offer.round, offer.root) != (number, root):
            return None
        del self._coming[peer]
        self.in_hand(peer, number)
        return [Release(peer, number, root)]

    def failed(self, peer: str, number: int, root: str) -> bool:
        """Note that a snapshot cannot be had; False where it is no proof that was asked for."""
        offer = self._coming.get(peer)
        if offer is None or (offer.round, offer.root) != (number, root):
            return False
        del self._coming[peer]
        return True

    def in_hand(self, peer: str, number: int) -> None:
        """Note that a peer's snapshot of a round was fetched."""
        self._proved[peer] = max(number, self._proved.get(peer, 0))

    def overtake(self, number: int) -> list[Action]:
        """Let go of proofs on their way of rounds before `number`: they move nobody any more."""
        past = [offer for offer in self._coming.values() if offer.round < number]
        self._coming = {peer: offer for peer, offer in self._coming.items() if offer.round >= number}
        return [Release(offer.peer, offer.round, offer.root) for offer in past]

    def forget_all_but(self, peers: Collection[str]) -> list[Action]:
        """Drop what peers that are not named have proved, and let their snapshots go."""
        self._proved = {peer: number for peer, number in self._proved.items() if peer in peers}
        gone = [offer for peer, offer in self._coming.items() if peer not in peers]
        self._coming = {peer: offer for peer, offer in self._coming.items() if peer in peers}
        return [Release(offer.peer, offer.round, offer.root) for offer in gone]
