"""Drives one agent's round machine for real: event loop, network, thread, wall clock.

Actions are carried out in the order in which the machine gives them, and the next event is handed in once they have
begun. The runner waits for a checkpoint, so that later actions (publishing above all) follow a durable state. In the
checkpoint after training, the optimizer's state is written after the snapshot is published: peers wait for weights
only. Training, merging and fetching run beside the loop, and their results come back as events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from dimat import events
from dimat.agent.daemon.lateness import Lateness
from dimat.agent.daemon.worker import AgentWorker, WorkThread
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import Plan
from dimat.agent.protocol.round import Phase, RoundMachine
from dimat.agent.protocol.work import Outcome
from dimat.errors import DataError, NetworkError, SecurityError
from dimat.events.view import AgentView
from dimat.net.threads import beside
from dimat.net.transport import Fetched, Transport
from dimat.train.progress import TrainingInterruptedError
from dimat.weights.snapshot import Manifest, RecordedSnapshot

T = TypeVar("T")

RETRY_S = (1.0, 60.0)
"""Seconds after which a write that failed (a full disk, say) is tried again: at first, and at most."""


class Runner:
    """One agent, from the start of its process to the end.

    It is the `PeerListener` of its transport, which its owner starts and closes.
    `emit` is called with every event, from the event loop's thread; `fetched` with every snapshot that arrives and the
    publisher's signed manifest, before the machine knows of it; `lateness` measures peers' lateness in synchronous
    rounds.
    """

    def __init__(
        self,
        machine: RoundMachine,
        work: AgentWorker,
        thread: WorkThread,
        transport: Transport,
        emit: Callable[[events.Event], None],
        fetched: Callable[[Fetched], None],
        *,
        max_time_s: float | None = None,
        lateness: Lateness | None = None,
    ) -> None:
        self.machine = machine
        self.ended: str | None = None
        """Why the agent has left, once it has."""
        self.view = AgentView(machine.agent, machine.run)
        self._work = work
        self._thread = thread
        self._transport = transport
        self._emit_to = emit
        self._note_fetched = fetched
        self._max_time_s = max_time_s
        self._lateness = lateness
        self._events: asyncio.Queue[m.Event] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._fetches: dict[tuple[str, int, str], asyncio.Task[None]] = {}
        self._jobs = asyncio.TaskGroup()
        self._held: dict[tuple[str, int, str], Fetched] = {}
        self._incomplete: events.Checkpointed | None = None  # to be told once it is whole
        self._recorded: dict[str, RecordedSnapshot] = {}
        self._sent = sum(transport.sent_bytes.values())  # up to the end of the last round
        self._received = 0  # since then
        self._phase, self._phase_began = "", time.monotonic()

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────
    async def run(self, *, join: bool) -> str:
        """Run until the agent leaves; return why. Raises the errors of its work."""
        loop = self._loop = asyncio.get_running_loop()
        over = None if self._max_time_s is None else loop.call_later(self._max_time_s, self.post, m.TimeUp())
        self.post(m.Started(join=join))
        try:
            async with beside(self._jobs):
                await self._go_on()
        finally:
            for handle in (over, self._timer):
                if handle is not None:
                    handle.cancel()
        if self._fault is not None:
            raise self._fault
        return self.ended or ""

    async def _go_on(self) -> None:
        """Hand the machine one event after the other, until the agent leaves or a job has raised something."""
        while self.ended is None and self._fault is None:
            await self._handle(await self._events.get())

    def post(self, event: m.Event) -> None:
        """Give the machine an event, once it has handled those before."""
        self._events.put_nowait(event)

    def stop(self, reason: str) -> None:
        """Leave at once; the newest checkpoint stays valid."""
        self._stopping.set()
        self.post(m.Stop(reason))

    async def save(self, most_s: float) -> None:
        """Save the round's training so far after the current step, within a time."""
        middle = self._work.middle
        middle.interrupt()
        if not middle.unsaved:
            return  # a merge that is under way is made again from what was durable before it
        saving = self._thread.do(middle.leave)
        await asyncio.wait([saving], timeout=most_s)
        if not saving.done():
            self.noticed(
                f"a step of training and saving it take longer than agent.drain_s ({most_s:g} s): the training of "
                f"round {self.machine.round} is lost; raise agent.drain_s, or set agent.checkpoint_every_s"
            )
        elif (error := saving.exception()) is not None:
            self._saved(str(error))
        elif saving.result():
            self._saved("")

    def saved_soon(self, fault: str) -> None:
        """Report from any thread that the middle of a round was saved, or why not."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._saved, fault)

    def _saved(self, fault: str) -> None:
        number = self.machine.round
        if fault:
            self.noticed(f"{fault}; the training of round {number} so far is not saved")
        else:
            self.emit(events.Checkpointed(agent=self.machine.agent, round=number, stage="training"))

    def remap(self, plan: Plan) -> None:
        """Use a new network map from the next round on."""
        self.post(m.MapChanged(plan))

    # ── what is heard ────────────────────────────────────────────────────────────────────────────────────────
    def offered(self, manifest: Manifest, oldest: int) -> None:
        """A peer offers a snapshot."""
        if self._lateness is not None:
            self._lateness.offered(manifest.agent, manifest.round, time.monotonic())
        self.post(PeerPublished.of(manifest, self.machine.agent, oldest))

    def lost(self, peer: str, reason: str, last: int) -> None:
        """A peer has left, or is out of reach."""
        if self._lateness is not None:
            self._lateness.lost(peer)
        self.post(m.PeerLost(peer, reason, last))

    def refused(self, peer: str, reason: str) -> None:
        """A peer is refused."""
        self.emit(events.PeerRefused(agent=self.machine.agent, round=self.machine.round, peer=peer, reason=reason))

    def noticed(self, message: str) -> None:
        """Emit a warning for a person."""
        self.emit(events.Warned(message=message, agent=self.machine.agent))

    def twin(self, reason: str) -> None:
        """Leave: an older process runs under this agent's name."""
        if self._fault is None:
            self._fault = SecurityError(reason)
            self.stop("another process runs under its name")

    # ── actions ──────────────────────────────────────────────────────────────────────────────────────────────
    async def _handle(self, event: m.Event) -> None:
        answers = isinstance(event, m.SnapshotReady | m.FetchFailure)
        if answers and (event.peer, event.round, event.root) in self._fetches:
            return  # of a fetch that was released while this waited: the same one, asked for again, has its own answer
        actions = self.machine.handle(event)
        if self.machine.phase is Phase.JOINING:
            self._enter("join")
        for action in actions:
            await self._perform(action)

    def _enter(self, phase: str) -> None:
        """Tell that another part of the round begins; going on with the same one is not told."""
        if phase == self._phase:
            return
        now = time.monotonic()
        self.emit(
            events.PhaseStarted(
                agent=self.machine.agent,
                round=self.machine.round,
                phase=phase,
                previous=self._phase,
                previous_s=now - self._phase_began if self._phase else 0.0,
            )
        )
        self._phase, self._phase_began = phase, now

    async def _perform(self, action: m.Action) -> None:
        agent = self.machine.agent
        match action:
            case m.Emit(fact=fact):
                self.emit(fact)
            case m.SetTimer(round=number, seconds=seconds):
                if self._timer is not None:
                    self._timer.cancel()
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(seconds, self.post, m.Deadline(number))
            case m.Fetch():
                key = (action.peer, action.round, action.root)
                self._fetches[key] = self._start(self._fetch, action)
            case m.Release(peer=peer, round=number, root=root):
                self._release((peer, number, root))
            case m.Train():
                self._enter("train")
                self._start(self._train, action)
            case m.CheckpointAction(round=number, stage=stage):
                await self._durable(self._work.checkpoint(self._vouched(action)))
                told = events.Checkpointed(agent=agent, round=number, stage=stage)
                if self._work.incomplete:
                    self._incomplete = told
                else:
                    self.emit(told)
                if stage == "merged":
                    await self._save_weights()
                    self._finish(number)
            case m.Publish():
                self._enter("wait")
                await self._publish(action)
                await self._complete()
            case m.AdoptBasis():
                self._enter("merge")
                self._start(self._adopt_basis, action, self.machine.basis)
            case m.AdoptWeights():
                self._start(self._adopt_weights, action)
            case m.MergeAction():
                self._enter("merge")
                self._start(self._merge, action)
            case m.Exit(reason=reason):
                self.ended = reason
                self._enter("done")
                self.emit(events.AgentLeft(agent=agent, round=self.machine.round, reason=reason))

    def _start(self, job: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> asyncio.Task[None]:
        """Let a job go on beside the loop; an error in it ends the run."""

        async def guarded() -> None:
            try:
                await job(*args)
            except asyncio.CancelledError:
                raise
            except TrainingInterruptedError:
                return  # the agent is about to leave
            except BaseException as error:
                self._fault = error
                self.stop(str(error))

        return self._jobs.create_task(guarded())

    async def _durable(self, write: Outcome[T]) -> T:
        """Do what has to be on disk before anything goes on. A disk that is full may have room again: the agent waits,
        says so, and serves meanwhile; it gives up only when it is stopped."""
        wait, most = RETRY_S
        while True:
            try:
                return await self._thread.do(write)
            except DataError as error:
                if self._stopping.is_set():
                    raise
                self.noticed(f"{error}; trying again in {wait:.0f} s")
                try:
                    async with asyncio.timeout(wait):
                        await self._stopping.wait()
                except TimeoutError:
                    wait = min(2 * wait, most)

    async def _complete(self) -> None:
        """Bring the rest of the checkpoint after training to the disk: peers have what they wait for."""
        told, self._incomplete = self._incomplete, None
        if told is not None:
            await self._durable(self._work.complete())
            self.emit(told)

    def _vouched(self, action: m.CheckpointAction) -> m.CheckpointAction:
        """Say in the record of a merge which manifests its parts rest on: they are held until the round ends."""
        record = action.record
        if record is None:
            return action
        keys = {part.agent: (part.agent, part.round, part.snapshot) for part in record.contributions}
        hashes = {
            peer: blake3(self._held[key].signed[0]).hexdigest() for peer, key in keys.items() if key in self._held
        }
        return replace(action, record=replace(record, manifests=hashes))

    async def _train(self, action: m.Train) -> None:
        if self._work.middle.resumed:
            self.emit(events.Resumed(agent=self.machine.agent, round=action.round, stage="training"))
        started = time.monotonic()
        result = await self._thread.do(self._work.train(action))
        train_s = time.monotonic() - started
        if self._lateness is not None:
            self._lateness.trained(action.round, train_s, time.monotonic())
        if action.learn:
            self.emit(events.Trained(agent=self.machine.agent, round=action.round, result=result, train_s=train_s))
        recorded = await self._durable(self._work.record(action))
        # the one before too: an agent whose newest checkpoint is damaged publishes that again
        self._recorded = dict([*self._recorded.items()][-1:]) | {recorded.payload.root: recorded}
        self.post(m.TrainingDone(action.round, recorded.payload.root))

    async def _publish(self, action: m.Publish) -> None:
        agent = self.machine.agent
        recorded = self._recorded.get(action.root)
        if recorded is None:  # of an earlier life
            recorded = await self._thread.do(self._work.recorded(action.root))
        if recorded is None:
            gone = f"the snapshot of round {action.round} ({action.root[:12]}…) is gone from the agent's folder"
            self.noticed(f"{gone}; peers cannot get it")
            return
        self._recorded.setdefault(action.root, recorded)
        manifest = action.manifest(self.machine.run, agent, recorded)
        self._transport.publish(manifest)
        size = recorded.payload.bytes
        self.emit(
            events.Published(agent=agent, round=action.round, snapshot=action.root, bytes=size, basis=manifest.basis)
        )

    async def _fetch(self, action: m.Fetch) -> None:
        key = (action.peer, action.round, action.root)
        agent, number = self.machine.agent, self.machine.round
        try:
            fetched = await self._transport.fetch(*key)
        except Exception as error:  # of whatever kind: a fault in one fetch is that fetch's failure
            reason = str(error) if isinstance(error, NetworkError) else f"{type(error).__name__}: {error}"
            self._fetches.pop(key, None)
            fact = events.FetchFailed(agent=agent, round=number, peer=action.peer, snapshot=action.root, reason=reason)
            self.emit(fact)
            self.post(m.FetchFailure(*key, reason))
            return
        self._fetches.pop(key, None)
        self._held[key] = fetched
        self._received += fetched.bytes
        try:
            self._note_fetched(fetched)
        except DataError as error:
            self.noticed(f"{error}; the manifest of {action.peer}'s round {action.round} is not kept")
        self.emit(
            events.SnapshotFetched(
                agent=agent, round=number, peer=action.peer, snapshot=action.root, bytes=fetched.bytes
            )
        )
        self.post(m.SnapshotReady(*key))

    def _release(self, key: tuple[str, int, str]) -> None:
        task = self._fetches.pop(key, None)
        if task is not None:
            task.cancel()
        if self._held.pop(key, None) is not None:
            self._transport.release(*key)

    def _source(self, peer: str, root: str) -> Path:
        """Return where a snapshot lies that is here, of whatever round it has this content."""
        return next(held.path for (of, _, what), held in self._held.items() if (of, what) == (peer, root))

    async def _adopt_basis(self, action: m.AdoptBasis, own: BasisId) -> None:
        moves = await self._thread.do(self._work.adopt_basis(action, self._source(action.peer, action.root)))
        self.post(m.BasisChanged.after(action, own, moves))

    async def _adopt_weights(self, action: m.AdoptWeights) -> None:
        work = self._work.adopt_weights(action, self._source(action.peer, action.root))
        self.post(m.WeightsAdopted(action.root, await self._thread.do(work)))

    async def _merge(self, action: m.MergeAction) -> None:
        sources = {part.peer: self._source(part.peer, part.root) for part in action.parts}
        self.post(m.MergeDone(action.round, await self._thread.do(self._work.merge(action, sources))))

    async def _save_weights(self) -> None:
        try:
            await self._thread.do(self._work.save_weights())
            await self._thread.do(self._work.compact())
        except DataError as error:  # conveniences for people; the checkpoint has the weights too
            self.noticed(str(error))

    def _finish(self, number: int) -> None:
        sent = sum(self._transport.sent_bytes.values())
        self.emit(self.view.round_finished(number, sent - self._sent, self._received))
        self._sent, self._received = sent, 0

    def emit(self, fact: events.Event) -> None:
        """Fold an event of this agent into its view, and pass it on."""
        stamped = replace(fact, run=self.machine.run, time_s=time.time())
        self.view.take(stamped)
        self._emit_to(stamped)
