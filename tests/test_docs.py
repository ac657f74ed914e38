"""The page on merge methods: its tables say what the registry says, and its commands, recipes and code run as they
stand there."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimat.cli import main
from dimat.config import PRESETS, MergeConfig, build
from dimat.merge import plan_merge
from dimat.merge.registry import combine_registry
from dimat.registry import keywords
from dimat.tasks import mlp, seeded
from tests.merge_files.adapters import LAYERS, factors, write_adapter
from tests.merge_files.models import read_model, weights, write_folder

PAGE = (Path(__file__).parent.parent / "docs" / "merge-methods.md").read_text(encoding="utf-8")
COLUMNS = ["method", "θ", "needs", "w_k", "options", "reads, work", "for", "paper"]


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def table_rows() -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for line in section("Methods").splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            name = cells[0].strip("`")
            assert name not in rows, f"{name} has two rows"
            rows[name] = dict(zip(COLUMNS, cells, strict=True))
    return rows


ROWS = table_rows()


def test_every_registered_method_has_one_row() -> None:
    """The tables name exactly what `merge.combine` can be."""
    assert sorted(ROWS) == combine_registry.names()


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_agree_with_the_code(name: str) -> None:
    """Options and their defaults, needs, and the paper are those of the function and its docstring."""
    row, function = ROWS[name], combine_registry.get(name)
    options, needs = combine_registry.options(name), keywords(function)
    for option in re.findall(r"`(\w+)`", row["options"]):
        assert option in options, option
    for option, value in re.findall(r"`(\w+)` = (\"[\w-]+\"|[\w.-]*\d|true|false)", row["options"]):
        assert tomllib.loads(f"value = {value}")["value"] == options[option], option
    assert ("base" in row["needs"]) == ("base" in needs)
    assert ("seed" in row["needs"]) == ("generator" in needs)
    assert (re.search("Fisher|Gram", row["needs"]) is not None) == ("aux" in needs)
    assert ("state" in row["needs"]) == ("state" in needs)
    links = re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", row["paper"])
    for shown, linked in links:
        assert shown == linked
        assert linked in (inspect.getdoc(function) or "")
    assert links or "arXiv" not in (inspect.getdoc(function) or "").replace("no arXiv number", "")


def test_presets_are_as_described() -> None:
    """ "A merge in five lines": the presets that it names, and the stages that it gives them; its table is valid."""
    text = section("A merge in five lines")
    stages = {name: [preset.align, preset.combine, preset.repair] for name, preset in PRESETS.items()}
    assert stages["average"] == stages["dpsgd"] == stages["sgp"] == ["none", "average", "none"]
    assert stages["dimat"] == stages["dimat-paper"] == ["activations", "average", "batchnorm"]
    assert stages["opcm"] == ["none", "opcm", "none"]
    for name in ("average", "dpsgd", "sgp", "dimat", "dimat-paper", "opcm"):
        assert f"`{name}`" in text
    plan = plan_merge(build(MergeConfig, tomllib.loads(blocks(text)[0])["merge"], "the page"))
    assert plan.combine.name == "trimmed-mean"


def test_statistics_from_code_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Statistics": the code as pasted, then its recipe by the command that is named there."""
    monkeypatch.chdir(tmp_path)
    text = section("Statistics")
    space: dict[str, Any] = {}
    exec(blocks(text, "python")[0], space)
    assert any(not tensor.equal(space["own"][name]) for name, tensor in space["merged"].items())
    (tmp_path / "regmean.toml").write_text(blocks(text)[0])
    assert "`dimat merge regmean.toml`" in text
    assert main(["merge", "regmean.toml", "--quiet"]) == 0
    assert load_file("regmean.safetensors").keys() == load_file("one.safetensors").keys()


def test_commands_to_merge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Merging files": the recipe and each command as they stand there."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("a", "b", "c", "base")):
        write_folder(tmp_path / name, weights(k))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    listed, recipe, *_ = blocks(section("Merging files"))
    (tmp_path / "recipe.toml").write_text(recipe)
    models = [{"model": name, "parameters": {"weight": 0.4}} for name in ("a", "b")]
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (tmp_path / "config.yml").write_text(json.dumps(config))
    commands = [shlex.split(line) for line in listed.splitlines()]
    assert len(commands) == 10
    for command in commands:
        assert command[0] == "dimat"
        assert main(command[1:]) == 0, command
        if "--dry-run" not in command:
            (out,) = [word for flag, word in pairwise(command) if flag in ("-o", "--out")] or ["by-rule"]
            assert read_model(tmp_path / out).keys() == weights(0).keys()
    a, b = weights(0), weights(1)
    mean = a["norm.weight"].double() * 0.6 + b["norm.weight"].double() * 0.4
    assert (read_model(tmp_path / "by-rule")["norm.weight"] - mean).abs().max() < 1e-6


def test_commands_that_run_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Merging files": the commands with a model and data, on networks of different initialisations."""
    monkeypatch.chdir(tmp_path)
    build = "from dimat.tasks import mlp\n\n\ndef build():\n    return mlp((20, 32, 2))\n"
    (tmp_path / "model.py").write_text(build)
    make = seeded(lambda: mlp((20, 32, 2)))
    for seed, name in enumerate(("one", "two")):
        save_file(dict(make(torch.Generator().manual_seed(seed)).state_dict()), f"{name}.safetensors")
    save_file({"x": torch.randn(200, 20, generator=torch.Generator().manual_seed(2))}, "inputs.safetensors")
    commands = [shlex.split(line) for line in blocks(section("Merging files"))[2].splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert main([*command[1:], "--quiet"]) == 0, command
    aligned, fitted = load_file("aligned.safetensors"), load_file("pleas.safetensors")
    assert aligned.keys() == fitted.keys() == load_file("one.safetensors").keys()
    assert any(not torch.equal(aligned[name], fitted[name]) for name in aligned)


def test_commands_on_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Merging files": adapters of different rank, compressed, and merged into their base."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=g) for name, shape in LAYERS.items()}
    write_folder(tmp_path / "model", base)
    write_adapter(tmp_path / "adapter-a", factors(0, 4))
    write_adapter(tmp_path / "adapter-b", factors(1, 3), r=3)
    commands = [shlex.split(line) for line in blocks(section("Merging files"))[3].splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert main([*command[1:], "--quiet"]) == 0, command
    assert {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in ("merged", "smaller")
    } == {
        "merged": 4,
        "smaller": 2,
    }
    assert read_model(tmp_path / "whole").keys() == base.keys()


def test_mergekit_methods_are_all_named() -> None:
    """ "Merging files" lists what `--from-mergekit` reads."""
    from dimat.merge_files.mergekit import METHODS

    (line,) = re.findall(r"mergekit's YAML is read for (.*?), with its own", section("Merging files"), flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", line)) == METHODS.keys()
