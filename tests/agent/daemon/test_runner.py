"""The runner's jobs end with its run. Reference: what the work raises, and who is called off."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from dimat import events
from dimat.agent.daemon.runner import Runner
from dimat.agent.daemon.worker import WorkThread
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.work import Outcome
from dimat.errors import DataError, TrainingError
from dimat.events import TrainResult
from dimat.net.transport import Fetched
from tests.agent.machines import machine, offer

pytestmark = pytest.mark.anyio


class Silent:
    """A network in which every fetch is on its way for ever. `waiting`, `called_off`: the peers fetched from."""

    sent_bytes: Mapping[str, int] = {}

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.called_off: list[str] = []
        self.asked = asyncio.Event()

    async def fetch(self, peer: str, round: int, root: str) -> Fetched:
        self.waiting.append(peer)
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.called_off.append(peer)
        raise AssertionError

    def publish(self, manifest: Any) -> None:
        raise AssertionError("nothing was recorded")


class Broken:
    """Work whose training, or whose first checkpoint, raises an error."""

    def __init__(self, training: Exception | None, writing: Exception | None) -> None:
        self._training = training
        self._writing = writing
        self.middle = SimpleNamespace(resumed=False)
        self.incomplete = False

    def train(self, action: m.Train) -> Outcome[TrainResult]:
        def outcome() -> TrainResult:
            if self._training is not None:
                raise self._training
            return TrainResult()

        return outcome

    def record(self, action: m.Train) -> Outcome[Any]:
        raise AssertionError("training has failed")

    def checkpoint(self, action: m.CheckpointAction) -> Outcome[None]:
        def outcome() -> None:
            if self._writing is not None:
                raise self._writing

        return outcome


def runner(work: Any, network: Any, told: list[events.Event]) -> Runner:
    return Runner(machine(), work, WorkThread(), network, told.append, lambda fetched: None)


async def test_an_error_in_a_job_ends_the_run_as_it_is_and_calls_the_others_off() -> None:
    """Not wrapped in a group; the agent says why it leaves; fetches that are on their way are cancelled."""
    network, told = Silent(), list[events.Event]()
    ran = runner(Broken(TrainingError("the loss is not finite"), None), network, told)
    ran.post(offer("b", 1))
    with pytest.raises(TrainingError, match=r"^the loss is not finite$"):
        await ran.run(join=False)
    assert network.called_off == network.waiting
    (left,) = [event for event in told if isinstance(event, events.AgentLeft)]
    assert left.reason == "the loss is not finite"


async def test_an_error_in_the_loop_is_raised_as_it_is() -> None:
    """A checkpoint that cannot be written while the agent is told to stop: its own error, not a group's."""
    ran = runner(Broken(None, DataError("no room")), Silent(), [])
    asyncio.get_running_loop().call_soon(ran.stop, "stopped")  # while the first checkpoint is written
    with pytest.raises(DataError, match=r"^no room$"):
        await ran.run(join=False)


async def test_a_run_that_is_cancelled_takes_its_jobs_along() -> None:
    """Cancellation is passed on, once all jobs are through."""
    network = Silent()
    ran = runner(Broken(None, None), network, [])
    ran.post(offer("b", 1))
    task = asyncio.ensure_future(ran.run(join=True))
    await network.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert network.called_off == network.waiting == ["b"]


async def test_a_fetch_that_raises_whatever_is_that_fetchs_failure() -> None:
    """The run goes on, and the event names the fault."""

    class Faulty(Silent):
        async def fetch(self, peer: str, round: int, root: str) -> Fetched:
            raise RuntimeError("dictionary changed size during iteration")

    told: list[events.Event] = []
    ran = runner(Broken(TrainingError("it went on to its training"), None), Faulty(), told)
    ran.post(offer("b", 1))
    ran.post(offer("c", 1))
    with pytest.raises(TrainingError, match="went on"):
        await ran.run(join=True)
    reasons = {event.reason for event in told if isinstance(event, events.FetchFailed)}
    assert reasons == {"RuntimeError: dictionary changed size during iteration"}


async def test_the_answer_of_a_released_fetch_is_not_that_of_the_same_one_asked_again() -> None:
    """A newcomer that gives up on weights releases a snapshot and asks for it again while the first has just come: the
    machine hears of it once the second is here. Before, its merge looked for a file that had been let go."""
    asked, release = m.Fetch("b", 1, "root"), m.Release("b", 1, "root")
    heard: list[m.Event] = []

    class Twice(Silent):
        ready = 0

        async def fetch(self, peer: str, round: int, root: str) -> Any:
            if self.waiting:
                await asyncio.sleep(0.05)
            else:
                ran.post(m.Deadline(1))  # it is handled before the answer, which is put behind it
            self.waiting.append(peer)
            self.ready += 1
            return SimpleNamespace(bytes=1)

        def release(self, peer: str, round: int, root: str) -> None:
            self.called_off.append(peer)

    class Scripted:
        agent, run, round, phase = "a", "r", 1, None

        def handle(self, event: m.Event) -> list[m.Action]:
            heard.append(event)
            match event:
                case m.Started():
                    return [asked]
                case m.Deadline():
                    return [release, asked]
                case _:
                    return [m.Exit("done")]

    network = Twice()
    machine: Any = Scripted()
    ran = Runner(machine, Broken(None, None), WorkThread(), network, lambda _: None, lambda _: None)  # pyright: ignore[reportArgumentType]
    assert await ran.run(join=True) == "done"
    assert heard == [m.Started(join=True), m.Deadline(1), m.SnapshotReady("b", 1, "root")]
    assert network.ready == 2
    assert network.called_off == ["b"]
