"""Why an agent refuses a peer's offers: told once for each kind of fault, and counted."""

from __future__ import annotations

from dimat.agent.protocol.inbox import Heard
from dimat.agent.protocol.offers import PeerPublished


class Refusals:
    """Says why offers are refused, and remembers what it has said: a peer that repeats a fault fills no log.

    `counts`: each peer's refused offers, told or not.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._told: set[tuple[Heard, str]] = set()

    def reason(self, heard: Heard, offer: PeerPublished, base: str) -> str:
        """Return why an offer is refused; "" where it is not, or where that was said of its peer before.

        `heard`: the offer's fate; `base`: address of the weights that this agent takes deltas from.
        """
        reason = _reason(heard, offer, base)
        if not reason:
            return ""
        self.counts[offer.peer] = self.counts.get(offer.peer, 0) + 1
        if (heard, offer.peer) in self._told:
            return ""
        self._told.add((heard, offer.peer))
        return reason


def _reason(heard: Heard, offer: PeerPublished, base: str) -> str:
    match heard:
        case Heard.CONFLICT:
            return (
                f"it offers another snapshot for round {offer.round} ({offer.root[:12]}…) than before; the first one "
                "of a round counts, and others are refused and counted in the status"
            )
        case Heard.BEYOND:
            return f"it offers round {offer.round}, which nobody could offer"
        case Heard.OTHER_BASE:
            bases = f"its base is {offer.base[:12] or 'none'}, ours {base[:12] or 'none'}"
            return f"{bases}; agree on merge.base, and for adapters also on the base model"
        case Heard.IGNORED | Heard.NOTED:
            return ""
