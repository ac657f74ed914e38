"""Whether a peer is present: when it counts as lost, and when as gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dimat.net.compatibility import quoted


class Presence:
    """A peer's absence, from one connection to the next.

    `on_lost` is called once for it, with peer, reason and the last round that the peer offers (0: not known): when the
    peer says that it leaves, or after `lost_after_s` out of reach, for the reason that `reason` returns.
    """

    def __init__(
        self, peer: str, lost_after_s: float, on_lost: Callable[[str, str, int], None], reason: Callable[[], str]
    ) -> None:
        self._peer = peer
        self._lost_after_s = lost_after_s
        self._on_lost = on_lost
        self._reason = reason
        self.lost = False
        """Whether the peer was reported as lost, and has not been reached since."""
        self.gone = ""
        """The reason why waiting for it is of no use, until it is reached again."""
        self.parting = ""
        """The reason that it gave when it left, until it is reached again."""
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def in_reach(self) -> None:
        """End an absence: the peer is there."""
        self.lost = False
        self.parting = self.gone = ""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def out_of_reach(self) -> None:
        """Begin an absence, if none has begun; needs the event loop."""
        if self._timer is None and not self.lost and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(self._lost_after_s, self._lose)

    def leaves(self, reason: str, last: int) -> None:
        """Note that the peer says it leaves, while it is still connected; `last`: the last round that it offers."""
        self.lost, self.parting = True, reason
        self._on_lost(self._peer, f"it has left ({quoted(reason)})", last)

    def unanswered(self) -> bool:
        """Note that the peer does not answer; return whether it is gone, since it had said that it leaves."""
        if self.parting:
            self.gone = f"it has left ({quoted(self.parting)})"
        return bool(self.parting)

    def close(self) -> None:
        """Begin no further absence."""
        self._closed = True

    def _lose(self) -> None:
        self._timer = None
        self.lost = True
        self._on_lost(self._peer, self._reason(), 0)
