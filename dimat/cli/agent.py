"""Commands for a real agent: `agent`, `status`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dimat.cli import early
from dimat.cli.app import app
from dimat.cli.shared import Json, Overrides, Quiet, collector_paused, say, show
from dimat.errors import ConfigError, DataError, NetworkError

if TYPE_CHECKING:
    from dimat.agent.daemon.daemon import Daemon
    from dimat.config import ExperimentConfig
    from dimat.events import Listener
    from dimat.ui.jsonl import JsonlListener

SAME_S = 0.25
"""A signal to stop so soon after the first is the same one: supervisors signal a process, and then its group."""
WATCH_S = 2.0
"""Seconds between two queries of `status --watch`."""
Name = Annotated[str | None, Parameter(help="The agent's name on the network map; default: agent.name of the file.")]


@app.command
def agent(
    file: Annotated[Path, Parameter(help="Experiment file (TOML) with an [agent] table.")],
    /,
    *,
    name: Name = None,
    set_: Overrides = (),
    insecure: Annotated[
        bool, Parameter(negative="", help="Run without keys and encryption, and listen on loopback only.")
    ] = False,
    metrics: Annotated[
        str | None,
        Parameter(help="Serve Prometheus metrics on HOST:PORT, or on a PORT of loopback; default: monitor.metrics."),
    ] = None,
    dashboard: Annotated[
        str | None,
        Parameter(help="Serve a dashboard on HOST:PORT, or on a PORT of loopback; default: monitor.dashboard."),
    ] = None,
    verbose: Annotated[
        int, Parameter(count=True, alias="-v", help="Print more: -v late peers, too; -vv every step.")
    ] = 0,
    quiet: Quiet = False,
    plain: Annotated[bool, Parameter(negative="", help="Print plain lines, also on a terminal.")] = False,
) -> int:
    """Run one agent of a network: train, exchange weights with the peers on the map, merge, repeat. It ends after the
    last round, or on Ctrl-C, SIGTERM or SIGUSR1, and resumes when started again. SIGHUP makes it read the map again."""
    with _Signals() as signals:
        return _agent(signals, file, name, set_, insecure, metrics, dashboard, verbose, quiet, plain)


def _agent(
    signals: _Signals,
    file: Path,
    name: str | None,
    set_: tuple[str, ...],
    insecure: bool,
    metrics: str | None,
    dashboard: str | None,
    verbose: int,
    quiet: bool,
    plain: bool,
) -> int:
    from dimat.config import quoted

    flags = ["agent.insecure=true"] if insecure else []
    flags += [] if metrics is None else [f"monitor.metrics={quoted(metrics)}"]
    flags += [] if dashboard is None else [f"monitor.dashboard={quoted(dashboard)}"]
    # errors in the file are reported at once, not after seconds of loading torch
    config = load_agent(file, name, (*set_, *flags))
    if config.monitor.dashboard is not None:
        from dimat.ui.dashboard.available import need_dashboard

        need_dashboard()
    with collector_paused():
        from dimat.agent.daemon.daemon import Daemon
        from dimat.agent.setup.prepare import prepare_agent
        from dimat.config import agent_folder
        from dimat.ui.listeners import open_listeners
        from dimat.ui.terminal.panel import agent_listener

        setup = prepare_agent(config)
    # before the agent is made, so that a missing listener is reported before anything is done
    with open_listeners(config, agent_folder(config, setup.name), agent=setup.name) as watching:
        daemon = Daemon(setup)
        listener = agent_listener(setup.schedule.metric, sys.stderr, -1 if quiet else verbose, plain)
        with closing(listener), _log(daemon) as log, _dashboard(daemon) as shown:
            daemon.listeners += [listener, log, *watching.listeners, *shown]
            watching.warned += [listener, log, *shown]
            for line in () if quiet else watching.messages:
                say(f"dimat: {line}")
            code = asyncio.run(_run(daemon, signals, listener.close))
    if daemon.thread.busy:  # training cannot be interrupted, and the interpreter would tear down modules that it uses
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@app.command
def status(
    target: Annotated[str, Parameter(help="The agent's file or folder.")],
    /,
    *,
    name: Name = None,
    peer: Annotated[
        str | None, Parameter(help="Ask this peer on the map instead, over the network, with this agent's keys.")
    ] = None,
    watch: Annotated[bool, Parameter(negative="", help="Refresh every two seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> int:
    """Show an agent's status: round, peers, metrics, bytes, warnings. With --peer, ask an agent on another machine."""
    from dimat.agent.daemon.status_socket import ask
    from dimat.ui.terminal.status import status_lines

    if peer is None:
        folder = named_folder(target, name)

        def look() -> Mapping[str, Any]:
            return ask(folder)
    else:
        from dimat.agent.daemon.query import ask_peer

        if Path(target).is_dir():
            raise ConfigError("--peer needs the agent's file, which names keys and map, not its folder")
        config = load_agent(Path(target), name)

        def look() -> Mapping[str, Any]:
            return ask_peer(config, peer)

    found = look()
    if not watch:
        show(found if as_json else "\n".join(status_lines(found)))
        return 0
    _watch(found, look, as_json)
    return 0


