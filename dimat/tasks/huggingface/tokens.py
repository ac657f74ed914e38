"""Text as tokens: a tokenizer of transformers or plain bytes, and blocks of equal length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.registry import OptionNames
from dimat.tasks.base import Batch
from dimat.tasks.huggingface.library import library, local_path, telling
from dimat.tasks.huggingface.options import ModelOptions

BYTES = "bytes"
DOCUMENTS = 1000  # tokenised at a time


@dataclass(frozen=True)
class Tokens:
    """A tokenizer: `size` of its vocabulary, from its highest id; `end`: the id that ends a document, if it has one."""

    size: int
    end: int | None
    tokenizer: Any = None

    @property
    def bytes(self) -> bool:
        """Whether tokens are the bytes of UTF-8."""
        return self.tokenizer is None

    @property
    def identity(self) -> str:
        """A text that agents compare when they connect: the number of tokens, and a hash of the tokens' ids."""
        return BYTES if self.tokenizer is None else vocabulary_of(self.tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        if self.tokenizer is None:
            return [list(text.encode("utf-8")) for text in texts]
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def vocabulary_of(tokenizer: Any) -> str:
    """Return the number of a tokenizer's tokens, and a hash of their ids."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return f"{len(ids):,} tokens, hash {mapping_hash(ids)[:16]}"


def mapping_hash(ids: Mapping[str, int]) -> str:
    """Return a hash of the mapping from tokens to ids."""
    return blake3(json.dumps(sorted(ids.items()), ensure_ascii=True).encode()).hexdigest()


def same_id(ids: Mapping[str, int]) -> str:
    """Return how many tokens share an id with another, and the first two of them; "" if none does."""
    first: dict[int, str] = {}
    shared = [(first[row], token) for token, row in ids.items() if first.setdefault(row, token) != token]
    if not shared:
        return ""
    one, other = shared[0]
    more = f", and {len(shared) - 1:,} more tokens an id that is another's" if len(shared) > 1 else ""
    return f"the id {ids[one]} to two tokens, {_shown(one)} and {_shown(other)}{more}"


def _shown(token: str) -> str:
    return repr(token if len(token) <= 40 else token[:40] + "…")


class Blocks:
    """Blocks of tokens, (N, T) int32, read as int64; inputs and targets are the same. `labels`: (N,) or None."""

    def __init__(self, ids: Tensor, labels: Tensor | None) -> None:
        self.ids = ids
        self._labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        block = self.ids[indices].long()
        return Batch((block,), block)


def tokenizer_of(tokenizer: str | None, model: ModelOptions, names: OptionNames, folder: Path) -> Tokens:
    """Return the tokenizer that the options name: `tokenizer`, or that of the model's folder or name.

    Raises ConfigError, DataError or NetworkError that names the option as the user wrote it (`names`).
    """
    if tokenizer == BYTES:
        return Tokens(257, 256)
    given = {"data.tokenizer": tokenizer, "model.name": model.name, "model.config": model.config}
    key, name = next(((key, value) for key, value in given.items() if isinstance(value, str)), ("", ""))
    if not key:
        option = names("data.tokenizer")
        raise ConfigError(f'task.options.{option}: which one? A folder, a name on the hub, or "bytes"')
    option = names(key)
    path = local_path(name, folder, option)
    if path is not None and path.is_file():
        path = path.parent
    where = name if path is None else str(path)
    auto = library("transformers").AutoTokenizer
    with telling(option, f"the tokenizer of {where}" if path else where, path is not None):
        found = auto.from_pretrained(where, local_files_only=path is not None, trust_remote_code=False)
    ids: dict[str, int] = found.get_vocab()
    if twins := same_id(ids):
        raise DataError(f"the tokenizer of {where} gives {twins}: a model cannot tell them apart; mend its files")
    return Tokens(max(len(found), max(ids.values(), default=-1) + 1), found.eos_token_id, found)


def pack(
    rows: Any,
    column: str,
    label: str | None,
    classes: tuple[str, ...],
    tokens: Tokens,
    length: int,
    what: str,
    option: str,
) -> Blocks:
    """Tokenise documents and cut them, one after the other, into blocks of `length` tokens, separately for each class.
    `option`: the key of `length` as the user wrote it.

    Raises DataError if not even one block is filled, and for rows that are not text.
    """
    streams: list[list[np.ndarray[Any, np.dtype[np.int32]]]] = [[] for _ in range(max(1, len(classes)))]
    place = {name: i for i, name in enumerate(classes)}
    end = [] if tokens.end is None else [tokens.end]
    for start in range(0, len(rows), DOCUMENTS):
        part = rows[start : start + DOCUMENTS]
        texts: list[Any] = part[column]
        for offset, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"column {column!r}, row {start + offset} of the {what} is not text")
        kinds = [0] * len(texts) if label is None else [place[str(value)] for value in part[label]]
        for kind, ids in zip(kinds, tokens.encode(texts), strict=True):
            if ids:
                streams[kind].append(np.array([*ids, *end], dtype=np.int32))
    blocks: list[Tensor] = []
    for stream in streams:
        joined = np.concatenate(stream) if stream else np.empty(0, dtype=np.int32)
        whole = len(joined) // length
        blocks.append(torch.from_numpy(joined[: whole * length].reshape(whole, length).copy()))
    ids = torch.cat(blocks)
    if not len(ids):
        raise DataError(f"the {what} does not fill one block of {length} tokens; lower task.options.{option}")
    labels = torch.cat([torch.full((len(b),), i) for i, b in enumerate(blocks)]) if classes else None
    return Blocks(ids, labels)
