"""The tools that check files of deploy/: found where they are, and a visible skip where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forks

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """Return the path of a program, beside this Python or on PATH; skips the test where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here")
    return found


def run(*words: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def passes(*words: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Run a program, which must end with 0; return all that it said."""
    done = run(*words, cwd=cwd, **env)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def program(folder: Path) -> Path:
    """Write `dimat` into a folder of programs, as an installation has it; return the folder, for PATH."""
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return forks.program(folder / "dimat", "-m", "dimat.cli", env=env).parent


def documents(file: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [each for each in yaml.safe_load_all(file.read_text(encoding="utf-8")) if each]


def scripts() -> Iterator[Path]:
    """Yield the shell scripts of deploy/."""
    for path in sorted(DEPLOY.rglob("*")):
        if path.is_file() and path.read_bytes()[:64].partition(b"\n")[0] in (b"#!/bin/bash", b"#!/usr/bin/env bash"):
            yield path
