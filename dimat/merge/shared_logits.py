"""Logits in place of weights: their layout in a snapshot, the check of a peer's, their mean.

In a snapshot they are `aux.logits`, bf16 of shape (examples, kept), of an agent's model for the examples of the probe
set in order. Where not all classes are kept, `aux.logit_classes` says which they are: integers of the same shape, by
falling logit. Agents are told apart by nothing else, so that their architectures may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import PeerError, nearest
from dimat.merge.registry import CONTEXT, TRAITS
from dimat.merge.shared_statistics import AUX
from dimat.merge.stages import Weights
from dimat.registry import Registry
from dimat.weights.tensors import Tensors, schema_hash

LOGITS, CLASSES = AUX + "logits", AUX + "logit_classes"
"""Names of a snapshot's tensors."""

HEAT = 2.0
"""T where nothing else is said."""

logits_registry: Registry[Tensor] = Registry("combine method of logits", context=CONTEXT, traits=TRAITS)
"""The combine methods of presets that share logits: (own, peers, weights, classes, *, options) → what own is taught."""


@dataclass(frozen=True, slots=True)
class LogitLayout:
    """The layout of an agent's logits. `classes`: that the model tells apart; `keep`: the most of an example's logits
    that travel, None for all."""

    examples: int
    classes: int
    keep: int | None = None

    @property
    def kept(self) -> int:
        """Logits of an example that travel."""
        return self.classes if self.keep is None else min(self.keep, self.classes)

    def encoded(self, logits: Tensor) -> dict[str, Tensor]:
        """Return logits (examples, classes) as the tensors of a snapshot, on the CPU; of equal ones the first classes
        are kept."""
        logits = logits.detach().cpu()
        if self.kept == self.classes:
            return {LOGITS: logits.bfloat16()}
        ordered = logits.sort(dim=1, descending=True, stable=True)
        values, classes = ordered.values[:, : self.kept], ordered.indices[:, : self.kept]
        return {LOGITS: values.bfloat16(), CLASSES: classes.to(self._numbers)}

    @property
    def schema(self) -> str:
        """A hash of names, shapes and types, which is the same for all agents."""
        return schema_hash(self.sample())

    def sample(self) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and types of a snapshot."""
        return self.encoded(torch.zeros(self.examples, self.classes))

    def largest(self) -> dict[str, Tensor]:
        """Return tensors of the size of the largest snapshot that any agent may send: all have the same."""
        return self.sample()

    def read(self, peer: str, snapshot: Tensors) -> dict[str, Tensor]:
        """Return the tensors of a peer's snapshot, checked: names, types and shapes before any is read, then values.

        PeerError, naming the peer and the tensor, where it is not of this layout, a logit is not finite, or a class is
        none of the model's or named twice.
        """
        expected = self.sample()
        for name in expected:
            if name not in snapshot:
                raise PeerError(f"{peer}: tensor {name!r} is missing{nearest(name, snapshot)}; it has no such logits")
        for name in snapshot:
            if name not in expected:
                raise PeerError(f"{peer}: tensor {name!r} is none of the logits that agents exchange here")
        for name, ours in expected.items():
            info = snapshot.info(name)
            if (info.dtype, info.shape) != (ours.dtype, tuple(ours.shape)):
                raise PeerError(
                    f"{peer}: tensor {name!r} is {_shown(info.dtype, info.shape)}, ours "
                    f"{_shown(ours.dtype, ours.shape)}; agents need one probe set, the same classes and the same keep"
                )
        found = {name: snapshot[name] for name in expected}
        for name, tensor in found.items():
            if tensor.is_floating_point():
                if bad := int((~tensor.isfinite()).sum()):
                    raise PeerError(f"{peer}: tensor {name!r} holds {bad} values that are not finite")
                continue
            if int(tensor.min()) < 0 or int(tensor.max()) >= self.classes:
                raise PeerError(
                    f"{peer}: tensor {name!r} names classes from {int(tensor.min())} to {int(tensor.max())}, ours are "
                    f"0 to {self.classes - 1}"
                )
            if bool((tensor.sort(1).values.diff(dim=1) == 0).any()):
                raise PeerError(f"{peer}: tensor {name!r} names a class twice for one example")
        return found

    @property
    def _numbers(self) -> torch.dtype:
        return torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32


def softened(sent: Mapping[str, Tensor], classes: int, temperature: float) -> Tensor:
    """Return softmax(z / T), (examples, classes) in float64, of logits as they travel; classes not kept have none."""
    shares = (sent[LOGITS].double() / temperature).softmax(1)
    if CLASSES not in sent:
        return shares
    return torch.zeros(len(shares), classes, dtype=shares.dtype).scatter_(1, sent[CLASSES].long(), shares)


@logits_registry.register("distil")
def distil(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    classes: int,
    *,
    steps: Annotated[int, Field(ge=1)] = 80,
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] | None = None,
    keep: Annotated[int, Field(ge=1)] | None = None,
    text: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> Tensor:
    """Return the teachers' mean, p̄ = Σ_k w_k softmax(z_k / T) over own (k = 0) and peers, (examples, classes).

    `own`, `peers`: logits as they travel; `weights`: the mixing weights, own first, sum 1. The agent is then trained
    for `steps` steps on (1 − w) loss of own labelled examples + w T² KL(p̄ ‖ softmax(z / T)) of as many probe examples,
    with w = `weight` and T = `temperature`, by default 2. `keep`: the largest logits of an example that travel, None
    for all; the same for all agents. Language models teach each other's tokens (`dimat.merge.token_map`), with T = 1
    and the 16 largest logits of a prediction by default; `text` is the share of p̄ that goes to the tokens of the probe
    text itself, which no other model's probe set has.

    Papers: Hinton et al. 2015, arXiv 1503.02531 (the loss); Li & Wang 2019, FedMD, arXiv 1910.03581 (logits on a public
    set among unlike models, averaged by a server there).
    """
    del steps, weight, keep, text  # of the training and of the layout
    heat = HEAT if temperature is None else temperature
    parts = [w * softened(each, classes, heat) for each, w in zip((own, *peers), weights, strict=True)]
    return torch.stack(parts).sum(0).float()


def _shown(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
