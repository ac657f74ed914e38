"""Weights as lazily read mappings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dimat.errors import DataError
from dimat.merge import open_weights
from dimat.merge.weight_views import PermutedWeights, WeightsOn
from dimat.symmetry import derive_symmetry, permute_weights, random_permutations
from tests.merge.networks import UNet, randomise


def test_a_file_reads_as_what_was_saved(tmp_path: Path) -> None:
    """Reference: the dictionary that safetensors wrote."""
    saved = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.int64), "h": torch.zeros(2, 2).bfloat16()}
    save_file(saved, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")):
        weights = open_weights(path)
        assert set(weights) == set(saved)
        assert len(weights) == 3
        assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
        assert "c" not in weights
        with pytest.raises(KeyError):
            weights["c"]


def test_a_mapping_is_handed_back() -> None:
    """State dicts need no opening."""
    weights = {"a": torch.ones(1)}
    assert open_weights(weights) is weights


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, "truncated", "header"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | str | None) -> None:
    """Missing, empty, garbage, cut in the data, cut in the header: DataError, exit code 5."""
    path = tmp_path / "peer.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"a": torch.ones(1000)}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-7] if content == "truncated" else whole[:20])
    with pytest.raises(DataError, match=r"peer\.safetensors") as error:
        open_weights(path)
    assert error.value.exit_code == 5


def test_permuted_views_equal_permuted_state_dicts() -> None:
    """Reference: `permute_weights` on the whole, for a network with concatenations; one tensor at a time."""
    model = randomise(UNet(), 0)
    spec = derive_symmetry(model, (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
    permutations = random_permutations(spec, torch.Generator().manual_seed(1))
    whole = permute_weights(model.state_dict(), spec, permutations)
    view = PermutedWeights(model.state_dict(), spec, permutations)
    assert list(view) == list(whole)
    assert all(torch.equal(view[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(view[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_tensors_are_permuted_under_each_name() -> None:
    """Reference: `permute_weights`; a view of one name must not need the other."""
    first = torch.nn.Linear(6, 6, bias=False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), first, torch.nn.ReLU(), first)
    model.append(torch.nn.Linear(6, 2))
    spec = derive_symmetry(model, (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),))
    permutations = random_permutations(spec, torch.Generator().manual_seed(1))
    whole = permute_weights(model.state_dict(), spec, permutations)
    view = PermutedWeights(model.state_dict(), spec, permutations)
    assert permutations
    assert all(torch.equal(view[name], tensor) for name, tensor in whole.items())


def test_weights_on_a_device() -> None:
    """The CPU is where they are already: the same tensors."""
    weights = {"a": torch.ones(2)}
    moved = WeightsOn(weights, torch.device("cpu"))
    assert moved["a"] is weights["a"]
    assert list(moved) == ["a"]
    assert len(moved) == 1
