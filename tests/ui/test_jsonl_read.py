"""Logs read forgivingly and while they grow. Reference: the strict reader, and what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.events import Warned
from dimat.ui import jsonl_read
from dimat.ui.jsonl import JsonlListener
from dimat.ui.jsonl_read import HEADER, EventReader, read_events

HEAD = json.dumps(HEADER).encode() + b"\n"


def line(number: int) -> bytes:
    return json.dumps(Warned(message=str(number)).to_dict()).encode() + b"\n"


def said(events: list[dict[str, object]]) -> list[object]:
    return [event["message"] for event in events]


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """What is no JSON, no object, no event, or too deep is passed over; the strict reader says where it is."""
    path = tmp_path / "events.jsonl"
    damage = [b"{\n", b"\xff\xfe\n", b"[1]\n", b"\n", b'{"x": 1}\n', b'{"event": 3}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(HEAD + line(0) + b"".join(damage) + line(1))
    reader = EventReader(path)
    assert said(reader.read()) == ["0", "1"]
    assert (reader.skipped, reader.at_end) == (len(damage), True)
    assert said(list(read_events(path, strict=False))) == ["0", "1"]
    with pytest.raises(DataError, match="line 3"):
        list(read_events(path))


def test_a_log_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only new whole lines come; a line that is being written comes once it is whole; pieces of a few bytes give the
    same as the whole."""
    path = tmp_path / "events.jsonl"
    listener = JsonlListener(path)
    reader = EventReader(path)
    assert reader.read() == []
    for number in range(3):
        listener(Warned(message=str(number)))
        assert said(reader.read()) == [str(number)]
    assert reader.read() == []
    listener.close()
    with path.open("ab") as file:
        file.write(line(3)[:10])
        file.flush()
        assert reader.read() == []
        file.write(line(3)[10:-1])
        file.flush()
        assert reader.read() == []
        assert said(reader.rest()) == ["3"]
        file.write(b"\n")
    assert said(reader.read()) == ["3"]
    monkeypatch.setattr(jsonl_read, "READ_BYTES", 7)
    assert said(list(read_events(path, strict=False))) == ["0", "1", "2", "3"]


def test_a_log_that_is_replaced(tmp_path: Path) -> None:
    """A shorter file is another one: it is read from its start."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(HEAD + line(0) + b"{\n" + line(1))
    reader = EventReader(path)
    assert said(reader.read()) == ["0", "1"]
    path.write_bytes(HEAD + line(2))
    assert said(reader.read()) == ["2"]
    assert (reader.begun_anew, reader.skipped) == (1, 0)


@pytest.mark.parametrize("first", [b"x\n", b'{"format": 2, "kind": "dimat.events"}\n'])
def test_what_is_no_log_of_this_format(tmp_path: Path, first: bytes) -> None:
    """It is refused, each time, in one line."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(first + line(0))
    reader = EventReader(path)
    for _ in range(2):
        with pytest.raises(DataError, match="is not a dimat event log"):
            reader.read()
    with pytest.raises(DataError, match="cannot read events"):
        list(read_events(tmp_path / "none.jsonl", strict=False))
