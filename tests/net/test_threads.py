"""Tasks beside a body, and those that an owner keeps. Reference: what `asyncio.TaskGroup` promises."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dimat.net.threads import BackgroundTasks, beside, first_of

pytestmark = pytest.mark.anyio


class Endless:
    """A task without an end; `called_off`: whether it was."""

    def __init__(self) -> None:
        self.called_off = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.called_off = True


async def fail() -> None:
    raise KeyError("a task")


async def run(*tasks: Coroutine[Any, Any, None], error: Exception | None = None, ends: bool = False) -> None:
    """Run tasks beside a body, which raises an error, ends, or goes on for ever."""
    group = asyncio.TaskGroup()
    async with beside(group):
        for task in tasks:
            group.create_task(task)
        await asyncio.sleep(0 if error is None else 0.001)
        if error is not None:
            raise error
        if not ends:
            await asyncio.Event().wait()


async def test_tasks_end_with_the_body() -> None:
    """However that ends: by itself, with an error, or called off; the error comes out as it is, not in a group."""
    endless = Endless()
    await run(endless.run(), ends=True)
    assert endless.called_off
    endless = Endless()
    with pytest.raises(ValueError, match="the body"):
        await run(endless.run(), error=ValueError("the body"))
    assert endless.called_off
    endless = Endless()
    task = asyncio.create_task(run(endless.run()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert endless.called_off


async def test_an_error_of_a_task_ends_the_body_and_the_others() -> None:
    """As it is where it is the only one; of several all are told."""
    endless = Endless()
    with pytest.raises(KeyError, match="a task"):
        await run(endless.run(), fail())
    assert endless.called_off
    with pytest.raises(ExceptionGroup) as errors:
        await run(fail(), fail())
    assert len(errors.value.exceptions) == 2


async def test_an_owner_calls_its_tasks_off_or_waits_for_them() -> None:
    """`close` waits for tasks; with `cancel` none goes on; closing without opening is allowed."""
    await BackgroundTasks().close()
    tasks, endless = BackgroundTasks(), Endless()
    await tasks.open()
    tasks.start(endless.run(), "endless")
    ended = tasks.start(asyncio.sleep(0), "short")
    await asyncio.sleep(0.01)
    await tasks.close(cancel=True)
    assert ended.done()
    assert endless.called_off
    assert not tasks.is_open


async def test_the_first_of_several_or_the_time_ends_the_wait() -> None:
    """The others are called off before the wait is over; so are all where it is called off itself, or one fails."""
    for most_s, ending in ((None, asyncio.sleep(0)), (0.01, asyncio.Event().wait())):
        endless = Endless()
        await first_of(endless.run(), ending, most_s=most_s)
        assert endless.called_off
    endless = Endless()
    with pytest.raises(KeyError, match="a task"):
        await first_of(endless.run(), fail())
    assert endless.called_off
    endless = Endless()
    task = asyncio.create_task(first_of(endless.run()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert endless.called_off
