"""The text that tokens stand for, by which models of other tokenizers can be compared.

Documents are one stream of bytes: UTF-8, with `END` after each. Whatever the tokenizer, a place in it means the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

END = b"\xff"
"""The end of a document in the stream, and the text of the token that stands for it: no byte of UTF-8."""


@dataclass(frozen=True, eq=False)
class ProbeText:
    """The text of a probe set of T-token blocks, and where in it the P = T − 1 tokens are that a model predicts.

    `text`: the stream; `texts`: of all tokens by id, b"" where there is none (padding, unknown); `tokens`: the ids
    that stand there, (examples, P) int64; `spans`: where each begins and ends, (examples, P, 2) int64, in bytes.
    """

    text: bytes
    texts: Sequence[bytes]
    tokens: Tensor
    spans: Tensor

    @property
    def hash(self) -> str:
        """A short hash of the text, the same for every tokenizer."""
        return blake3(self.text).hexdigest(length=8)

    @property
    def known(self) -> Tensor:
        """Which tokens have a text, (tokens,) bool."""
        return torch.tensor([bool(text) for text in self.texts])


def text_of_blocks(ids: Tensor, texts: Sequence[bytes]) -> ProbeText:
    """Return the text of blocks (N, T) that were drawn from a longer one: what their tokens stand for, one after the
    other. Only agents with the same tokenizer get the same."""
    lengths = torch.tensor([len(text) for text in texts])[ids.long()]
    ends = lengths.flatten().cumsum(0).reshape(ids.shape)
    spans = torch.stack([ends - lengths, ends], 2)
    text = b"".join(texts[i] for i in ids.flatten().tolist())
    return ProbeText(text, texts, ids[:, 1:].long(), spans[:, 1:])


def spans_of(document: str, ids: Sequence[int], texts: Sequence[bytes], offsets: Iterable[Sequence[int]]) -> Tensor:
    """Return where a document's tokens begin and end, (tokens, 2) int64 in bytes.

    Where their texts make up the document they say it, to the byte; else the tokenizer's `offsets`, in characters, do.
    """
    whole = document.encode("utf-8")
    found = [texts[i] for i in ids]
    if b"".join(found) == whole:
        ends = np.cumsum([len(text) for text in found], dtype=np.int64)
        return torch.from_numpy(np.stack([np.concatenate([[0], ends[:-1]]), ends], 1))
    places = np.array(list(offsets), dtype=np.int64).reshape(-1, 2)
    if len(whole) != len(document):
        sizes = np.array([len(character.encode("utf-8")) for character in document], dtype=np.int64)
        places = np.concatenate([[0], np.cumsum(sizes)])[places]
    return torch.from_numpy(places)
