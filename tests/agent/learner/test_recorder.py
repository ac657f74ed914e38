"""How own weights become snapshots. Reference: what a reader gets by decoding the form it fetches, by its address."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dimat.agent.learner.recorder import Recorder
from dimat.config import ExchangeConfig
from dimat.weights.encodings import decode_weights
from dimat.weights.snapshot import Form, Payload, checksum
from dimat.weights.tensors import encode


def weights(step: int) -> dict[str, Tensor]:
    """A model that moves a little each round."""
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    return {"w": start + 0.01 * step * change, "bias": torch.arange(4.0), "steps": torch.tensor(step)}


def read(folder: Path, payload: Payload, form: Form) -> dict[str, Tensor]:
    """Decode a form as a reader does, and check that it is the snapshot that was promised, bit for bit."""
    after = folder / f"{form.after}.safetensors" if form.after else None
    found = decode_weights(folder / f"{form.payload.root}.safetensors", after=after)
    assert checksum(encode(found)).root == payload.root
    return found


def test_plain(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ExchangeConfig(), durable=False)
    payload, forms = recorder.record(weights(1))
    assert forms == ()
    assert torch.equal(load_file(tmp_path / f"{payload.root}.safetensors")["w"], weights(1)["w"])


@pytest.mark.parametrize(("encoding", "share"), [("bf16", 0.55), ("fp16", 0.55), ("int8", 0.3)])
def test_encodings_are_smaller_ways_to_one_content(tmp_path: Path, encoding: str, share: float) -> None:
    recorder = Recorder(tmp_path, ExchangeConfig(encoding=encoding), durable=False)
    for step in (1, 2):
        payload, (form,) = recorder.record(weights(step))
        assert (form.encoding, form.after) == (encoding, "")
        assert form.payload.bytes < share * payload.bytes
        assert (read(tmp_path, payload, form)["w"] - weights(step)["w"]).abs().max() < 0.05


def test_what_is_cut_off_is_carried_over(tmp_path: Path) -> None:
    """Error feedback: the mean of what readers hold of constant weights comes ever closer to them."""
    recorder = Recorder(tmp_path, ExchangeConfig(encoding="int8"), durable=False)
    sent = [read(tmp_path, payload, form)["w"] for payload, (form,) in (recorder.record(weights(1)) for _ in range(16))]
    errors = [(torch.stack(sent[:count]).mean(0) - weights(1)["w"]).abs().max() for count in (1, 16)]
    assert errors[1] < errors[0] / 4


def test_deltas(tmp_path: Path) -> None:
    """Each is a change to the one before, and far closer than a whole int8 snapshot; after a move into another basis,
    or where the one before is gone, the weights come whole."""
    recorder = Recorder(tmp_path, ExchangeConfig(encoding="int8", delta=True), durable=False)
    first, (form,) = recorder.record(weights(1))
    assert form.after == ""
    coarse = (read(tmp_path, first, form)["w"] - weights(1)["w"]).abs().max()
    second, (form,) = recorder.record(weights(2))
    assert form.after == first.root
    assert (read(tmp_path, second, form)["w"] - weights(2)["w"]).abs().max() < coarse / 10
    recorder.forget()
    third, (form,) = recorder.record(weights(3))
    assert form.after == ""
    (tmp_path / f"{third.root}.safetensors").unlink()
    _, (form,) = recorder.record(weights(4))
    assert form.after == ""
