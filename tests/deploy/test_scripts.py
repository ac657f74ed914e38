"""Shell scripts of deploy/. References: shellcheck; `dimat doctor` and `dimat keys show` on the keys that were made."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tests.deploy.tools import DEPLOY, program, run, scripts, tool

MAP = """graph = "ring"
[[agents]]
name = "lab-a"
addresses = ["127.0.0.1:{}"]
[[agents]]
name = "größe.2"
addresses = ["127.0.0.1:{}", "localhost:{}"]
"""
AGENTS = """run = "keys"
[topology]
map = "map.toml"
[task]
name = "digits"
partition = { kind = "iid" }
[agent]
keys = "keys/lab-a"
"""


def issue(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = f"{program(folder / 'bin')}:{os.environ['PATH']}"
    return run(DEPLOY / "issue-keys.sh", *words, cwd=folder, PATH=path)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and mode of all files of a folder."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in found}


def test_shellcheck_has_nothing_to_say() -> None:
    found = list(scripts())
    assert {path.name for path in found} >= {"issue-keys.sh", "dimat.sbatch"}
    done = run(tool("shellcheck"), "--severity=style", *found)
    assert done.returncode == 0, done.stdout


def test_keys_of_a_map(tmp_path: Path, free_ports: list[int]) -> None:
    """Keys of all agents, private from the start; `dimat doctor` takes them; a second run, with an agent more, leaves
    every byte of the first as it was."""
    (tmp_path / "map.toml").write_text(MAP.format(*free_ports[:3]))
    (tmp_path / "agents.toml").write_text(AGENTS)
    done = issue(tmp_path, "--map", "map.toml", "--days", "60")
    assert done.returncode == 0, done.stderr
    made = files(tmp_path / "keys")
    assert set(made) == {
        *("ca.key", "ca.crt", "lab-a/lab-a.key", "lab-a/lab-a.crt", "lab-a/ca.crt"),
        *("größe.2/größe.2.key", "größe.2/größe.2.crt", "größe.2/ca.crt"),
    }
    assert all(mode == 0o600 for name, (_, mode) in made.items() if name.endswith(".key"))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in tmp_path.glob("keys/**/"))
    dimat = tmp_path / "bin" / "dimat"
    said = run(dimat, "doctor", "agents.toml", "--name", "lab-a", cwd=tmp_path)
    (line,) = [line for line in said.stdout.splitlines() if line.split()[1:2] == ["keys"]]
    assert line.split()[0] == "ok", said.stdout
    assert run(dimat, "keys", "show", "keys/größe.2", cwd=tmp_path).returncode == 0

    with (tmp_path / "map.toml").open("a") as file:
        file.write('[[agents]]\nname = "lab-c"\n')
    again = issue(tmp_path, "--map", "map.toml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("left as they are") == 2
    now = files(tmp_path / "keys")
    assert {name: now[name] for name in made} == made
    assert set(now) - set(made) == {"lab-c/lab-c.key", "lab-c/lab-c.crt", "lab-c/ca.crt"}


def test_keys_of_named_agents(tmp_path: Path) -> None:
    """Names and addresses do without a map."""
    done = issue(tmp_path, "--folder", "own", "lab-a=lab-a.example.org:7300,10.0.0.1:7300", "lab-b=10.0.0.2:7300")
    assert done.returncode == 0, done.stderr
    shown = run(tmp_path / "bin" / "dimat", "keys", "show", "own/lab-a", cwd=tmp_path).stdout
    assert "lab-a.example.org" in shown
    assert "10.0.0.1" in shown


def test_what_the_key_script_refuses(tmp_path: Path) -> None:
    """One line that says what to do; what is half there is never replaced."""
    for words, says in (
        ((), "which agents?"),
        (("lab-a",), "'lab-a' has no address"),
        (("--map",), "--map needs a value"),
        (("--map", "none.toml"), "there is no map none.toml"),
        (("--force",), "there is no option --force"),
        (("--map", "x", "lab-a=h:1"), "there is no map x|give --map or agents"),
    ):
        done = issue(tmp_path, *words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert any(part in line for part in says.split("|"))
    assert not (tmp_path / "keys").exists()
    assert issue(tmp_path, "lab-a=127.0.0.1:7300").returncode == 0
    key = tmp_path / "keys" / "lab-a" / "lab-a.key"
    before = key.read_bytes()
    (tmp_path / "keys" / "lab-a" / "lab-a.crt").unlink()
    done = issue(tmp_path, "lab-a=127.0.0.1:7300")
    assert done.returncode != 0
    assert "lab-a.key" in done.stderr
    assert key.read_bytes() == before
    (tmp_path / "keys" / "ca.key").unlink()
    done = issue(tmp_path, "lab-b=127.0.0.1:7300")
    assert done.returncode != 0
    assert "ca.crt" in done.stderr
