"""Worker processes for the simulator, each with agents of its own.

An agent lives in one worker for the whole run, so that its model and optimizer never travel. Every worker
computes with one torch thread: sums in floating point depend on how many threads share them, and results must
not depend on the number of workers. With one worker the work is done in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from dimat.errors import DimatError

P = ParamSpec("P")
R = TypeVar("R")


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class WorkerPool:
    """`size` workers, chosen by slot: jobs of one slot run in one process, in the order submitted.

    A context manager. Workers ignore Ctrl-C (the parent decides) and end with the parent.
    """

    def __init__(self, size: int) -> None:
        self.size = size
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
                context.set_forkserver_preload(["dimat.simulate.worker"])
            self._executors = [
                ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_prepare_worker)
                for _ in range(self.size)
            ]
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

    def submit(self, slot: int, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `job` in the worker of a slot. In this process, if there is one worker: then it has run on return."""
        if self._executors:
            return self._executors[slot % self.size].submit(job, *args, **kwargs)
        future: Future[R] = Future()
        try:
            future.set_result(job(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def result_of(future: Future[Any], what: str) -> Any:
    """Wait for a job; a worker that died (out of memory, killed) becomes a DimatError that names the job."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DimatError(
            f"a worker process died during {what}; if memory ran out, use fewer --workers or a smaller model"
        ) from error


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
