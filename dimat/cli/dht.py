"""`dimat dht`: run a bootstrap node of the DHT."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import app
from dimat.cli.shared import Json, say, show
from dimat.errors import ConfigError


@app.command
def dht(
    *,
    listen: Annotated[str, Parameter(help="Address to listen on, IP:port; port 0: any free port.")] = "0.0.0.0:7301",
    folder: Annotated[Path, Parameter(help="Folder with the node's identity, so that its address stays.")] = Path(
        "dimat-dht"
    ),
    ca: Annotated[
        Path | None, Parameter(help="The CA's certificate (PEM); keep only records signed under this CA.")
    ] = None,
    run: Annotated[str | None, Parameter(help="Keep only records of this run; default: records of all runs.")] = None,
    bootstrap: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", consume_multiple=False, help="Address of another node, as that node prints it. Repeatable."
        ),
    ] = (),
    as_json: Json = False,
) -> int:
    """Run a bootstrap node of the DHT until you stop it; prints the addresses that agents need."""
    if ca is not None and run is None:
        raise ConfigError("dimat dht: --ca needs --run NAME, the run whose records the node keeps")
    if ca is not None and not ca.is_file():
        raise ConfigError(f"dimat dht: there is no file {ca} for --ca")
    certificate = ca.read_bytes() if ca is not None else None
    if certificate is not None:
        from dimat.net.pki.certificates import authorities

        authorities(certificate)  # SecurityError: with any other file the node would silently refuse each record
    return asyncio.run(_serve(listen, folder, certificate, run, bootstrap, as_json))


async def _serve(
    listen: str, folder: Path, ca: bytes | None, run: str | None, bootstraps: tuple[str, ...], as_json: bool
) -> int:
    """Return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    from dimat.net.discovery.dht import DhtNode

    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(128 + number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    node = DhtNode(
        folder,
        run=run,
        bootstraps=bootstraps,
        ca=ca,
        listen=listen,
        notice=lambda message: say(f"dimat: {message}"),
        generator=random.Random(),
    )
    try:
        await node.start()
        # a plain task: a signal that comes first counts, whatever becomes of the start
        ready = asyncio.create_task(node.ready())
        await asyncio.wait([ready, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            await ready  # NetworkError if the port is taken or hivemind is not installed
            show({"peer": node.peer, "addresses": list(node.addresses)} if as_json else "\n".join(node.addresses))
            sys.stdout.flush()  # a reader at the end of a pipe waits for it
            say("dimat: the DHT node is running; give agents one of these addresses as bootstrap. Ctrl-C stops it")
        code = await stopped
        say("dimat: stopping")
        ready.cancel()
        return code
    finally:
        await node.close()
