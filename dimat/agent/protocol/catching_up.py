"""How far peers' round numbers move an agent: fully if other members confirm them.

A number is confirmed by two or more members that claim it, if most members are at that round; by fetched snapshots of
two members, if most are not; or by a fetched snapshot of the only neighbour. Any other number is one peer's word: it
moves an agent by at most `ROUNDS_KEPT` rounds beyond what it has counted itself or that peer has proved with a
snapshot, and never into the last round of the schedule.

A peer that was away proves all of its rounds with one snapshot, as long as it has made at most `ROUNDS_KEPT` rounds for
each round of the agent since the agent's last snapshot of that peer: its word could have taken the agent there, had it
been heard. A peer that was never away gains nothing by this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dimat.agent.protocol.messages import Action, Fetch, Release
from dimat.agent.protocol.offers import ROUNDS_KEPT, Offers, PeerPublished
from dimat.agent.protocol.plan import Rules


class CatchingUp:
    """Knowledge of rounds ahead: for each peer the newest round that it has proved, and the proof in transit."""

    def __init__(self, offers: Offers, rules: Rules) -> None:
        self._offers = offers
        self._rules = rules
        self._proved: dict[str, int] = {}
        self._coming: dict[str, PeerPublished] = {}
        self._turn = 0
        self._first = (0, 0)  # the agent's own first round in this life, and its turn
        self._paced: dict[str, tuple[int, int]] = {}  # the round that a peer has come to at a likely pace, and when
        self.moved = 0
        """Rounds by which one peer's word has moved the agent since it was in step."""
        self._doubted: list[str] = []  # whose word did not take it all the way

    def begins(self, number: int) -> None:
        """Count a round of the agent's own."""
        self._turn += 1
        if self._turn == 1:
            self._first = (number, 1)

    def target(
        self, front: int, number: int, heard: Sequence[str], peers: Collection[str], *, most: bool = True
    ) -> int:
        """Return the round to continue with, from `number` to `front`, which some of the peers `heard` claim.

        `peers`: all that the agent may hear. `most`: whether `front` is the round of most of those heard.
        """
        self._doubted = []
        claim = [peer for peer in heard if self._offers.range(peer)[1] >= front]
        if most and len(claim) > 1:
            self.moved = 0
            return front
        proved = sorted((self._proved.get(peer, 0) for peer in claim), reverse=True)
        borne_out = proved[:1] if len(peers) == 1 else proved[1:2]
        if borne_out and borne_out[0] > number:
            self.moved = 0
            return max(number, min(front, borne_out[0] + ROUNDS_KEPT))
        paced = max((self._paced[peer][0] for peer in claim if peer in self._paced), default=0)
        word = max(min(max([number - self.moved, *proved]), number), paced) + ROUNDS_KEPT
        last = front if self._rules.rounds is None else self._rules.rounds - 1
        target = max(number, min(front, word, last))
        self.moved += target - number
        self._doubted = claim if word < min(front, last) else []
        return target

    def proofs(self, coming: Collection[PeerPublished]) -> list[Action]:
        """Fetch the newest snapshots of the peers whose word did not take the agent to the round that they claim.

        `coming`: snapshots already in transit for the round, which prove as much.
        """
        wanted = [self._offers.farthest(peer) for peer in self._doubted]
        new = [
            offer for offer in wanted if offer is not None and offer.peer not in self._coming and offer not in coming
        ]
        self._coming |= {offer.peer: offer for offer in new}
        return [Fetch(offer.peer, offer.round, offer.root) for offer in new]

    def take(self, offer: PeerPublished) -> bool:
        """Leave a proof in transit to the round that needs the same snapshot; return whether there was one."""
        if self._coming.get(offer.peer) != offer:
            return False
        del self._coming[offer.peer]
        return True

    def arrived(self, peer: str, number: int, root: str) -> list[Action] | None:
        """Note that a snapshot has arrived; None if it was not asked for as a proof."""
        offer = self._coming.get(peer)
        if offer is None or (offer.round, offer.root) != (number, root):
            return None
        del self._coming[peer]
        self.in_hand(peer, number)
        return [Release(peer, number, root)]

    def failed(self, peer: str, number: int, root: str) -> bool:
        """Note that a snapshot could not be fetched; False if it was not asked for as a proof."""
        offer = self._coming.get(peer)
        if offer is None or (offer.round, offer.root) != (number, root):
            return False
        del self._coming[peer]
        return True

    def in_hand(self, peer: str, number: int) -> None:
        """Note that a peer's snapshot of a round was fetched."""
        self._proved[peer] = max(number, self._proved.get(peer, 0))
        before, turn = self._paced.get(peer, self._first)
        if number >= before:
            self._paced[peer] = (min(number, before + ROUNDS_KEPT * max(1, self._turn - turn)), self._turn)

    def overtake(self, number: int) -> list[Action]:
        """Release proofs in transit of rounds before `number`: they no longer move anybody."""
        past = [offer for offer in self._coming.values() if offer.round < number]
        self._coming = {peer: offer for peer, offer in self._coming.items() if offer.round >= number}
        return [Release(offer.peer, offer.round, offer.root) for offer in past]

    def forget_all_but(self, peers: Collection[str]) -> list[Action]:
        """Drop the proofs of peers that are not named, and release their snapshots."""
        self._proved = {peer: number for peer, number in self._proved.items() if peer in peers}
        self._paced = {peer: paced for peer, paced in self._paced.items() if peer in peers}
        gone = [offer for peer, offer in self._coming.items() if peer not in peers]
        self._coming = {peer: offer for peer, offer in self._coming.items() if peer in peers}
        return [Release(offer.peer, offer.round, offer.root) for offer in gone]
