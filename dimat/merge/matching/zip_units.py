"""ZipIt's matching: which units of all models become which merged unit."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 1e-4
"""How much a budget may lack of a whole number, as in the authors' program."""


def zip_units(correlation: Tensor, models: int, a: float, b: float, *, within: bool = True) -> Tensor:
    """Return which merged unit each unit becomes: (models · units,) int64, merged units in order of their lowest one.

    correlation: (models · units)², rows and columns model by model. The pair with the highest correlation is merged,
    (models − 1) · units times; of equal ones the first, row by row. A merged unit goes with another as the worse of its
    halves does, times `a`, and counts as one of its lower half's model. `b`: a model may merge pairs of its own
    ⌊(models − 1) · units / models⌋ · b times, rounded down (but once, even where that is 0), then no more.
    `a` = 0: a merged unit takes in none of a model that it holds. `within` False: no pair is ever of one model,
    so that two models are matched one to one.
    Where bars leave no pair (of three models or more), they are lifted.

    This is what the authors' program does, in the same type and order of operations; but for a = 0, where it bars
    rows by their place before any was taken out.
    """
    total = correlation.shape[0]
    units = total // models
    origin = torch.arange(models).repeat_interleave(units)
    holds = torch.nn.functional.one_hot(origin, models).bool()
    merged_into = torch.arange(total)
    left = [int((total - units) // models * b + WHOLE)] * models
    free = correlation.detach().cpu().clone().fill_diagonal_(-torch.inf)  # correlations, whatever is barred
    table = _Table(free.clone())
    if not within:
        for number in range(models):
            table.bar((origin == number).nonzero()[:, 0])
    for _ in range(total - units):
        if table.stuck():
            table = _Table(free.clone())
        row, column = table.best_pair()
        same = bool(origin[row] == origin[column])
        holds[row] |= holds[column]
        merged_into[merged_into == column] = row
        origin[column] = -1
        holds[column] = False
        _join(free, row, column, a or 1.0)
        table.join(row, column, a or 1.0)
        if not a:
            table.bar_from(row, (holds & holds[row]).any(1).nonzero()[:, 0])
        if same:
            number = int(origin[row])
            left[number] -= 1
            if left[number] <= 0:
                table.bar((origin == number).nonzero()[:, 0])
    return merged_into.unique(return_inverse=True)[1]


def keep_places(labels: Tensor, units: int) -> Tensor:
    """Return the labels with merged units put where their lowest unit of the first model is; those that have none
    fill the places left, in order. What goes by the first model's order of units can go on with the merged one."""
    place = [-1] * units
    for unit in reversed(range(units)):
        place[int(labels[unit])] = unit
    rest = iter(sorted(set(range(units)) - set(place)))
    return torch.tensor([p if p >= 0 else next(rest) for p in place])[labels]


class _Table:
    """Scores of all pairs, with the best of each row at hand: a merge touches few rows' bests."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores
        self._best, self._where = scores.max(1)

    def stuck(self) -> bool:
        return bool(self._best.max() == -torch.inf)

    def best_pair(self) -> tuple[int, int]:
        """Return the pair with the highest score, lower unit first."""
        row = int(self._best.argmax())
        column = int(self._where[row])
        return min(row, column), max(row, column)

    def join(self, row: int, column: int, factor: float) -> None:
        """Let `row` stand for both, and nothing for `column`."""
        _join(self._scores, row, column, factor)
        self._best[column] = -torch.inf
        stale = (self._where == row) | (self._where == column)
        stale[row], stale[column] = True, False
        news = self._scores[:, row]
        better = ~stale & ((news > self._best) | ((news == self._best) & (row < self._where)))
        better[column] = False
        self._best[better], self._where[better] = news[better], row
        self._look_again(stale.nonzero()[:, 0])

    def bar(self, members: Tensor) -> None:
        """Bar all pairs among these."""
        self._scores[members[:, None], members] = -torch.inf
        self._look_again(members)

    def bar_from(self, unit: int, others: Tensor) -> None:
        """Bar pairs of a unit with these."""
        self._scores[unit, others] = self._scores[others, unit] = -torch.inf
        self._look_again(torch.cat([others, torch.tensor([unit])]))

    def _look_again(self, rows: Tensor) -> None:
        self._best[rows], self._where[rows] = self._scores[rows].max(1)


def _join(scores: Tensor, row: int, column: int, factor: float) -> None:
    scores[:, row] = torch.minimum(scores[:, row], scores[:, column]) * factor
    scores[row] = torch.minimum(scores[row], scores[column]) * factor
    scores[:, column] = scores[column] = -torch.inf
