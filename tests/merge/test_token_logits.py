"""What language models say of a probe text, in a snapshot. References: tensors by hand, snapshots damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dimat.errors import PeerError
from dimat.merge.token_logits import IDS, LENGTHS, LOGITS, LONGEST, STARTS, TEXTS, TokenLayout
from dimat.tasks.token_text import END, ProbeText
from dimat.weights.encodings import encoded_bytes
from dimat.weights.tensors import Tensors, write_weights

TEXT = b"the cat sees" + END
WORDS = ("the", " cat", " sees", "x" * 50, "", "s")
PROBE = ProbeText(
    TEXT,
    (*(word.encode() for word in WORDS), END),
    torch.tensor([[2, 6], [0, 1]]),
    torch.tensor([[[7, 12], [12, 13]], [[0, 3], [3, 7]]]),
)
LAYOUT = TokenLayout(len(TEXT), 4, 6, keep=2)
VALUES = torch.tensor([[3.0, 1.0], [2.0, 0.5], [1.5, 1.0], [4.0, -1.0]])
CHOSEN = torch.tensor([[2, 3], [6, 0], [0, 5], [1, 2]])


def sent() -> dict[str, Tensor]:
    return LAYOUT.encoded(VALUES, CHOSEN, PROBE)


def test_what_travels_says_all_by_itself(tmp_path: Path) -> None:
    """Rows by place, ids into the texts that occur (long ones cut), read as they were sent."""
    write_weights(tmp_path / "good.safetensors", sent())
    said = LAYOUT.read("eve", Tensors(tmp_path / "good.safetensors"))
    assert said.starts.tolist() == [0, 3, 7, 12]
    assert torch.equal(said.logits, VALUES[[2, 3, 0, 1]])
    named = [[said.texts[i] for i in row] for row in said.ids.tolist()]
    assert named == [[b"the", b"s"], [b" cat", b" sees"], [b" sees", b"x" * LONGEST], [END, b"the"]]
    torch.testing.assert_close(said.shares(2.0), (VALUES[[2, 3, 0, 1]].double() / 2).softmax(1))
    assert {name: tensor.dtype for name, tensor in sent().items()} == {
        LOGITS: torch.bfloat16,
        IDS: torch.int16,
        STARTS: torch.int32,
        LENGTHS: torch.uint8,
        TEXTS: torch.uint8,
    }


def test_of_tokens_at_one_place_the_first_is_told() -> None:
    """Where a tokenizer does not tell the bytes of a character apart."""
    spans = torch.tensor([[[7, 12], [12, 13]], [[0, 3], [0, 3]]])
    found = LAYOUT.encoded(VALUES, CHOSEN, ProbeText(TEXT, PROBE.texts, PROBE.tokens, spans))
    assert found[STARTS].tolist() == [0, 7, 12]
    assert torch.equal(found[LOGITS].float(), VALUES[[2, 0, 1]])


def test_the_schema_is_that_of_every_tokenizer() -> None:
    """It depends on `keep` alone, and the largest snapshot of any on the text; a bound for bytes of many kept ones."""
    other = TokenLayout(len(TEXT), 900, 50_000, keep=2)
    assert LAYOUT.schema == other.schema != TokenLayout(len(TEXT), 4, 6, keep=3).schema
    most = encoded_bytes(LAYOUT.largest(), "fp32")
    assert most == encoded_bytes(other.largest(), "fp32")
    rows = len(TEXT)
    whole = {
        LOGITS: torch.zeros(rows, 2, dtype=torch.bfloat16),
        IDS: torch.zeros(rows, 2, dtype=torch.int32),
        STARTS: torch.zeros(rows, dtype=torch.int32),
        LENGTHS: torch.zeros(2 * rows, dtype=torch.uint8),
        TEXTS: torch.zeros(2 * rows * LONGEST, dtype=torch.uint8),
    }
    assert encoded_bytes(whole, "fp32") <= most
    assert encoded_bytes(sent(), "fp32") <= most


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: {**found, name: change(found[name])}


def _put(place: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[place] = value
        return changed

    return put


MANY = torch.zeros(14, 2)
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nan": (_changed(LOGITS, _put((1, 1), float("nan"))), f"{LOGITS}' holds 1 values that are not finite"),
    "type": (_changed(LOGITS, Tensor.float), rf"{LOGITS}' is float32\[4, 2\]"),
    "more rows than bytes": (
        lambda found: {**found, LOGITS: MANY.bfloat16(), IDS: MANY.to(torch.int16)},
        rf"{LOGITS}' is bfloat16\[14, 2\], which does not fit 13 bytes",
    ),
    "more kept": (_changed(LOGITS, lambda t: t.repeat(1, 2)), rf"{LOGITS}' is bfloat16\[4, 4\]"),
    "other ids": (_changed(IDS, lambda t: t[:3].contiguous()), rf"{IDS}' is int16\[3, 2\]"),
    "wide ids": (_changed(IDS, Tensor.long), rf"{IDS}' is int64\[4, 2\]"),
    "other starts": (_changed(STARTS, lambda t: t[:3].contiguous()), rf"{STARTS}' is int32\[3\]"),
    "start beyond": (_changed(STARTS, _put((3,), 13)), f"{STARTS}' must rise"),
    "start before": (_changed(STARTS, _put((0,), -1)), f"{STARTS}' must rise"),
    "starts fall": (_changed(STARTS, _put((1,), 9)), f"{STARTS}' must rise"),
    "start twice": (_changed(STARTS, _put((1,), 7)), f"{STARTS}' must rise"),
    "id above": (_changed(IDS, _put((2, 0), 6)), f"{IDS}' names texts from 0 to 6, it has 6"),
    "id below": (_changed(IDS, _put((2, 0), -1)), f"{IDS}' names texts from -1"),
    "id twice": (_changed(IDS, lambda t: t.fill_(2)), f"{IDS}' names a text twice"),
    "empty text": (_changed(LENGTHS, _put((0,), 0)), f"{LENGTHS}' must be lengths"),
    "long text": (_changed(LENGTHS, _put((0,), 200)), f"{LENGTHS}' must be lengths"),
    "texts cut": (_changed(TEXTS, lambda t: t[:-1].contiguous()), f"{LENGTHS}' must be lengths"),
    "many texts": (_changed(LENGTHS, lambda t: torch.ones(9, dtype=torch.uint8)), rf"{LENGTHS}' is uint8\[9\]"),
    "much text": (_changed(TEXTS, lambda t: torch.zeros(999, dtype=torch.uint8)), rf"{TEXTS}' is uint8\[999\]"),
    "no starts": (lambda found: {k: t for k, t in found.items() if k != STARTS}, f"{STARTS}' is missing"),
    "weights": (lambda found: {**found, "fc.weight": torch.zeros(3)}, "'fc.weight' is none of the logits"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_snapshots_are_refused(tmp_path: Path, fault: str) -> None:
    """One line that names peer and tensor."""
    change, says = BAD[fault]
    write_weights(tmp_path / "bad.safetensors", change(sent()))
    with pytest.raises(PeerError, match=says) as error:
        LAYOUT.read("eve", Tensors(tmp_path / "bad.safetensors"))
    assert str(error.value).startswith("eve: ")
    assert "\n" not in str(error.value)


def test_nothing_is_read_before_all_shapes_fit(tmp_path: Path) -> None:
    """A last tensor that is too large, behind four good ones."""

    class Unread(Tensors):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was read before all shapes were checked")

    write_weights(tmp_path / "bad.safetensors", BAD["much text"][0](sent()))
    with pytest.raises(PeerError, match=TEXTS):
        LAYOUT.read("eve", Unread(tmp_path / "bad.safetensors"))
