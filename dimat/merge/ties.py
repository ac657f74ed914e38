"""Tied tensors: several names of one tensor, stored once or twice.

A model says itself which of its names are tied; in a file equal values do. This is the one place that finds ties and
shows weights under other names: the pipeline keeps tied names equal by it, `dimat merge` brings folders together by it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from dimat.errors import MergeError, PeerError
from dimat.merge.models.functional import aliases
from dimat.merge.stages import Weights
from dimat.merge.weight_views import RenamedWeights

HEADS = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|cls\.predictions\.decoder)\.weight|output\.weight")
"""Output layers that may be tied to the embedding of tokens."""

EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight")

_LIKELY = re.compile(r"(embed|wte|shared|head|decoder|output|proj_out|classifier)[^.]*\.weight$")
"""Tensors of files that are looked at: embeddings and output layers, which are what models tie."""

_EMBEDDED = re.compile(r"(?:.*[._])?(?:embed\w*|wte|shared)\.weight")
_OUTPUT = re.compile(r"(?:.*[._])?(?:\w*head|decoder|output|proj_out|classifier)\.weight")
"""Names of embeddings and of output layers: two of one value are one tensor, and not layers that began alike."""

Groups = Mapping[str, tuple[str, ...]]
"""Tied names: for each of them all names of its tensor, in their order."""


def ties_of(weights: Weights, model: nn.Module | None = None) -> Groups:
    """Return the names of weights that are tied: as the model says, or else by equal values.

    By values only matrices count, and none that is all one number: vectors of ones are equal by chance. Of files only
    the tensors that models tie are read.
    """
    if model is not None:
        return _grouped((name, first) for name, first in aliases(model).items() if name in weights)
    names = [*weights] if isinstance(weights, dict) else [name for name in weights if _LIKELY.search(name)]
    alike: dict[tuple[object, ...], list[str]] = {}
    pairs: list[tuple[str, str]] = []
    for name in names if len(names) > 1 else ():
        tensor = weights[name].detach()
        if not _tells(tensor):
            continue
        sample = tensor.reshape(-1)[:: max(1, tensor.numel() // 64)].double().cpu()
        group = alike.setdefault((tensor.shape, tensor.dtype, sample.numpy().tobytes()), [])
        first = next((one for one in group if same_values(weights[one].detach(), tensor)), None)
        if first is None:
            group.append(name)
        pairs.append((name, first or name))
    return _grouped(pairs)


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name, first in pairs:
        groups.setdefault(first, []).append(name)
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


def first_names(groups: Groups) -> dict[str, str]:
    """Return the first name of the same tensor by each other name."""
    return {name: group[0] for name, group in groups.items() if name != group[0]}


def _tells(tensor: Tensor) -> bool:
    """Tell whether that another tensor has equal values says that they are one."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() < 2:
        return False
    return bool((tensor != tensor.reshape(-1)[0]).any())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal, which takes no time where they are the same memory."""
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.shape == other.shape
    return same or (one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all()))


def tied_in(weights: Weights, name: str, twin: str) -> bool:
    """Tell whether two names that weights have are names of one tensor."""
    one, other = weights[name].detach(), weights[twin].detach()
    return _tells(one) and same_values(one, other)


def surely_tied(weights: Weights, firsts: Mapping[str, str], model: nn.Module | None) -> dict[str, str]:
    """Return those tied names (see `first_names`) of which equal values are more than chance.

    They are tied in the model, share their memory, or are an embedding and an output layer: layers that are copies of
    one another also begin with equal values, and may differ in a peer's weights.
    """
    if model is not None:
        return {name: first for name, first in firsts.items() if name in weights and first in weights}
    found: dict[str, str] = {}
    for name, first in firsts.items():
        one, other = (
            (_OUTPUT.fullmatch(name), _EMBEDDED.fullmatch(first)),
            (_EMBEDDED.fullmatch(name), _OUTPUT.fullmatch(first)),
        )
        shared = isinstance(weights, dict) and weights[name].data_ptr() == weights[first].data_ptr()
        if shared or all(one) or all(other):
            found[name] = first
    return found


def check_own_ties(own: Weights, tied: Mapping[str, str]) -> None:
    """Raise MergeError if own weights hold different values under two names of one tensor of the model."""
    for name, first in tied.items():
        if not same_values(own[name].detach(), own[first].detach()):
            raise MergeError(
                f"own weights: tensors {name!r} and {first!r} differ, and are one tensor in the model (tied); pass the "
                "model to which the weights belong"
            )


def check_ties(peer: Weights, agent: str, tied: Mapping[str, str]) -> None:
    """Raise PeerError if a peer holds different values under two names that are one tensor here."""
    for name, first in tied.items():
        if name in peer and first in peer and not same_values(peer[name].detach(), peer[first].detach()):
            raise PeerError(
                f"{agent}: tensors {name!r} and {first!r} differ, and are one tensor in our weights (tied); to merge "
                f"them, store {name!r} apart in ours too, or tie it in {agent}'s"
            )


def under_names(theirs: Weights, names: Collection[str], firsts: Mapping[str, str]) -> Weights:
    """Return weights under other names where they differ in tied tensors alone: some store these once, some twice.

    `names`: those wanted; `firsts`: of their tied ones (see `first_names`). A tied name that is missing has the values
    of its first name, or that name the values of this one; a name too many is left out where another tensor that is
    wanted has its values. Everything else is as it was.
    """
    stored = {name: name for name in theirs if name in names}
    for name, first in firsts.items():
        if name in names and name not in stored and first in stored:
            stored[name] = stored[first]
        elif first in names and first not in stored and name in stored:
            stored[first] = stored[name]
    more = [name for name in theirs if name not in names]
    stored |= {n: n for n in more if not any(one in theirs and _twice(theirs, n, one) for one in names)}
    return theirs if stored.keys() == theirs.keys() else RenamedWeights(theirs, stored)


def _twice(weights: Weights, name: str, other: str) -> bool:
    one, twin = weights[name].detach(), weights[other].detach()
    return one.ndim > 1 and one.shape == twin.shape and one.dtype == twin.dtype and same_values(one, twin)
