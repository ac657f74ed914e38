"""The README's commands and code, run as they stand there (in a folder of their own, training made short)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "DIMAT_SCHEDULE__ROUNDS": "1",
    "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2",
    "DIMAT_TRAIN__EPOCHS_PER_ROUND": "0.2",
}


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language. All are read in order: a closing fence never opens the prose after it."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(start: str) -> list[list[str]]:
    (block,) = [b for b in blocks("") if start in b]
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("dimat ")]


def execute(command: list[str], folder: Path, short: Mapping[str, str] = SHORT) -> subprocess.CompletedProcess[str]:
    for name in ("topology", "examples"):
        if not (folder / name).exists() and not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "dimat.cli", *command[1:]],
        cwd=folder,
        env={**os.environ, **short},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done


def test_commands_to_simulate(tmp_path: Path) -> None:
    """README, "Simulate an experiment": each command in order, each building on the one before."""
    listed = commands("dimat init")
    assert len(listed) == 5
    for command in listed:
        execute(command, tmp_path)
    for run in ("digits-ring", "average", "compared"):
        assert (tmp_path / "runs" / run / "report.html").exists()


def test_commands_to_simulate_a_network(tmp_path: Path) -> None:
    """README, "Simulate a network": each command in order, the replay of the trace that was recorded before."""
    short = {"DIMAT_SCHEDULE__ROUNDS": "1", "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2"}
    listed = commands("examples/wan")
    assert len(listed) == 4
    for command in listed:
        done = execute(command, tmp_path, short)
    assert "all the same" in done.stdout
    for run in ("wan", "wan-compared", "traced"):
        assert (tmp_path / "runs" / run / "report.html").exists()


def test_commands_of_real_agents(tmp_path: Path) -> None:
    """README, "Run real agents" and "Collaborate between labs": keys, three agents side by side, how one is, whose
    rounds are in its model; then a newcomer's keys. In a copy of the example, on ports of its own."""
    shutil.copytree(ROOT / "examples" / "loopback", tmp_path / "examples" / "loopback")
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [each.getsockname()[1] for each in taken]
    file = tmp_path / "examples" / "loopback" / "map.toml"
    text = file.read_text()
    for number, port in enumerate(ports, 1):
        text = text.replace(f"127.0.0.1:731{number}", f"127.0.0.1:{port}")
    file.write_text(text)
    listed = commands("dimat keys init-ca")
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in listed:
            match command[1:]:
                case ["agent", *words]:
                    words = [word for word in words if word != "&"]
                    program = [sys.executable, "-m", "dimat.cli", "agent", *words]
                    running.append(subprocess.Popen(program, cwd=tmp_path, env={**os.environ, **SHORT}))
                case ["status", *_]:
                    assert [process.wait(200) for process in running] == [0, 0, 0]
                    done = subprocess.run(
                        [sys.executable, "-m", "dimat.cli", *command[1:]],
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
    for command in commands("dimat keys request"):
        execute(command, tmp_path)
    assert (tmp_path / "examples" / "loopback" / "keys" / "lab-d.crt").exists()


@pytest.mark.parametrize("command", commands("dimat topology list"), ids=lambda c: " ".join(c[1:4]))
def test_commands_to_look(tmp_path: Path, command: list[str]) -> None:
    """README, "Look at topologies and symmetries"."""
    execute(command, tmp_path)


def test_python_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """README, "From Python": the six names, as pasted; alignment keeps the function."""
    for key, value in SHORT.items():
        monkeypatch.setenv(key, value)
    (code,) = [b for b in blocks("python") if "from dimat import" in b]
    space: dict[str, object] = {}
    exec(code, space)
    assert isinstance(space["error"], float)
    assert space["error"] < 1e-9
    assert len(space["results"].after_merge()) == 2  # type: ignore[attr-defined]


def test_new_task(tmp_path: Path) -> None:
    """README, "Adding things": the task as pasted learns in a simulation."""
    (code,) = [b for b in blocks("python") if "def task()" in b]
    (tmp_path / "my_task.py").write_text(code)
    execute(["dimat", "init"], tmp_path)
    file = tmp_path / "experiment.toml"
    file.write_text(file.read_text().replace('name = "digits"  ', 'hook = "my_task.py:task"  '))
    assert "my_task.py" in file.read_text()
    execute(["dimat", "simulate", "experiment.toml"], tmp_path)


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
    """README, "What is where": every name exists, and every module of the package's top is named."""
    (tree,) = [b for b in blocks("") if "pyproject.toml  constraints.txt" in b]
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
