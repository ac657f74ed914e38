"""README.md: what tests/test_pages.py does not run of its commands and code, as they stand there; its file tree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.forks import dimat
from tests.pages import README, ROOT
from tests.pages import blocks as all_blocks

SHORT = {
    "DIMAT_SCHEDULE__ROUNDS": "1",
    "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2",
    "DIMAT_TRAIN__EPOCHS_PER_ROUND": "0.2",
    "DIMAT_SIMULATE__WORKERS": "1",  # results are the same, and importing torch in workers takes longer than training
}


def blocks(language: str) -> list[str]:
    return [block.text for block in all_blocks(README) if block.language == language]


def commands(start: str) -> list[list[str]]:
    (block,) = [b for b in blocks("") if start in b]
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("dimat ")]


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [dimat(), *command[1:]],
        cwd=folder,
        env={**os.environ, **SHORT},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done


def other_ports(file: Path) -> None:
    """Give the agents of a map ports that are free now: other tests start networks on this host, too."""
    text = file.read_text()
    ports = re.findall(r"127\.0\.0\.1:(\d+)", text)
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ports]
        free = iter([each.getsockname()[1] for each in taken])
    file.write_text(re.sub(r"127\.0\.0\.1:\d+", lambda _: f"127.0.0.1:{next(free)}", text))


@pytest.mark.page
def test_commands_of_real_agents(tmp_path: Path) -> None:
    """README, "Three uses": a network is written, three agents run side by side, how one is, whose rounds are in its
    model; then a newcomer's keys."""
    listed = commands("dimat init --agents")
    assert len(listed) == 6
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in listed:
            match command[1:]:
                case ["init", *_]:
                    execute(command, tmp_path)
                    other_ports(tmp_path / "trio" / "map.toml")
                case ["agent", *words]:
                    words = [word for word in words if word != "&"]
                    program = [dimat(), "agent", *words]
                    running.append(subprocess.Popen(program, cwd=tmp_path, env={**os.environ, **SHORT}))
                case ["status", *_]:
                    assert [process.wait(200) for process in running] == [0, 0, 0]
                    done = subprocess.run(
                        [dimat(), *command[1:]],
                        cwd=tmp_path,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    assert (done.returncode, "no agent answers" in done.stderr) == (5, True)  # it is through
                case _:
                    execute(command, tmp_path)
    finally:
        for process in running:
            process.kill()
            process.wait()
    for command in commands("dimat keys request"):
        execute(command, tmp_path)
    assert (tmp_path / "trio" / "keys" / "lab-d.crt").exists()


@pytest.mark.page
def test_python_example() -> None:
    """README, "From Python": the six names, as pasted but for little training; alignment keeps the function."""
    (code,) = [b for b in blocks("python") if "from dimat import" in b]
    rounds = '"schedule": {"rounds": 2}'
    assert rounds in code
    short = '"train": {"first_round_epochs": 0.2, "epochs_per_round": 0.2}, "simulate": {"workers": 1}'
    code = code.replace(rounds, f"{rounds}, {short}")
    space: dict[str, object] = {}
    exec(code, space)
    assert isinstance(space["error"], float)
    assert space["error"] < 1e-9
    assert len(space["results"].after_merge()) == 2  # type: ignore[attr-defined]


@pytest.mark.page
def test_new_merge_method(tmp_path: Path) -> None:
    """README, "Adding things": the method as pasted, found by its file alone. It is put into a copy of the package."""
    (code,) = [b for b in blocks("python") if "combine_registry" in b]
    copy = tmp_path / "site" / "dimat"
    shutil.copytree(ROOT / "dimat", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "merge" / "combine" / "median.py").write_text(code)
    env = {**os.environ, **SHORT, "PYTHONPATH": str(tmp_path / "site")}
    for words in (["init"], ["simulate", "experiment.toml", "--set", "merge.combine=median", "--workers", "1"]):
        done = subprocess.run(
            [sys.executable, "-m", "dimat.cli", *words],
            cwd=tmp_path / "site",
            env=env,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_tree_is_true() -> None:
    """README, "What is where": every name exists, and every module of the package's top and every room are named."""
    (tree,) = [b for b in blocks("text") if "pyproject.toml  constraints.txt" in b]
    for line in tree.splitlines():
        inside = line.startswith("  ")
        name_part = re.split(r"   +", line.strip())[0]
        for name in name_part.split():
            if re.fullmatch(r"[\w./-]+(\.\w+|/)?", name) and ("." in name or "/" in name or name == "LICENSE"):
                path = ROOT / "dimat" / name if inside else ROOT / name
                assert path.exists(), name
    for path in (ROOT / "dimat").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert path.name in tree
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in tree
    rooms = {path.parent.relative_to(ROOT / "dimat").as_posix() for path in (ROOT / "dimat").rglob("__init__.py")}
    named = {name.rstrip("/") for name in tree.split() if name.endswith("/")}
    assert rooms - {".", "wire/v1"} <= named
