"""Measure the zoo and print a table: `python -m tests.symmetry.wide [NAMES…] [--json FILE] [--reasons] [--planted]`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.symmetry.wide import ENTRIES, Entry, Row, build, measure
from tests.symmetry.wide.planted import FOUND, LARGEST, recover

_HEAD = (
    f"{'model':24} {'family':6} {'traced':8} {'params':>7} {'groups':>6} {'heads':>5} {'moved':>6} {'error':>8} "
    f"{'export':>7} {'derive':>7} verdict"
)


def main(arguments: list[str] | None = None) -> int:
    """Measure the named models, or all whose library is installed; the exit status is 1 if one misses a target."""
    parser = argparse.ArgumentParser(prog="python -m tests.symmetry.wide", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="models or sources (torchvision, timm, …); default all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--reasons", action="store_true", help="list unknown ops and reasons for frozen axes")
    parser.add_argument("--planted", action="store_true", help="align each model to a permuted copy of itself instead")
    options = parser.parse_args(arguments)
    known = {*ENTRIES, *(entry.source for entry in ENTRIES.values())}
    if wrong := [name for name in options.names if name not in known]:
        parser.error(f"no such model: {', '.join(wrong)} (known: {', '.join(ENTRIES)})")
    torch.set_num_threads(1)
    chosen = [e for e in ENTRIES.values() if e.name in options.names or e.source in options.names]
    if not options.names:
        chosen = [entry for entry in ENTRIES.values() if entry.source == "own" or find_spec(entry.source)]
        absent = {e.source for e in ENTRIES.values()} - {e.source for e in chosen}
        if absent:
            print(f"left out, as not installed: {', '.join(sorted(absent))}", flush=True)
    if options.planted:
        return planted_table(chosen)
    rows: list[Row] = []
    print(_HEAD, flush=True)
    for entry in chosen:
        rows.append(measure(entry).row)
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.reasons:
        print("\n".join(text for row in rows for text in reasons(row)))
    print(totals(rows))
    return int(any(row.problems for row in rows))


def planted_table(entries: list[Entry]) -> int:
    """Print how well planted permutations are found; the exit status is 1 if a model's are not."""
    print(f"{'model':24} {'groups':>6} {'exact':>7} {'error':>8} {'unaligned':>9}", flush=True)
    missed = 0
    for entry in entries:
        if sum(p.numel() for p in build(entry)[0].parameters()) > LARGEST:
            continue
        found = recover(measure(entry))
        good = found.error <= FOUND
        missed += not good
        print(
            f"{entry.name:24} {found.groups:6} {100 * found.exact:6.1f}% {found.error:8.1e} {found.before:9.1e} "
            f"{'ok' if good else 'not found'}",
            flush=True,
        )
    print(f"{missed} models whose planted permutations were not found")
    return int(missed > 0)


def line(row: Row) -> str:
    """Return a row of the table."""
    name = f"{row.name} (unseen)" if row.unseen else row.name
    verdict = "; ".join(row.problems) or "ok"
    if row.unknown:
        verdict += f" [no rule: {', '.join(row.unknown)}]"
    return (
        f"{name:24} {row.family:6} {row.trace_kind or '-':8} {row.parameters / 1e6:6.1f}M {row.groups:6} {row.heads:5} "
        f"{100 * row.coverage:5.1f}% {row.error:8.1e} {row.export_seconds:6.2f}s {row.derive_seconds:6.2f}s {verdict}"
    )


def reasons(row: Row, most: int = 6) -> list[str]:
    """Return lines about what keeps a model's axes in place; none for a model that meets its targets."""
    if not row.problems and not row.unknown:
        return []
    lines = [f"\n== {row.name}: {'; '.join(row.problems) or 'ok'}"]
    lines += [f"   no rule for {op} at {place}" for op, place in row.unknown.items()]
    lines += [
        f"   {100 * lost:5.1f} % unmoved ({100 * touched:5.1f} % touched): {reason}"
        for reason, lost, touched in row.frozen[:most]
    ]
    return lines


def totals(rows: list[Row]) -> str:
    """Return the last line of the table."""
    good = sum(not row.problems for row in rows)
    traced = sum(row.trace_kind not in ("", "none") for row in rows)
    export, derive = sum(row.export_seconds for row in rows), sum(row.derive_seconds for row in rows)
    verify = sum(row.verify_seconds for row in rows)
    return (
        f"{len(rows)} models: {good} meet their targets, {len(rows) - good} do not; {traced} traced; "
        f"CPU seconds: export {export:.1f}, derive {derive:.1f}, verify {verify:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
