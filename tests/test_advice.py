"""Advice as plain values and as TOML. Reference: tomllib reads what was meant."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from dimat.advice import Advice, ProbeRow, as_toml
from dimat.ui.terminal.advice import AS_IT_IS, advice_lines


def row(
    *values: float, factor: str = "start", option: str = "own", noise: float = 0.05, kept: bool = False
) -> ProbeRow:
    return ProbeRow(factor, option, values, 0.0, noise, 1.5, kept)


def advice(advised: float, settings: dict[str, object] | None = None) -> Advice:
    rows = (row(0.5, 0.7, kept=True), row(0.4, 0.4, option="shared"))
    return Advice(
        "accuracy",
        rows,
        row(0.5, 0.5, factor="alone", option="isolated"),
        rows[0],
        row(advised),
        settings or {},
        (),
        "",
        "a probe",
        "2 runs",
        ("careful\x1b[1m",),
    )


def test_toml_is_read_as_it_was_meant() -> None:
    """Texts, numbers, truth, lists and tables of each kind; tables by their first part."""
    settings = {
        "train.loss": 'a "quoted" é',
        "train.epochs_per_round": 0.5,
        "schedule.rounds": 3,
        "merge.combine": {"name": "ties", "options": {"density": 0.5, "deep": [1, True]}},
    }
    read = tomllib.loads(as_toml(settings))
    assert {f"{table}.{key}": value for table, entries in read.items() for key, value in entries.items()} == settings


def test_a_topology_of_a_map_is_for_the_map() -> None:
    """Its lines come first and in no table, so that they can stand at a map's beginning; what goes is said."""
    text = as_toml({"train.loss": "auto", "topology.graph": "complete"}, ("topology.edges",), "maps/ring.toml")
    first, second = text.split("\n\n")
    assert first.startswith("# in maps/ring.toml")
    assert tomllib.loads(first) == {"graph": "complete"}
    assert "# instead of edges" in first
    assert tomllib.loads(second) == {"train": {"loss": "auto"}}


def test_mean_and_spread_by_hand() -> None:
    """0.5 and 0.7: mean 0.6, standard deviation 0.141."""
    assert (row(0.5, 0.7).mean, row(0.5, 0.7).std) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert row(0.5).std == 0


@pytest.mark.parametrize(("advised", "ahead"), [(0.6, True), (0.52, None), (0.4, False)])
def test_the_verdict_is_above_noise_or_none(advised: float, ahead: bool | None) -> None:
    """Noise is 0.05 and training alone 0.5."""
    found = advice(advised)
    assert found.ahead is ahead
    assert found.to_plain()["ahead_of_alone"] is ahead
    first = advice_lines(found)[0]
    assert ("beat training alone by 0.100" in first) == (ahead is True)
    assert ("did not beat" in first) == (ahead is False)


@pytest.mark.parametrize(("advised", "ahead"), [(0.4, True), (0.52, None), (0.6, False)])
def test_a_perplexity_is_ahead_where_it_is_lower(advised: float, ahead: bool | None) -> None:
    """The same numbers, the other way round."""
    found = replace(advice(advised), metric="perplexity")
    assert found.ahead is ahead
    assert ("beat training alone by 0.100" in advice_lines(found)[0]) == (ahead is True)


def test_a_person_sees_the_table_the_lines_and_the_cost() -> None:
    """Rows of a factor stand together under its name; control characters are spelled out."""
    lines = advice_lines(advice(0.6, {"train.loss": "auto"}))
    table = [line.split() for line in lines]
    assert ["start", "own", "0.600", "±", "0.141", "0.050", "1.50", "kept"] in table
    assert ["shared", "0.400", "±", "0.000", "1.50"] in table
    assert lines[lines.index("[train]") + 1] == 'loss = "auto"'
    assert "one probe: a probe; all of them: 2 runs" in lines
    assert lines[-1] == "note: careful\\x1b[1m"
    assert AS_IT_IS in advice_lines(advice(0.6))
