"""`dimat symmetry show|verify|diff` as a person meets it: tables, drawings, exit codes, one line for bad input."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from dimat.cli import main
from dimat.symmetry import SymmetrySpec

MODELS = """
import torch
from torch import nn
from dimat.symmetry import Value, register_rule

def mlp(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)), torch.randn(2, 4)

def wider():
    return mlp(7)

def deeper():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 3)), torch.randn(2, 4)

def smooth():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(2, 4)

class Numbered(nn.Sequential):
    def forward(self, x):
        return self[2](self[1](self[0](x)) * torch.arange(1.0, 7.0))

def numbered():
    return Numbered(*mlp()[0]), torch.randn(2, 4)

def half():
    model, x = mlp()
    return model.double(), x.double()

def encoder():
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 24), stack, nn.Linear(24, 4)), torch.randn(2, 6, 5)

def normed():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, x):
        hidden = torch.relu(self.one(x))
        return {"logits": self.two(hidden), "hidden": hidden}

def two():
    return Two(), torch.randn(2, 4)

class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
    def forward(self, x):
        return self.out(torch.relu(self.two(torch.cumsum(self.one(x), -1))))

def wrong():
    register_rule("aten.cumsum", lambda call: call.value("self"))  # not so: order matters
    return Sums(), torch.randn(2, 4)

class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such thing")

def broken():
    return Broken(), torch.randn(2, 4)

def nothing():
    return 3

def fails():
    raise KeyError("lost")
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from dimat.symmetry.rules import call

    monkeypatch.setattr(call, "_RULES", dict(call._RULES))  # pyright: ignore[reportPrivateUsage]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(MODELS)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert main(["symmetry", *arguments]) == code
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert main(["symmetry", *arguments]) == code
    both = capsys.readouterr()
    assert both.out == ""
    (line,) = both.err.strip().splitlines()
    assert line.startswith("dimat: ")
    return line


def test_show_names_heads_and_what_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """3 heads of 24 / 3 = 8 units; each of the 24 · 5 weights of the first layer has an axis frozen by the input."""
    text = said(capsys, 0, "show", "m.py:encoder")
    assert "8 in each of 3" in text
    assert "frozen because" in text
    shown = json.loads(said(capsys, 0, "show", "m.py:encoder", "--json"))
    assert shown["invariance_error"] < 1e-9
    summary = shown["summary"]
    assert summary["groups"] == len(shown["groups"])
    assert summary["nested_groups"] == sum(1 for group in shown["groups"] if group["parents"]) > 0
    share = {row["reason"]: row["share"] for row in summary["frozen"]}
    assert share["model input 'input'"] == pytest.approx(24 * 5 / summary["parameters"])
    assert SymmetrySpec.from_json(json.dumps(shown)).arch_hash == shown["arch_hash"]


def test_show_lists_tensors_that_are_no_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """Natures by their words in the table, by tensor in JSON."""
    text = said(capsys, 0, "show", "m.py:normed")
    assert re.search(r"variance +1 +1\.running_var", text)
    assert re.search(r"vector +2 +0\.parametrizations\.weight\.0\._u \+1", text)
    natures = json.loads(said(capsys, 0, "show", "m.py:normed", "--json"))["summary"]["natures"]
    assert natures["1.num_batches_tracked"] == "count"
    assert "3.weight" not in natures


def test_selected_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that returns its hidden layer pins it (SYM-W05), unless the output that counts is named."""
    assert "SYM-W05" in said(capsys, 0, "show", "m.py:two")
    for output in ("logits", "0"):
        found = json.loads(said(capsys, 0, "show", "m.py:two", "--output", output, "--json"))
        assert [group["size"] for group in found["groups"]] == [8]
    assert "logitz" in fails(capsys, 1, "show", "m.py:two", "--output", "logitz")


@pytest.mark.parametrize("name", ["mlp", "encoder", "two", "broken"])
def test_drawing(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Well-formed; every tensor with an axis and every group is in it; nothing is fetched, nothing runs."""
    out = said(capsys, int(name == "broken"), "show", f"m.py:{name}", "--json", "--svg", "d.svg", "--html", "d.html")
    shown = json.loads(out)
    root = ET.parse("d.svg").getroot()
    texts = "\n".join(element.text or "" for element in root.iter())
    for group in shown["groups"]:
        assert f"group {shown['groups'].index(group) + 1}, {group['id']}" in texts
        assert group["id"] in texts
    moved = {axis["tensor"] for axis in shown["axes"]}
    assert {tensor.rpartition(".")[0] for tensor in moved} <= set(texts.splitlines()), texts
    page = Path("d.html").read_text()
    assert Path("d.svg").read_text() in page
    assert not re.search(r"<script|<link|src=|@import|url\(", page)
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    boxes = [[float(v) for v in re.findall(r"[\d.]+", g.get("transform", ""))] for g in root[-1] if g.get("transform")]
    assert len({tuple(box) for box in boxes}) == len(boxes), "no box covers another"
    assert set(os.listdir()) - {"__pycache__"} == {"d.html", "d.svg", "m.py"}


