"""What becomes of a DHT node when its processes are killed or hang, or its bootstraps are gone.

Real processes and signals. Reference: what /proc says is alive, and the addresses that the node had before.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dimat.errors import NetworkError
from dimat.net.discovery.dht import DhtNode
from tests.net.nodes import make_node, make_record, needs_hivemind, processes, token_of, until, until_there, up

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.live,
    needs_hivemind,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes through /proc"),
]


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[DhtNode]:
    node = make_node(folder, **options)
    try:
        await node.start()
        yield node
    finally:
        await node.close()


@pytest.mark.slow
async def test_killed_and_hanging_processes_are_replaced(tmp_path: Path) -> None:
    """kill -9 of p2pd, kill -9 of the sidecar, and SIGSTOP of p2pd: each time the node comes back under the address
    that it had, joins by itself, and does what it did before."""
    notices: list[str] = []
    async with (
        running(tmp_path / "boot") as boot,
        running(tmp_path / "b") as b_alone,
    ):
        await boot.ready()
        await b_alone.ready()
        bootstraps = [*boot.addresses, *b_alone.addresses]
        async with running(tmp_path / "a", bootstraps=bootstraps, notices=notices) as a:
            await up(a, 2)
            before = a.addresses
            for number, (what, number_of_signal) in enumerate(
                [("p2pd", signal.SIGKILL), ("python", signal.SIGKILL), ("p2pd", signal.SIGSTOP)], start=1
            ):
                old = processes(token_of(tmp_path / "a"))
                assert [len(old["p2pd"]), len(old["python"])] == [1, 1]
                os.kill(old[what][0], number_of_signal)
                await until(lambda: not a.healthy)
                assert not await a.announce(make_record("lab-a")), "down, and said so at once"
                await up(a, 2)
                assert a.addresses == before
                now = processes(token_of(tmp_path / "a"))
                assert not {*old["p2pd"], *old["python"]} & {*now["p2pd"], *now["python"]}
                assert [len(now["p2pd"]), len(now["python"])] == [1, 1]
                record = make_record("lab-a", seq=number)

                async def announce(record: Any = record) -> bool:
                    return await a.announce(record)

                await until_there(announce)
                found = await b_alone.lookup("lab-a")
                assert found is not None
                assert found.seq == number
            assert [line for line in notices if "the DHT is down" in line]
            token = token_of(tmp_path / "a")
        assert processes(token) == {"p2pd": [], "python": []}
        assert not (tmp_path / "a" / "dht.pid").exists()


PARENT = """
import asyncio, os, random, sys
from pathlib import Path
from dimat.net.discovery.dht import DhtNode

async def main():
    node = DhtNode(Path(sys.argv[1]), run="digits", bootstraps=[], ca=None, listen="127.0.0.1:0",
                      notice=print, generator=random.Random(0))
    node.spawn()
    await node.start()
    await node.ready()
    if os.fork() == 0:  # a data loader's worker, say: it holds the parent's pipes open
        os.write(1, b"%d\\n" % os.getpid())
        os.execvp("sleep", ["sleep", "300"]) if sys.argv[2] == "exec" else __import__("time").sleep(300)
    await asyncio.sleep(300)

