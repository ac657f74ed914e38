"""Peers' offers of snapshots, bounded whatever the peers claim."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from dimat.agent.protocol.basis import BasisId
from dimat.weights.snapshot import Manifest

ROUNDS_KEPT = 16
"""Offers kept per peer in synchronous mode, the nearest rounds first. Undirected neighbours are at most one round
ahead; along one-way links a peer may be ahead by as many rounds as the way back is long."""
FAR_KEPT = 4
"""Offers kept per peer of rounds that are further ahead than that, the newest ones: an agent that comes back after many
rounds follows its peers there, and nobody repeats to it what it has heard once."""
PATIENCE = 2
"""Rounds in a row for which a living peer is out of reach ahead before an agent makes up ground."""


@dataclass(frozen=True, slots=True)
class PeerPublished:
    """`peer` offers the snapshot `root`, its weights of `round`, written in `basis`.

    `oldest`: the oldest round that it still offers (0: not known). `pushed`: all the push-sum weight that it has
    ever sent to this agent, this snapshot's included. `base`: address of the weights that its task vectors start
    from, if any. `previous`: its own round from which this one was trained (0: not known); it skipped the rounds
    between. A driver hands in each offer when it is made, and again after each reconnection.
    """

    peer: str
    round: int
    root: str
    basis: BasisId
    run: str = ""
    oldest: int = 0
    pushed: float = 0.0
    base: str = ""
    previous: int = 0

    @staticmethod
    def of(manifest: Manifest, reader: str, oldest: int, basis: BasisId | None = None) -> PeerPublished:
        """Return a manifest's offer to `reader`.

        `basis`: the manifest's, if already parsed. Raises ValueError if the manifest's cannot be read.
        """
        return PeerPublished(
            manifest.agent,
            manifest.round,
            manifest.payload.root,
            basis or BasisId.parse(manifest.basis),
            run=manifest.run,
            oldest=oldest,
            pushed=manifest.pushed.get(reader, 0.0),
            base=manifest.base,
            previous=max((number for agent, _, number, _ in manifest.parents if agent == manifest.agent), default=0),
        )


class Known(Enum):
    """Whether an offer was known before."""

    NEW = "new"
    AGAIN = "again"
    CONFLICT = "conflict"
    """Other content under an (agent, round) that was offered before: the first one counts."""
    SURPLUS = "surplus"


class Offers:
    """Offers by peer and round.

    `newest_only`: keep only each peer's newest round (asynchronous mode). `newest_first`: if there are too many, drop
    the oldest, as for a newcomer, which has no round yet.
    """

    def __init__(self, *, newest_only: bool) -> None:
        self.span = 1 if newest_only else ROUNDS_KEPT
        self.newest_first = True
        self._offers: dict[str, dict[int, PeerPublished]] = {}
        self._far: dict[str, dict[int, PeerPublished]] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self._gaps: dict[str, dict[int, int]] = {}  # rounds that a peer left out: those between two numbers

    def heard(self, offer: PeerPublished) -> None:
        """Note which round a peer has reached, and which rounds it no longer offers."""
        oldest, newest = self._ranges.get(offer.peer, (0, 0))
        oldest = max(oldest, min(offer.oldest, offer.round))
        self._ranges[offer.peer] = (oldest, max(newest, offer.round))
        if 0 < offer.previous < offer.round - 1:
            gaps = self._gaps.setdefault(offer.peer, {})
            gaps[offer.previous] = offer.round
            for surplus in sorted(gaps)[FAR_KEPT:]:
                del gaps[surplus]
        for kept in (self._offers.get(offer.peer, {}), self._far.get(offer.peer, {})):
            for withdrawn in [number for number in kept if number < oldest]:
                del kept[withdrawn]

    def note(self, offer: PeerPublished) -> Known:
        """Keep an offer, if it is new and there is room."""
        offers = self._offers.setdefault(offer.peer, {})
        known = offers.get(offer.round)
        if known is not None:
            return Known.AGAIN if known.root == offer.root else Known.CONFLICT
        if offer.round < self.range(offer.peer)[0]:
            return Known.SURPLUS
        offers[offer.round] = offer
        rounds = sorted(offers, reverse=self.newest_first)
        for surplus in rounds[self.span :]:
            del offers[surplus]
        return Known.NEW if offer.round in offers else Known.SURPLUS

    def note_far(self, offer: PeerPublished) -> None:
        """Keep an offer of a round that is out of reach, as one of the newest few.

        The first one of a round counts.
        """
        far = self._far.setdefault(offer.peer, {})
        if offer.round >= self.range(offer.peer)[0]:
            far.setdefault(offer.round, offer)
        for surplus in sorted(far)[:-FAR_KEPT]:
            del far[surplus]

    def approach(self, number: int) -> None:
        """Treat offers that have come within reach in this round like the others, and only those.

        A newcomer has noted all alike: near ones that come would drive out the far ones that it has asked for.
        """
        for offers in self._offers.values():
            for beyond in [r for r in offers if r >= number + self.span]:
                self.note_far(offers.pop(beyond))
        for far in self._far.values():
            for near in [r for r in far if r < number + self.span]:
                self.note(far.pop(near))

    def get(self, peer: str, number: int) -> PeerPublished | None:
        """Return a peer's offer of a round, if it is known."""
        return self._offers.get(peer, {}).get(number)

    def newest(self, peer: str) -> PeerPublished | None:
        """Return the newest of a peer's offers that are kept."""
        offers = self._offers.get(peer)
        return offers[max(offers)] if offers else None

    def farthest(self, peer: str) -> PeerPublished | None:
        """Return the offer of a peer's newest round, within reach or not."""
        kept = {**self._offers.get(peer, {}), **self._far.get(peer, {})}
        return kept[max(kept)] if kept else None

    def range(self, peer: str) -> tuple[int, int]:
        """Return the oldest and newest round that a peer offers (0: not known, never heard)."""
        return self._ranges.get(peer, (0, 0))

    def left_out(self, peer: str, number: int) -> bool:
        """Whether a peer is known to have skipped a round."""
        return any(before < number < after for before, after in self._gaps.get(peer, {}).items())

    def forget_before(self, number: int) -> None:
        """Drop what is known of earlier rounds (synchronous mode: it is of no use)."""
        for offers in self._offers.values():
            for old in [r for r in offers if r < number]:
                del offers[old]
        for peer, gaps in self._gaps.items():
            self._gaps[peer] = {before: after for before, after in gaps.items() if after > number}

    def forget_all_but(self, peers: Collection[str]) -> None:
        """Drop all offers of peers that are not named."""
        self._offers = {peer: offers for peer, offers in self._offers.items() if peer in peers}
        self._far = {peer: far for peer, far in self._far.items() if peer in peers}
        self._ranges = {peer: range_ for peer, range_ in self._ranges.items() if peer in peers}
        self._gaps = {peer: gap for peer, gap in self._gaps.items() if peer in peers}

    def settle(self, base: str) -> None:
        """Drop offers with another base, and what they have told of their peers."""
        kept = [offer for offer in self if offer.base == base]
        self.forget_all_but({offer.peer for offer in kept} - {offer.peer for offer in self if offer.base != base})
        for offer in kept:
            self.heard(offer)
            self.note(offer)

    def front(self, peers: Collection[str]) -> int:
        """Return the round that a network is at, 0 if no peer was heard.

        It is the lower median of the peers' newest rounds.

        The median keeps one lying peer from moving an agent ahead if two or more others are heard.
        """
        rounds = sorted(self._ranges[peer][1] for peer in peers if peer in self._ranges)
        return rounds[(len(rounds) - 1) // 2] if rounds else 0

    def __iter__(self) -> Iterator[PeerPublished]:
        for offers in self._offers.values():
            yield from offers.values()
