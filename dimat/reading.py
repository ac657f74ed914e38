"""Reads text, JSON and TOML from untrusted files, within bounds.

The result is plain values, or an error that gives the reason in one line. Plain values are safe for all code that
takes them: nesting is bounded, whole numbers fit into 64 bits, and text is Unicode without NUL. Parsers here raise
ValueError with the reason alone; readers of files raise the error class that they are given, with the file's name.
Regular expressions that come from files run for a bounded time.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from dimat.errors import DataError, DimatError

T = TypeVar("T")
_CONTROL = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})
"""Bytes that no text holds, whatever its encoding."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
MOST_BYTES = 2**30
"""Largest file that is read as a whole, in bytes."""
REGEX_S = 1.0
"""Seconds that a regular expression may take for one text, unless another limit is given."""
MOST_DEPTH = 64
"""Deepest nesting of tables and lists."""
MOST_VALUES = 10_000_000
"""Most values in one tree: YAML can repeat a list by name, so that a few lines describe more than memory can hold."""


def read_text(path: str | Path, error: type[DimatError] = DataError, mend: str = "") -> str:
    """Return the text of a UTF-8 file, without its byte-order mark; raises `error` if that fails.

    `mend`: what to do if it is no text, for files that no person has written.
    """
    data = b""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise error(f"cannot read {path}: it is longer than {MOST_BYTES:,} bytes, the most that is read at once")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        place = f"byte {fault.start} is 0x{data[fault.start]:02x}"
        if mend or (data.translate(None, _CONTROL) != data and not data.startswith(_UTF_16)):
            raise error(f"{path} holds no text ({place}); {mend or 'is it the right file, and undamaged?'}") from None
        raise error(f"{path} is not UTF-8 text: {place}; save it as UTF-8") from None
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror or fault}") from fault
    except ValueError:  # of a name with NUL in it
        raise error(f"cannot read {str(path)!r}: no file can have this name") from None


def matches(pattern: str, text: str, limit_s: float, *, whole: bool = False) -> bool:
    """Tell whether a regular expression matches somewhere in a text, or all of it (`whole`).

    Raises TimeoutError if the search takes more than `limit_s` seconds, since some patterns would run for ever, and
    `regex.error` for a malformed pattern.
    """
    import regex

    return (regex.fullmatch if whole else regex.search)(pattern, text, timeout=limit_s) is not None


def read_json(path: str | Path, error: type[DimatError] = DataError) -> Any:
    """Return the value in a JSON file; raises `error` if it is not valid JSON."""
    text = read_text(path, error)
    try:
        return parse_json(text)
    except ValueError as fault:
        raise error(f"{path} is not valid JSON: {fault}") from None


def read_table(path: str | Path, error: type[DimatError] = DataError) -> dict[str, Any]:
    """Return the table (object) in a JSON file; raises `error` if it holds no table."""
    found = read_json(path, error)
    if not isinstance(found, dict):
        raise error(f"{path} is not a JSON table but {_kind(found)}")
    return cast("dict[str, Any]", found)


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text; raises ValueError with the reason if it is not valid.

    `finite`: also refuse NaN and infinities, which are not JSON although Python writes them.
    """
    if finite:
        return _parsed(lambda: json.loads(text, parse_constant=_refused, parse_float=_finite), text=False)
    return _parsed(lambda: json.loads(text), text=False)


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text; raises ValueError with the reason if it is not valid."""
    return _parsed(lambda: tomllib.loads(text), text=True)


def _parsed(parse: Callable[[], Any], *, text: bool) -> Any:
    try:
        return check_plain(parse(), text=text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except ValueError as fault:
        if type(fault) is ValueError and "int_max_str_digits" in str(fault):  # Python's own bound on digits
            raise ValueError(f"it {_LARGE}") from None
        raise


_LARGE = "holds a whole number that does not fit into 64 bits"


def as_type(kind: type[T], value: Any) -> T:
    """Return plain values as a dataclass, nested ones included; raises ValueError, in one line, if they do not fit."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return _adapter(TypeAdapter, kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ValueError(f"{where.removeprefix('.') or kind.__name__}: {first['msg']}") from None


@cache
def _adapter(adapter: Callable[[Any], Any], kind: type) -> Any:
    return adapter(kind)


def check_plain(tree: Any, *, text: bool = False) -> Any:
    """Return plain values unchanged; raises ValueError, with the place, for values outside this module's bounds.

    `text`: check texts too.
    """
    left: list[tuple[Any, _Place, int]] = [([tree], None, -1)]
    seen = 0
    while left:
        value, place, depth = left.pop()
        if depth >= MOST_DEPTH:
            raise ValueError(f"{_shown(place, None)[:80]}… is nested more than {MOST_DEPTH} deep")
        seen += len(value)
        if seen > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        pairs: Iterable[tuple[Any, Any]] = value.items() if value.__class__ is dict else enumerate(value)
        for key, item in pairs:
            kind = item.__class__  # a vocabulary has a million entries: no look at subclasses
            if kind is str:
                if text and not item.isprintable():
                    _check_text(item, place, key)
            elif kind is int:
                if not -(2**63) <= item < 2**64:
                    raise ValueError(f"{_shown(place, key)} {_LARGE}")
            elif kind is dict or kind is list or kind is tuple:
                left.append((item, (place, key), depth + 1))
            if text and isinstance(key, str) and not key.isprintable():
                _check_text(key, place, "<key>")
    return tree


_Place = tuple[Any, Any] | None
"""Place of a value: (place of the table or list that holds it, key or index in it); None at the top."""


def _shown(place: _Place, key: Any) -> str:
    """Return a place as users write it: `models[3].weight`; the first key is that of the list around the tree."""
    parts = [key]
    while place is not None:
        place, key = place
        parts.append(key)
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts[-2::-1] if part is not None)
    return text.removeprefix(".") or "it"


def _check_text(value: str, place: _Place, key: Any) -> None:
    if "\0" in value:
        raise ValueError(f"{_shown(place, key)} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        written = value.encode(errors="surrogateescape" if _from_bytes(value) else "backslashreplace")
        raise ValueError(
            f"{_shown(place, key)} is not UTF-8 text ({written!r:.80}); write it in UTF-8: a file with such a name "
            "can be renamed, or given by a symbolic link"
        ) from None


def _from_bytes(value: str) -> bool:
    """Tell whether a text encodes raw bytes, as Python does for file names that are not UTF-8."""
    return all("\udc80" <= letter <= "\udcff" for letter in value if "\ud800" <= letter <= "\udfff")


def _refused(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if value - value == 0 else _refused(digits[:20])


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {str: "a text", bool: "a truth value", int: "a number", float: "a number", list: "a list"}[type(value)]
