"""Numbers as text, and plain tables."""

from __future__ import annotations

import pytest

from dimat.ui import text
from dimat.ui.text import Table


def test_numbers_read_as_a_person_writes_them() -> None:
    """Reference: written by hand."""
    assert [text.metric_text(v) for v in (None, 0.93149, 12.5, 51234.0, float("nan"))] == [
        "-",
        "0.931",
        "12.500",
        "5.123e+04",
        "nan",
    ]
    assert [text.distance_text(v) for v in (0.0, 0.5, 0.01, 0.00123)] == ["0.000", "0.500", "0.010", "1.2e-03"]
    assert [text.mb_text(v) for v in (None, 0.0, 0.9406, 9.406, 28.218, 12345.6)] == [
        "-",
        "0",
        "0.941",
        "9.41",
        "28.2",
        "12,345.6",
    ]
    assert [text.bytes_text(v) for v in (7, 940_600, 1_000_000, 25_600_000_000)] == [
        "7 B",
        "940.6 kB",
        "1.0 MB",
        "25.6 GB",
    ]
    assert [text.seconds_text(v) for v in (3.24, 125, 3725)] == ["3.2 s", "2 min 5 s", "1 h 2 min"]
    assert [text.count_text(v, "agent") for v in (0, 1, 12000)] == ["0 agents", "1 agent", "12,000 agents"]
    assert text.mean([]) is None
    assert text.mean([1.0, None, 2.0]) == 1.5


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\nb\tc", "a\\r b c"),
        ("abc\u202egnp", "abc\\u202egnp"),
        ("\x9b2J\u2028\ud800", "\\x9b2J\\u2028\\ud800"),
        ("Zürich 東京", "Zürich 東京"),
    ],
)
def test_control_characters_are_spelled_out(hostile: str, shown: str) -> None:
    """Reference: Unicode categories Cc, Cf, Cs, Zl, Zp; all else is kept."""
    assert text.clean(hostile) == shown


def test_plain_table_is_aligned_also_with_wide_characters() -> None:
    """Reference: by hand; an East Asian wide character takes two columns of a terminal."""
    table = Table("who", ("agent", "n"), (("東京", "5"), ("lab-a", "12")), note="all")
    assert text.as_text(table) == ["who", "agent   n", "東京    5", "lab-a  12", "all"]


def test_a_long_last_column_goes_on_below_itself() -> None:
    """Reference: by hand; without room for twenty columns, or a width, lines stay whole."""
    table = Table("", ("name", "what it is"), (("ring", "a circle of agents, two peers each"),), left=frozenset({0, 1}))
    whole = ["name  what it is", "ring  a circle of agents, two peers each"]
    assert text.as_text(table) == text.as_text(table, 80) == text.as_text(table, 25) == whole
    assert text.as_text(table, 30) == ["name  what it is", "ring  a circle of agents, two", "      peers each"]


def test_narrowed_drops_columns_in_the_given_order_only_as_needed() -> None:
    """Reference: widths counted by hand (three columns of 4 + gap 3)."""
    table = Table("", ("name", "bbbb", "cccc"), (("a", "1", "2"),), left=frozenset({0}), best=frozenset({(0, 2)}))
    assert text.narrowed(table, 21, ("bbbb", "cccc")) == table
    less = text.narrowed(table, 20, ("bbbb", "cccc"))
    assert less.headers == ("name", "cccc")
    assert less.rows == (("a", "2"),)
    assert less.best == {(0, 1)}
    assert text.narrowed(table, 1, ("bbbb", "cccc")).headers == ("name",)
