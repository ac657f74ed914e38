"""Logits of language models in a snapshot: their layout, and the check of a peer's.

A snapshot says by itself what it is about, so that nobody needs to know a peer's tokenizer:

- `aux.token_logits`, bf16 (rows, kept): the largest logits of each prediction, falling;
- `aux.token_ids`, int16 or int32 (rows, kept): which texts they are of;
- `aux.token_starts`, int32 (rows,): where in the probe text the predicted token begins, in bytes, strictly rising;
- `aux.token_lengths`, uint8 (texts,), and `aux.token_texts`, uint8 (bytes,): the texts, one after the other.

Neither the number of rows nor that of texts is part of the schema, as they depend on the tokenizer; both are bounded by
the probe text, which is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.errors import PeerError, nearest
from dimat.merge.shared_statistics import AUX
from dimat.tasks.token_text import ProbeText
from dimat.weights.tensors import Tensors, schema_hash

LOGITS, IDS, STARTS = AUX + "token_logits", AUX + "token_ids", AUX + "token_starts"
LENGTHS, TEXTS = AUX + "token_lengths", AUX + "token_texts"
"""Names of a snapshot's tensors."""
KEPT = 16
"""Logits of a prediction that travel, where nothing else is said: of a vocabulary, hardly any have a share."""
LONGEST = 32
"""Bytes of a text that travel; of a longer one its beginning, of which own tokens are hardly longer."""
MOST_TEXTS = 2**18
"""Texts that a snapshot may have."""
TYPES = {
    LOGITS: (torch.bfloat16,),
    IDS: (torch.int16, torch.int32),
    STARTS: (torch.int32,),
    LENGTHS: (torch.uint8,),
    TEXTS: (torch.uint8,),
}


