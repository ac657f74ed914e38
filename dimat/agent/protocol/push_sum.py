"""Push-sum weights, which make averaging exact on directed graphs.

Every agent holds a weight y (1 at first) beside its network θ. Before it publishes it gives shares of y away, one
to each reader, and keeps the rest; a reader that merges the snapshot adds its share: y' = y_kept + Σ m_k and
θ' = (y_kept θ + Σ m_k θ_k) / y'. If nothing is lost Σ y stays n, and all θ tend to the true mean. Kempe, Dobra &
Gehrke 2003; as stochastic gradient push: Assran et al. 2019, arXiv 1811.10792.

Publishers state for each reader the sum of all shares so far. So a share that a reader misses in one round comes with
the next snapshot that it gets, as in the running sums of Hadjicostis, Vaidya & Domínguez-García 2016: weight is never
lost between two living agents, only late. That paper also sums y θ, at the price of a second network in each message;
here late weight counts for the newer θ, so that after missed snapshots the agreed value is off by
1/n Σ late weight × the change of θ meanwhile (`tests/agent/test_consensus.py` measures it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dimat.agent.protocol.plan import PushShares

SMALLEST = 1e-200
"""Weight that an agent never falls below: where readers are gone for good, their shares run off for ever."""


class PushSum:
    """One agent's push-sum weight.

    `sent[reader]`, `taken[peer]`: sums of shares since the start.
    """

    def __init__(self) -> None:
        self.weight = 1.0
        self.sent: dict[str, float] = {}
        self.taken: dict[str, float] = {}

    def push(self, shares: PushShares) -> None:
        """Give shares of the weight away."""
        for reader, share in shares.to.items():
            self.sent[reader] = self.sent.get(reader, 0.0) + share * self.weight
        self.weight = max(self.weight * shares.keep, SMALLEST)

    def mixing(self, pushed: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Return own mixing weight and that of each peer in `pushed` (peer → its sum of shares).

        They sum to 1.
        """
        shares = {peer: max(total - self.taken.get(peer, 0.0), 0.0) for peer, total in pushed.items()}
        whole = self.weight + sum(shares.values())
        mixing = {peer: share / whole for peer, share in shares.items()}
        return 1.0 - sum(mixing.values()), mixing

    def take(self, pushed: Mapping[str, float]) -> None:
        """Take in the shares that `mixing` weighed."""
        for peer, total in pushed.items():
            # a sum that has fallen is that of a peer which lost its disk: counting starts again from there
            self.weight += max(total - self.taken.get(peer, 0.0), 0.0)
            self.taken[peer] = total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {"weight": self.weight, "sent": dict(self.sent), "taken": dict(self.taken)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PushSum:
        """Rebuild the state from `to_dict`."""
        ledger = PushSum()
        ledger.weight = float(values["weight"])
        ledger.sent = {str(k): float(v) for k, v in values["sent"].items()}
        ledger.taken = {str(k): float(v) for k, v in values["taken"].items()}
        return ledger
