"""`dimat init --agents N`: what it writes is valid, free to start, replaces nothing unasked, and is whole or not there.

That the network runs is shown with real agents in tests/test_docs_start.py.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dimat.cli import main
from dimat.cli.templates import network_template as starter_network
from dimat.cli.templates.experiment_template import tables_of
from dimat.cli.templates.network_template import write_network
from dimat.config import TopologyConfig, load_experiment
from dimat.errors import ConfigError, DataError
from dimat.net.pki.certificates import check_certificate
from dimat.net.pki.identity import load_identity
from dimat.topology import build_topology


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("agents", [2, 3, 30])
def test_map_configuration_and_keys_fit_together(tmp_path: Path, agents: int) -> None:
    """Every agent of the map has an address of its own and a certificate of the CA in its name; names sort."""
    made = write_network(tmp_path / "trio", agents)
    config = load_experiment(made.file, env={})
    assert (config.run, config.agent.founder) == ("trio", True)
    topology = build_topology(TopologyConfig(map=str(tmp_path / "trio" / "map.toml")))
    assert topology.names == made.names == tuple(sorted(made.names))
    assert len({address for name in made.names for address in topology.addresses[name]}) == agents
    ca = (tmp_path / "trio" / "keys" / "ca.crt").read_bytes()
    for name in made.names:
        check_certificate(load_identity(tmp_path / "trio" / "keys", name).certificate_der, ca, name)
    assert {path.name for path in tmp_path.iterdir()} == {"trio"}


@pytest.mark.parametrize("task", ["digits", "images", "hf-image-classification", "hf-causal-lm"])
def test_the_deadline_fits_the_task(tmp_path: Path, task: str) -> None:
    """A task whose rounds train for minutes is not given a minute to wait: the deadline is the one of its template."""
    schedule = load_experiment(write_network(tmp_path / "net", 2, task=task).file, env={}).schedule
    assert schedule.round_deadline_s == float(tables_of(task)["deadline"])
    assert (schedule.round_deadline_s > 60) == (task != "digits")


def test_ports_that_are_taken_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(starter_network, "FIRST_PORT", port)
        write_network(tmp_path / "trio", 3)
    addresses = build_topology(TopologyConfig(map=str(tmp_path / "trio" / "map.toml"))).addresses
    ports = [int(address.rpartition(":")[2]) for name in addresses for address in addresses[name]]
    assert len(set(ports)) == 3
    assert min(ports) > port


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    """Any of the three is in the way; --force replaces these alone, and makes new keys."""
    folder = tmp_path / "trio"
    write_network(folder, 3)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"has map\.toml, agents\.toml, keys already; .*--force"):
        write_network(folder, 4)
    assert contents(folder) == before
    write_network(folder, 2, force=True)
    after = contents(folder)
    assert after["notes.txt"] == b"mine"
    assert after["keys/ca.key"] != before["keys/ca.key"]
    assert "keys/lab-c.key" not in after
    assert {path.name for path in folder.iterdir()} == {"map.toml", "agents.toml", "keys", "notes.txt"}


@pytest.mark.parametrize("there", [False, True])
def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """A fault on the way (a certificate that cannot be made; a move that fails) leaves what was there before."""
    folder = tmp_path / "trio"
    if there:
        write_network(folder, 3)
    before = contents(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise DataError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(starter_network, "issue", fail)
        with pytest.raises(DataError):
            write_network(folder, 3, force=True)
    assert contents(tmp_path) == before
    rename = Path.rename

    def fails_late(self: Path, target: Path) -> Path:
        if self.parent.name == ".trio.init" and self.name in ("trio", "map.toml", ".trio.init"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    if there:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fails_late)
            with pytest.raises(DataError, match="No space left"):
                write_network(folder, 3, force=True)
        assert contents(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"trio"}
    else:
        assert list(tmp_path.iterdir()) == []


def test_into_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "." is as good a folder as any; the commands that it says are those for it."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--agents", "2", "."]) == 0
    said = capsys.readouterr().err
    assert "  dimat agent agents.toml --name lab-b\n" in said
    assert f"  dimat report agents/{tmp_path.name}/lab-a\n" in said
    assert os.stat("keys/ca.key").st_mode & 0o777 == 0o600
    Path(f"agents/{tmp_path.name}").mkdir(parents=True)
    assert main(["init", "--agents", "2", ".", "--force"]) == 0
    assert "holds an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--agents", "1"], "a network has 2 to 1,000 agents"),
        (["--agents", "3", "nowhere/trio"], "no folder nowhere to write trio to"),
        (["--agents", "3", "file"], "file is a file; with --agents, name the folder"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["init", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
