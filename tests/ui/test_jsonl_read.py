"""Logs read while they grow. Reference: the strict reader, and what was written."""

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


def new(reader: EventReader) -> list[object]:
    """Return what the events say that are new."""
    return [event["message"] for events in reader.read() for event in events]


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """What is no JSON, no object, no event, too deep, or two events in one line is passed over; the strict reader says
    where the first of them is."""
    path = tmp_path / "events.jsonl"
    damage = [
        b"{\n",
        b"\xff\xfe\n",
        b'{"event": "Warned", "message": "\xff"}\n',
        b"[1]\n",
        b"\n",
        b'{"x": 1}\n',
        b'{"event": 3}\n',
        b"[" * 100_000 + b"\n",
        line(7)[:-1] + b"," + line(8),
    ]
    path.write_bytes(HEAD + line(0) + b"".join(damage) + line(1))
    reader = EventReader(path)
    assert new(reader) == ["0", "1"]
    assert reader.skipped == len(damage)
    for one in damage:
        path.write_bytes(HEAD + line(0) + one + line(1))
        reader = EventReader(path)
        assert (new(reader), reader.skipped) == (["0", "1"], 1), one
    path.write_bytes(HEAD + line(0) + b"".join(damage) + line(1))
    with pytest.raises(DataError, match="line 3"):
        list(read_events(path))


def test_a_log_that_grows(tmp_path: Path) -> None:
    """Only new whole lines come; a line that is being written comes once it is whole."""
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert new(reader) == [], "a log that is not there yet has nothing new"
    path.write_bytes(HEAD[:9])
    assert new(reader) == [], "nor has one whose header is being written"
    listener = JsonlListener(path)
    for number in range(3):
        listener(Warned(message=str(number)))
        assert new(reader) == [str(number)]
    assert new(reader) == []
    listener.close()
    with path.open("ab") as file:
        for part in (line(3)[:10], line(3)[10:-1]):
            file.write(part)
            file.flush()
            assert new(reader) == []
        file.write(b"\n" + line(4) + line(5))
    assert new(reader) == ["3", "4", "5"]
    assert reader.skipped == 0


@pytest.mark.parametrize("size", [len(HEAD), 100, 101, 1000, 4096])
def test_pieces_give_the_same_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Reference: the strict reader on the log without the lines that are longer than a piece; each of those counts
    once, however many pieces it has, and one that is being written does not yet."""
    path = tmp_path / "events.jsonl"
    short = [line(i) for i in range(200)]
    assert max(map(len, short)) <= 100
    path.write_bytes(HEAD + b"".join(short))
    expected = [event["message"] for event in read_events(path)] if size >= 100 else []
    long = [b"x" * n + b"\n" for n in (5000, 8191, 8192, 12345)]
    path.write_bytes(HEAD + b"".join(short[:50]) + b"".join(long) + b"".join(short[50:]) + b"y" * 9000)
    monkeypatch.setattr(jsonl_read, "READ_BYTES", size)
    reader = EventReader(path)
    assert new(reader) == expected
    unfinished = 1
    assert reader.skipped == len(long) + unfinished + (0 if expected else len(short))
    with path.open("ab") as file:
        file.write(b"y\n" + line(7))
    assert new(reader) == (["7"] if expected else [])
    assert reader.skipped == len(long) + unfinished + (0 if expected else len(short) + 1)


def test_a_log_that_is_replaced(tmp_path: Path) -> None:
    """A shorter file is another one, and so is another file under the name: it is read from its start."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(HEAD + line(0) + b"{\n" + line(1))
    reader = EventReader(path)
    assert new(reader) == ["0", "1"]
    path.write_bytes(HEAD + line(2))
    assert new(reader) == ["2"]
    other = tmp_path / "other.jsonl"
    other.write_bytes(HEAD + line(3) + line(4) + line(5))
    other.replace(path)
    assert new(reader) == ["3", "4", "5"]
    path.unlink()
    assert new(reader) == []
    assert reader.skipped == 1


@pytest.mark.parametrize("first", [b"x\n", line(0), b'{"format": 3, "kind": "dimat.events"}\n', b"z" * (5 << 20)])
def test_what_is_no_log_of_this_format(tmp_path: Path, first: bytes) -> None:
    """It is refused, each time, in one line."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(first + line(0))
    reader = EventReader(path)
    for _ in range(2):
        with pytest.raises(DataError, match="is not a dimat event log"):
            new(reader)
    with pytest.raises(DataError, match="cannot read events"):
        new(EventReader(tmp_path))
