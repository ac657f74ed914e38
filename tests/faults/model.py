"""A network small enough to check every number of: a few units with names, a momentum, a counter as random stream."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

UNITS = 5
MOMENTUM = 0.5
_MASK = (1 << 64) - 1
_PACK = struct.Struct(f"<{UNITS}d{UNITS}B")


def splitmix(state: int) -> tuple[int, float]:
    """Return the next state of a random stream and a number in [-1, 1) (Steele, Lea & Flood 2014, splitmix64)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, (z ^ (z >> 31)) / (1 << 63) - 1.0


class Snapshot(NamedTuple):
    """What an agent gives to others, by the address of its content. `order`: which unit stands where."""

    root: str
    order: tuple[int, ...]
    values: tuple[float, ...]

    @staticmethod
    def of(order: tuple[int, ...], values: tuple[float, ...]) -> Snapshot:
        """Address content."""
        return Snapshot(hashlib.blake2b(_PACK.pack(*values, *order), digest_size=8).hexdigest(), order, values)

    def in_order(self, order: tuple[int, ...]) -> tuple[float, ...]:
        """Return the values aligned to an order of units."""
        return self.values if order == self.order else reorder(self.values, self.order, order)


def reorder(values: Sequence[float], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[float, ...]:
    """Return values of units that stood in the order `old`, in the order `new`."""
    at = {unit: i for i, unit in enumerate(old)}
    return tuple(values[at[unit]] for unit in new)


@dataclass(slots=True)
class Model:
    """All that training goes on from: weights and momentum in one order of units, and the random stream."""

    order: tuple[int, ...]
    values: tuple[float, ...]
    momentum: tuple[float, ...]
    stream: int

    @staticmethod
    def initial(seed: int, order: tuple[int, ...]) -> Model:
        """Draw a network of its own."""
        stream, drawn = seed & _MASK, []
        for _ in range(UNITS):
            stream, x = splitmix(stream)
            drawn.append(10 * x)
        return Model(order, reorder(drawn, tuple(range(UNITS)), order), (0.0,) * UNITS, stream)

    def copy(self) -> Model:
        return Model(self.order, self.values, self.momentum, self.stream)

    def by_unit(self) -> tuple[float, ...]:
        """Return the weights by the units' names."""
        return reorder(self.values, self.order, tuple(range(UNITS)))

    def train(self) -> tuple[float, ...]:
        """Add noise with momentum; return what it added, by the units' names."""
        noise = [0.0] * UNITS
        for unit in range(UNITS):
            self.stream, noise[unit] = splitmix(self.stream)
        self.momentum = tuple(MOMENTUM * m + noise[unit] for m, unit in zip(self.momentum, self.order))
        self.values = tuple(v + m for v, m in zip(self.values, self.momentum))
        return reorder(self.momentum, self.order, tuple(range(UNITS)))

    def rebase(self, order: tuple[int, ...]) -> None:
        """Permute weights and momentum into another order of units."""
        self.values = reorder(self.values, self.order, order)
        self.momentum = reorder(self.momentum, self.order, order)
        self.order = order

    def adopt(self, snapshot: Snapshot) -> None:
        """Take a network over whole; momentum starts afresh."""
        self.order, self.values, self.momentum = snapshot.order, snapshot.values, (0.0,) * UNITS

    def merge(self, own_weight: float, others: Sequence[tuple[float, Snapshot]], accepted: float) -> None:
        """Average with snapshots, then go `accepted` of the way there."""
        merged = [own_weight * v for v in self.values]
        for weight, snapshot in others:
            for i, v in enumerate(snapshot.in_order(self.order)):
                merged[i] += weight * v
        self.values = tuple(v + accepted * (m - v) for v, m in zip(self.values, merged))

    def snapshot(self) -> Snapshot:
        return Snapshot.of(self.order, self.values)

    def to_dict(self) -> dict[str, object]:
        return {"order": self.order, "values": self.values, "momentum": self.momentum, "stream": self.stream}

    @staticmethod
    def from_dict(values: dict[str, list]) -> Model:
        stream = int(values["stream"])
        return Model(tuple(values["order"]), tuple(values["values"]), tuple(values["momentum"]), stream)
