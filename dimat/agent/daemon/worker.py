"""What a real agent does on its own machine, one thing after the other, in a thread of its own: the event loop goes
on serving meanwhile."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dimat.agent.learner.checkpoint import CheckpointStore, Loaded
from dimat.agent.learner.learner import Learned, Learner
from dimat.agent.lineage.lineage import append_record
from dimat.agent.protocol import messages as m
from dimat.errors import DataError
from dimat.weights.durable import write_bytes
from dimat.weights.snapshot import Form, Payload

T = TypeVar("T")


class WorkThread:
    """A thread that does what it is given, in order. It is a daemon: nobody waits for it when the process ends."""

    def __init__(self) -> None:
        self.busy = False
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="dimat-work", daemon=True).start()

    def do(self, job: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do a job once those before it are done; the future has its outcome, in the event loop that asks."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(outcome: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(outcome)  # pyright: ignore[reportArgumentType]

        def run() -> None:
            try:
                outcome, error = job(*args), None
            except BaseException as caught:  # whoever asked is told, whatever it was
                outcome, error = None, caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, outcome, error)

        self._jobs.put(run)
        return future

    def _loop(self) -> None:
        while True:
            job = self._jobs.get()
            self.busy = True
            job()
            self.busy = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """A snapshot that was recorded and may still be asked for: what a manifest says of it."""

    payload: Payload
    forms: tuple[Form, ...]
    schema: str
    samples: int

    def save(self, folder: Path) -> None:
        """Write it beside its payload; DataError where that fails."""
        write_bytes(folder / f"{self.payload.root}.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def load(folder: Path, root: str) -> Recorded | None:
        """Read what was recorded under an address; None where there is nothing. DataError where it is damaged."""
        path = folder / f"{root}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            forms = tuple(Form(f["encoding"], _payload(f["payload"]), f["after"]) for f in values["forms"])
            return Recorded(_payload(values["payload"]), forms, values["schema"], int(values["samples"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from error


class AgentWorker:
    """The work of one agent, as plain calls that take as long as they take; they belong to one thread."""

    def __init__(
        self, local: Learner, run: str, checkpoints: CheckpointStore, lineage: Path, evaluate: str, weights: Path
    ) -> None:
        self.local = local
        self._run = run
        self._checkpoints = checkpoints
        self._lineage = lineage
        self._evaluate = evaluate
        self._weights = weights

    def restore(self) -> Loaded | None:
        """Go on from the newest checkpoint that can be read; None where there is none."""
        found = self._checkpoints.newest(self._run, self.local.name, self.local.schema())
        if found is not None:
            self.local.restore(found.checkpoint)
        return found

    def learn(self, action: m.Train) -> Learned:
        """Train for a round."""
        return self.local.learn(action.round, action.learn)

    def record(self, learned: Learned) -> Recorded:
        """Record the weights as a snapshot; DataError where it cannot be written, and it may be tried again then."""
        report = self.local.record(learned)
        recorded = Recorded(report.payload, report.forms, report.schema, report.samples)
        recorded.save(self.local.store)
        for record in self.local.store.glob("*.json"):
            if not record.with_suffix(".safetensors").exists():
                record.unlink(missing_ok=True)
        return recorded

    def checkpoint(self, action: m.CheckpointAction) -> None:
        """Make the record of a merge and the agent's state durable; DataError where that fails."""
        if action.record is not None:
            append_record(self._lineage, action.record)
        self._checkpoints.save(self.local.checkpoint(action.state))

    def adopt_basis(self, action: m.AdoptBasis, source: Path) -> m.Moves | None:
        """Permute the agent into the basis of a snapshot; None where it is not fit to align to."""
        return self.local.adopt(action.round, action.peer, source)

    def adopt_weights(self, action: m.AdoptWeights, source: Path) -> str:
        """Take over the weights of a snapshot; return why they could not be, or an empty string."""
        return self.local.take_over(action.peer, source)

    def merge(self, action: m.MergeAction, sources: Mapping[str, Path]) -> m.MergeDone:
        """Merge snapshots into own weights."""
        parts = [(part.peer, sources[part.peer], part.weight, part.same_basis) for part in action.parts]
        return self.local.merge(action.round, action.own_weight, parts, self._evaluate).done(action.round)

    def save_weights(self) -> None:
        """Write the current weights to where people find them."""
        self.local.save(self._weights)


def _payload(values: Mapping[str, Any]) -> Payload:
    return Payload(values["root"], int(values["bytes"]), tuple(values["blocks"]), int(values["block_bytes"]))
