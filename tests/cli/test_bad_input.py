"""No input of whatever kind ends in a traceback: each is told in one line, and nothing is written outside.

Reference: the exit codes of `dimat/errors.py`, and the folder before the command.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dimat.cli import main
from dimat.simulate import run_simulation
from tests.cli.bad_input import Place, as_toml, each_text
from tests.merge_files.models import weights
from tests.simulate.helpers import TINY_TASK, tiny_experiment


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with a trace."""
    folder = tmp_path_factory.mktemp("finished")
    run_simulation(tiny_experiment(folder, simulate__trace=True, schedule__rounds=2), out=folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("x.toml", ["simulate", "--set", "task.hook=none.py:task"]),
        ("x.toml", ["agent"]),
        ("x.toml", ["status"]),
        ("x.toml", ["evaluate", "none.safetensors", "--file"]),
        ("x.toml", ["symmetry", "show", "--no-verify"]),
        ("x.toml", ["topology", "show"]),
        ("x.toml", ["topology", "check"]),
        ("x.json", ["topology", "show"]),
        ("x.graphml", ["topology", "show"]),
        ("x.gml", ["topology", "show"]),
        ("x.edges", ["topology", "show"]),
        ("x.csv", ["topology", "export", "--draw"]),
        ("x.toml", ["merge"]),
        ("x.safetensors", ["merge", "-o", "out"]),
        ("x.safetensors", ["evaluate"]),
        ("x.yaml", ["merge", "-o", "out", "--from-mergekit"]),
        ("x.json", ["symmetry", "diff", "x.json"]),
        ("x.toml", ["keys", "issue", "--map"]),
        ("x.csr", ["keys", "sign"]),
        ("x.crt", ["keys", "show"]),
        ("x.key", ["keys", "show"]),
        ("x.py:task", ["symmetry", "show"]),
        ("x.py:task", ["evaluate", "none.safetensors", "--task"]),
        ("x.py:graph", ["topology", "show"]),
        ("x.crt", ["dht", "--run", "r", "--ca"]),
    ],
)
def test_a_file_that_holds_something_else(name: str, command: list[str], place: Place) -> None:
    """Every kind of text in the place of every kind of file that a command names."""
    file = place.folder / name.partition(":")[0]
    for kind in each_text(file.write_bytes):
        if command[0] == "keys" and command[1] == "show":
            continue
        place.refuses([*command, name], kind, may_pass=file.suffix in {".edges", ".csv", ".toml"})
        for left in ("runs", "agents"):
            shutil.rmtree(place.folder / left, ignore_errors=True)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("results.json", ["report", "run"]),
        ("experiment.json", ["simulate", "--replay", "run"]),
        ("origin.json", ["simulate", "--replay", "run"]),
        ("trace.jsonl", ["simulate", "--replay", "run"]),
    ],
)
def test_a_run_folder_that_holds_something_else(name: str, command: list[str], place: Place, finished: Path) -> None:
    """A finished run with one of its files replaced."""
    shutil.copytree(finished, place.folder / "run")
    for kind in each_text((place.folder / "run" / name).write_bytes):
        place.refuses(command, kind, may_pass=name == "trace.jsonl")  # a last line that was cut short is passed over


def test_keys_that_are_something_else(place: Place) -> None:
    """A folder of keys whose files hold any text: `keys show` lists the faults, and an agent does not start; exit 4."""
    (place.folder / "tiny_task.py").write_text(TINY_TASK)
    agent = {"name": "lab-a", "keys": "keys"}
    tree = {"topology": {"map": "map.toml"}, "task": {"hook": "tiny_task.py:task"}, "agent": agent}
    tree["merge"] = {"method": "average"}  # which needs no symmetry groups
    (place.folder / "x.toml").write_text(as_toml(tree))
    agents = [{"name": name, "addresses": [f"127.0.0.1:{port}"]} for name, port in (("lab-a", 7399), ("lab-b", 7398))]
    (place.folder / "map.toml").write_text(as_toml({"graph": "ring", "agents": agents}))
    keys = place.folder / "keys"
    keys.mkdir()

    def write(data: bytes) -> None:
        for name in ("lab-a.key", "lab-a.crt", "ca.crt"):
            (keys / name).write_bytes(data)
            (keys / name).chmod(0o600)

    for kind in each_text(write):
        place.refuses(["agent", "x.toml"], kind)
        assert main(["keys", "show", "keys"]) == 4, kind


BAD = "\udcff"
"""A byte that is no UTF-8, as Python has it in arguments."""


@pytest.mark.parametrize(
    "command",
    [
        ["simulate", f"{BAD}.toml"],
        ["simulate", "--replay", BAD],
        ["simulate", "x.toml", "--set", f"run={BAD}"],
        ["agent", f"{BAD}.toml"],
        ["agent", "x.toml", "--name", BAD],
        ["agent", "x.toml", "--metrics", BAD],
        ["status", BAD],
        ["report", BAD],
        ["evaluate", f"{BAD}.safetensors", "--task", f"{BAD}:f"],
        ["merge", f"{BAD}.safetensors", "-o", "out"],
        ["merge", "a.safetensors", "-o", BAD],
        ["merge", "a.safetensors", "-o", "out", "--set", f"{BAD}={BAD}"],
        ["merge", "--from-mergekit", BAD, "-o", "out"],
        ["topology", "show", BAD],
        ["topology", "show", f"{BAD}.json"],
        ["topology", "check", f"{BAD}.toml"],
        ["symmetry", "show", f"{BAD}.py:f"],
        ["symmetry", "diff", "digits", f"{BAD}.json"],
        ["keys", "init-ca", "--name", BAD],
        ["keys", "issue", BAD],
        ["keys", "show", BAD],
        ["keys", "sign", f"{BAD}.csr"],
        ["dht", "--ca", BAD, "--run", "r"],
        ["dht", "--bootstrap", BAD],
        ["dashboard", BAD],
        [BAD],
        ["merge", f"--{BAD}"],
        ["topology", "show", "ring", "-n", "9" * 5000],
        ["symmetry", "verify", "digits", "--seed", "9" * 30],
        ["merge", "a.safetensors", "-o", "out", "--seed", "9" * 30],
        ["demo", "--seeds", "1000000000"],
    ],
)
def test_arguments(command: list[str], place: Place) -> None:
    """Arguments that are no UTF-8, and numbers beyond all bounds."""
    (place.folder / "x.toml").write_text("")
    save_file(weights(0), place.folder / "a.safetensors")
    line = place.refuses(command)
    if command[0] == "merge" and f"{BAD}.safetensors" in command:
        assert "models[0] is not UTF-8 text (b'\\xff.safetensors')" in line
        assert "can be renamed, or given by a symbolic link" in line


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["x" * 100] * 60)])
@pytest.mark.parametrize(
    "command",
    [
        *(["doctor"], ["agent"], ["status"], ["report"], ["dashboard"], ["simulate"], ["init"], ["keys", "show"]),
        *(
            ["topology", "show"],
            ["merge", "a.safetensors", "-o"],
            ["keys", "issue", "a", "--folder"],
            ["dht", "--folder"],
        ),
    ],
    ids=" ".join,
)
def test_paths_that_are_too_long(command: list[str], path: str, place: Place) -> None:
    """Longer than a name, and longer than a path: one line that says the limits, and exit code 5."""
    save_file(weights(0), place.folder / "a.safetensors")
    line = place.refuses([*command, path], codes=(5,))
    assert "'xxxxx" in line
    assert "names of up to 255 bytes and paths of up to 4,095, and this path has" in line
    assert len(line) < 300
