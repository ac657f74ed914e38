"""Causal language modelling with a model of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import ConfigError, DataError
from dimat.registry import OptionNames
from dimat.tasks.base import Data, Split
from dimat.tasks.data import Subset
from dimat.tasks.huggingface.base import MadeByMaker, ModelMaker
from dimat.tasks.huggingface.models import architecture, fits_kind
from dimat.tasks.huggingface.options import MODEL, NAMES, DataOptions, ModelOptions, ProbeOptions, moved_keys
from dimat.tasks.huggingface.sources import check_labelled, column_of, first_rows, open_probe, open_splits
from dimat.tasks.huggingface.token_texts import text_of_rows, texts_of
from dimat.tasks.huggingface.tokens import BYTES, Tokens, pack, tokenizer_of
from dimat.tasks.registry import TASKS
from dimat.tasks.token_text import ProbeText, text_of_blocks

TEXT_COLUMNS = ("text", "content", "document")
LARGEST_PERPLEXITY_LOG = 80.0


class TextData(DataOptions):
    """Documents: a text file (with empty lines between them), Parquet, JSON Lines or CSV, a folder of such files, or a
    name on the hub. `train_samples` and `test_samples` count documents.

    Documents of `text_column` are tokenised once, each followed by the tokenizer's end token, and packed into blocks of
    `max_length` tokens; the last tokens are dropped if they do not fill a block. A block is an example. `label_column`:
    documents are packed separately for each of its values, which are classes for `task.partition`. `tokenizer`: a
    folder or a name, by default that of the model; "bytes" is the 256 bytes of UTF-8 and an end token.
    """

    text_column: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 256
    tokenizer: str | None = None


class TextProbe(ProbeOptions):
    """A probe set of blocks of tokens, 16 by default."""

    count: Annotated[int, Field(ge=2)] = 16


PROBE = TextProbe()


@dataclass(frozen=True)
class HfCausalLM(MadeByMaker):
    """Next-token prediction on blocks of tokens, (B, T) int64, which are both inputs and targets.

    Metrics are of a block's T − 1 predictions: "token_accuracy" and "nll" in nats per token; over a set, "perplexity" =
    exp(nll). `metric`: the one that counts. `classes`: values of the label column, empty without one. `read_probe`:
    reads the probe set's text.
    """

    name: str
    maker: ModelMaker
    train: Data
    test: Data
    probe: Data
    read_probe: Callable[[], ProbeText]
    classes: tuple[str, ...] = ()
    metric: str = "token_accuracy"
    agreement: Mapping[str, str] = field(default_factory=dict[str, str])

    def build_model(self, generator: torch.Generator) -> nn.Module:
        return self.maker.build(generator)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.train.batch(torch.arange(min(2, len(self.train)))).inputs

    def data(self, split: Split) -> Data:
        return {"train": self.train, "test": self.test, "probe": self.probe}[split]

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        logits, following = outputs.logits[:, :-1], targets[:, 1:]
        nll = F.cross_entropy(logits.float().transpose(1, 2), following, reduction="none").mean(1)
        return {"token_accuracy": (logits.argmax(-1) == following).float().mean(1), "nll": nll}

    def token_logits(self, outputs: Any) -> Tensor:
        return outputs.logits[:, :-1]

    @cached_property
    def probe_text(self) -> ProbeText:
        """The probe set's text. Of a probe text of its own that is taken whole it is the same for every tokenizer."""
        return self.read_probe()

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return {"perplexity": math.exp(min(means["nll"], LARGEST_PERPLEXITY_LOG))}


