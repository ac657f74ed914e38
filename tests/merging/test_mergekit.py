"""mergekit's YAML end to end: its golden runs (mergekit 0.1.5 on a tiny Llama, float32), from folders to a folder.

The tolerance is float32's last bits, 2e-7, as for the methods themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dimat.cli import main
from tests.merge.methods import GOLDEN, part
from tests.merging.models import read_model, weights, write_folder

RUNS: dict[str, dict[str, Any]] = {
    name: run["config"] for name, run in json.loads((GOLDEN / "mergekit.json").read_text())["runs"].items()
}
SHARED = [name for name, config in RUNS.items() if config["merge_method"] != "arcee_fusion"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tensors = load_file(GOLDEN / "mergekit.safetensors")
    for name in ("base", "t0", "t1", "t2"):
        write_folder(tmp_path / name, part(tensors, f"in.{name}."), shards=2 if name == "t1" else 1)
    return tmp_path


def run(config: dict[str, Any], *flags: str) -> int:
    Path("config.yml").write_text(yaml.safe_dump(config))
    return main(["merge", "--from-mergekit", "config.yml", "-o", "out", "--quiet", *flags])


@pytest.mark.parametrize("name", SHARED)
def test_golden_runs(name: str, folder: Path) -> None:
    """Same result as mergekit itself for all methods that both have."""
    assert run(RUNS[name]) == 0
    expected = part(load_file(GOLDEN / "mergekit.safetensors"), f"{name}.")
    found = read_model(Path("out"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert float((found[key] - tensor).abs().max()) <= 2e-7 * max(1.0, float(tensor.abs().max())), key
    assert Path("out/tokenizer.json").exists()


def test_linear_normalises_its_weights(folder: Path) -> None:
    """mergekit's default: Σ w θ / Σ w; base_model may be one of the models."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("base", 1.0), ("t0", 3.0))]
    assert run({"merge_method": "linear", "models": models, "dtype": "bfloat16"}) == 0
    base, other = (read_model(Path(m))["lm_head.weight"].double() for m in ("base", "t0"))
    assert torch.equal(read_model(Path("out"))["lm_head.weight"], (base + 0.75 * (other - base)).float().bfloat16())


def test_random_methods_run_and_depend_on_the_seed_alone(folder: Path) -> None:
    """Their draws are ours, so only their laws can be compared, which the methods' own tests do."""
    models = [{"model": "base"}, *({"model": f"t{k}", "parameters": {"weight": 0.5, "density": 0.6}} for k in range(2))]
    for method in ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties"):
        config = {"merge_method": method, "base_model": "base", "models": models}
        assert run(config, "--overwrite") == 0
        first = read_model(Path("out"))
        assert run(config, "--overwrite") == 0
        assert all(torch.equal(tensor, first[name]) for name, tensor in read_model(Path("out")).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "arcee_fusion"}, "unknown merge method 'arcee_fusion'"),
        ({"slices": []}, "'slices' of mergekit is not supported"),
        ({"parameters": {"normalise": True}}, "parameter 'normalise' of ties is not supported"),
        ({"parameters": {"rescale": True}}, "ties with rescale: true is not supported"),
        ({"parameters": {"density": [0.2, 0.5]}}, "density of t0 is no plain number"),
        ({"models": [{"model": "t0", "parameters": {"density": d}} for d in (0.1, 0.2)]}, "density of their own"),
        ({"models": {}}, "models must be a list"),
        ({"models": [{"model": "org/name"}]}, "no model org/name: give a safetensors file or a folder (models are not"),
        ({"dtype": "float31"}, "dtype: unknown type; did you mean 'float32'"),
        ({"base_model": None}, "merges deltas from a base"),
    ],
)
def test_what_is_not_supported_is_refused(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it; nothing is approximated."""
    config = {"merge_method": "ties", "base_model": "base", "models": [{"model": "t0"}, {"model": "t1"}], **change}
    assert run(config) in (2, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["models: [", "- a", "!!python/object/apply:os.system [true]", "\x00"])
def test_files_that_are_no_configuration(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML is read without running anything."""
    Path("config.yml").write_text(text)
    assert main(["merge", "--from-mergekit", "config.yml", "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dimat: config.yml is not")


def test_models_beside_the_configuration_are_found(tmp_path: Path) -> None:
    """Paths are taken from where the command runs, else from the file's folder."""
    for k in range(2):
        write_folder(tmp_path / f"m{k}", weights(k))
    models = [{"model": f"m{k}", "parameters": {"weight": 1}} for k in range(2)]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert main(["merge", "--from-mergekit", str(tmp_path / "c.yml"), "-o", str(tmp_path / "out")]) == 0
