"""Who contributed what: a record per merge, and the lineage of a model computed from them.

A merged model is Σ_j w_j · snapshot_j, and a snapshot is the model its agent merged the round before plus what
training added to it. Following the records back, a model is a weighted sum of the initial networks, with weights
that sum to 1, plus every round of training of every agent, each with the weight that reached the model.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from dimat.agent.protocol.messages import MergeRecord
from dimat.errors import DataError
from dimat.events import Contribution
from dimat.json_text import to_json
from dimat.reading import parse_json, read_text

DAMAGED = (
    "the file is damaged: put a copy of it back, or move it away, and the agent begins a new one, without the merges "
    "of before"
)
"""What to do about a ledger that holds no text."""

Model = tuple[str, int]
"""An agent's model after its merge of a round; round 0: its first network."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The origins of a model's weights.

    `initial[agent]`: weight of that agent's first network; `updates[agent, round]`: weight with which that round of
    training is in the model, from 0 to 1; `earlier[agent, round]`: weight of that agent's model as it went into that
    round, where nothing tells what it was made of. `initial` and `earlier` sum to 1.
    """

    initial: Mapping[str, float]
    updates: Mapping[tuple[str, int], float]
    earlier: Mapping[Model, float] = field(default_factory=dict[Model, float])

    def shares(self) -> dict[str, float]:
        """Return each agent's part in all training that is in the model.

        Sums to 1 where there was any.
        """
        totals: defaultdict[str, float] = defaultdict(float)
        for (agent, _), weight in self.updates.items():
            totals[agent] += weight
        whole = sum(totals.values())
        return {agent: total / whole for agent, total in sorted(totals.items())} if whole else {}


def lineage(
    records: Iterable[MergeRecord],
    agent: str,
    round: int | None = None,
    *,
    starts: Mapping[Model, int] | None = None,
    known: Mapping[Model, Lineage] | None = None,
) -> Lineage:
    """Return the lineage of `agent`'s model after its merge of `round` (default: its last).

    `starts` is for one who has not all records, but `agent`'s own: of others' snapshots (agent, round) the round of the
    merge that their training started from, 0 for a first network. Training from a merge that is not known ends in
    `Lineage.earlier`. Without it the records must be complete. `known`: models whose lineage is known already, so that
    records of before are not needed.

    Of several records of one agent and round the last counts: it is the one that became durable. DataError where
    there is no such record, where one names another snapshot than its publisher's own record does, or where
    merges depend on each other in a circle.
    """
    ledger = Ledger(records, agent, starts, known or {})
    wanted = round if round is not None else max(ledger.rounds.get(agent, [0]))
    if (agent, wanted) not in ledger.last and (agent, wanted) not in ledger.known:
        raise DataError(f"there is no record of a merge of {agent} in round {wanted}")
    return ledger.lineage((agent, wanted))


class Ledger:
    """Records by (agent, round), and the way back from a model to its parts. See `lineage`."""

    def __init__(
        self,
        records: Iterable[MergeRecord],
        agent: str,
        starts: Mapping[Model, int] | None,
        known: Mapping[Model, Lineage],
    ) -> None:
        self._agent = agent
        self._starts = starts
        self.known = known
        self.last: dict[Model, MergeRecord] = {(record.agent, record.round): record for record in records}
        self.rounds: defaultdict[str, list[int]] = defaultdict(list)
        for name, number in sorted({*self.last, *known}):
            self.rounds[name].append(number)

    def lineage(self, start: Model) -> Lineage:
        """Return the lineage of a model that is on record, or known."""
        initial: defaultdict[str, float] = defaultdict(float)
        updates: defaultdict[Model, float] = defaultdict(float)
        earlier: defaultdict[Model, float] = defaultdict(float)
        weights: defaultdict[Model, float] = defaultdict(float)
        weights[start] = 1.0
        for model in self.newest_first(start):
            weight = weights.pop(model)
            if (made := self.known.get(model)) is not None:
                for total, shares in ((initial, made.initial), (updates, made.updates), (earlier, made.earlier)):
                    for key, share in shares.items():
                        total[key] += weight * share  # pyright: ignore[reportArgumentType]
                continue
            if model not in self.last:
                initial[model[0]] += weight
                continue
            for part in self.parts(model):
                origin = self.origin(part)
                if origin is None:
                    earlier[part.agent, part.round] += weight * part.weight
                else:
                    weights[origin] += weight * part.weight
                if self.trained(part, model):
                    updates[part.agent, part.round] += weight * part.weight
        return Lineage(dict(sorted(initial.items())), dict(sorted(updates.items())), dict(sorted(earlier.items())))

    def parts(self, model: Model) -> list[Contribution]:
        return [part for part in self.last[model].contributions if part.weight > 0]

    def origin(self, part: Contribution) -> Model | None:
        """Return the model that a snapshot's training started from.

        It is its agent's newest merge before, or round 0. None where the records are not all there, and this is not
        known.
        """
        if self._starts is not None and part.agent != self._agent:
            start = self._starts.get((part.agent, part.round))
            known = start == 0 or (part.agent, start) in self.last or (part.agent, start) in self.known
            return (part.agent, start) if start is not None and known else None
        rounds = self.rounds.get(part.agent, [])
        before = bisect_left(rounds, part.round)
        return part.agent, rounds[before - 1] if before else 0

    def trained(self, part: Contribution, model: Model) -> bool:
        """Whether training preceded a snapshot that is a part of `model`.

        Raises DataError if the publisher's own record names another snapshot.
        """
        record = self.last.get((part.agent, part.round))
        if record is None or record.kind != "merge":
            # its publisher was gone before its own merge; whether a round trains is planned alike for all
            return self.last[model].trained or part.round != model[1]
        if record.snapshot != part.snapshot:
            raise DataError(
                f"the records disagree about {part.agent}'s snapshot of round {part.round}: "
                f"{record.snapshot[:12]}… and {part.snapshot[:12]}…"
            )
        return record.trained

    def newest_first(self, start: Model) -> list[Model]:
        """Return all models on which `start` depends, each before its own parts."""
        done: list[Model] = []
        state: dict[Model, bool] = {}  # True: all that it rests on is done
        stack = [start]
        while stack:
            model = stack[-1]
            if model in state:
                stack.pop()
                if not state[model]:
                    state[model] = True
                    done.append(model)
                continue
            state[model] = False
            for part in self.parts(model) if model in self.last and model not in self.known else ():
                origin = self.origin(part)
                if origin is None:
                    continue
                if state.get(origin) is False:
                    raise DataError(f"the records of {model[0]} and {origin[0]} depend on each other in a circle")
                if origin not in state:
                    stack.append(origin)
        return done[::-1]


def append_record(file: Path, record: MergeRecord, *, durable: bool = True) -> None:
    """Append a record to a ledger, one JSON object per line; `durable`: it survives power loss."""
    line = to_json(record.to_dict(), separators=(",", ":")) + "\n"
    try:
        with file.open("a+b") as ledger:
            # a line that a crash cut short stays behind as one damaged line of its own
            if ledger.tell() and not _ends_with_newline(ledger):
                line = "\n" + line
            ledger.write(line.encode())
            if durable:
                ledger.flush()
                os.fsync(ledger.fileno())
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error


def read_records(file: Path) -> list[MergeRecord]:
    """Read a ledger. A line that is cut short is ignored: its merge never became durable."""
    records: list[MergeRecord] = []
    for number, line in enumerate(read_text(file, mend=DAMAGED).splitlines(), 1):
        try:
            values = parse_json(line, finite=True)
        except JSONDecodeError:
            continue
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not a merge record: {error}") from None
        try:
            records.append(MergeRecord.from_dict(values))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{file}, line {number}: not a merge record: {error}") from None
    return records


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
