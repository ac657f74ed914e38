"""Bad input to `dimat merge`: one clear line, a stable exit code, and nothing under the output's name (issue C)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dimat.cli import main
from tests.merge_files.models import weights, write_folder

Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Two models a, b and a base in the current folder; returns a check of exit code, one line, no output."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1), ("base", 3)):
        save_file(weights(seed), f"{name}.safetensors")

    def check(code: int, *arguments: object, out: str = "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["merge", *map(str, arguments), "-o", out]) == code
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("dimat: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return check


def test_models_that_differ_are_told_apart_in_full(fails: Fails) -> None:
    """The number of differences and the first ten, whatever kind they are."""
    one = {f"layer{i}": torch.zeros(2) for i in range(20)} | {"same": torch.zeros(1), "w": torch.zeros(3)}
    two = {"same": torch.zeros(1), "extra": torch.zeros(2), "w": torch.zeros(4)}
    save_file(one, "one.safetensors")
    save_file(two, "two.safetensors")
    line = fails(5, "one.safetensors", "two.safetensors")
    assert "22 differences: 'layer0' is missing from two.safetensors; 'layer1'" in line
    assert line.count("is missing") == 10
    assert line.endswith("; and 12 more")
    line = fails(5, "two.safetensors", "one.safetensors", "--method", "ties", "--base", "two.safetensors")
    assert "'w' is F32[4] in two.safetensors, F32[3] in one.safetensors" in line
    assert "'layer0' is only in one.safetensors" in line


def test_integers_and_reals_do_not_mix(fails: Fails) -> None:
    save_file({**weights(1), "steps": torch.zeros(2)}, "c.safetensors")
    line = fails(5, "a.safetensors", "c.safetensors")
    assert "1 difference: 'steps' is I64[2] in a.safetensors, F32[2] in c.safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "tie"], 2, "unknown combine method 'tie'; did you mean 'ties'?"),
        (["--method", "ties"], 2, "method 'ties' merges deltas from a base, and there is none: give one with --base"),
        (["--method", "fisher"], 2, "method 'fisher' needs statistics of every model"),
        (["--method", "slerp", "base.safetensors"], 1, "'slerp' merges two models, got 3"),
        (["--set", "density=0.5"], 2, "combine method 'average' has no option 'density'"),
        (["--method", "ties", "--base", "base.safetensors", "--set", "density=2"], 2, "less than or equal to 1"),
        (["--method", "ties", "--base", "base.safetensors", "--set", "density"], 2, "expected OPTION=VALUE"),
        (["--weights", "0.5"], 2, "1 weights for 2 models"),
        (["--weights", "0.5,0.6"], 2, "must sum to 1, got 0.5, 0.6"),
        (["--weights", "1.5,-0.5"], 2, "must not be negative"),
        (["--weights", "half,half"], 2, "--weights 'half,half': expected numbers"),
        (["--weights", "nan,nan"], 2, "must sum to 1"),
        (["--dtype", "bf61"], 2, "dtype: unknown type; did you mean 'bf16'? (known: fp64"),
        (["--device", "tpu"], 2, "device 'tpu' cannot be used here"),
        (["--shard-size", "5 parsecs"], 2, "unknown unit 'parsecs'"),
        (["--shard-size", "0"], 2, "shard_size"),
        (["--base", "nowhere"], 5, "no model nowhere: give a safetensors file or a folder (models are not downloaded)"),
        (["recipe.toml"], 2, "recipe.toml is a recipe, which names its models itself"),
        (["--from-mergekit", "x.yml"], 2, "leave out INPUTS"),
        (["--metod", "ties"], 2, "--metod"),
    ],
)
def test_flags(arguments: list[str], code: int, message: str, fails: Fails) -> None:
    assert message in fails(code, "a.safetensors", "b.safetensors", *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "models: Field required"),
        ("models = []", "models"),
        ('models = ["a.safetensors"]\nmetod = "ties"', "unknown key 'metod' in recipe.toml; did you mean 'method'"),
        ('models = ["a.safetensors"]\n[[rules]]\nweights = [1.0]', "either match"),
        ('models = ["a.safetensors"]\n[[rules]]\nregex = "("', "regex '('"),
        ('models = ["a.safetensors"]\n[[rules]]\nmatch = "x.*"', "rule 1 ('x.*') applies to no tensor: names are like"),
        ('models = ["a.safetensors"]\n[[rules]]\nmatch="*"\n[[rules]]\nmatch="n*"', "earlier rules take all"),
        ('models = ["a.safetensors"]\n[[rules]]\nmatch="*"\nmethod="tie"', "did you mean 'ties'"),
        ('models = [{ path = "a.safetensors", weight = 1.0 }, "b.safetensors"]', "model 2 has no weight"),
        ('models = [{ path = "a.safetensors", wight = 1.0 }]', "did you mean 'weight'"),
        ("models = 3", "models"),
        ("models = [3]", "models[0]"),
        ("models = [", "recipe.toml is not valid TOML"),
    ],
)
def test_recipes(text: str, message: str, fails: Fails) -> None:
    Path("recipe.toml").write_text(text)
    assert message in fails(2, "recipe.toml")


def header(entries: dict[str, Any], length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file: it has 0 bytes"),
        (b"x" * 100, "its header claims"),
        (header({}, 2**63, b"\0" * 8), "its header claims 9,223,372,036,854,775,808 bytes, the file has 18"),
        (header({}, 2**40), "its header claims"),
        (b"\x05" + b"\0" * 7 + b"[[[[[", "its header is not JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "its header is not JSON"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is no table"),
        (header({}), "holds no tensors"),
        (header({"w": entry([2], 0, 8)}, data=b"\0" * 7), "is cut short: its tensors take 8 bytes, the file has 7"),
        (header({"w": entry([2], 0, 8)}, data=b"\0" * 9), "is too long"),
        (header({"w": entry([2**30, 2**30], 0, 8)}, data=b"\0" * 8), "does not fit its 8 bytes"),
        (header({"w": entry([2**60, 2**60], 0, 8)}, data=b"\0" * 8), "entry of tensor 'w' is malformed"),
        (header({"w": entry([0, 2**62, 2**62], 0, 0)}), "entry of tensor 'w' is malformed"),
        (header({"w": entry([1] * 65, 0, 4)}, data=b"\0" * 4), "entry of tensor 'w' is malformed"),
        (header({"\ud800": entry([1], 0, 4)}, data=b"\0" * 4), "its header is not JSON"),
        (b"\x0d" + b"\0" * 7 + b'{"w":1,"w":2}', "its header is not JSON"),
        (header({"__metadata__": {"format": 1}}), "the header's metadata are malformed"),
        (header({"w": entry([2], 0, 2**62)}), "does not fit"),
        (header({"w": entry([-2], 0, 8)}, data=b"\0" * 8), "entry of tensor 'w' is malformed"),
        (header({"w": entry([2], 0, 8, "F4")}, data=b"\0" * 8), "is of type F4, which is not merged"),
        (header({"w": entry([2], 4, 12)}, data=b"\0" * 12), "overlap others, or leave a hole"),
        (header({"w": entry([2], 0, 8), "v": entry([2], 0, 8)}, data=b"\0" * 8), "overlap others"),
        (header({"w": 3}), "entry of tensor 'w' is malformed"),
    ],
)
def test_damaged_files(content: bytes, message: str, fails: Fails) -> None:
    """Nothing is allocated from what a header claims before it is checked."""
    Path("bad.safetensors").write_bytes(content)
    line = fails(5, "a.safetensors", "bad.safetensors")
    assert message in line
    assert "bad.safetensors" in line


def test_every_cut_of_a_file_is_noticed(fails: Fails) -> None:
    whole = Path("b.safetensors").read_bytes()
    for size in range(0, len(whole), 97):
        Path("cut.safetensors").write_bytes(whole[:size])
        fails(5, "a.safetensors", "cut.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "is not a JSON table"),
        ("{", "is not valid JSON"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": {"w": "../b.safetensors"}}', "which is not a file in this folder"),
        ('{"weight_map": {"w": 3}}', "which is not a file in this folder"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
        ('{"weight_map": {"w": "here.safetensors"}}', "has tensor 'w' in here.safetensors, which does not hold it"),
    ],
)
def test_damaged_indices(index: str, message: str, fails: Fails) -> None:
    Path("m").mkdir()
    save_file(weights(1), "m/here.safetensors")
    Path("m/model.safetensors.index.json").write_text(index)
    assert message in fails(5, "a.safetensors", "m")


def test_folders_that_are_no_models(fails: Fails) -> None:
    Path("empty").mkdir()
    assert "is not a model folder" in fails(5, "a.safetensors", "empty")
    Path("old").mkdir()
    Path("old/pytorch_model.bin").write_bytes(b"x")
    assert "convert them to safetensors first" in fails(5, "a.safetensors", "old")
    assert "is a pickle" in fails(5, "a.safetensors", "old/pytorch_model.bin")
    Path("two").mkdir()
    for name in ("x", "y"):
        save_file(weights(1), f"two/{name}.safetensors")
    assert "has 2 safetensors files and no model.safetensors.index.json" in fails(5, "a.safetensors", "two")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["own", "peer", "base"])
def test_values_that_are_not_finite(value: float, which: str, fails: Fails) -> None:
    """Named by file and tensor; what was written until then is removed."""
    tensors = weights(5, torch.bfloat16)
    tensors["norm.weight"][3] = value
    save_file(tensors, "bad.safetensors")
    place = {"own": ["bad.safetensors", "b.safetensors"], "peer": ["b.safetensors", "bad.safetensors"]}
    inputs = place.get(which, ["a.safetensors", "b.safetensors"])
    base = "bad.safetensors" if which == "base" else "base.safetensors"
    line = fails(5, *inputs, "--method", "ties", "--base", base)
    assert "bad.safetensors: tensor 'norm.weight' holds 1 values that are not finite" in line
    fails(5, *inputs, "--method", "ties", "--base", base, out="out.safetensors")


def test_output_that_is_there(fails: Fails) -> None:
    """Refused before anything is read; never an input, with --overwrite or without."""
    Path("x.safetensors").write_bytes(b"mine")
    assert "x.safetensors exists; replace it with --overwrite" in fails(
        2, "a.safetensors", "b.safetensors", out="x.safetensors"
    )
    write_folder(Path("full"), weights(1))
    assert "full exists and is not empty" in fails(2, "a.safetensors", "b.safetensors", out="full")
    line = fails(2, "a.safetensors", "full", "--overwrite", out="full")
    assert "full is one of the inputs" in line
    line = fails(2, "a.safetensors", "full", "--overwrite", out="full/model.safetensors")
    assert "is one of the inputs" in line
    Path("file").write_text("")
    assert "file is a file" in fails(2, "a.safetensors", "b.safetensors", out="file")
    Path("d.safetensors").mkdir()
    assert "d.safetensors is a folder" in fails(2, "a.safetensors", "b.safetensors", out="d.safetensors")


def test_no_output_and_no_input(fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "a.safetensors", "b.safetensors"]) == 2
    assert "where to? give an output with -o" in capsys.readouterr().err
    assert "needs a recipe (TOML) or models" in fails(2)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_file_system_that_takes_no_more_leaves_nothing(out: str, tmp_path: Path) -> None:
    """A real limit on file sizes (RLIMIT_FSIZE) in a process of its own, where writing fails as on a full disk."""
    for k in range(2):
        save_file({"w": torch.randn(100_000)}, tmp_path / f"{k}.safetensors")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [sys.executable, "-m", "dimat.cli", "merge", "0.safetensors", "1.safetensors", "-o", out]
    done = subprocess.run(
        command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert f"cannot write {out} (400,000 bytes): " in line
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_full_disk_leaves_what_was_there(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small tmpfs: the merge fails at once, and the model that was to be replaced is as it was."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        inputs = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
        for k, path in enumerate(inputs):
            save_file({"w": torch.randn(1_000 * (k + 1))[:1_000].clone()}, path)
        assert main(["merge", *inputs, "-o", str(disk / out)]) == 0
        before = {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()}
        capsys.readouterr()
        for path in inputs:
            save_file({"w": torch.randn(100_000)}, path)
        assert main(["merge", *inputs, "-o", str(disk / out), "--overwrite"]) == 5
        assert "No space left on device; nothing" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in disk.rglob("*") if file.is_file()} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
