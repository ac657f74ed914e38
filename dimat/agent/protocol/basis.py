"""Basis ids: the name of an order of units, and the rule by which agents come to share one.

Networks with permuted units compute the same function, so each agent starts in its own basis. In basis gossip an
agent that sees a neighbour with a smaller id permutes its units into that neighbour's basis and adopts the id. Ids
only ever fall, and all agents of a connected component agree after at most as many rounds as its diameter.
"""

from __future__ import annotations

from typing import NamedTuple


class BasisId(NamedTuple):
    """(round of founding, founder, nonce), compared in this order: the oldest basis wins.

    The nonce distinguishes two agents that used one name in turn, for instance after a lost disk.
    """

    round: int
    founder: str
    nonce: str

    def __str__(self) -> str:
        return f"{self.round}:{self.founder}:{self.nonce}"

    @staticmethod
    def parse(text: str) -> BasisId:
        """Parse `str(basis)`; raises ValueError if the text is not a basis id."""
        number, _, rest = text.partition(":")
        founder, _, nonce = rest.rpartition(":")
        if not founder or not nonce:
            raise ValueError(f"not a basis id: {text!r}")
        return BasisId(int(number), founder, nonce)
