"""`dimat barrier` as a person meets it. References: `dimat.barrier` on the same files; one line for bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimat import barrier
from dimat.cli import main
from dimat.config import TaskConfig, TrainConfig
from dimat.tasks import load_task
from dimat.tasks.data import Subset
from dimat.train import Trainer

HOOKS = """
import torch
from dimat.tasks import load_task
from dimat.config import TaskConfig

def net():
    return load_task(TaskConfig(name="digits")).build_model(torch.Generator())

def pair():
    return net(), torch.zeros(2, 1, 8, 8)

def batches():
    data = load_task(TaskConfig(name="digits")).data("test")
    batch = data.batch(torch.arange(90))
    yield batch.inputs[0].double(), batch.targets.to(torch.uint8)  # as numpy has them

def text():
    return "no model"

def broken():
    yield torch.zeros(4, 1, 8, 8), torch.zeros(4).long()
    raise OSError("the disk is gone")

def arrays():
    return [(torch.zeros(4, 1, 8, 8).numpy(), torch.zeros(4).long())]

def unequal():
    return [(torch.zeros(4, 1, n, n), torch.zeros(4).long()) for n in (8, 9)]

def eleven():
    return [(torch.zeros(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 10], dtype=torch.uint8))]

def unlabelled():
    return [(torch.zeros(4, 1, 8, 8),)]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks that were trained apart, a folder that holds the second one, and labelled examples."""
    folder = tmp_path_factory.mktemp("models")
    task = load_task(TaskConfig(name="digits"))
    data = task.data("train")
    settings = TrainConfig.model_validate({"device": "cpu", "epochs_per_round": 2, "initialisation": "own"})
    for seed in (0, 1):
        trainer = Trainer(task, Subset(data, torch.arange(600)), settings, seed=seed)
        trainer.train(1)
        save_file(trainer.weights(), folder / f"{seed}.safetensors")
    (folder / "one").mkdir()
    (folder / "one" / "model.safetensors").write_bytes((folder / "1.safetensors").read_bytes())
    chosen = task.data("test").batch(torch.arange(90))
    save_file({"images": chosen.inputs[0], "labels": chosen.targets}, folder / "test.safetensors")
    (folder / "hooks.py").write_text(HOOKS)
    return folder


def test_table_picture_and_json(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each way, the same numbers as JSON, and a PNG; with a task no more than the models is needed."""
    monkeypatch.chdir(models)
    call = ["barrier", "0.safetensors", "one", "--model", "digits", "--points", "5", "--examples", "200"]
    assert main([*call, "--plot", str(tmp_path / "line.png")]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["none", "weights", "auto"]
    assert float(rows[1][1]) > float(rows[3][1])
    assert out.splitlines()[4].startswith("at the ends: loss ")
    assert f"wrote {tmp_path / 'line.png'}" in err + out
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--json", "--align", "none", "--align", "auto"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shares"] == [0, 0.25, 0.5, 0.75, 1]
    assert [f"{line['barrier']:.3f}" for line in told["lines"]] == [rows[1][1], rows[3][1]]
    assert all(len(line["loss"]) == len(line["accuracy"]) == 5 for line in told["lines"])


@pytest.mark.parametrize(
    ("hook", "data"),
    [("hooks.py:net", "test.safetensors"), ("hooks.py:pair", "hooks.py:batches")],
    ids=["file", "hook"],
)
def test_a_model_with_labelled_examples(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: str, data: str
) -> None:
    """Reference: `dimat.barrier` with cross-entropy on those examples."""
    monkeypatch.chdir(models)
    call = ["barrier", "0.safetensors", "1.safetensors", "--model", hook, "--data", data, "--align", "none", "--json"]
    assert main([*call, "--points", "3"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    task = load_task(TaskConfig(name="digits"))
    network, held = task.build_model(torch.Generator()), load_file("test.safetensors")

    def evaluate(weights: object) -> dict[str, float]:
        network.load_state_dict(dict(weights))  # type: ignore[call-overload]
        with torch.no_grad():
            logits = network.eval()(held["images"])
        return {"loss": float(task.loss(logits, held["labels"]))}

    (own,) = barrier(
        *("0.safetensors", "1.safetensors", evaluate),
        **{"model": task.build_model(torch.Generator()), "data": held["images"], "align": ["none"], "points": 3},
    )
    assert line["loss"] == pytest.approx(own.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--model", "digits", "--align", "activation"], 2, "did you mean 'activations'"),
        (["--model", "digits", "--points", "2"], 2, "Must be >= 3"),
        (["--model", "digits", "--examples", "-1"], 2, "Must be >= 1"),
        (["--model", "digits", "--plot", "nowhere/line.png"], 2, "there is no folder nowhere"),
        (["--model", "hooks.py:net", "--data", "hooks.py:arrays"], 2, "must return batches of tensors"),
        (["--model", "hooks.py:net", "--data", "hooks.py:unequal"], 2, "returns batches of unequal shapes"),
        (
            ["--model", "hooks.py:net", "--data", "hooks.py:eleven"],
            5,
            "class 10 has no output of the model, which has 10",
        ),
        (["--model", "digits", "--repair", "batch"], 2, "did you mean 'batchnorm'"),
        (["--model", "digits", "--plot", "line.pdf"], 2, "the name must end in .png"),
        (["--model", "digits", "--data", "test.safetensors"], 2, "returns a Task, which has data of its own"),
        (["--model", "hooks.py:net"], 2, "give labelled examples with --data"),
        (["--model", "hooks.py:text"], 2, "must return a Task or a torch.nn.Module, not str"),
        (["--model", "hooks.py:net", "--data", "hooks.py:unlabelled"], 5, "last is [4, 1, 8, 8] of float32"),
        (["--model", "hooks.py:net", "--data", "hooks.py:broken"], 2, "the disk is gone"),
        (["--model", "hooks.py:net", "--data", "0.safetensors"], 5, "inputs must have equally many examples"),
        ([], 2, "requires an argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(models)
    assert main(["barrier", "0.safetensors", "1.safetensors", *words]) == code
    err = capsys.readouterr().err.strip()
    assert told in err
    assert "\n" not in err


def test_models_of_another_architecture_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    save_file({"other.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    assert main(["barrier", "0.safetensors", str(tmp_path / "other.safetensors"), "--model", "digits"]) == 5
    assert "the models do not fit together" in capsys.readouterr().err
    same = str(tmp_path / "other.safetensors")
    assert main(["barrier", same, same, "--model", "digits"]) == 5
    assert "does not fit the model 'digits'" in capsys.readouterr().err


def test_the_command_of_the_page(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/alignment.md: the command as it stands there, and its lines of Python."""
    text = (Path(__file__).parents[2] / "docs" / "alignment.md").read_text(encoding="utf-8")
    section = text[text.index("## How far apart two networks are") :]
    (command,) = [line for line in section.splitlines() if line.startswith("dimat barrier ")]
    code = section[section.index("```python") + 9 :].partition("```")[0]
    for seed, name in enumerate(("mine", "theirs")):
        (tmp_path / f"{name}.safetensors").write_bytes((models / f"{seed}.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "line.png").exists()
    space: dict[str, Any] = {}
    exec(code, space)
    assert [line.align for line in space["lines"]] == ["none", "auto"]
