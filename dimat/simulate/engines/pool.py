"""Worker processes for the simulator, each with agents of its own.

An agent lives in one worker for the whole run, so that its model and optimizer never travel. Every worker
computes with one torch thread: sums in floating point depend on how many threads share them, and results must
not depend on the number of workers. With one worker the work is done in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from dimat.errors import ConfigError, DimatError
from dimat.hooks import cause

WORKER_ENDED = "a worker process has ended; if memory ran out, use fewer --workers or a smaller model"

P = ParamSpec("P")
R = TypeVar("R")


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class WorkerPool:
    """Worker processes, chosen by slot: a slot's jobs run in one of them, in order.

    A context manager. Workers ignore Ctrl-C (the parent decides) and end with the parent.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a pool of {size} workers cannot work; give at least one")
        self.size = size
        self._slots_taken = 0
        self._executors: list[ProcessPoolExecutor] = []
        self._threads_before = 0

    def __enter__(self) -> WorkerPool:
        import torch

        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.size > 1:
            # one clean process imports torch and forks the workers from itself: no locks or threads are inherited
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
            if context.get_start_method() == "forkserver":
                context.set_forkserver_preload(["dimat.simulate.engines.worker"])
            self._executors = [
                ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_prepare_worker)
                for _ in range(self.size)
            ]
            try:
                with _hidden_main(), _ignored_interrupts():
                    for executor in self._executors:
                        executor.submit(int)  # starts the process
            except BaseException:  # stopped while it waits for them
                _end_fork_server()
                self.terminate()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import torch

        torch.set_num_threads(self._threads_before)
        if kind is not None:
            self.terminate()
        for executor in self._executors:
            executor.shutdown(wait=True)

    def terminate(self) -> None:
        """End all workers at once, whatever they are doing; the pool takes no more jobs."""
        for executor in self._executors:
            processes = list((executor._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5)  # a worker that still writes would disturb the caller's tidying up

    def take_slots(self, count: int) -> int:
        """Return the first of `count` slots in a row, so that runs side by side share workers."""
        first = self._slots_taken
        self._slots_taken += count
        return first

    def submit(self, slot: int, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `job` in the worker of a slot.

        In this process, if there is one worker: then it has run on return.
        """
        if self._executors:
            try:
                return self._executors[slot % self.size].submit(job, *args, **kwargs)
            except RuntimeError as error:  # a broken pool, or one that was ended
                raise DimatError(WORKER_ENDED) from error
        future: Future[R] = Future()
        try:
            future.set_result(job(*args, **kwargs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's code may exit
            future.set_exception(error)
        return future


def _end_fork_server() -> None:
    """End the process that forks workers, if there is one: it would fork those that nobody waits for any more, and
    they would complain about it."""
    from multiprocessing import forkserver

    server: Any = getattr(forkserver, "_forkserver", None)
    if (pid := getattr(server, "_forkserver_pid", None)) is not None:
        with suppress(OSError, AttributeError):
            os.kill(pid, signal.SIGKILL)
            server._stop()


def result_of(future: Future[Any], what: str) -> Any:
    """Wait for a job.

    Any failure becomes an error in one line that names the job: a worker that died (out of memory, killed), or a fault
    in a user's model, loss or data.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DimatError(f"{what}: {WORKER_ENDED}") from error
    except DimatError as error:
        raise type(error)(f"{what}: {error}") from error
    except (CancelledError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise DimatError(f"{what} failed: {cause(error)}") from error


@contextmanager
def _hidden_main() -> Generator[None]:
    """Let processes start without the user's script: they need nothing of it, and would run it a second time."""
    main = sys.modules["__main__"]
    file, spec = main.__dict__.pop("__file__", None), main.__spec__
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


@contextmanager
def _ignored_interrupts() -> Generator[None]:
    """Let processes inherit that they ignore Ctrl-C, which reaches the whole group."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Leave when the parent is gone, even by kill -9: an orphan would wait for jobs for ever."""
    wait([sentinel])
    os._exit(1)
