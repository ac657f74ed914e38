"""What the tasks say where a library or the hub is missing, and the starters that `dimat init --task` writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dimat.cli import main
from dimat.config import TaskConfig, load_experiment
from dimat.errors import ConfigError
from dimat.seeds import torch_generator
from dimat.tasks import list_tasks, load_task
from tests.forks import dimat
from tests.tasks.huggingface.samples import GPT2, VIT, write_parquet, write_text

VIT_TOML = "{ " + ", ".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in VIT.items()) + " }"
GPT2_TOML = "{ " + ", ".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in GPT2.items()) + " }"


@pytest.mark.parametrize("package", ["transformers", "datasets", "peft"])
def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """With the command that installs the extra."""
    write_text(tmp_path / "text.txt", 40)
    monkeypatch.setitem(sys.modules, package, None)
    data = {"name": "text.txt", "tokenizer": "bytes", "max_length": 32}
    options: dict[str, Any] = {"data": data, "model": {"config": GPT2, "lora": {}}}
    with pytest.raises(ConfigError) as caught:
        load_task(TaskConfig(name="hf-causal-lm", options=options), tmp_path).build_model(torch_generator(0))
    said = str(caught.value)
    assert package in said
    assert "pip install 'dimat[hf]'" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "changes", [["task.options.data.name=some-owner/some-data"], ["task.options.model.name=some-owner/some-model"]]
)
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, changes: list[str]) -> None:
    """Exit code 3, what was asked for, and that a folder does without: a process of its own, which is offline."""
    write_text(tmp_path / "text.txt", 40)
    (tmp_path / "e.toml").write_text('[task]\nname = "hf-causal-lm"\n[task.options.data]\nname = "text.txt"\n')
    if "data" in changes[0]:
        changes = [*changes, f"task.options.model.config={GPT2_TOML}", "task.options.data.tokenizer=bytes"]
    program = [dimat(), "simulate", "e.toml", *(w for c in changes for w in ("--set", c))]
    done = subprocess.run(
        program,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "some-owner/some-" in line
    assert "the Hugging Face hub cannot be reached" in line
    assert "to its folder" in line


@pytest.mark.parametrize("task", ["digits", "images", "hf-image-classification", "hf-causal-lm"])
def test_init_scaffolds_every_task(tmp_path: Path, task: str) -> None:
    """The file names a bundled task, its options are known, and the HF ones run with local data put in."""
    assert task in list_tasks()
    file = tmp_path / "e.toml"
    assert main(["init", str(file), "--task", task]) == 0
    config = load_experiment(file, env={})
    assert (config.task.name or "digits") == task
    changes = ["train.steps_per_round=1", "schedule.rounds=1", "simulate.workers=1", "topology.agents=2"]
    if task == "hf-image-classification":
        write_parquet(tmp_path / "colours.parquet", 150)
        text = file.read_text().replace("uoft-cs/cifar10", "colours.parquet")
        text = text.replace('name = "google/vit-base-patch16-224-in21k"', f"config = {VIT_TOML}")
        file.write_text(text)
    elif task == "hf-causal-lm":
        write_text(tmp_path / "text.txt", 150)
        text = (
            file.read_text().replace("Salesforce/wikitext", "text.txt").replace("max_length = 128", "max_length = 48")
        )
        text = text.replace("max_length =", 'tokenizer = "bytes"\nmax_length =')
        text = text.replace('name = "distilbert/distilgpt2"', f"config = {GPT2_TOML}")
        file.write_text(text)
    else:
        return
    settings = [word for change in changes for word in ("--set", change)]
    assert main(["simulate", str(file), "--out", str(tmp_path / "run"), "--quiet", *settings]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_init_of_an_unknown_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "e.toml"), "--task", "hf-casual-lm"]) == 2
    assert "did you mean 'hf-causal-lm'" in capsys.readouterr().err
