"""`dimat dashboard`: a run's folder as a page."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import app
from dimat.cli.shared import say


@app.command
def dashboard(
    folder: Annotated[
        Path, Parameter(help="Folder of a run, of an agent, or one that holds agents' folders (agents/RUN).")
    ],
    /,
    *,
    listen: Annotated[str, Parameter(help="`host:port` to listen on; port 0: any free one.")] = "127.0.0.1:8300",
    token_file: Annotated[
        Path | None, Parameter(help="File with a token that whoever looks must give; needed for other hosts than this.")
    ] = None,
) -> int:
    """Show a run in the browser, while it runs or afterwards: network, curves, merges, lineage, log. Ctrl-C ends it."""
    from dimat.ui.dashboard.available import need_dashboard

    need_dashboard()
    from dimat.ui.dashboard.guard import check_exposure, open_socket, parse_listen, read_token
    from dimat.ui.dashboard.run_source import FolderSource
    from dimat.ui.dashboard.server import Server

    host, port = parse_listen(listen)
    token = None if token_file is None else read_token(token_file)
    check_exposure(host, token)
    opened = open_socket(host, port)  # before what may take seconds to read
    with opened:
        server = Server(FolderSource(folder), opened, host, token)
        say(f"dashboard of {folder}: {server.address} (Ctrl-C ends it)")
        asyncio.run(server.run())
    return 0
