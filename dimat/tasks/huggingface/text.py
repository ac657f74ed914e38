"""Causal language modelling with a model of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import ConfigError, DataError
from dimat.tasks.base import Data, Split
from dimat.tasks.data import Subset
from dimat.tasks.huggingface.base import MadeByMaker, ModelMaker
from dimat.tasks.huggingface.lora import LoraOptions
from dimat.tasks.huggingface.models import architecture, fits_kind
from dimat.tasks.huggingface.sources import column_of, first_rows, open_probe, open_splits
from dimat.tasks.huggingface.tokens import BYTES, Tokens, pack, tokenizer_of
from dimat.tasks.registry import TASKS

Count = Annotated[int, Field(ge=1)]
TEXT_COLUMNS = ("text", "content", "document")
LARGEST_PERPLEXITY_LOG = 80.0


@dataclass(frozen=True)
class HfCausalLM(MadeByMaker):
    """Next-token prediction on blocks of tokens, (B, T) int64, which are inputs and targets alike.

    Metrics are of a block's T − 1 predictions: "token_accuracy" (the one that counts) and "nll" in nats per token;
    over a set, "perplexity" = exp(nll). `classes`: values of the label column, empty without one.
    """

    name: str
    maker: ModelMaker
    train: Data
    test: Data
    probe: Data
    classes: tuple[str, ...] = ()
    metric: str = "token_accuracy"

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

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return {"perplexity": math.exp(min(means["nll"], LARGEST_PERPLEXITY_LOG))}


@TASKS.register("hf-causal-lm")
def hf_causal_lm(
    *,
    data: str,
    model: str | None = None,
    config: str | dict[str, Any] | None = None,
    tokenizer: str | None = None,
    test: str | None = None,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: Annotated[int, Field(ge=2)] = 256,
    train_samples: Count | None = None,
    test_samples: Count | None = None,
    probe: Annotated[int, Field(ge=2)] = 16,
    probe_data: str | None = None,
    probe_subset: str | None = None,
    probe_split: str | None = None,
    lora: LoraOptions | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: Annotated[int, Field(ge=0)] = 0,
    folder: Path = Path(),
) -> HfCausalLM:
    """Causal language modelling with a model and text from Hugging Face's libraries (extra `hf`), or from disk.

    model: a folder of a pretrained model or its name on the hub; weights are read from safetensors only. Or config: a
    folder, a config.json or a table such as { model_type = "gpt2", n_embd = 64, … }, with random weights. tokenizer:
    a folder or name of its own, by default that of the model; "bytes" is the 256 bytes of UTF-8 and an end mark.
    data: a text file (documents with empty lines between them), Parquet, JSON Lines or CSV, a folder of such files,
    or a name on the hub (`subset`: its configuration), with the splits `train_split` and `test_split`; test: test data
    apart from it. Where there are none, `test_share` of the documents become them. Documents of `text_column` are
    tokenised once, each with the tokenizer's end mark after it, and packed into blocks of `max_length` tokens; what
    does not fill one is left out. A block is an example. label_column: documents are packed by its values, which are
    the classes that `task.partition` may go by. train_samples, test_samples: at most so many documents.
    probe: blocks of the training text set aside as the probe set; with probe_data (a file, folder or name as `data`
    takes, with probe_subset and probe_split), blocks of that text at most, and all training text is trained on.
    **Agents that compare networks on it must give the same text, probe, tokenizer, max_length and seed**.
    lora: { r, alpha, dropout, targets } freezes the model; adapters are what agents exchange. dtype: of the frozen
    base. seed: of what is drawn from the data, and of a frozen base without pretrained weights.
    """
    train, held = open_splits(
        data,
        test,
        subset=subset,
        train_split=train_split,
        test_split=test_split,
        test_share=test_share,
        seed=seed,
        folder=folder,
    )
    column = column_of(train, text_column, TEXT_COLUMNS, "text_column")
    column_of(held, column, (), "text_column")
    classes: tuple[str, ...] = ()
    if label_column is not None:
        for rows in (train, held):
            column_of(rows, label_column, (), "label_column")
        classes = tuple(sorted({*map(str, train.unique(label_column)), *map(str, held.unique(label_column))}))
    tokens = tokenizer_of(tokenizer, model, config, folder)
    changes: dict[str, Any] = {"use_cache": False}
    if isinstance(config, Mapping):
        # the end of text is the tokenizer's, and the vocabulary as large as it must be
        own = {"vocab_size": tokens.size, "bos_token_id": tokens.end, "eos_token_id": tokens.end}
        changes |= {key: value for key, value in own.items() if key not in config}
    built = architecture("AutoModelForCausalLM", model, config, folder, changes)
    fits_kind(built)
    _check_sizes(built.config, tokens, max_length)
    parts = [
        pack(first_rows(rows, most, seed), column, label_column, classes, tokens, max_length, f"{what} of {data}")
        for rows, most, what in ((train, train_samples, "training text"), (held, test_samples, "test text"))
    ]
    blocks, public = parts[0], parts[0]
    aside = probe
    if probe_data is not None:
        rows = open_probe(probe_data, subset=probe_subset, split=probe_split, folder=folder)
        column_of(rows, column, (), "text_column")
        public, aside = pack(rows, column, None, (), tokens, max_length, f"probe text of {probe_data}"), 0
    if len(blocks) < aside + 2:
        raise DataError(
            f"the training text of {data} fills {len(blocks)} blocks of {max_length} tokens, too few for a probe set "
            f"of {aside} and training; lower task.options.max_length or probe"
        )
    if len(public) < 2:
        raise DataError(f"the probe text of {probe_data} fills one block of {max_length} tokens; two are needed")
    order, drawn = (torch.from_numpy(np.random.default_rng(seed).permutation(len(part))) for part in (blocks, public))
    return HfCausalLM(
        name="hf-causal-lm",
        maker=ModelMaker(built, lora, dtype, seed),
        train=Subset(blocks, order[aside:].sort().values),
        test=parts[1],
        probe=Subset(public, drawn[:probe]),
        classes=classes,
    )


def _check_sizes(config: Any, tokens: Tokens, max_length: int) -> None:
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and tokens.size > size:
        what = f'"{BYTES}"' if tokens.bytes else "the tokenizer"
        raise ConfigError(f"{what} has {tokens.size} tokens, the model a vocabulary of {size}; take the model's own")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and max_length > longest:
        raise ConfigError(f"task.options.max_length is {max_length}; the model takes {longest} tokens at most")
