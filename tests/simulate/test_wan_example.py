"""examples/wan, by the command of docs/simulate.md, with one round and little training: each variant runs, is reported,
and the table has all of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.forks import dimat
from tests.pages import ROOT, blocks

pytestmark = pytest.mark.page


@pytest.mark.timeout(900)  # eleven runs of sixteen agents: half a minute of two idle cores
def test_variants_of_the_example(tmp_path: Path) -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "simulate.md") if "examples/wan" in b.text]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = {"DIMAT_SCHEDULE__ROUNDS": "1", "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2"}
    command = [dimat(), *shlex.split(block.text)[1:]]
    env = {**os.environ, **short}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    variants = tomllib.loads((ROOT / "examples" / "wan" / "experiment.toml").read_text())["variants"]
    for name in [*(variant["name"] for variant in variants), "centralised"]:
        assert name in done.stdout
    assert (tmp_path / "runs" / "wan-compared" / "report.html").exists()