@dataclass(frozen=True, slots=True)
class TokenSaid:
    """What a language model says of the probe text. `logits`, `ids`: (rows, kept), by falling logit; `starts`: (rows,)
    where the predicted token begins; `texts`: what the ids stand for."""

    logits: Tensor
    ids: Tensor
    starts: Tensor
    texts: tuple[bytes, ...]

    def shares(self, temperature: float) -> Tensor:
        """Return softmax(z / T) of the logits that are kept, (rows, kept) in float64."""
        return (self.logits.double() / temperature).softmax(1)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The layout of what an agent says of the probe text. `bytes`: of that text; `rows`: own predictions; `tokens`: own
    tokens that have a text; `keep`: the most logits of a prediction that travel."""

    bytes: int
    rows: int
    tokens: int
    keep: int = KEPT

    @property
    def schema(self) -> str:
        """A hash of names, types and `keep`, which is the same for every tokenizer."""
        return schema_hash(_tensors(0, self.keep, 0, 0, torch.int32))

    def sample(self) -> dict[str, Tensor]:
        """Return tensors of about the size of an own snapshot: all tokens occur in it, with a text of usual length."""
        texts = min(self.tokens, self.rows * self.keep, MOST_TEXTS)
        return _tensors(self.rows, min(self.keep, self.tokens), texts, 8 * texts, torch.int32)

    def largest(self) -> dict[str, Tensor]:
        """Return tensors of the size of the largest snapshot that any agent may send; they take no memory."""
        texts = min(self.bytes * self.keep, MOST_TEXTS)
        return _tensors(self.bytes, self.keep, texts, LONGEST * texts, torch.int32)

    def encoded(self, logits: Tensor, ids: Tensor, probe: ProbeText) -> dict[str, Tensor]:
        """Return the largest logits (rows, kept), and the ids of their tokens, as the tensors of a snapshot.

        Rows are in the order of `probe.tokens`. Of several that begin at one place the first is told (tokens of parts
        of a character); and where there are more texts than may travel, none with one of the rarest.
        """
        places = probe.spans[..., 0].flatten()
        order = places.sort(stable=True).indices
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = places[order].diff() > 0
        order = order[first]
        logits, ids, starts = logits[order], ids[order], places[order]
        used, count = ids.unique(return_counts=True)
        if len(used) > MOST_TEXTS:
            used = used[count.argsort(descending=True, stable=True)[:MOST_TEXTS]].sort().values
            told = torch.isin(ids, used).all(1)
            logits, ids, starts = logits[told], ids[told], starts[told]
        texts = [probe.texts[i][:LONGEST] for i in used.tolist()]
        blob = bytearray(b"".join(texts))
        return {
            LOGITS: logits.bfloat16(),
            IDS: torch.searchsorted(used, ids).to(torch.int16 if len(used) <= 2**15 else torch.int32),
            STARTS: starts.int(),
            LENGTHS: torch.tensor([len(text) for text in texts], dtype=torch.uint8),
            TEXTS: torch.frombuffer(blob, dtype=torch.uint8) if blob else torch.zeros(0, dtype=torch.uint8),
        }

    def read(self, peer: str, snapshot: Tensors) -> TokenSaid:
        """Return what a peer's snapshot says, checked: names, types and shapes before any is read, then values.

        PeerError, naming the peer and the tensor, for more rows than the probe text has bytes, logits than are kept or
        texts than may be; for starts that do not rise or lie outside of the text; for a logit that is not finite, and
        for ids of no text, or that come twice in a row.
        """
        _check_form(peer, snapshot, self)
        return self.decoded({name: snapshot[name] for name in TYPES}, peer)

    def decoded(self, found: Mapping[str, Tensor], peer: str = "own") -> TokenSaid:
        """Return what tensors of fitting names, types and shapes say; PeerError as in `read`."""
        if bad := int((~found[LOGITS].isfinite()).sum()):
            raise PeerError(f"{peer}: tensor {LOGITS!r} holds {bad} values that are not finite")
        starts = found[STARTS].long()
        if int(starts[0]) < 0 or int(starts[-1]) >= self.bytes or bool((starts.diff() <= 0).any()):
            raise PeerError(
                f"{peer}: tensor {STARTS!r} must rise from 0 or more to less than the {self.bytes} bytes of the probe "
                "text"
            )
        lengths, blob = found[LENGTHS].long(), found[TEXTS]
        if int(lengths.min()) < 1 or int(lengths.max()) > LONGEST or int(lengths.sum()) != len(blob):
            raise PeerError(
                f"{peer}: tensor {LENGTHS!r} must be lengths from 1 to {LONGEST} that add up to the {len(blob)} bytes "
                f"of {TEXTS!r}"
            )
        ids = found[IDS].long()
        if int(ids.min()) < 0 or int(ids.max()) >= len(lengths):
            raise PeerError(
                f"{peer}: tensor {IDS!r} names texts from {int(ids.min())} to {int(ids.max())}, it has {len(lengths)}"
            )
        if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
            raise PeerError(f"{peer}: tensor {IDS!r} names a text twice for one prediction")
        data, ends = bytes(blob.numpy()), lengths.cumsum(0).tolist()
        texts = tuple(data[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True))
        return TokenSaid(found[LOGITS].float(), ids, starts, texts)


def _check_form(peer: str, snapshot: Tensors, layout: TokenLayout) -> None:
    """Check names, types and shapes; nothing is read."""
    for name in TYPES:
        if name not in snapshot:
            raise PeerError(f"{peer}: tensor {name!r} is missing{nearest(name, snapshot)}; it has no such logits")
    for name in snapshot:
        if name not in TYPES:
            raise PeerError(f"{peer}: tensor {name!r} is none of the logits that agents exchange here")
    shapes = {name: tuple(snapshot.info(name).shape) for name in TYPES}
    rows, kept = shapes[LOGITS] if len(shapes[LOGITS]) == 2 else (0, 0)
    texts, size = (shapes[name][0] if len(shapes[name]) == 1 else 0 for name in (LENGTHS, TEXTS))
    fits = {
        LOGITS: 1 <= rows <= layout.bytes and 1 <= kept <= layout.keep,
        IDS: shapes[IDS] == shapes[LOGITS],
        STARTS: shapes[STARTS] == (rows,),
        LENGTHS: 1 <= texts <= min(rows * kept, MOST_TEXTS),
        TEXTS: 1 <= size <= LONGEST * texts,
    }
    for name, types in TYPES.items():
        dtype = snapshot.info(name).dtype
        if dtype not in types or not fits[name]:
            shown = str(dtype).removeprefix("torch.")
            raise PeerError(
                f"{peer}: tensor {name!r} is {shown}{list(shapes[name])}, which does not fit {layout.bytes} bytes of "
                f"probe text and {layout.keep} logits of each prediction; agents need one probe text and the same keep"
            )


def _tensors(rows: int, kept: int, texts: int, size: int, ids: torch.dtype) -> dict[str, Tensor]:
    shapes = {LOGITS: (rows, kept), IDS: (rows, kept), STARTS: (rows,), LENGTHS: (texts,), TEXTS: (size,)}
    types = {name: each[0] for name, each in TYPES.items()} | {IDS: ids}
    return {name: torch.zeros((), dtype=types[name]).expand(shape) for name, shape in shapes.items()}
