"""Specs kept on disk: what comes back is what was proved, and nothing stale or damaged is believed."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dimat.symmetry.cache as spec_cache
import dimat.symmetry.rules.call as rule_table
from dimat.errors import SymmetryError
from dimat.symmetry import (
    AxisRef,
    Factor,
    Group,
    Observer,
    SymmetrySpec,
    SymmetryWarning,
    register_rule,
    verified_symmetry,
)
from dimat.symmetry.fingerprint import fingerprint
from tests.symmetry.test_paths import Loop
from tests.symmetry.zoo import MLP, ResNet20


@pytest.fixture(autouse=True)
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget rules that earlier tests of the process registered from outside: with them nothing is kept."""
    monkeypatch.setattr(rule_table, "_foreign", set())


def _kept(model: nn.Module, inputs: torch.Tensor, folder: Path) -> str:
    return verified_symmetry(model, inputs, torch.Generator().manual_seed(0), folder=folder).to_json()


def test_a_kept_spec_is_the_one_that_was_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the spec as derived without a folder of before; the second time nothing is proved again."""
    inputs = torch.randn(2, 3, 32, 32)
    fresh = _kept(ResNet20(), inputs, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    monkeypatch.setattr(spec_cache, "freeze_failing", None)
    assert _kept(ResNet20(), inputs, tmp_path) == fresh


def test_another_width_or_a_damaged_file_is_derived_anew(tmp_path: Path) -> None:
    """Reference: one file for each architecture; a file that is cut off or holds something else is replaced."""
    inputs = torch.randn(3, 12)
    fresh = _kept(MLP(), inputs, tmp_path)
    (file,) = tmp_path.iterdir()
    _kept(ResNet20("B", 4), torch.randn(2, 3, 32, 32), tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    for damage in (b"", file.read_bytes()[:100], b"{}", b"\xff\xfe"):
        file.write_bytes(damage)
        assert _kept(MLP(), inputs, tmp_path) == fresh
        assert file.read_text() == fresh
    file.write_bytes(other.read_bytes())
    with pytest.warns(SymmetryWarning, match="SYM-W07"):
        assert _kept(MLP(), inputs, tmp_path) == fresh
    assert file.read_text() == fresh


@pytest.mark.parametrize("wrong", ["a group too many", "an output too many", "another size"])
def test_a_spec_that_does_not_hold_is_caught_and_derived_anew(wrong: str, tmp_path: Path) -> None:
    """Reference: the spec as proved. The wrong one permutes outputs, or does not fit the module; it is
    found under the module's own key, as where the key had missed a difference."""
    inputs = torch.randn(3, 12)
    fresh = _kept(MLP(), inputs, tmp_path)
    (file,) = tmp_path.iterdir()
    spec = SymmetrySpec.from_json(fresh)
    if wrong == "a group too many":  # the units of the output
        tensor, size = "layers.2.weight", 5
        group = Group("new", size, ((tensor, 0),))
        bad = replace(
            spec, groups=(*spec.groups, group), axes=(*spec.axes, AxisRef(tensor, 0, ((Factor(size, "new"),),)))
        )
    elif wrong == "an output too many":
        bad = replace(spec, outputs=(*spec.outputs, 7))
    else:
        first = spec.axes[0]
        bad = replace(spec, axes=(AxisRef(first.tensor, first.dim, (*first.layout, (Factor(1),))), *spec.axes[1:]))
    file.write_text(bad.to_json())
    with pytest.warns(SymmetryWarning, match="SYM-W07 the symmetry groups in .* do not hold"):
        assert _kept(MLP(), inputs, tmp_path) == fresh
    assert file.read_text() == fresh
    assert _kept(MLP(), inputs, tmp_path) == fresh


def test_a_module_without_a_fingerprint_is_known_by_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the spec as derived; the second time nothing is proved, but the module is traced."""

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu())

    inputs = torch.randn(3, 4)
    assert fingerprint(Local(), inputs) is None
    fresh = _kept(Local(), inputs, tmp_path)
    assert len([*tmp_path.iterdir()]) == 1
    monkeypatch.setattr(spec_cache, "freeze_failing", None)
    assert _kept(Local(), inputs, tmp_path) == fresh


def test_an_observer_of_another_model_forgets_the_kept_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a spec kept for a width of 8; the file of the one that is refused is gone, the other's stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inputs = torch.randn(3, 12)
    verified_symmetry(MLP(), inputs, torch.Generator().manual_seed(0))
    folder = tmp_path / "dimat" / "symmetry"
    (kept,) = folder.iterdir()
    image = torch.randn(2, 3, 32, 32)
    spec = verified_symmetry(ResNet20("B", 4), image, torch.Generator().manual_seed(0))
    with pytest.raises(SymmetryError, match="another model"):
        Observer(MLP(), spec, inputs)
    assert [*folder.iterdir()] == [kept]


@pytest.mark.parametrize("home", [None, "", "a/relative/one"])
def test_without_a_home_directory_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """Reference: the spec that is derived with a folder. A user without an entry in passwd, as in a container that runs
    under any number, has no home, and may have an empty HOME; the cache is a convenience and never a traceback."""
    fresh = _kept(MLP(), torch.randn(3, 12), tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)

    def unknown(_: object) -> object:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert spec_cache.default_folder() is None
    spec = verified_symmetry(MLP(), torch.randn(3, 12), torch.Generator().manual_seed(0))
    assert spec.to_json() == fresh
    spec_cache.forget(spec)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_second_start_does_not_trace(tmp_path: Path) -> None:
    """Reference: torch's compiler, which every trace loads, and scipy are not loaded when the spec was kept."""
    code = (
        "import sys, torch\n"
        "from dimat.symmetry import verified_symmetry\n"
        "from tests.symmetry.zoo import MLP\n"
        "spec = verified_symmetry(MLP(), torch.randn(3, 12), torch.Generator().manual_seed(0))\n"
        "print(spec.groups_hash, *[m in sys.modules for m in ('torch.export._trace', 'torch._dynamo', 'scipy')])\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert said[0][1:3] == ["True", "True"]
    assert said[1] == [said[0][0], "False", "False", "False"]


def test_a_folder_that_cannot_be_made_costs_time_only(tmp_path: Path) -> None:
    """Reference: the spec as it is elsewhere."""
    (tmp_path / "file").write_text("in the way")
    inputs = torch.randn(3, 12)
    assert _kept(MLP(), inputs, tmp_path / "file" / "folder") == _kept(MLP(), inputs, tmp_path / "elsewhere")


def test_nothing_is_kept_of_foreign_rules_and_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the folder stays empty: neither the rules nor the paths taken are in the hash."""
    _kept(Loop(), torch.randn(3, 4), tmp_path)
    monkeypatch.setattr(rule_table, "_RULES", dict(rule_table._RULES))
    monkeypatch.setattr(rule_table, "_foreign", set())
    register_rule("mylib.scan", lambda call: None)
    _kept(MLP(), torch.randn(3, 12), tmp_path)
    assert not list(tmp_path.iterdir())
