"""The examples: every command of their READMEs runs as it stands there, offline, and says what the README promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.forks import dimat, python

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "examples").glob("*/README.md"))
LARGEST_BYTES = 100_000


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the examples, which they may write into."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("base", "__pycache__"))
    return tmp_path


def execute(command: list[str], folder: Path, loads: Sequence[str] = ()) -> str:
    assert command[0] in ("dimat", "python"), command
    stand_in = dimat(*loads) if command[0] == "dimat" else python()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [stand_in, *command[1:]],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_of_an_example(page: Path, copy: Path) -> None:
    """Each command in order, each building on the one before."""
    if page.parent.name == "lora_text" and any(
        find_spec(name) is None for name in ("transformers", "peft", "datasets")
    ):
        pytest.skip("the extra hf is not installed")
    listed = commands(page)
    assert listed
    for command in listed:
        execute(command, copy, ("tests.tasks.huggingface.loaded",) if page.parent.name == "lora_text" else ())
    results = list((copy / "runs").glob("**/results.json"))
    assert results
    for file in results:
        rows = json.loads(file.read_text())["rows"]
        rounds = [row["round"] for row in rows]
        first, last = (
            [row["after"] for row in rows if row["round"] == number] for number in (min(rounds), max(rounds))
        )
        assert sum(last) / len(last) > sum(first) / len(first), f"{file}: nothing was learnt"


def test_examples_are_small() -> None:
    """Data that come with an example are less than 100 kB each."""
    data = [file for page in PAGES for file in page.parent.glob("*") if file.is_file()]
    assert {file.name: file.stat().st_size for file in data if file.stat().st_size > LARGEST_BYTES} == {}
