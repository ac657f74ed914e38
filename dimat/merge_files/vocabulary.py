"""Tokens behind the rows of embeddings: read, compared, and brought into one order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dimat.errors import ConfigError, DataError
from dimat.merge_files.files import ModelFiles, hash_of
from dimat.reading import read_table, read_text
from dimat.tasks.huggingface.tokens import mapping_hash, same_id

BY_TOKEN = re.compile(r"(?:.*[._])?(?:embed\w*|wte|shared|lm_head|output|predictions|decoder)(?:\..*)?")
"""Names of tensors that may have a row for each token."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a model: the id of each token, or nothing if the file cannot be parsed; and a hash."""

    model: ModelFiles
    ids: Mapping[str, int]
    hash: str


def read_vocabulary(model: ModelFiles) -> Vocabulary | None:
    """Return the vocabulary in a model's folder; None if there is none. DataError if its file is damaged."""
    folder = model.folder
    if folder is None:
        return None
    ids = _ids_in(folder)
    if ids:
        return Vocabulary(model, ids, mapping_hash(ids))
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            return Vocabulary(model, {}, hash_of(folder / name))
    return None


def check_vocabularies(models: Sequence[ModelFiles], reference: ModelFiles | None) -> list[str]:
    """Compare models' vocabularies with that of `reference`, whose tokenizer is written; return differences that may be
    intended.

    Raises DataError if a token has another id, so that rows of different tokens would be merged.
    """
    notes = _splitting(models, reference) + _shared_ids(models)
    for first, other in _different(models, reference):
        moved, (more, less) = _moved(first, other), _apart(first, other)
        taken = set(first.ids.values())
        clash = next((token for token in more if other.ids[token] in taken), None)
        if not first.ids or not other.ids:
            raise DataError(
                f"the tokenizers of {first.model.path} and {other.model.path} differ, and their files do not list "
                "the tokens' rows; give both models one tokenizer"
            )
        if moved and not more and not less:
            raise DataError(
                f"{other.model.path} has the tokens of {first.model.path} in another order: "
                f"{_where(first, other, moved[0])}; --align-vocabulary brings its rows into one order"
            )
        if moved or clash is not None:
            one = _where(first, other, moved[0] if moved else cast("str", clash))
            raise DataError(
                f"{other.model.path} has other tokens than {first.model.path}: {one}; {len(moved):,} tokens have "
                f"another row, {len(more):,} are only here and {len(less):,} only there; merge models of one vocabulary"
            )
        notes.append(
            f"vocabularies: tokens only in {other.model.path}: {len(more):,}, only in {first.model.path}: "
            f"{len(less):,}; their rows are merged with rows that have no token"
        )
    return notes


def align_vocabularies(models: Sequence[ModelFiles], reference: ModelFiles | None) -> list[ModelFiles]:
    """Return models with the rows of their embeddings in the order of the tokens of `reference`.

    Raises ConfigError if a model has no tokenizer, DataError if the tokens differ.
    """
    for model in models:
        vocabulary = None if model.adapter else read_vocabulary(model)
        if vocabulary is None:
            raise ConfigError(
                f"align_vocabulary (--align-vocabulary): {model.path} is not a model folder with a tokenizer"
            )
        if twins := same_id(vocabulary.ids):
            raise DataError(
                f"the tokenizer of {model.path} gives {twins}: rows cannot be brought into one order by their tokens; "
                "mend its files"
            )
        if odd := [token for token, row in vocabulary.ids.items() if row < 0]:
            raise DataError(f"the tokenizer of {model.path} gives {odd[0]!r} the id {vocabulary.ids[odd[0]]}, no row")
    changed: dict[int, ModelFiles] = {}
    for first, other in _different(models, reference):
        more, less = _apart(first, other)
        if more or less or not first.ids:
            raise DataError(
                f"{other.model.path} and {first.model.path} have {len(more):,} and {len(less):,} tokens "
                f"that the other lacks: rows can be brought into one order only if the tokens are the same"
            )
        changed[id(other.model)] = _permuted(first, other)
    return [changed.get(id(model), model) for model in models]


def _different(models: Sequence[ModelFiles], reference: ModelFiles | None) -> list[tuple[Vocabulary, Vocabulary]]:
    first = None if reference is None else read_vocabulary(reference)
    if first is None:
        return []
    others = [read_vocabulary(model) for model in models if model is not reference]
    return [(first, other) for other in others if other is not None and other.hash != first.hash]


def _permuted(first: Vocabulary, other: Vocabulary) -> ModelFiles:
    """Return the other model with its rows in the first one's order; rows without a token stay in place."""
    model = other.model
    rows: dict[str, Tensor] = {}
    size = _rows_of(model, max(other.ids.values()) + 1)
    order = torch.arange(size)
    taken = set(first.ids.values())
    if taken != set(other.ids.values()):
        raise DataError(f"the tokens of {first.model.path} and {model.path} have other ids: rows have no common order")
    for token, row in first.ids.items():
        order[row] = other.ids[token]
    for name, info in model.infos.items():
        if info.shape and info.shape[0] == size and BY_TOKEN.fullmatch(name):
            rows[name] = order
    if not rows:
        raise DataError(f"{model.path} has no embedding of {size:,} tokens whose rows could be put in order")
    return model.with_rows(rows)


