"""Logits that language models exchange in place of weights, and how one learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.token_logits import KEPT, TokenLayout, TokenSaid
from dimat.merge.token_map import OwnTokens, PeerTokens, teachers_mean
from dimat.tasks.base import Data
from dimat.tasks.token_text import ProbeText
from dimat.train.token_lesson import TokenLesson, probe_token_logits
from dimat.train.trainer import Trainer
from dimat.weights.tensors import Tensors

NOT_FINITE = "own logits on the probe set are not finite; lower train.optimizer.lr"
HEAT = 1.0
"""T where nothing else is said: probabilities along a text can be multiplied at 1 alone."""
WIDTH = 4
"""Own tokens that a row of p̄ may have, in multiples of the logits that travel."""
LEAST_OVERLAP = 0.05
"""Share of own predictions of which a peer must say something; below it a note says how to get more."""


def token_layout(text: ProbeText, examples: int, keep: int | None) -> TokenLayout:
    """Return the layout of what is exchanged of the first `examples` of a probe text."""
    rows = examples * text.tokens.shape[1]
    return TokenLayout(len(text.text), rows, int(text.known.sum()), KEPT if keep is None else keep)


@dataclass(slots=True)
class TokenExchange:
    """The logits of one agent's language model on the probe text. `probe`: the examples, `text`: their text;
    `settings`: the options of "distil"."""

    trainer: Trainer
    probe: Data
    text: ProbeText
    settings: Mapping[str, Any]
    layout: TokenLayout
    _own: OwnTokens | None = None

    @classmethod
    def of(cls, trainer: Trainer, probe: Data, text: ProbeText, settings: Mapping[str, Any]) -> TokenExchange:
        """Return the exchange of an agent; `text` may be of more examples than `probe` has."""
        layout = token_layout(text, len(probe), settings["keep"])
        text = replace(text, tokens=text.tokens[: len(probe)], spans=text.spans[: len(probe)])
        return cls(trainer, probe, text, settings, layout)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a snapshot of the model as it is."""
        return self.layout.encoded(*self._said(), self.text)

    def read(self, peer: str, snapshot: Tensors) -> TokenSaid:
        """Return a peer's snapshot, checked (`TokenLayout.read`)."""
        return self.layout.read(peer, snapshot)

    def lesson(
        self, heard: Mapping[str, TokenSaid], weights: Sequence[float], order: torch.Generator
    ) -> tuple[TokenLesson | None, tuple[str, ...]]:
        """Return what own model and peers teach together, by mixing weights, own first; None where no peer says
        anything of own tokens. And notes for people. MergeError where own logits are not finite."""
        heat = HEAT if self.settings["temperature"] is None else self.settings["temperature"]
        own = self._own = self._own or OwnTokens(self.text)
        logits, ids = self._said()
        if not bool(logits.isfinite().all()):
            raise MergeError(NOT_FINITE)
        peers = {peer: PeerTokens(said, own, heat) for peer, said in heard.items()}
        notes = tuple(note for peer, each in peers.items() if (note := _overlap(peer, each, own)))
        shares = (logits.bfloat16().double() / heat).softmax(1)  # as peers get them
        said = teachers_mean(
            own,
            ids,
            shares,
            list(peers.values()),
            weights,
            most=WIDTH * self.layout.keep,
            text=self.settings["text"],
        )
        if len(said.rows) == 0:
            return None, notes
        device = self.trainer.device
        said = replace(said, ids=said.ids.to(device), shares=said.shares.to(device))
        predictions = self.text.tokens.shape[1]
        return TokenLesson(self.probe, predictions, said, self.settings["weight"], heat, order), notes

    def _said(self) -> tuple[Tensor, Tensor]:
        config = self.trainer.config
        return probe_token_logits(
            self.trainer.task,
            self.trainer.model,
            self.probe,
            self.text,
            self.layout.keep,
            batch_size=min(config.eval_batch_size, config.batch_size),  # logits over a vocabulary are large
            precision=config.precision,
            device=self.trainer.device,
        )


def _overlap(peer: str, said: PeerTokens, own: OwnTokens) -> str:
    """Return a note where a peer says something of few own predictions; "" else."""
    count = sum(said.row_of(start) is not None for start in own.starts)
    if count >= LEAST_OVERLAP * len(own.starts):
        return ""
    return (
        f"{peer} says something of {count:,} of {len(own.starts):,} own tokens of the probe text; for more, give all "
        "agents a probe text of its own (task.options.probe.name), with a probe.count and a merge.probe_samples that "
        "take all of its blocks"
    )
