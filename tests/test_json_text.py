"""What dimat prints and writes as JSON is JSON. Reference: RFC 8259, which has no NaN and no infinity."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from grpc import aio

from dimat.agent.daemon.status_socket import StatusSocket
from dimat.agent.lineage.lineage import append_record, read_records
from dimat.agent.protocol.messages import MergeDone, MergeRecord
from dimat.cli.shared import show
from dimat.events import MergeResult
from dimat.json_text import to_json
from dimat.results import AgentRound
from dimat.simulate.trace import TraceWriter, event_of, plain
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import call, make, started, update_neighbours

NAN, INF = float("nan"), float("inf")
ODD = {"nan": NAN, "list": [1.5, INF, {"deep": (-INF, "NaN", None)}], "whole": 1}


def strictly(text: str) -> Any:
    """Parse JSON as a strict parser does."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_becomes_null() -> None:
    assert strictly(to_json(ODD)) == {"nan": None, "list": [1.5, None, {"deep": [None, "NaN", None]}], "whole": 1}
    assert to_json({"a": 1.0}, separators=(",", ":")) == '{"a":1.0}'


def test_results_on_stdout_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    """All commands print their `--json` with `show`."""
    show(ODD)
    assert strictly(capsys.readouterr().out)["nan"] is None


@pytest.mark.anyio
async def test_a_status_is_json(tmp_path: Path) -> None:
    """On the agent's socket, byte for byte."""
    server = StatusSocket(tmp_path, lambda: ODD)
    await server.start()
    reader, writer = await asyncio.open_unix_connection(tmp_path / "status.sock")
    assert strictly((await reader.read()).decode())["list"] == [1.5, None, {"deep": [None, "NaN", None]}]
    writer.close()
    await server.close()


@pytest.mark.anyio
@pytest.mark.live
async def test_a_status_for_members_is_json(tmp_path: Path) -> None:
    """As it comes over the network."""
    agent = make(tmp_path / "a", "a", status=lambda: ODD)
    async with started(agent):
        update_neighbours([agent], {"a": agent.address, "b": "127.0.0.1:1"})
        async with aio.insecure_channel(agent.address) as channel:
            reply = await call(channel, "Status", pb.StatusRequest(), pb.StatusReply, "b")
    assert strictly(reply.json)["nan"] is None


def test_a_ledger_of_merges_is_json_and_comes_back(tmp_path: Path) -> None:
    """A metric that is not finite is null in the file and not a number once it is read."""
    result = MergeResult(before={"loss": INF}, after={"loss": NAN, "accuracy": 0.5})
    append_record(tmp_path / "lineage.jsonl", MergeRecord("a", 1, "root", (), result))
    strictly((tmp_path / "lineage.jsonl").read_text())
    (read,) = read_records(tmp_path / "lineage.jsonl")
    assert str(read.result.after) == str({"loss": NAN, "accuracy": 0.5})
    assert str(read.result.before) == str({"loss": NAN})


def test_a_trace_is_json_and_comes_back(tmp_path: Path) -> None:
    event = MergeDone(1, MergeResult(after={"loss": NAN}))
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        trace.step(0.0, "a", event, ())
    line = strictly((tmp_path / "trace.jsonl").read_text())
    again = event_of(line["event"])
    assert isinstance(again, MergeDone)
    assert str(again.result.after) == str({"loss": NAN})
    assert to_json(plain(again)) == to_json(plain(event))


@pytest.mark.parametrize("make", [NAN, INF])
def test_results_of_a_run_come_back(make: float) -> None:
    """A distance that is not finite is null in results.json, which the report still reads."""
    values: dict[str, Any] = dict.fromkeys(("round", "heard", "expected", "bytes_sent", "bytes_received", "samples"), 1)
    values |= {"agent": "a", "loss": make, "before": None, "after": make, "basis": "", "accepted": 1.0, "time_s": 1.0}
    text = AgentRound(**values, consensus_distance=make).model_dump_json()
    strictly(text)
    assert str(AgentRound.model_validate_json(text).consensus_distance) == "nan"
