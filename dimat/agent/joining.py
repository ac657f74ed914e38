"""How a newcomer joins a network that lives already: at which round, and with whose weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dimat.agent.inbox import Inbox
from dimat.agent.offers import PeerPublished
from dimat.agent.plan import Plan, Rules


@dataclass(frozen=True, slots=True)
class Choice:
    """What a newcomer does. `round`: the network's, 0 where there is none and it founds one; `adopt`: the snapshot
    whose weights it takes over, None where it keeps its own."""

    round: int
    adopt: PeerPublished | None = None


def choose(inbox: Inbox, plan: Plan, rules: Rules, unfit: Collection[str], *, waited: bool) -> Choice | None:
    """Return what to do, or None while it is worth listening on: not everybody is heard and the wait is not over.

    `unfit`: peers whose weights turned out to be of no use.
    """
    heard = {peer: offer for peer in sorted(plan.peers) if (offer := inbox.offers.newest(peer)) is not None}
    if not waited and (not heard or any(peer not in heard and peer not in inbox.lost for peer in plan.peers)):
        return None
    if not heard:
        return Choice(0)
    front = inbox.offers.front(list(heard))
    fit = [offer for offer in heard.values() if offer.round >= front and offer.peer not in unfit]
    if rules.join == "align" or not fit:
        return Choice(front)
    return Choice(front, min(fit, key=lambda offer: (offer.basis, -offer.round, offer.peer)))
