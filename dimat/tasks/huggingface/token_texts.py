"""Texts of a tokenizer's tokens as bytes, and a probe text with the places of its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from dimat.errors import ConfigError
from dimat.tasks.huggingface.tokens import DOCUMENTS, Tokens
from dimat.tasks.token_text import END, ProbeText, spans_of

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How tokenizers with byte fallback write the token of one byte."""


def texts_of(tokens: Tokens) -> tuple[bytes, ...]:
    """Return the text of each token by id, as it stands within a text; b"" where there is none.

    How a token is written (GPT-2's letters for bytes, "▁" for a space, "##" within a word, "</w>" at its end) is
    known from the tokenizer's decoder. Special tokens have no text, but the one that ends a document has `END`.
    """
    texts = [b""] * tokens.size
    if tokens.bytes:
        texts[:255] = [bytes([value]) for value in range(255)]  # 0xFF is in no UTF-8, and here it is the end
    else:
        kinds = set(_decoders(tokens.tokenizer))
        special = set(tokens.tokenizer.all_special_ids)
        added = {int(i): str(token) for i, token in tokens.tokenizer.added_tokens_decoder.items()}
        for token, i in cast("dict[str, int]", tokens.tokenizer.get_vocab()).items():
            if i not in special:
                text = added[i].encode() if i in added else _text(token, kinds)
                texts[i] = b"" if text == END else text
    if tokens.end is not None:
        texts[tokens.end] = END
    return tuple(texts)


def text_of_rows(rows: Any, column: str, tokens: Tokens, length: int, chosen: Tensor, option: str) -> ProbeText:
    """Return the text of all documents, and where the tokens of their blocks of `length` at `chosen` stand in it.

    The documents are tokenised and packed as `pack` does without labels. ConfigError, naming the tokenizer's `option`,
    where a tokenizer cannot say where its tokens stand.
    """
    texts = texts_of(tokens)
    stream, at = [b""], 0
    ids: list[Tensor] = []
    spans: list[Tensor] = []
    for start in range(0, len(rows), DOCUMENTS):
        documents: list[str] = rows[start : start + DOCUMENTS][column]
        encoded = tokens.encode(documents)
        for document, found, offsets in zip(documents, encoded, _offsets(tokens, documents, option), strict=True):
            whole = document.encode("utf-8")
            if found:
                here, places = [*found], spans_of(document, found, texts, offsets) + at
                if tokens.end is not None:
                    here.append(tokens.end)
                    places = torch.cat([places, torch.tensor([[at + len(whole), at + len(whole) + 1]])])
                ids.append(torch.tensor(here))
                spans.append(places)
            stream.append(whole + END)
            at += len(whole) + 1
    joined, places = torch.cat(ids), torch.cat(spans)
    blocks = len(joined) // length
    joined = joined[: blocks * length].reshape(blocks, length)[chosen]
    places = places[: blocks * length].reshape(blocks, length, 2)[chosen]
    return ProbeText(b"".join(stream), texts, joined[:, 1:], places[:, 1:])


def _offsets(tokens: Tokens, documents: list[str], option: str) -> list[list[tuple[int, int]]]:
    """Return where each document's tokens begin and end, in characters; nothing of plain bytes, which say it."""
    if tokens.bytes:
        return [[] for _ in documents]
    if not tokens.tokenizer.is_fast:
        raise ConfigError(
            f"task.options.{option}: this tokenizer ({type(tokens.tokenizer).__name__}) does not say where in a text "
            "its tokens are, which exchanging logits takes; give one with a tokenizer.json"
        )
    return tokens.tokenizer(
        documents,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]


def _decoders(tokenizer: Any) -> Iterator[str]:
    """Yield the types of a fast tokenizer's decoders; nothing where it has none."""
    if not getattr(tokenizer, "is_fast", False):
        return
    waiting: list[Any] = [json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]]
    while waiting:
        decoder = waiting.pop()
        if isinstance(decoder, dict):
            tree = cast("dict[str, Any]", decoder)
            yield str(tree.get("type"))
            waiting += tree.get("decoders", [])


def _text(token: str, decoders: set[str]) -> bytes:
    if "ByteLevel" in decoders:
        return b"".join(_LETTERS.get(letter, letter.encode()) for letter in token)
    if "WordPiece" in decoders:
        return token.removeprefix("##").encode()
    if "BPEDecoder" in decoders:
        return token.replace("</w>", "").encode()
    if (byte := BYTE.fullmatch(token)) and "ByteFallback" in decoders:
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def _letters() -> dict[str, bytes]:
    """Return the letters that stand for bytes in vocabularies of GPT-2's kind: printable ones for themselves, the
    others for those from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in plain]
    return {chr(v): bytes([v]) for v in plain} | {chr(256 + i): bytes([v]) for i, v in enumerate(others)}


_LETTERS = _letters()
