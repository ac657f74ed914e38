"""The seeds of the schedules that a commit is tested on."""

from __future__ import annotations

import subprocess

from tests.pages import ROOT

_LEAST, _SPAN = 10_000, 10**9  # below are the seeds that `make test-all` runs at every commit


def first_seed(chosen: int | None = None) -> int:
    """Return `chosen` if it is a number, else the first seed of this commit, or 0 where there is no repository."""
    if chosen is not None:
        return chosen
    if not (ROOT / ".git").exists():
        return 0
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return _LEAST + int(done.stdout.strip()[:12], 16) % _SPAN