@TASKS.register("hf-causal-lm", moved=moved_keys(TextData))
def hf_causal_lm(
    *,
    data: TextData,
    model: ModelOptions = MODEL,
    probe: TextProbe = PROBE,
    metric: Literal["token_accuracy", "perplexity"] = "token_accuracy",
    seed: Annotated[int, Field(ge=0)] = 0,
    folder: Path = Path(),
    option_names: OptionNames = NAMES,
) -> HfCausalLM:
    """Causal language modelling with a model and text from Hugging Face's libraries (extra `hf`), or from disk.

    data: { name, … }, see `TextData`. model: { name, … } or { config, … }, see `ModelOptions`; with `lora` agents
    exchange adapters. probe: `count` blocks of the training text, or blocks of the text { name, … }, in which case all
    training text is used for training. **Agents that compare networks on it must give the same text, probe, tokenizer,
    max_length and seed**; those that exchange logits may have other tokenizers and lengths if it is a text { name, … }
    with a `count` that takes all of its blocks. metric: the one that counts, in reports, for targets and to accept
    merges; a perplexity is better if it is lower. seed: of the draws from the data, and of a frozen base without
    pretrained weights.
    """
    train, held = open_splits(data, option_names, seed=seed, folder=folder)
    length, label = data.max_length, data.label_column
    columns, lengths = option_names("data.text_column"), option_names("data.max_length")
    column = column_of(train, data.text_column, TEXT_COLUMNS, columns)
    column_of(held, column, (), columns)
    classes: tuple[str, ...] = ()
    if label is not None:
        for rows, kind in ((train, "training text"), (held, "test text")):
            column_of(rows, label, (), labels := option_names("data.label_column"))
            check_labelled(rows, label, f"{kind} of {data.name}", labels)
        classes = tuple(sorted({*map(str, train.unique(label)), *map(str, held.unique(label))}))
    tokens = tokenizer_of(data.tokenizer, model, option_names, folder)
    changes: dict[str, Any] = {"use_cache": False}
    if isinstance(model.config, Mapping):
        # the end of text is the tokenizer's, and the vocabulary as large as it must be
        own = {"vocab_size": tokens.size, "bos_token_id": tokens.end, "eos_token_id": tokens.end}
        changes |= {key: value for key, value in own.items() if key not in model.config}
    built = architecture("AutoModelForCausalLM", model, option_names, folder, changes)
    fits_kind(built)
    _check_sizes(built.config, tokens, length, lengths)
    parts = [
        pack(first_rows(rows, most, seed), column, label, classes, tokens, length, f"{kind} of {data.name}", lengths)
        for rows, most, kind in (
            (train, data.train_samples, "training text"),
            (held, data.test_samples, "test text"),
        )
    ]
    blocks, public = parts[0], parts[0]
    aside = probe.count
    text_rows: Any = None
    if probe.name is not None:
        text_rows = open_probe(probe.name, probe, option_names, folder)
        column_of(text_rows, column, (), columns)
        public = pack(text_rows, column, None, (), tokens, length, f"probe text of {probe.name}", lengths)
        aside = 0
    if len(blocks) < aside + 2:
        raise DataError(
            f"the training text of {data.name} fills {len(blocks)} blocks of {length} tokens, too few for a probe set "
            f"of {aside} and training; lower task.options.{lengths} or task.options.{option_names('probe.count')}"
        )
    if len(public) < 2:
        raise DataError(f"the probe text of {probe.name} fills one block of {length} tokens; two are needed")
    order, drawn = (torch.from_numpy(np.random.default_rng(seed).permutation(len(part))) for part in (blocks, public))
    chosen = drawn[: probe.count]

    def read_probe() -> ProbeText:
        if text_rows is None or len(chosen) < len(public):  # another tokenizer's blocks are of other places
            return text_of_blocks(public.ids[chosen], texts_of(tokens))
        return text_of_rows(text_rows, column, tokens, length, chosen, option_names("data.tokenizer"))

    return HfCausalLM(
        name="hf-causal-lm",
        maker=ModelMaker(built, model, option_names, seed),
        train=Subset(blocks, order[aside:].sort().values),
        test=parts[1],
        probe=Subset(public, chosen),
        read_probe=read_probe,
        classes=classes,
        metric=metric,
        agreement={"tokenizer": tokens.identity},
    )


def _check_sizes(config: Any, tokens: Tokens, max_length: int, option: str) -> None:
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and tokens.size > size:
        kind = f'"{BYTES}"' if tokens.bytes else "the tokenizer"
        raise ConfigError(f"{kind} has {tokens.size} tokens, the model a vocabulary of {size}; take the model's own")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and max_length > longest:
        raise ConfigError(f"task.options.{option} is {max_length}; the model takes {longest} tokens at most")
