"""Logits in place of weights. References: formulas by hand, snapshots damaged one way each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dimat import merge_weights
from dimat.config import MergeConfig
from dimat.errors import ConfigError, DataError, PeerError
from dimat.merge import plan_merge
from dimat.merge.shared_logits import CLASSES, LOGITS, LogitLayout, distil
from dimat.weights.tensors import Tensors, write_weights


def logits(seed: int, examples: int = 5, classes: int = 4) -> Tensor:
    return 3 * torch.randn(examples, classes, generator=torch.Generator().manual_seed(seed))


def test_teachers_are_softened_and_averaged_by_mixing_weights() -> None:
    """p̄ = Σ w softmax(z / T), own first, in bf16 as they travel; each row sums to 1."""
    layout = LogitLayout(5, 4)
    sent = [layout.encoded(logits(seed)) for seed in range(3)]
    assert {name: (t.dtype, t.shape) for name, t in sent[0].items()} == {LOGITS: (torch.bfloat16, (5, 4))}
    found = distil(sent[0], sent[1:], [0.5, 0.3, 0.2], 4, temperature=3.0)
    parts = [w * (logits(k).bfloat16().float() / 3).softmax(1) for k, w in enumerate((0.5, 0.3, 0.2))]
    torch.testing.assert_close(found, sum(parts))
    torch.testing.assert_close(found.sum(1), torch.ones(5))


def test_the_largest_logits_are_kept() -> None:
    """As many as are asked for, with their classes; those left out have no share, and ties go to the first class."""
    layout = LogitLayout(2, 4, keep=2)
    values = torch.tensor([[0.0, 5.0, -1.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    sent = layout.encoded(values)
    assert sent[CLASSES].tolist() == [[1, 3], [0, 1]]
    assert sent[CLASSES].dtype == torch.int16
    found = distil(sent, [], [1.0], 4, temperature=1.0)
    torch.testing.assert_close(found[0, [1, 3]], torch.tensor([5.0, 3.0]).softmax(0))
    assert found[:, 2].tolist() == [0, 0]
    assert LogitLayout(2, 4, keep=9).encoded(values).keys() == {LOGITS}
    assert LogitLayout(1, 40_000, keep=1).sample()[CLASSES].dtype == torch.int32


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda sent: {**sent, name: change(sent[name])}


def _put(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[row, column] = value
        return changed

    return put


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nan": (_changed(LOGITS, _put(1, 1, float("nan"))), "holds 1 values that are not finite"),
    "infinite": (_changed(LOGITS, _put(0, 0, float("inf"))), "holds 1 values that are not finite"),
    "examples": (_changed(LOGITS, lambda t: t[:3].contiguous()), r"is bfloat16\[3, 2\], ours bfloat16\[5, 2\]"),
    "type": (_changed(LOGITS, Tensor.float), r"is float32\[5, 2\]"),
    "class above": (_changed(CLASSES, _put(2, 0, 4)), "names classes from 0 to 4, ours are 0 to 3"),
    "class below": (_changed(CLASSES, _put(2, 0, -1)), "names classes from -1 to"),
    "class twice": (_changed(CLASSES, lambda t: t.fill_(2)), "names a class twice"),
    "no classes": (lambda sent: {LOGITS: sent[LOGITS]}, "'aux.logit_classes' is missing"),
    "weights": (lambda sent: {**sent, "fc.weight": torch.zeros(3)}, "'fc.weight' is none of the logits"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_logits_are_refused(tmp_path: Path, fault: str) -> None:
    """One line that names peer and tensor; the good ones are read as they were sent."""
    layout = LogitLayout(5, 4, keep=2)
    good = layout.encoded(logits(0))
    write_weights(tmp_path / "good.safetensors", good)
    read = layout.read("eve", Tensors(tmp_path / "good.safetensors"))
    assert all(torch.equal(read[name], tensor) for name, tensor in good.items())
    change, says = BAD[fault]
    write_weights(tmp_path / "bad.safetensors", change(good))
    with pytest.raises(PeerError, match=says) as error:
        layout.read("eve", Tensors(tmp_path / "bad.safetensors"))
    assert str(error.value).startswith("eve: ")
    assert "\n" not in str(error.value)


def test_a_size_that_is_only_claimed_allocates_nothing(tmp_path: Path) -> None:
    """A header of a terabyte over a few bytes is refused when it is opened; one that fits its file, by its shape."""
    header = json.dumps({LOGITS: {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": [0, 2 * 10**12]}}).encode()
    (tmp_path / "huge.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(DataError):
        LogitLayout(5, 4).read("eve", Tensors(tmp_path / "huge.safetensors"))

    class Unread(Tensors):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was read before its shape was checked")

    write_weights(tmp_path / "wide.safetensors", {LOGITS: torch.zeros(5, 4000, dtype=torch.bfloat16)})
    with pytest.raises(PeerError, match=r"\[5, 4000\]"):
        LogitLayout(5, 4).read("eve", Unread(tmp_path / "wide.safetensors"))


def test_weights_and_logits_are_not_mixed_up() -> None:
    """The method names what it exchanges; the library's call merges weights alone."""
    with pytest.raises(ConfigError, match=r'combine = "distil" merges logits.*set merge.method = "distil"'):
        plan_merge(MergeConfig.model_validate({"method": "dimat", "combine": "distil"}))
    with pytest.raises(ConfigError, match=r"unknown combine method of logits 'avarage'"):
        plan_merge(MergeConfig.model_validate({"method": "distil", "combine": "avarage"}))
    with pytest.raises(ConfigError, match=r'"distil" exchanges logits and merges no weights'):
        merge_weights({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], [0.5, 0.5], method="distil")
    options = {"name": "distil", "options": {"keep": 0}}
    with pytest.raises(ConfigError, match=r"'keep'.*greater than or equal to 1"):
        plan_merge(MergeConfig.model_validate({"method": "distil", "combine": options}))