def _rows_of(model: ModelFiles, least: int) -> int:
    """Return the number of rows of a model's embedding: from its config, else the smallest that fits all tokens."""
    said = model.config.get("vocab_size")
    if isinstance(said, int) and said >= least:
        return said
    tables = [info.shape for name, info in model.infos.items() if len(info.shape) == 2 and BY_TOKEN.fullmatch(name)]
    found = [shape[0] for shape in tables if shape[0] >= least]
    if not found:
        raise DataError(f"{model.path} has no embedding with a row for each of its {least:,} tokens")
    return min(found)


def _moved(first: Vocabulary, other: Vocabulary) -> list[str]:
    return sorted((t for t, row in other.ids.items() if first.ids.get(t, row) != row), key=lambda t: first.ids[t])


def _apart(first: Vocabulary, other: Vocabulary) -> tuple[list[str], list[str]]:
    """Return the tokens that only the other has, and those that only the first has."""
    more, less = other.ids.keys() - first.ids.keys(), first.ids.keys() - other.ids.keys()
    return sorted(more, key=lambda t: other.ids[t]), sorted(less, key=lambda t: first.ids[t])


def _where(first: Vocabulary, other: Vocabulary, token: str) -> str:
    if token in first.ids:
        return f"{token!r} is {first.ids[token]} there, {other.ids[token]} here"
    row = other.ids[token]
    mine = next(t for t, k in first.ids.items() if k == row)
    return f"{row} is {mine!r} there, {token!r} here"


def _splitting(models: Sequence[ModelFiles], reference: ModelFiles | None) -> list[str]:
    """Return which models' tokenizers cut a text otherwise than the one that is written, though tokens are the same."""
    first = None if reference is None else _rules_of(reference)
    if reference is None or first is None:
        return []
    notes: list[str] = []
    for model in models:
        other = first if model is reference else _rules_of(model) or first
        if apart := [key for key, value in first.items() if other[key] != value]:
            notes.append(
                f"tokenizers: {model.path} cuts text otherwise than {reference.path}, whose tokenizer is written: "
                f"{', '.join(apart)} of tokenizer.json differ"
            )
    return notes


def _shared_ids(models: Sequence[ModelFiles]) -> list[str]:
    """Return which models' tokenizers give one id to several tokens."""
    found = ((model, read_vocabulary(model)) for model in models)
    return [
        f"tokenizers: {model.path} gives {twins}: the merged row is that of all of them"
        for model, vocabulary in found
        if vocabulary is not None and (twins := same_id(vocabulary.ids))
    ]


def _rules_of(model: ModelFiles) -> dict[str, str] | None:
    """Return the parts of a tokenizer.json by which text is cut, in one form; None where there is none."""
    path = None if model.folder is None else model.folder / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    tree = read_table(path)
    part: Any = tree.get("model")
    table = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    merges: Any = table.get("merges") or []
    pairs = [
        " ".join(map(str, pair)) if isinstance(pair, list) else pair
        for pair in cast("list[Any]", merges if isinstance(merges, list) else [])
    ]
    vocabulary: Any = table.get("vocab")
    scores: Any = vocabulary if isinstance(vocabulary, list) else None  # Unigram's, by which it cuts
    found = {key: tree.get(key) for key in ("normalizer", "pre_tokenizer")} | {"merges": pairs, "scores": scores}
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items()}


def _ids_in(folder: Path) -> dict[str, int]:
    """Return the id of each token, from the files of a tokenizer."""
    ids: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        tree = read_table(folder / "tokenizer.json")
        part: Any = tree.get("model")
        vocabulary: Any = cast("dict[str, Any]", part).get("vocab") if isinstance(part, dict) else None
        if isinstance(vocabulary, dict):
            ids = _whole_numbers(cast("dict[str, Any]", vocabulary))
        elif isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of ids
            pieces = cast("list[Any]", vocabulary)
            ids = {str(piece[0]): i for i, piece in enumerate(pieces) if isinstance(piece, list) and piece}
        added: Any = tree.get("added_tokens") or []
        for token in cast("list[Any]", added) if isinstance(added, list) else []:
            if isinstance(token, dict) and type(cast("dict[str, Any]", token).get("id")) is int:
                ids[str(cast("dict[str, Any]", token).get("content"))] = token["id"]
    elif (folder / "vocab.json").is_file():
        ids = _whole_numbers(read_table(folder / "vocab.json"))
    elif (folder / "vocab.txt").is_file():
        lines = read_text(folder / "vocab.txt").split("\n")
        ids = {line.rstrip("\r"): i for i, line in enumerate(lines) if line}
    # tokenizer.json has the last word on what is in it, and the lists of added tokens on what is in older files
    added_later = _added(folder) if ids else {}
    return added_later | ids if (folder / "tokenizer.json").is_file() else ids | added_later


def _added(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens that files beside a vocabulary add to it."""
    ids: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        decoder: Any = read_table(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for row, token in cast("dict[str, Any]", decoder).items() if isinstance(decoder, dict) else ():
            if isinstance(token, dict) and row.isdecimal():
                ids[str(cast("dict[str, Any]", token).get("content"))] = int(row)
    if (folder / "added_tokens.json").is_file():
        ids |= _whole_numbers(read_table(folder / "added_tokens.json"))
    return ids


def _whole_numbers(table: Mapping[str, Any]) -> dict[str, int]:
    return {token: row for token, row in table.items() if type(row) is int}
