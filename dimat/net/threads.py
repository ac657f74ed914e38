"""Threads, background tasks, notifications and counters of one transport's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A small pool for work that would hold up the event loop: hashing, reading and writing files.

    The transport has its own, so that training in other threads never makes a peer wait.
    """

    def __init__(self, count: int = 8) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="dimat-net")

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Call a function in a thread; the future is the event loop's."""
        return asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Accept no more work; current calls run to their end."""
        self._pool.shutdown(wait=False)


class BackgroundTasks:
    """A TaskGroup that its owner opens and closes, possibly from different tasks.

    No task outlives `close`. As in any TaskGroup, an error of one task cancels the others, and `close` raises it.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._closing = asyncio.Event()
        self._holder: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def is_open(self) -> bool:
        """Whether tasks are accepted: from `open` to `close`."""
        return self._group is not None and not self._closing.is_set()

    async def open(self) -> None:
        """Begin to accept tasks."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._holder = asyncio.create_task(self._hold(opened), name="background tasks")
        await opened

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a coroutine in a task of the group, between `open` and `close`."""
        assert self._group is not None, "tasks are started after `open`"
        task = self._group.create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self, *, cancel: bool = False) -> None:
        """Wait until all tasks have ended, cancelled or by themselves; ExceptionGroup of their errors."""
        if cancel:
            for task in self._running:
                task.cancel()
        self._closing.set()
        if self._holder is not None:
            await self._holder

    async def _hold(self, opened: asyncio.Future[None]) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            opened.set_result(None)
            await self._closing.wait()


class _Over(Exception):
    """Ends the body of a task group: the tasks that are still running are cancelled."""


@asynccontextmanager
async def beside(group: asyncio.TaskGroup) -> AsyncGenerator[None]:
    """Let the tasks of a group run beside the body, and cancel them when it ends.

    An error of the body is raised unwrapped, and so is the only error of a task, which ends the body; a task group
    would wrap them.
    """
    fault: Exception | None = None
    try:
        async with group:
            try:
                yield
            except Exception as error:
                fault = error
            raise _Over
    except* _Over:
        pass
    except* Exception as errors:
        faults = list(errors.exceptions)
        if len(faults) != 1 or isinstance(faults[0], BaseExceptionGroup):
            raise
        fault = fault or faults[0]
    if fault is not None:
        raise fault


async def first_of(*waits: Coroutine[Any, Any, object], most_s: float | None = None) -> None:
    """Wait until one of several coroutines has ended, or a time is over; none runs on after that.

    The others are cancelled. An error of one is raised unwrapped.
    """
    group = asyncio.TaskGroup()
    async with beside(group):
        tasks = [group.create_task(wait) for wait in waits]
        await asyncio.wait(tasks, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)


class Notifier:
    """Wakes all waiting tasks, each time it is fired."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def fire(self) -> None:
        """Wake the tasks that are waiting now."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        """Wait until it is fired."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


class InFlight:
    """Counts running operations, and lets others wait for their end."""

    def __init__(self) -> None:
        self.count = 0
        self._ended = asyncio.Event()

    @contextmanager
    def one(self) -> Generator[None]:
        """Count the body as one operation."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            self._ended.set()

    async def none(self) -> None:
        """Wait until no operation is running."""
        while self.count:
            self._ended.clear()
            await self._ended.wait()