asyncio.run(main())
"""


@pytest.mark.parametrize("worker", ["exec", "forked"])
def test_nothing_outlives_a_killed_parent(tmp_path: Path, worker: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), worker], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        token = token_of(tmp_path)
        scratch = Path(json.loads((tmp_path / "dht.pid").read_text())["scratch"])
        assert {name: len(pids) for name, pids in processes(token).items()} == {"p2pd": 1, "python": 1}
        assert scratch.is_dir()
        parent.kill()
        parent.wait()
        asyncio.run(until(lambda: processes(token) == {"p2pd": [], "python": []}))
        assert not scratch.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.wait()
        parent.stdout.close()


def _stopped(pid: int) -> bool:
    """Whether all threads of a process stand still; the signal alone does not say so."""
    tasks = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(text.rpartition(") ")[2].startswith("T") for text in tasks)


async def test_orphans_of_an_earlier_life_are_swept(tmp_path: Path) -> None:
    """Killed together, parent and sidecar leave p2pd behind; whoever comes next finds it by the pidfile."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), "exec"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220  (nothing else runs here)
    assert parent.stdout is not None
    child = int(await asyncio.to_thread(parent.stdout.readline))
    try:
        token = token_of(tmp_path)
        old = processes(token)
        with pytest.raises(NetworkError, match=f"process {parent.pid} runs a DHT node from this folder"):
            make_node(tmp_path).spawn()
        # both are stopped first: the sidecar so that it cannot see its parent die, p2pd so that it is left over
        for pid in (old["python"][0], old["p2pd"][0]):
            os.kill(pid, signal.SIGSTOP)
            await until(lambda pid=pid: _stopped(pid))
        parent.kill()
        parent.wait()
        os.kill(old["python"][0], signal.SIGKILL)
        await until(lambda: processes(token)["python"] == [])
        assert processes(token)["p2pd"] == old["p2pd"], "p2pd is left over"
        notices: list[str] = []
        async with running(tmp_path, notices=notices) as node:
            assert processes(token) == {"p2pd": [], "python": []}
            assert "ended 1 processes left over from an earlier run" in notices[0]
            await node.ready()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.slow
async def test_bootstraps_that_are_dead_at_the_start_are_joined_later(tmp_path: Path) -> None:
    """Of two bootstraps none is there at first: said once for each. Then one comes, which suffices, then the other."""
    notices: list[str] = []
    folders = [tmp_path / "one", tmp_path / "two"]
    addresses: list[str] = []
    for folder in folders:
        async with running(folder) as early:
            await early.ready()
            addresses += early.addresses
    ports = [address.split("/")[4] for address in addresses]
    async with running(tmp_path / "a", bootstraps=addresses, notices=notices) as a:
        await a.ready()
        await until(lambda: len(notices) == 2)
        assert sorted(line.split()[3] for line in notices) == sorted(addresses)
        assert all("is out of reach: " in line and "refused" in line for line in notices)
        assert not await a.announce(make_record("lab-a"))
        assert await a.lookup("lab-a", elsewhere=True) is None
        async with running(folders[1], listen=f"127.0.0.1:{ports[1]}") as second:
            await up(a, 1)

            async def announce() -> bool:
                return await a.announce(make_record("lab-a", seq=3))

            await until_there(announce)
            assert await second.lookup("lab-a", elsewhere=True) is not None
            async with running(folders[0], listen=f"127.0.0.1:{ports[0]}") as first:
                await up(a, 2)
                await until(lambda: len(notices) == 4)
                assert {line.rpartition(" is back")[1] for line in notices[2:]} == {" is back"}
                await up(first, 1)
                assert (await until_there(lambda: first.lookup("lab-a"))).seq == 3


async def test_a_port_that_is_taken_is_named_and_waited_for(tmp_path: Path) -> None:
    """hivemind alone would share it without a word."""
    async with running(tmp_path / "a") as a:
        await a.ready()
        port = a.addresses[0].split("/")[4]
        async with running(tmp_path / "b", listen=f"127.0.0.1:{port}") as b:
            with pytest.raises(NetworkError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
                await b.ready()
            await a.close()
            await up(b)
            assert b.addresses[0].split("/")[4] == port


async def test_without_hivemind_it_is_said_once_and_nothing_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "hivemind.py").write_text("raise ImportError('no module named hivemind')\n")
    monkeypatch.setenv("PYTHONPATH", str(stub))
    notices: list[str] = []
    async with running(tmp_path / "a", notices=notices) as node:
        with pytest.raises(NetworkError, match="hivemind cannot be imported"):
            await node.ready()
        await until(lambda: node.missing)
        assert len(notices) == 1
        assert notices[0].startswith(
            "no DHT, static addresses only: hivemind cannot be imported (ImportError: no module"
        )
        assert await node.lookup("lab-a") is None
        assert not await node.announce(make_record("lab-a"))
        await until(lambda: not (tmp_path / "a" / "dht.pid").exists())
