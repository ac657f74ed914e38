"""The event log: round trip, torn last line, continued files, threads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.events import Trained, TrainResult, Warned
from dimat.ui.jsonl import HEADER, JsonlListener, read_events
from tests.ui.samples import make_events


def _log(path: Path, count: int = 3) -> list[bytes]:
    listener = JsonlListener(path)
    for number in range(count):
        listener(Warned(run="r", message=f"nummer {number} é"))
    listener.close()
    return path.read_bytes().splitlines(keepends=True)


def test_round_trip_of_a_whole_run(tmp_path: Path) -> None:
    """Reference: `Event.to_dict`, through JSON (tuples become lists)."""
    events = make_events()
    listener = JsonlListener(tmp_path / "events.jsonl")
    for event in events:
        listener(event)
    assert list(read_events(tmp_path / "events.jsonl")) == json.loads(json.dumps([e.to_dict() for e in events]))
    assert json.loads((tmp_path / "events.jsonl").read_bytes().splitlines()[0]) == HEADER
    listener.close()
    listener.close()


def test_torn_last_line_is_passed_over_at_every_cut(tmp_path: Path) -> None:
    """Reference: a kill leaves a prefix of the file; whole lines are read, and nothing else."""
    lines = _log(tmp_path / "whole.jsonl")
    before = len(b"".join(lines[:3]))
    for cut in range(1, len(lines[3])):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(b"".join(lines)[: before + cut])
        read = [event["message"] for event in read_events(torn)]
        # the newline alone missing: the event is whole
        assert read == [f"nummer {n} é" for n in range(3 if cut == len(lines[3]) - 1 else 2)]


def test_continuing_a_torn_log_loses_only_the_torn_line(tmp_path: Path) -> None:
    """Reference: after a restart the log reads as if the torn event had never been written."""
    path = tmp_path / "events.jsonl"
    lines = _log(path)
    for cut in (1, 20, len(lines[3]) - 1):
        path.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
        listener = JsonlListener(path)
        listener(Warned(message="again"))
        listener.close()
        messages = [event["message"] for event in read_events(path)]
        kept = ["nummer 2 é"] if cut == len(lines[3]) - 1 else []
        assert messages == ["nummer 0 é", "nummer 1 é", *kept, "again"]
        assert path.read_bytes().count(b"dimat.events") == 1


@pytest.mark.parametrize("size", [0, 1, 10])
def test_a_header_torn_or_missing_is_written_again(tmp_path: Path, size: int) -> None:
    """Reference: a kill within the very first line."""
    path = tmp_path / "events.jsonl"
    path.write_bytes((json.dumps(HEADER).encode() + b"\n")[:size])
    assert len(_log(path)) == 4


def test_foreign_files_are_neither_written_nor_read(tmp_path: Path) -> None:
    """Reference: DataError, and the file as it was."""
    for content in (b"my notes", b'{"format": 1, "kind": "other"}\n', b"a\n" * 100):
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a dimat event log"):
            JsonlListener(path)
        with pytest.raises(DataError, match="not a dimat event log"):
            list(read_events(path))
        assert path.read_bytes() == content


def test_damage_within_the_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    """Reference: only the last line can be torn; anything else is damage."""
    path = tmp_path / "events.jsonl"
    lines = _log(path)
    for broken in (b'{"event": "War\n', b"[1]\n", b"\xff\xfe\n"):
        path.write_bytes(lines[0] + lines[1] + broken + lines[3])
        with pytest.raises(DataError, match="line 3"):
            list(read_events(path))


def test_unwritable_and_missing(tmp_path: Path) -> None:
    """Reference: DataError with the path, for both directions and after closing."""
    with pytest.raises(DataError, match=r"cannot write events to .*nowhere"):
        JsonlListener(tmp_path / "nowhere" / "events.jsonl")
    with pytest.raises(DataError, match="cannot write events"):
        JsonlListener(tmp_path)
    with pytest.raises(DataError, match="cannot read events"):
        list(read_events(tmp_path / "none.jsonl"))
    listener = JsonlListener(tmp_path / "events.jsonl")
    listener.close()
    with pytest.raises(DataError, match="closed"):
        listener(Warned(message="late"))


def test_a_full_disk_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: /dev/full, which takes no byte; stands in for the file once that is open."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    listener = JsonlListener(tmp_path / "events.jsonl")
    whole = listener._file
    monkeypatch.setattr(listener, "_file", open("/dev/full", "ab"))
    with pytest.raises(DataError, match="No space left"):
        listener(Warned(message="x"))
    with pytest.raises(DataError, match="No space left"):
        listener.close()
    whole.close()


def test_non_finite_numbers_and_lone_surrogates_are_still_json(tmp_path: Path) -> None:
    """Reference: RFC 8259 has no NaN; null stands for it. A strict parser reads every line."""
    path = tmp_path / "events.jsonl"
    listener = JsonlListener(path)
    listener(Trained(agent="a\ud800", round=1, result=TrainResult(loss=float("nan"), samples=1), train_s=float("inf")))
    listener.close()
    (event,) = read_events(path)
    assert (event["agent"], event["loss"], event["train_s"]) == ("a\ud800", None, None)
    assert b"NaN" not in path.read_bytes()


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    """Reference: 8 threads × 200 events; each arrives once, whole, in its thread's order."""
    listener = JsonlListener(tmp_path / "events.jsonl")

    def write(name: str) -> None:
        for number in range(200):
            listener(Warned(run=name, time_s=number, message="x" * (number % 50)))

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listener.close()
    seen: dict[str, list[float]] = {}
    for event in read_events(tmp_path / "events.jsonl"):
        seen.setdefault(event["run"], []).append(event["time_s"])
    assert seen == {str(i): [float(n) for n in range(200)] for i in range(8)}