def test_a_file_that_cannot_be_written_keeps_the_old_one(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 5 for the file, 2 for its name; no half a file beside it."""
    assert "cannot write" in fails(capsys, 5, "show", "m.py:mlp", "--svg", "nowhere/d.svg")
    assert "must end in .svg" in fails(capsys, 2, "show", "m.py:mlp", "--svg", "d.png")
    assert "must end in .html" in fails(capsys, 2, "show", "m.py:mlp", "--html", "d.svg")
    assert not list(Path().glob("*.svg")) + list(Path().glob(".*.tmp"))


def test_verify_names_the_group_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong rule lets the units before a running sum be permuted: that group fails, the one after it does not."""
    assert "passed" in said(capsys, 0, "verify", "m.py:mlp", "--seed", "3")
    assert json.loads(said(capsys, 0, "verify", "m.py:encoder", "--json"))["failed"] == []
    text = said(capsys, 1, "verify", "m.py:wrong")
    assert "FAILED" in text
    assert re.findall(r"^failed: (.*)$", text, flags=re.MULTILINE) == ["one.bias/0"]
    found = json.loads(said(capsys, 1, "verify", "m.py:wrong", "--json", "--seed", "7"))
    assert (found["passed"], found["failed"], found["seed"], found["groups"]) == (False, ["one.bias/0"], 7, 2)
    assert found["error"] > found["tolerance"]
    assert "SYM-E01 cannot trace" in said(capsys, 1, "verify", "m.py:broken")


def test_diff(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    """Exit 0 for one architecture; 3 with the first tensor by name that differs, else the graph."""
    assert "same architecture" in said(capsys, 0, "diff", "m.py:mlp", "m.py:mlp")
    cases = {
        "wider": "tensor 0.bias is float32 (6,) in m.py:mlp, float32 (7,) in m.py:wider",
        "deeper": "tensor 3.bias float32 (3,) is only in m.py:deeper",
        "half": "tensor 0.bias is float32 (6,) in m.py:mlp, float64 (6,) in m.py:half",
        "smooth": "the graphs of operations (tensors and groups are the same)",
        "numbered": "axis 0.bias/0 moves only in m.py:mlp",
    }
    for other, why in cases.items():
        text = said(capsys, 3, "diff", "m.py:mlp", f"m.py:{other}")
        assert text.count("of the movable entries in") == 2
        assert f"first difference: {why}" in text
        assert ("can still align: tensors and groups are equal" in text) == (other == "smooth")
        assert ("refuse each other: the groups differ" in text) == (other == "numbered")
    (models / "mlp.json").write_text(said(capsys, 0, "show", "m.py:mlp", "--json"))
    assert main(["symmetry", "diff", "mlp.json", "m.py:mlp"]) == 0
    capsys.readouterr()
    found = json.loads(said(capsys, 3, "diff", "mlp.json", "m.py:wider", "--json"))
    assert (found["same"], found["first_difference"][:14]) == (False, "tensor 0.bias ")
    assert [model["parameters"] for model in found["models"]] == [4 * 6 + 6 + 6 * 3 + 3, 4 * 7 + 7 + 7 * 3 + 3]
    bare = json.loads((models / "mlp.json").read_text())
    del bare["summary"]
    (models / "bare.json").write_text(json.dumps(bare))
    assert "axis 0.bias/0 has 6 entries in bare.json, 7 in m.py:wider" in said(
        capsys, 3, "diff", "bare.json", "m.py:wider"
    )


def test_experiment_files(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    """An experiment stands for its task's model."""
    (models / "e.toml").write_text('run = "e"\ntask = { name = "digits" }\n')
    assert "same architecture" in said(capsys, 0, "diff", "e.toml", "digits")


@pytest.mark.parametrize(
    ("code", "arguments", "line"),
    [
        (2, ["show", "m.py:nothing"], "must return a Task or (model, example inputs), not int"),
        (2, ["verify", "m.py:fails"], "KeyError"),
        (2, ["verify", "gone.py:model"], "there is no file"),
        (2, ["verify", "digitz"], "expected package.module:function"),
        (2, ["verify", "m.py:mlp", "--seed", "x"], "see --help"),
        (2, ["diff", "m.py:mlp"], "see --help"),
        (2, ["diff", "m.py:mlp", "gone.toml"], "gone.toml"),
        (5, ["diff", "m.py:mlp", "gone.json"], "cannot read gone.json"),
        (5, ["diff", "bad.json", "m.py:mlp"], "bad.json is not a symmetry spec"),
        (5, ["diff", "other.json", "m.py:mlp"], "other.json is not a symmetry spec"),
        (5, ["diff", "list.json", "m.py:mlp"], "list.json is not a symmetry spec"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], models: Path, code: int, arguments: list[str], line: str
) -> None:
    """One line, a stable exit code."""
    (models / "bad.json").write_text("{")
    (models / "other.json").write_text('{"groups": 3}')
    (models / "list.json").write_text("[1]")
    assert line in fails(capsys, code, *arguments)


def test_show_of_a_model_whose_forward_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown what there is, with the cause, and scripts are told by exit code 1."""
    text = said(capsys, 1, "show", "m.py:broken")
    assert "no such thing" in text
    assert json.loads(said(capsys, 1, "show", "m.py:broken", "--json"))["trace_kind"] == "none"
