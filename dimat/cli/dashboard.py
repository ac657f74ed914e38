"""`dimat dashboard`: show a run's folder as a web page."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import app
from dimat.cli.shared import say


@app.command
def dashboard(
    folder: Annotated[Path, Parameter(help="Folder of a run, of an agent, or of several agents (agents/RUN).")],
    /,
    *,
    listen: Annotated[str, Parameter(help="`host:port` to listen on; port 0: any free port.")] = "127.0.0.1:8300",
    token_file: Annotated[
        Path | None,
        Parameter(help="File with a token that every viewer must present; required unless the host is loopback."),
    ] = None,
) -> int:
    """Show a run in the browser, while it runs or afterwards. Ctrl-C stops the server.

    The page shows the network, curves, merges, lineage and the log.
    """
    from dimat.ui.dashboard.available import need_dashboard

    need_dashboard()
    from dimat.ui.dashboard.guard import check_exposure, open_socket, parse_listen, read_token
    from dimat.ui.dashboard.run_source import FolderSource
    from dimat.ui.dashboard.server import Server

    host, port = parse_listen(listen)
    token = None if token_file is None else read_token(token_file)
    check_exposure(host, token)
    opened = open_socket(host, port)  # before the logs are read, which may take seconds
    with opened:
        server = Server(FolderSource(folder), opened, host, token)
        say(f"dashboard of {folder}: {server.address} (Ctrl-C ends it)")
        asyncio.run(server.run())
    return 0
