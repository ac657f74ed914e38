"""The modes of a round, sync and async: which snapshots it merges, whom it waits for.

A mode has no state: it decides from the offers and snapshots that the inbox keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dimat.agent.protocol.offers import ROUNDS_KEPT, Offers, PeerPublished
from dimat.agent.protocol.plan import RoundPlan, Rules

Ready = Mapping[str, PeerPublished]
"""The snapshots that have arrived, by peer."""


class Mode(Protocol):
    """The decisions in which the modes differ. `number`: the round in progress, 0 before the first."""

    keeps: bool
    """Whether a snapshot may be merged in a later round than the one that it was fetched in."""
    newest_only: bool
    """Whether only the newest of each peer's offers counts."""
    slack: int
    """Rounds by which a peer may be ahead without being out of reach."""

    def open(self, offers: Offers, number: int) -> None:
        """Sort the offers for a round that begins."""
        ...

    def wanted(self, offers: Offers, peer: str, number: int) -> PeerPublished | None:
        """Return the peer's offer that the round takes, if it is known."""
        ...

    def replaced(self, offers: Offers, offer: PeerPublished) -> bool:
        """Whether the peer offers another snapshot in place of one that could not be fetched."""
        ...

    def missing(self, expected: Sequence[str], ready: Ready) -> list[str]:
        """Return the peers that the round waits for."""
        ...

    def usable(self, expected: Sequence[str], ready: Ready, number: int) -> Ready:
        """Return the snapshots that may be merged in the round."""
        ...

    def is_past(self, offers: Offers, peer: str, number: int) -> bool:
        """Whether a peer is ahead of the round and no longer offers its snapshot of it."""
        ...

    def is_far(self, offers: Offers, offer: PeerPublished, number: int) -> bool:
        """Whether an offer is only of use after many skipped rounds."""
        ...

    def is_useless(self, offer: PeerPublished, number: int, planned: Callable[[int], RoundPlan]) -> bool:
        """Whether an offer is of no use: its round is over already, or not planned with it."""
        ...

    def may_come(self, offers: Offers, peer: str, number: int) -> bool:
        """Whether a peer's snapshot of the round may still be found."""
        ...

    def meets_at(self, oldest: int, newest: int) -> int:
        """Return the first round that can merge a peer offering rounds `oldest` to `newest`."""
        ...

    def ended(self, number: int, newest: int) -> range:
        """Return the rounds from `number` on that a peer has ended without this agent, of those that are near.

        `newest`: the newest round that the peer offers.
        """
        ...

    def begins_alone(self, number: int) -> bool:
        """Whether hearing nobody in the round is expected."""
        ...


class Synchronous:
    """A round merges its neighbours' snapshots of the same round, and waits for them."""

    keeps = False
    newest_only = False
    slack = 0

    def open(self, offers: Offers, number: int) -> None:
        """Take in offers within reach; offers of earlier rounds are of no use."""
        offers.newest_first = False
        offers.approach(number)
        offers.forget_before(number)

    def wanted(self, offers: Offers, peer: str, number: int) -> PeerPublished | None:
        """Return the peer's offer of this very round."""
        return offers.get(peer, number)

    def replaced(self, offers: Offers, offer: PeerPublished) -> bool:
        """A peer's snapshot of a round never changes."""
        return False

    def missing(self, expected: Sequence[str], ready: Ready) -> list[str]:
        """Return the planned peers whose snapshots have not arrived."""
        return [peer for peer in expected if peer not in ready]

    def usable(self, expected: Sequence[str], ready: Ready, number: int) -> Ready:
        """Return all that have arrived: they were fetched for this round."""
        return ready

    def is_past(self, offers: Offers, peer: str, number: int) -> bool:
        """The peer's offers begin after the round, or it left the round out."""
        gone = offers.range(peer)[0] > number or offers.left_out(peer, number)
        return gone and offers.get(peer, number) is None

    def is_far(self, offers: Offers, offer: PeerPublished, number: int) -> bool:
        """The offer is further ahead than offers are kept."""
        return 0 < number <= offer.round - offers.span

    def is_useless(self, offer: PeerPublished, number: int, planned: Callable[[int], RoundPlan]) -> bool:
        """The round is over, or the peer is not in its plan."""
        if number == 0:
            return False
        return offer.round < number or offer.peer not in planned(offer.round).mixing

    def may_come(self, offers: Offers, peer: str, number: int) -> bool:
        """The offer is known, or was lost on its way and lies within what the peer still offers."""
        oldest, newest = offers.range(peer)
        lost = oldest <= number <= newest < number + ROUNDS_KEPT and not offers.left_out(peer, number)
        return lost or offers.get(peer, number) is not None

    def meets_at(self, oldest: int, newest: int) -> int:
        """The peer's oldest round."""
        return oldest

    def ended(self, number: int, newest: int) -> range:
        """Return the rounds before the peer's newest: each of them waits for its peers, and it has gone on."""
        return range(number, min(newest, number + ROUNDS_KEPT))

    def begins_alone(self, number: int) -> bool:
        """Each round, even the first, should hear of its neighbours' snapshots."""
        return False


class Asynchronous:
    """A round merges the newest snapshots, at most `max_staleness` rounds old; it never waits."""

    keeps = True
    newest_only = True

    def __init__(self, rules: Rules) -> None:
        self.slack = rules.max_staleness

    def open(self, offers: Offers, number: int) -> None:
        """The newest offers stay, whatever the round."""
        offers.newest_first = True

    def wanted(self, offers: Offers, peer: str, number: int) -> PeerPublished | None:
        """Return the peer's newest offer."""
        return offers.newest(peer)

    def replaced(self, offers: Offers, offer: PeerPublished) -> bool:
        """The peer has published another round meanwhile."""
        return offers.newest(offer.peer) not in (None, offer)

    def missing(self, expected: Sequence[str], ready: Ready) -> list[str]:
        """Nobody is waited for."""
        return []

    def usable(self, expected: Sequence[str], ready: Ready, number: int) -> Ready:
        """Return the planned peers' snapshots that are not too old."""
        oldest = number - self.slack
        return {peer: ready[peer] for peer in expected if peer in ready and ready[peer].round >= oldest}

    def is_past(self, offers: Offers, peer: str, number: int) -> bool:
        """A snapshot of a later round is as good."""
        return False

    def is_far(self, offers: Offers, offer: PeerPublished, number: int) -> bool:
        """A snapshot of a later round is as good."""
        return False

    def is_useless(self, offer: PeerPublished, number: int, planned: Callable[[int], RoundPlan]) -> bool:
        """An older one may be within `max_staleness`, and who is planned may change."""
        return False

    def may_come(self, offers: Offers, peer: str, number: int) -> bool:
        """No snapshot of a particular round is needed."""
        return False

    def meets_at(self, oldest: int, newest: int) -> int:
        """The first round in which the peer's newest snapshot is not ahead by more than the slack."""
        return newest - self.slack

    def ended(self, number: int, newest: int) -> range:
        """Return none: no round waits, so none is ended without anybody."""
        return range(0)

    def begins_alone(self, number: int) -> bool:
        """An agent is alone at first, until somebody else has trained."""
        return number <= self.slack + 1


def mode_of(rules: Rules) -> Mode:
    """Return the mode that the rules name."""
    return Synchronous() if rules.mode == "sync" else Asynchronous(rules)
