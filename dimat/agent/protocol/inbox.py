"""An agent's inbox: peers' offers, snapshots in transit, snapshots that have arrived.

Part of the round machine, and like it without I/O, clock or chance. Whatever peers send, it keeps a bounded number
of things per peer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dimat.agent.protocol.catching_up import CatchingUp
from dimat.agent.protocol.messages import Action, Fetch, Release
from dimat.agent.protocol.modes import mode_of
from dimat.agent.protocol.offers import PATIENCE, ROUNDS_KEPT, Known, Offers, PeerPublished
from dimat.agent.protocol.plan import LAST_ROUND, Plan, RoundPlan, Rules, last_planned

SILENT = "not heard since an earlier round"
RECENT = 4
"""Rounds after which a peer that was not heard again may be dead; one that is ahead and waits makes fewer of them."""
LONGEST_REST = 10
"""Rounds in which a living peer that did not catch up is not waited for double each time, up to two to this power."""
PAST = "it is ahead and no longer offers this round"
BEHIND = "it is behind; it is waited for again once it has caught up"


class Heard(Enum):
    """The fate of an offer."""

    IGNORED = "ignored"
    NOTED = "noted"
    OTHER_BASE = "other base"
    CONFLICT = "conflict"
    BEYOND = "beyond the last round"


@dataclass(slots=True)
class _Late:
    """What is known of a living peer that a deadline has passed in waiting for, or that was ahead.

    `deadlines`: how many passed in a row; `turn`: the agent's round in which the last of them did; `behind`: by how
    many rounds the peer was behind then, at least.
    """

    deadlines: int
    turn: int
    behind: int


class Inbox:
    """Offers and snapshots of one agent's peers.

    `open`: whether snapshots for the current round are still fetched.
    """

    def __init__(self, agent: str, run: str, plan: Plan, rules: Rules) -> None:
        self.mode = mode_of(rules)
        self.offers = Offers(newest_only=self.mode.newest_only)
        self._catching_up = CatchingUp(self.offers, rules)
        self.ready: dict[str, PeerPublished] = {}
        self.fetching: dict[str, PeerPublished] = {}
        self.lost: dict[str, str] = {}
        """Peers that are not waited for in this round, and why."""
        self._failed: set[str] = set()  # those of which it is because the snapshot could not be had
        self.open = False
        self.base: str | None = ""
        """Address of the weights that deltas are taken from; None: a newcomer takes whatever the network's is."""
        self._agent = agent
        self._run = run
        self._plan = plan
        self._rules = rules
        # gone, or missed a deadline, and not heard since: why, and the last round that may still come
        self._silent: dict[str, tuple[str, int]] = {}
        self._retired: list[PeerPublished] = []  # replaced while a merge may still read them
        self._number = 0
        self._current = RoundPlan({agent: 1.0})
        self._expected: list[str] = []
        self._next: Plan | None = None
        self._turn = 0  # counts the rounds that were begun
        self._heard: dict[str, int] = {}  # the turn in which a peer was heard last
        self._late: dict[str, _Late] = {}
        self._due: dict[str, int] = {}  # the last round before this one in which a peer was in the plan
        self._apart: dict[str, int] = {}  # for how many rounds in a row a living peer was out of reach ahead

    # ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────
    def begin(self, number: int, current: RoundPlan) -> list[Action]:
        """Open a round: fetch what is offered for it."""
        self._number, self._current, self._turn = number, current, self._turn + 1
        self._catching_up.begins(number)
        # once a round: it is asked for with every message, and a dense graph has many of both
        self._expected = [peer for peer, weight in current.mixing.items() if peer != self._agent and weight > 0]
        self._due = last_planned(self._plan, self._expected, number)
        self.open = True
        # a dead peer costs its neighbours one deadline, not one in every round
        self.lost, self._failed = {peer: why for peer, (why, last) in self._silent.items() if last < number}, set()
        self.mode.open(self.offers, number)
        for peer in self.expected():
            self._pass_over(peer)
        fetched = [action for peer in self.expected() for action in self._fetch_from(peer)]
        # with a mode that keeps, whatever is newest is fetched anyway
        return fetched if self.mode.keeps else [*fetched, *self._catching_up.proofs(self.fetching.values())]

    def end(self) -> list[Action]:
        """Close a round and release the snapshots that no later one may merge."""
        self.open = False
        done = self._retired
        if not self.mode.keeps:
            done = [*done, *self.ready.values(), *self.fetching.values()]
            self.ready, self.fetching = {}, {}
        self._retired = []
        return [Release(offer.peer, offer.round, offer.root) for offer in done]

    def overtake(self, number: int) -> list[Action]:
        """Release snapshots fetched as proofs of rounds before `number`, which is about to begin."""
        return self._catching_up.overtake(number)

    def announce(self, plan: Plan) -> None:
        """Note the plan that applies from the next round on: offers of its peers count from now on."""
        self._next = plan

    def change(self, plan: Plan) -> list[Action]:
        """Use a new plan, between rounds.

        Offers and snapshots of peers that it does not name are dropped.
        """
        self._plan, self._next = plan, None
        self.offers.forget_all_but(plan.peers)
        self._silent = {peer: gone for peer, gone in self._silent.items() if peer in plan.peers}
        self._heard = {peer: turn for peer, turn in self._heard.items() if peer in plan.peers}
        self._late = {peer: late for peer, late in self._late.items() if peer in plan.peers}
        gone = [
            offer for held in (self.ready, self.fetching) for offer in held.values() if offer.peer not in plan.peers
        ]
        for offer in gone:
            self.ready.pop(offer.peer, None)
            self.fetching.pop(offer.peer, None)
        released = [Release(offer.peer, offer.round, offer.root) for offer in gone]
        return [*released, *self._catching_up.forget_all_but(plan.peers)]

    def settle(self, base: str) -> None:
        """Adopt the network's base; offers with another base are dropped."""
        self.base = base
        self.offers.settle(base)

    def expire(self) -> None:
        """Stop waiting in this round.

        A peer that was waited for and not heard counts as silent. The next round waits again for a peer that is late:
        it may catch up.
        """
        for peer in self.missing():
            if peer in self.lost:
                continue
            if self._heard_within(peer, 1):
                behind = self._number - self.offers.range(peer)[1]
                late = self._late.get(peer, _Late(0, 0, behind))
                self._late[peer] = _Late(late.deadlines + 1, self._turn, min(behind, late.behind))
            else:
                self._silent[peer] = (SILENT, 0)

    def network_round(self, number: int) -> int:
        """Return the round to continue with: `number`, or the network's if that is ahead.

        The network's round is a median, which one liar does not move. If a living peer stays out of reach ahead of
        it (two parts of a network that progressed at different speeds and meet again) an agent catches up, a bounded
        number of rounds at a time. See `CatchingUp` for how far one peer's word alone counts. Peers that have continued
        without this agent's snapshot do not wait for it: it goes to their round, whatever they still offer.
        """
        # who was heard in this round lives, though what it offered may not have come in time
        heard = [peer for peer in self._plan.peers if peer not in self._silent or self._heard_within(peer, 1)]
        front = self.offers.front(heard)
        passed = {peer for peer in heard if self._has_passed(peer, number)}
        apart = self._out_of_reach(number, heard, passed)
        still_offered = any(self.mode.may_come(self.offers, peer, number) for peer in heard if peer not in passed)
        if front > number + self.mode.slack and not still_offered:
            return self._catching_up.target(front, number, heard, self._plan.peers)
        if not apart:
            return number
        return self._catching_up.target(max(number, apart[0]), number, heard, self._plan.peers, most=False)

    def take_word(self, rounds: int) -> int:
        """Note that one peer's word has moved a newcomer by `rounds` rounds; return them."""
        self._catching_up.moved += rounds
        return rounds

    def _heard_within(self, peer: str, turns: int) -> bool:
        """Whether a peer was heard in this round or in the last `turns` rounds, this one counted."""
        return peer in self._heard and self._turn - self._heard[peer] < turns

    def _has_passed(self, peer: str, number: int) -> bool:
        """Whether a peer has gone on without this agent's snapshot of the round, or of a later one that is near."""
        ended = self.mode.ended(number, self.offers.range(peer)[1])
        return any(peer in self._plan.readers(r) for r in ended)

    def _out_of_reach(self, number: int, peers: Sequence[str], passed: Collection[str]) -> list[int]:
        """Return the newest rounds, in order, of living peers that have been ahead for some rounds, out of reach or
        without waiting (`passed`)."""
        ahead: dict[str, int] = {}
        for peer in peers:
            oldest, newest = self.offers.range(peer)
            far = peer in passed or self.mode.meets_at(oldest, newest) > number
            if far and self._heard_within(peer, RECENT):
                ahead[peer] = newest
        self._apart = {peer: self._apart.get(peer, 0) + 1 for peer in ahead}
        return sorted(newest for peer, newest in ahead.items() if self._apart[peer] >= PATIENCE)

    # ── what is known for the round ──────────────────────────────────────────────────────────────────────────
    def expected(self) -> list[str]:
        """Return the peers planned for the round."""
        return self._expected

    def missing(self) -> list[str]:
        """Return the peers that the round waits for."""
        return self.mode.missing(self._expected, self.ready)

    def usable(self) -> Mapping[str, PeerPublished]:
        """Return the snapshots that have arrived and may be merged in this round, by peer."""
        return self.mode.usable(self._expected, self.ready, self._number)

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────
    def hear(self, offer: PeerPublished) -> tuple[Heard, list[Action]]:
        """Note an offer.

        Only offers of a neighbour in this run count, and the content of a (peer, round) never changes.
        """
        known_peer = offer.peer in self._plan.peers or (self._next is not None and offer.peer in self._next.peers)
        foreign = offer.run != self._run or not known_peer or offer.peer == self._agent
        if foreign or offer.round < 1:
            return Heard.IGNORED, []
        if self._rules.beyond(offer.round):
            return Heard.IGNORED if offer.round <= LAST_ROUND else Heard.BEYOND, []
        if self.base is not None and offer.base != self.base:
            return Heard.OTHER_BASE, []
        given_up = offer.peer in self.lost
        if offer.peer in self._silent and self._silent[offer.peer][1] < offer.round:
            del self._silent[offer.peer]
            if offer.peer not in self._failed:
                self.lost.pop(offer.peer, None)
        self._heard[offer.peer] = self._turn
        self.offers.heard(offer)
        late = self._late.get(offer.peer, _Late(0, 0, 0))
        if self._number - offer.round < late.behind:  # nearer than ever: worth another wait
            self._late[offer.peer] = _Late(0, late.turn, self._number - offer.round)
        far = self.mode.is_far(self.offers, offer, self._number)
        if far:
            self.offers.note_far(offer)
        if far or self.mode.is_useless(offer, self._number, self._planned):
            self._pass_over(offer.peer)
            return Heard.NOTED, []
        known = self.offers.note(offer)
        self._pass_over(offer.peer)
        if known is Known.CONFLICT:
            return Heard.CONFLICT, []
        # a peer that was given up and is back: one more try, which the deadline bounds
        wanted = self.open and (known is Known.NEW or given_up)
        return Heard.NOTED, self._fetch_from(offer.peer) if wanted else []

    def arrived(self, peer: str, number: int, root: str) -> list[Action] | None:
        """Note that a snapshot has arrived.

        None if it was not asked for, or is no longer of use.
        """
        proof = self._catching_up.arrived(peer, number, root)
        if proof is not None:
            return proof
        offer = self._asked(peer, number, root)
        if offer is None or not (self.open or self.mode.keeps):
            return None
        del self.fetching[peer]
        self._late.pop(peer, None)
        self._catching_up.in_hand(peer, number)
        before = self.ready.get(peer)
        self.ready[peer] = offer
        if not self.open:
            self._retired += [before] if before is not None else []
            return []
        released: list[Action] = [Release(before.peer, before.round, before.root)] if before is not None else []
        return released + self._fetch_from(peer)

    def failed(self, peer: str, number: int, root: str, reason: str) -> list[Action] | None:
        """Note that a snapshot could not be fetched; None if it was not asked for."""
        if self._catching_up.failed(peer, number, root):
            return []
        offer = self._asked(peer, number, root)
        if offer is None:
            return None
        del self.fetching[peer]
        self.lost[peer] = reason
        self._failed.add(peer)
        return self._fetch_from(peer) if self.open and self.mode.replaced(self.offers, offer) else []

    def gone(self, peer: str, reason: str, last: int) -> bool:
        """Stop waiting for a peer's rounds after `last`.

        Its snapshots that have arrived or are in transit still count. False for a stranger.
        """
        if peer not in self._plan.peers:
            return False
        last = min(last, self._silent[peer][1]) if peer in self._silent else last  # it has not been heard since
        self._silent[peer] = (reason, last)
        if last < self._number and peer not in self.ready and peer not in self.fetching:
            self.lost[peer] = reason
        return True

    def _asked(self, peer: str, number: int, root: str) -> PeerPublished | None:
        offer = self.fetching.get(peer)
        return offer if offer is not None and (offer.round, offer.root) == (number, root) else None

    def _pass_over(self, peer: str) -> None:
        """Do not wait for a peer that is ahead and offers this round no more, nor for one that is far behind."""
        if peer in self.ready or peer in self.fetching:
            return
        if self.mode.is_past(self.offers, peer, self._number):
            self.lost[peer] = PAST
        elif self._is_behind(peer):
            self.lost[peer] = BEHIND
        elif self.lost.get(peer) == BEHIND:
            del self.lost[peer]

    def _is_behind(self, peer: str) -> bool:
        """Whether a peer is further behind than it comes within a round, or has not caught up while it was waited for
        `PATIENCE` times.

        It is tried again, `PATIENCE` times in a row and more and more rarely: one that follows at a slower pace never
        catches up with an agent that does not wait, and may have been held up by others when it was waited for.
        """
        newest = self.offers.range(peer)[1]
        # offers may come in planned rounds only, so that nothing is known of those since the last one
        due = self._due.get(peer, self._number - 1)
        late = self._late.get(peer, _Late(0, 0, 0))
        tries, rest = divmod(late.deadlines, PATIENCE)
        rests = tries > 0 == rest and self._turn - late.turn <= 2 ** min(tries + 1, LONGEST_REST)
        return 0 < newest <= due - ROUNDS_KEPT or (rests and newest < due)

    def _planned(self, number: int) -> RoundPlan:
        """Return the plan of this round, or of a later one as it is known now."""
        return self._current if number == self._number else (self._next or self._plan).of(number)

    def _fetch_from(self, peer: str) -> list[Action]:
        """Fetch what a peer offers for this round, unless that is on its way or here."""
        if peer not in self._current.mixing or peer in self.fetching:
            return []
        offer = self.mode.wanted(self.offers, peer, self._number)
        ready = self.ready.get(peer)
        if offer is None or (ready is not None and ready.round >= offer.round):
            return []
        self.fetching[peer] = offer
        self.lost.pop(peer, None)
        self._failed.discard(peer)
        if self._catching_up.take(offer):
            return []
        return [Fetch(peer, offer.round, offer.root)]
