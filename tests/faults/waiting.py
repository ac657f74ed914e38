"""Whom it makes sense to wait for in a synchronous round, worked out from what an agent has heard and from nothing of
the machine's: whoever waits for anybody else wastes a deadline."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from dimat.agent.protocol.inbox import LONGEST_REST
from dimat.agent.protocol.offers import PATIENCE, ROUNDS_KEPT, PeerPublished
from dimat.agent.protocol.plan import Plan, last_planned


@dataclass(slots=True)
class Waiting:
    """What an agent knows of its peers in one life.

    `gone`: peers that have left or were not heard for a whole round, with the last round that may still come of them;
    `newest`, `oldest`: rounds that they have got to and still offer; `gaps`: rounds that they left out, all of them;
    `offered`: the first content of each round; `late`: deadlines in a row that passed in waiting for a peer that was
    heard; `failed`: whose snapshot of this round could not be had; `heard`: who was, in this round; `number`: the
    round; `behind`: by how many rounds peers were behind, at least, when a deadline passed in waiting for them;
    `begun`: rounds of this life; `rests`: until which of them a late peer is not waited for; `due`: the last round
    before in which a peer was to be heard; `first`: what was offered before the first round.
    """

    plan: Collection[str] = ()
    gone: dict[str, int] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    oldest: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, set[int]] = field(default_factory=dict)
    offered: dict[tuple[str, int], str] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)
    number: int = 0
    behind: dict[str, int] = field(default_factory=dict)
    begun: int = 0
    rests: dict[str, int] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    first: list[PeerPublished] = field(default_factory=list)

    def settles(self, base: str) -> None:
        """The first round is to begin, on a base: offers on another one tell nothing of their peers' rounds."""
        self.newest, self.oldest, self.gaps, self.offered = {}, {}, {}, {}
        for offer in self.first:
            if offer.base == base:
                self._learns(offer)
        self.first = []

    def begins(self, plan: Plan, number: int) -> None:
        """A round begins, by a plan."""
        self.plan, self.number = plan.peers, number
        self.due = last_planned(plan, plan.of(number).mixing, number)
        self.failed, self.heard = set(), set()
        self.late = {peer: count for peer, count in self.late.items() if peer in plan.peers}
        self.behind = {peer: rounds for peer, rounds in self.behind.items() if peer in plan.peers}
        self.begun += 1

    def hears(self, offer: PeerPublished) -> None:
        """An offer of a peer that counts."""
        peer, number = offer.peer, offer.round
        if self.gone.get(peer, number) < number:
            del self.gone[peer]
        self.heard.add(peer)
        known = self._learns(offer)
        if known == offer.root and 0 <= number - self.number < ROUNDS_KEPT:
            # a second content revives nobody, nor a round that is over or far ahead
            self.failed.discard(peer)
        if self.number - number < self.behind.get(peer, 0):
            self.behind[peer] = self.number - number
            self.late.pop(peer, None)
        if not self.begun:
            self.first.append(offer)

    def _learns(self, offer: PeerPublished) -> str:
        """Take in what an offer says of its peer's rounds; return the content that counts for the offer's own."""
        peer, number = offer.peer, offer.round
        self.newest[peer] = max(self.newest.get(peer, 0), number)
        self.oldest[peer] = max(self.oldest.get(peer, 0), min(offer.oldest, number))
        if offer.previous:
            self.gaps.setdefault(peer, set()).update(range(offer.previous + 1, number))
        return self.offered.setdefault((peer, number), offer.root)

    def lost(self, peer: str, last: int) -> None:
        """A peer is said to be gone, after a round."""
        if peer in self.plan:
            self.gone[peer] = min(last, self.gone.get(peer, last))

    def came(self, peer: str) -> None:
        """A peer's snapshot is here."""
        self.late.pop(peer, None)
        self.behind.pop(peer, None)

    def expired(self, missing: Iterable[str], coming: Collection[str], number: int) -> None:
        """A deadline has passed while these had not come, some of which were on their way."""
        for peer in missing:
            if peer not in coming and not self.worth(peer, number):
                continue
            if peer in self.heard:
                self.late[peer] = self.late.get(peer, 0) + 1
                self.rests[peer] = self.begun + 2 ** min(self.late[peer] // PATIENCE + 1, LONGEST_REST)
                behind = number - self.newest.get(peer, 0)
                self.behind[peer] = min(behind, self.behind.get(peer, behind))
            else:
                self.gone[peer] = 0

    def worth(self, peer: str, number: int) -> bool:
        """Whether a peer's snapshot of a round may still come before the deadline."""
        if peer in self.failed or self.gone.get(peer, number) < number:
            return False
        newest = self.newest.get(peer, 0)
        if self.oldest.get(peer, 0) > number:  # withdrawn, if it was ever offered
            return False
        if number in self.gaps.get(peer, ()) and (peer, number) not in self.offered:
            return False
        due = self.due.get(peer, number - 1)
        if 0 < newest <= due - ROUNDS_KEPT:
            return False
        late = self.late.get(peer, 0)
        return newest >= due or late < PATIENCE or late % PATIENCE > 0 or self.begun > self.rests[peer]
