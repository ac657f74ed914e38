"""Keys and certificates as lines, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from dimat.net.pki.key_info import KeyInfo
from dimat.net.pki.keyring import KeyFiles
from dimat.ui.text import NONE, Table, as_text, clean


def made_lines(made: KeyFiles, what: str) -> list[str]:
    """Return a command's output about the files that it made. `what`: their kind, e.g. "certificate of"."""
    hosts = f" at {', '.join(made.hosts)}" if made.hosts else ""
    until = f", until {made.until:%Y-%m-%d}" if made.until is not None else ""
    return [
        clean(f"{what} {made.name}{hosts}{until}: wrote {', '.join(map(str, made.files))}"),
        f"  its key (sha256): {made.key_fingerprint}",
    ]


def keys_text(found: Sequence[KeyInfo], now: datetime | None = None) -> str:
    """Return a table of keys, with fingerprints below, and a line for each fault and warning."""
    now = now or datetime.now(UTC)
    headers = ("name", "kind", "addresses", "valid until", "days left", "key", "issuer")
    rows = tuple(
        (
            clean(facts.name),
            facts.kind,
            clean(", ".join(facts.hosts)) or NONE,
            NONE if facts.until is None else f"{facts.until:%Y-%m-%d}",
            NONE if facts.until is None else str(days_left(facts.until, now)),
            facts.key,
            NONE if facts.issuer is None else clean(facts.issuer),
        )
        for facts in found
    )
    lines = as_text(Table("", headers, rows, left=frozenset({0, 1, 2, 3, 5, 6})))
    lines.append("")
    for facts in found:
        for kind, value in (("certificate", facts.fingerprint), ("key", facts.key_fingerprint)):
            if value is not None:
                lines.append(f"{clean(facts.name)} {kind} sha256 {value}")
    for facts in found:
        lines += [f"fault: {facts.file}: {clean(text)}" for text in facts.faults]
        lines += [f"warning: {facts.file}: {clean(text)}" for text in facts.warnings]
    return "\n".join(lines)


def keys_json(found: Sequence[KeyInfo], now: datetime | None = None) -> dict[str, Any]:
    """Return keys as one JSON object: dates in ISO 8601, days left as a whole number, negative after expiry."""
    now = now or datetime.now(UTC)
    listed: list[dict[str, Any]] = []
    for facts in found:
        entry = asdict(facts)
        for name in ("first", "until"):
            entry[name] = entry[name].isoformat() if entry[name] is not None else None
        entry["file"] = str(facts.file)
        entry["days_left"] = None if facts.until is None else days_left(facts.until, now)
        listed.append(entry)
    return {"keys": listed}


def days_left(until: datetime, now: datetime) -> int:
    """Return the whole days until a date; below zero once it has passed."""
    return (until - now).days
