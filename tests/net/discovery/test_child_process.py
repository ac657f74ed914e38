"""A child process that answers requests. Reference: the promise of `asyncio` that a cancelled task ends."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from dimat.net.discovery.child_process import ChildProcess

pytestmark = pytest.mark.anyio

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "ok": True}), flush=True)
"""


async def test_a_call_that_is_cancelled_as_its_answer_comes_is_cancelled(tmp_path: Path) -> None:
    """Whoever closes a node cancels its supervisor and waits until it has ended: it must not go on."""
    (tmp_path / "echo.py").write_text(ECHO)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = ChildProcess("echo", environment=environment, log=tmp_path / "log", first={"op": "start"})
    try:
        await child.attach(60.0)
        call = asyncio.create_task(child.ask("probe", 60.0))
        await asyncio.sleep(0)
        ((_, answer),) = child._waiting.items()
        answer.set_result({"id": 1, "ok": True})
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert (await child.ask("probe", 60.0))["ok"], "the child goes on"
    finally:
        await child.kill()
