"""Specs kept on disk: what comes back is what was proved, and nothing stale or damaged is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dimat.symmetry.cache as spec_cache
import dimat.symmetry.rules.call as rule_table
from dimat.symmetry import register_rule, verified_symmetry
from tests.symmetry.test_paths import Loop
from tests.symmetry.zoo import MLP, ResNet20


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
    for damage in (b"", file.read_bytes()[:100], b"{}", b"\xff\xfe", other.read_bytes()):
        file.write_bytes(damage)
        assert _kept(MLP(), inputs, tmp_path) == fresh
        assert file.read_text() == fresh


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