def load_agent(file: Path, name: str | None, overrides: tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an agent's file; `name`, if given, overrides the agent's name in it."""
    from dimat.config import load_experiment, naming

    if not file.exists():
        raise ConfigError(f"no file {file}; write one with: dimat init {file}")
    return load_experiment(file, (*overrides, *naming(name)))


def named_folder(target: str, name: str | None) -> Path:
    """Return an agent's folder, given that folder or the agent's file."""
    path = Path(target)
    if path.is_dir():  # health checks ask often, so nothing more is loaded here
        return path
    from dimat.config import agent_folder

    config = load_agent(path, name)
    if config.agent.name is None:
        raise ConfigError(f"{path} does not name the agent; give --name, or the agent's folder")
    return agent_folder(config, config.agent.name)


def _watch(found: Mapping[str, Any], look: Callable[[], Mapping[str, Any]], as_json: bool) -> None:
    """Show a status and refresh it until Ctrl-C or until the agent ends.

    A peer that has answered once is asked again while it cannot be reached."""
    from dimat.ui.terminal.status import status_lines
    from dimat.ui.terminal.watch import LiveText
    from dimat.ui.text import clean

    trouble = ""
    with nullcontext() if as_json else LiveText() as screen:
        while True:
            if screen is not None:
                screen.show("\n".join([*status_lines(found), *([f"not reached now: {trouble}"] if trouble else [])]))
            elif trouble:
                say(f"dimat: not reached now: {trouble}")
            else:
                show(found)
                sys.stdout.flush()
            time.sleep(WATCH_S)
            try:
                found, trouble = look(), ""
            except NetworkError as error:
                trouble = clean(str(error))


@contextmanager
def _log(daemon: Daemon) -> Generator[JsonlListener]:
    """Open the agent's event log; if a full disk prevents closing it, say so and do not change the agent's exit."""
    from dimat.ui.jsonl import JsonlListener

    kept = daemon.setup.config.agent.logs_kept
    log = JsonlListener(daemon.folder.events, most_bytes=daemon.shares.log_file, kept=kept)
    try:
        yield log
    finally:
        try:
            log.close()
        except DataError as error:
            say(f"dimat: {error}")


@contextmanager
def _dashboard(daemon: Daemon) -> Generator[Sequence[Listener]]:
    """Serve the agent's dashboard, if one is configured; yield the listeners that must get the agent's events."""
    monitor = daemon.setup.config.monitor
    if monitor.dashboard is None:
        yield ()
        return
    from dimat.ui.dashboard.agent_source import AgentDashboard

    token = monitor.dashboard_token_file
    file = None if token is None else Path(daemon.setup.config.folder) / token
    with AgentDashboard(daemon, monitor.dashboard, file) as shown:
        say(f"dashboard of {daemon.setup.name}: {shown.address}")
        yield (shown,)


class _Signals:
    """Catches SIGHUP and SIGUSR1, which would end the process, while a command runs.

    Signals that arrive before `serve` are kept until then, as an agent may take long to start, and so are those that
    arrived before the command was loaded (`dimat.cli.early`). SIGINT and SIGTERM end the start at once, by the handlers
    of before; they are kept too, since what these raise may be lost in the code that it comes in (a destructor, a
    library's or a user's `except`).
    """

    def __init__(self) -> None:
        self._remembered: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._actions: Mapping[int, Callable[[], None]] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in early.KEPT:
            self._before[number] = signal.signal(number, self._take)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        self._remembered[:0] = early.arrived
        early.arrived.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def serve(self, actions: Mapping[int, Callable[[], None]]) -> None:
        """From now on, run each signal's action in the running event loop."""
        self._actions, self._loop = actions, asyncio.get_running_loop()
        for number in dict.fromkeys(self._remembered):
            actions[number]()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._remembered.append(number)
        before = self._before[number]
        if callable(before):
            before(number, frame)

    def _take(self, number: int, _: object) -> None:
        if self._loop is None:
            self._remembered.append(number)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._actions[number])


async def _run(daemon: Daemon, signals: _Signals, restore: Callable[[], None]) -> int:
    """Run a daemon and handle signals: the first SIGINT, SIGTERM or SIGUSR1 lets it leave in good order.

    A second one, `SAME_S` later or more, ends the process at once, after `restore` has restored the terminal."""
    loop = asyncio.get_running_loop()
    code, began_s = 0, 0.0

    def stop(number: signal.Signals) -> None:
        nonlocal code, began_s
        if code and loop.time() - began_s < SAME_S:
            return
        if code:
            restore()
            say("dimat: stopped at once")
            os._exit(128 + number)
        code, began_s = 128 + number, loop.time()
        say("dimat: leaving; once more to stop at once")
        daemon.stop()

    stops = {number: partial(stop, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stops[number])
    signals.serve({signal.SIGHUP: daemon.reload_soon, **stops})
    try:
        await daemon.run()
    except DataError as error:  # a full disk: the next life repeats the work that was not written
        if not code:
            raise
        say(f"dimat: {error}; the previous checkpoint is kept")
    return code
