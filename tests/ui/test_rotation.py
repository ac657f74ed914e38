"""Logs that are put aside as they grow. Reference: all events that were written, in order."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.events import AgentStarted, RoundStarted, Warned
from dimat.ui.dashboard.run_source import FolderSource
from dimat.ui.jsonl import JsonlListener
from dimat.ui.jsonl_read import EventReader, read_events, rotated


def said(path: Path) -> list[str]:
    """Return what the strict reader finds."""
    return [event["message"] for event in read_events(path)]


def new(reader: EventReader) -> list[str]:
    """Return what is new to a reader that follows."""
    return [event["message"] for events in reader.read() for event in events]


def listener(path: Path, kept: int = 100) -> JsonlListener:
    """Return one whose files take about ten events."""
    return JsonlListener(path, most_bytes=600, kept=kept)


def test_a_log_is_put_aside_by_size_and_the_newest_stay(tmp_path: Path) -> None:
    """Every file has a header and whole lines; numbers go on over restarts; sizes are bounded by the kept count."""
    path = tmp_path / "events.jsonl"
    for life in range(4):
        log = listener(path, kept=3)
        for number in range(25):
            log(Warned(message=f"{life}.{number}"))
        log.close()
        assert len(rotated(path)) <= 3
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4 * 700
    numbers = [int(file.name.split(".")[1]) for file in rotated(path)]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert numbers[0] > 3
    every = [f"{life}.{number}" for life in range(4) for number in range(25)]
    found = said(path)
    assert found == every[-len(found) :]
    assert len(found) > 20
    for file in (*rotated(path), path):
        assert list(read_events(file)) is not None
        assert file.read_bytes().endswith(b"\n")


def test_followers_miss_nothing_and_see_nothing_twice(tmp_path: Path) -> None:
    """However many files were put aside between two looks, and in the middle of which one a look ended."""
    draws = random.Random(5)
    path = tmp_path / "events.jsonl"
    log = listener(path)
    readers: list[tuple[EventReader, list[str]]] = [(EventReader(path), []) for _ in range(5)]
    for number in range(400):
        log(Warned(message=str(number)))
        for reader, found in readers:
            if draws.random() < 0.08:
                found += new(reader)
    every = [str(number) for number in range(400)]
    assert len(rotated(path)) > 20
    for reader, found in readers:
        assert found + new(reader) == every
        assert new(reader) == []
        assert reader.skipped == 0
    late = EventReader(path)
    assert new(late) == every
    assert said(path) == every
    log.close()


def test_a_follower_that_is_too_slow_goes_on_with_what_is_left(tmp_path: Path) -> None:
    """What it has not read was removed; the files that are left come once, in order."""
    path = tmp_path / "events.jsonl"
    log, reader = listener(path, kept=2), EventReader(path)
    for number in range(5):
        log(Warned(message=str(number)))
    assert new(reader) == [str(number) for number in range(5)]
    for number in range(5, 200):
        log(Warned(message=str(number)))
    left = said(path)
    assert new(reader) == left
    log(Warned(message="more"))
    assert new(reader) == ["more"]
    log.close()


def test_a_log_that_is_replaced_is_still_read_anew(tmp_path: Path) -> None:
    """By people, with files put aside beside it, which are not read again."""
    path = tmp_path / "events.jsonl"
    log, reader = listener(path), EventReader(path)
    for number in range(30):
        log(Warned(message=str(number)))
    log.close()
    new(reader)
    path.rename(tmp_path / "old.jsonl")
    log = listener(path)
    log(Warned(message="fresh"))
    assert new(reader) == ["fresh"]
    log.close()


def test_the_dashboard_reads_what_was_put_aside(tmp_path: Path) -> None:
    """An agent's start lies in the first file, its newest round in the last; both are shown, as the log goes on."""
    path = tmp_path / "events.jsonl"
    log = listener(path)
    start = AgentStarted(run="r", agent="a", round=0, address="", peers=(), samples=1, parameters=1, secure=True)
    log(replace(start, members=("a",)))
    for number in range(1, 40):
        log(RoundStarted(run="r", agent="a", round=number))
    source = FolderSource(tmp_path)
    assert not source.damaged
    for number in range(40, 80):
        log(RoundStarted(run="r", agent="a", round=number))
    assert source.read()
    assert not source.damaged
    view = source.state.agents["a"].view
    assert (view.round, view.members) == (79, ("a",))
    log.close()


def test_a_log_that_cannot_be_put_aside_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told each time, nothing is lost, and it is put aside once it can be."""
    path = tmp_path / "events.jsonl"
    log = listener(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _refuse)
        for number in range(20):
            full = path.stat().st_size > 540
            with pytest.raises(DataError, match="no permission") if full else nullcontext():
                log(Warned(message=str(number)))
    assert not rotated(path)
    log(Warned(message="20"))
    assert len(rotated(path)) == 1
    assert said(path) == [str(number) for number in range(21)]
    log.close()


def _refuse(*_: object) -> None:
    raise OSError("no permission")
