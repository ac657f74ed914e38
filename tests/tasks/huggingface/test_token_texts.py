"""Tokens as texts, and their places in the probe text. Reference: the documents' own bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dimat.config import TaskConfig
from dimat.tasks import load_task
from dimat.tasks.huggingface.library import library
from dimat.tasks.token_text import END, ProbeText
from tests.tasks.huggingface.samples import GPT2, sentences, write_byte_pairs, write_text, write_tokenizer

ODD = "Été à Zürich: 3 € – and 🦊 too. The end"
PUBLIC = [*sentences(12, seed=2), ODD, "the red cat"]


def write_pieces(folder: Path, texts: list[str]) -> None:
    """Save a tokenizer as SentencePiece's: spaces as "▁", also before the first word, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    fast = library("transformers").PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_word_pieces(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.decoder = normalizers.Lowercase(), decoders.WordPiece()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[SEP]"]))
    fast = library("transformers").PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[SEP]")
    fast.save_pretrained(folder)


def probe_text(folder: Path, tokenizer: str, length: int = 16, **probe: Any) -> ProbeText:
    options = {
        "data": {"name": "text.txt", "tokenizer": tokenizer, "max_length": length},
        "model": {"config": GPT2},
        "probe": {"name": "public.txt", "count": 10_000, **probe},
    }
    task: Any = load_task(TaskConfig(name="hf-causal-lm", options=options), folder)
    found: ProbeText = task.probe_text
    assert torch.equal(found.tokens, task.data("probe").batch(torch.arange(len(task.data("probe")))).targets[:, 1:])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = write_text(tmp_path / "text.txt")
    (tmp_path / "public.txt").write_text("\n\n".join(PUBLIC), encoding="utf-8")
    write_tokenizer(tmp_path / "words", texts)
    write_byte_pairs(tmp_path / "pairs", texts)
    write_pieces(tmp_path / "pieces", texts)
    write_word_pieces(tmp_path / "word-pieces", texts)
    return tmp_path


def test_a_text_is_the_same_for_every_tokenizer(folder: Path) -> None:
    """The documents' bytes, an end after each; where a token stands is its text, as far as the tokenizer keeps that."""
    stream = b"".join(text.encode() + END for text in PUBLIC)
    kinds = ("bytes", "words", "pairs", "pieces", "word-pieces")
    found = {kind: probe_text(folder, kind) for kind in kinds}
    assert {text.text for text in found.values()} == {stream}
    assert len({text.hash for text in found.values()}) == 1
    for kind, each in found.items():
        spans = each.spans.flatten(0, 1).tolist()
        stands = [stream[a:b] for a, b in spans]
        said = [each.texts[i] for i in each.tokens.flatten().tolist()]
        fits: dict[str, Callable[[bytes, bytes], bool]] = {
            "bytes": lambda a, b: a == b,
            "pairs": lambda a, b: a == b,
            "words": lambda a, b: b in (a, b""),  # unknown ones have no text
            "word-pieces": lambda a, b: b in (a.lower(), b""),
            "pieces": lambda a, b: b.strip() == a.strip() or b.startswith(b"<0x") or len(b) == 1,
        }
        assert all(fits[kind](a, b) for a, b in zip(stands, said, strict=True)), kind
        assert sum(bool(text) for text in said) > 0.8 * len(said)
        assert END in said
        starts = sorted(a for a, _ in spans)
        assert starts[0] >= 0
        assert all(a < b for a, b in spans)


def test_byte_tokens_of_a_character_stand_at_their_bytes(folder: Path) -> None:
    """ "é" is two tokens of a byte-level tokenizer, each of which begins at a byte of its own."""
    found = probe_text(folder, "pairs", length=2)
    starts = set(found.spans[..., 0].flatten().tolist())
    fast = library("transformers").AutoTokenizer.from_pretrained(folder / "pairs")
    at = len(b"".join(text.encode() + END for text in PUBLIC[:12]))
    places, place = set[int](), at
    for token in fast(ODD)["input_ids"]:
        places.add(place)
        place += len(found.texts[token])
    assert place == at + len(ODD.encode())
    assert len(starts & places) > 0.4 * len(places)  # of every second token, as blocks have two
    assert starts & set(range(at, place)) <= places


def test_drawn_blocks_are_their_own_text(folder: Path) -> None:
    """Fewer blocks than there are, or blocks of the training text: for one tokenizer the same text, else another."""
    few = probe_text(folder, "bytes", count=3)
    assert few.text == b"".join(few.texts[i] for i in _blocks(folder, "bytes", count=3))
    assert few.hash == probe_text(folder, "bytes", count=3).hash != probe_text(folder, "pairs", count=3).hash
    assert probe_text(folder, "pairs", name=None, count=4).hash != probe_text(folder, "bytes", name=None, count=4).hash


def _blocks(folder: Path, tokenizer: str, **probe: Any) -> list[int]:
    options = {
        "data": {"name": "text.txt", "tokenizer": tokenizer, "max_length": 16},
        "model": {"config": GPT2},
        "probe": {"name": "public.txt", **probe},
    }
    data = load_task(TaskConfig(name="hf-causal-lm", options=options), folder).data("probe")
    return data.batch(torch.arange(len(data))).inputs[0].flatten().tolist()
