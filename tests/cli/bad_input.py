"""Bad input by kind: texts that a file may hold instead of what it should, values in the place of others, and the check
that a command told them as it should."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dimat.cli import LONGEST, main

TEXTS: Mapping[str, bytes] = {
    "nothing": b"",
    "no UTF-8": b"a = '\xff\xfe'",
    "UTF-16": "run = 'x'".encode("utf-16"),
    "NUL bytes": bytes(64),
    "random bytes": random.Random(0).randbytes(300),
    "a list": b"[]",
    "null": b"null",
    "a text": b'"text"',
    "a number": b"7",
    "NaN": b'{"round": NaN, "seed": Infinity}',
    "deep nesting": b"[" * 20_000,
    "deep tables": b'{"a":' * 10_000,
    "deep TOML": b"a = " + b"[" * 20_000,
    "a long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "a long number, TOML": b"seed = " + b"9" * 5000,
    "128 bits": b'{"version": ' + str(2**127).encode() + b"}",
    "NUL in text": b'run = "a\\u0000b"',
    "surrogates": b'{"run": "\\ud800"}',
    "cut short": b'{"run": "x", "se',
    "XML": b'<?xml version="1.0"?><a b="c"/>',
    "YAML aliases": b"a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n".encode() for a, b in zip("abcdefghi", "bcdefghij")),
    "YAML within itself": b"models: &a [*a]\nmerge_method: linear\n",
}

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 2**63, 2**70, 10**400, "", "x", "..", "../x"),
    *("/x", "a/../..", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": {}}, {"x": 1}, "ring", [1, "a"]),
)


def mutants(tree: Any, generator: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """Yield trees with one value replaced, left out, or given under another key; each with a word on what was done."""
    places = list(_places(tree))
    for _ in range(count):
        place = generator.choice(places)
        changed = deepcopy(tree)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        what = generator.randrange(8)
        if what == 0:
            del holder[place[-1]]
            yield f"without {place}", changed
        elif what == 1 and isinstance(holder, dict):
            holder[generator.choice(["", "..", "x" * 300, "a\0b"])] = holder.pop(place[-1])
            yield f"{place} under another key", changed
        else:
            value = generator.choice(VALUES)
            holder[place[-1]] = deepcopy(value)
            yield f"{place} = {str(value)[:40]!r}", changed


def _places(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from _places(value, (*before, key))


def as_toml(tree: Mapping[str, Any]) -> str:
    """Return plain values as TOML, each key on a line; TOML has no null."""
    return "".join(f"{_text(key)} = {_value(value)}\n" for key, value in tree.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value if v is not None) + "]"
    if isinstance(value, float):
        return str(value)
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    return json.dumps(value).replace("\\ud800", "?").replace("\x7f", "\\u007f")


class Place:
    """A folder to run commands in, inside of one that nothing may be written to."""

    def __init__(self, outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.outside = outside
        self.folder = outside / "work"
        self.folder.mkdir()
        self._capsys = capsys
        monkeypatch.chdir(self.folder)
        monkeypatch.delenv("DIMAT_TRACEBACK", raising=False)

    def refuses(
        self, arguments: Sequence[str], why: str = "", *, may_pass: bool = False, codes: Sequence[int] = (1, 2, 3, 4, 5)
    ) -> str:
        """Demand that a command tells what it is given in one line, by a code of dimat's, and writes nothing; return
        the line. `may_pass`: or does what it is asked."""
        before = self._files()
        self._capsys.readouterr()
        where = f"{why}: dimat {' '.join(map(str, arguments))}"[:500]
        code = main([*map(str, arguments)])
        told = self._capsys.readouterr().err
        lines = told.splitlines()
        assert "internal error" not in told, f"{where}\n{told}"
        assert "Traceback" not in told, f"{where}\n{told}"
        if may_pass and code == 0:
            return ""
        assert code in codes, f"{where}: exit code {code}\n{told}"
        assert lines, where
        assert lines[-1].startswith("dimat: "), f"{where}\n{told}"
        assert sum(line.startswith("dimat: ") for line in lines) == 1, f"{where}\n{told}"
        assert len(lines[-1]) <= LONGEST + 20, where
        new = self._files() - before
        assert not new, f"{where} leaves {sorted(map(str, new))[:5]}"
        return lines[-1]

    def _files(self) -> set[Path]:
        return {path for path in self.outside.rglob("*") if "__pycache__" not in path.parts}


def each_text(write: Callable[[bytes], object]) -> Iterator[str]:
    """Write one text after the other, and yield its kind."""
    for kind, data in TEXTS.items():
        write(data)
        yield kind
