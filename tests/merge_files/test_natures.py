"""`dimat merge` on entries that are no parameters: masks, variances, singular vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dimat.cli import main


def weights(seed: int, variance: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    layer = spectral_norm(nn.Linear(4, 6))
    for _ in range(5):
        layer(torch.randn(8, 4))
    mask = torch.full((6, 6), -torch.inf).triu(1)
    state = {f"layer.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    return state | {"mask": mask, "attn.bias": mask.clone(), "norm.running_var": torch.full((6,), variance)}


@pytest.mark.parametrize("method", ["average", "krum", "coordinate-median", "karcher"])
def test_masks_stay_and_vectors_are_iterated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A mask is written bit for bit, whatever it is called; u W v is the largest singular value."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1, 2):
        save_file(weights(seed), f"{seed}.safetensors")
    files = [f"{seed}.safetensors" for seed in (0, 1, 2)]
    assert main(["merge", *files, "--method", method, "-o", "out.safetensors"]) == 0
    merged = load_file("out.safetensors")
    assert torch.equal(merged["mask"], weights(0)["mask"])
    assert torch.equal(merged["attn.bias"], weights(0)["mask"])
    weight, u, v = (merged[f"layer.parametrizations.weight.{part}"] for part in ("original", "0._u", "0._v"))
    assert float(u @ weight @ v) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-2)


def test_a_negative_variance_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names file and tensor; nothing is written."""
    monkeypatch.chdir(tmp_path)
    save_file(weights(0), "a.safetensors")
    save_file(weights(1, variance=-5.0), "b.safetensors")
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]) == 5
    told = capsys.readouterr().err.strip()
    assert "b.safetensors: tensor 'norm.running_var' is a variance and holds 6 values below 0" in told
    assert not Path("out.safetensors").exists()


def test_complex_weights_are_no_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are averaged as numbers; a real tensor of the same name is told."""
    monkeypatch.chdir(tmp_path)
    own, peer = (torch.full((2, 2), z, dtype=torch.complex64) for z in (1 + 2j, 3 - 2j))
    for name, tensor in (("a", own), ("b", peer), ("c", own.real.clone())):
        save_file({"x.weight": tensor}, f"{name}.safetensors")
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]) == 0
    assert torch.equal(load_file("out.safetensors")["x.weight"], torch.full((2, 2), 2 + 0j, dtype=torch.complex64))
    assert main(["merge", "a.safetensors", "c.safetensors", "-o", "x.safetensors"]) == 5
    assert "'x.weight' is C64[2, 2] in a.safetensors, F32[2, 2] in c.safetensors" in capsys.readouterr().err
