"""Basis ids: the name of an order of units, and the rule by which agents come to share one.

Networks with permuted units compute the same function, so each agent starts in a basis of its own. In basis
gossip an agent that sees a smaller id at a neighbour permutes itself into that neighbour's basis and takes the
id over; ids only ever fall, and after at most diameter rounds all agents of a connected component agree.
"""

from __future__ import annotations

from typing import NamedTuple


class BasisId(NamedTuple):
    """(round of founding, founder, nonce), compared in this order: the oldest basis wins.

    The nonce tells two lives of one agent name apart, one that lost its disk, say.
    """

    round: int
    founder: str
    nonce: str

    def __str__(self) -> str:
        return f"{self.round}:{self.founder}:{self.nonce}"

    @staticmethod
    def parse(text: str) -> BasisId:
        """Read `str(basis)` back; ValueError where it is none."""
        number, _, rest = text.partition(":")
        founder, _, nonce = rest.rpartition(":")
        if not founder or not nonce:
            raise ValueError(f"not a basis id: {text!r}")
        return BasisId(int(number), founder, nonce)
