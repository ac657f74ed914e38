"""Makes random operations steady: one draw for all entries, the same in every run.

Random draws of a forward pass are not tied to units: a permuted model assigns other draws to them, and two runs agree
only in distribution. One number for a whole tensor does not depend on the order of units, so that two runs differ only
by the effect of the permuted weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 0


class Steady(TorchDispatchMode):
    """Gives every draw of a random operation one value, which depends only on the sequence of draws."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = random.Random(_SEED)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to be kept from torch's compiler would load it: a CPU-second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[str, Any] = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **given)
        name = func._schema.name.partition("::")[2]
        bound = _bound(func, args, given)
        if bound.get("dropout_p"):
            return func(**{**bound, "dropout_p": 0.0})
        if name in _STILL:
            return _STILL[name](bound)
        draw = _DRAWS.get(name.removesuffix("_").removesuffix("_like").removesuffix("_functional"))
        if draw is None:
            return func(*args, **given)
        value = draw(self._stream, bound)
        if name.endswith("_"):
            return bound["self"].copy_(_as(value, bound["self"]))
        with torch.no_grad():
            made = func(*args, **given)  # for its shape, dtype and device
        return made.copy_(_as(value, made))


@contextmanager
def steady() -> Generator[None]:
    """Make torch's random operations steady, and start Python's and NumPy's streams from one seed; restore all
    afterwards."""
    before, numbers, own = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        with Steady():
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)
        torch.random.set_rng_state(own)


def _bound(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
    return {**bound, **kwargs}


def _as(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, device=like.device)
    return value.to(like.dtype).broadcast_to(like.shape)


_Draw = Callable[[random.Random, dict[str, Any]], Any]


def _bernoulli(stream: random.Random, given: dict[str, Any]) -> Any:
    chance = given.get("p", given["self"])  # the chances of each entry, or one for all
    return (chance if isinstance(chance, Tensor) else torch.tensor(float(chance))) > stream.random()


def _normal(stream: random.Random, given: dict[str, Any]) -> Any:
    return given.get("mean", 0.0) + given.get("std", 1.0) * stream.gauss(0, 1)


def _uniform(stream: random.Random, given: dict[str, Any]) -> Any:
    return stream.uniform(given.get("from", 0.0), given.get("to", 1.0))


def _whole(stream: random.Random, given: dict[str, Any]) -> Any:
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    return stream.randrange(int(low or 0), int(high if high is not None else 2))


_DRAWS: dict[str, _Draw] = {
    "bernoulli": _bernoulli,
    "binomial": lambda _, given: (given["count"] * given["prob"]).round(),
    "cauchy": lambda stream, _: stream.uniform(-1, 1),
    "exponential": lambda stream, given: stream.expovariate(1.0) / given.get("lambd", 1.0),
    "geometric": lambda stream, _: stream.randrange(1, 4),
    "log_normal": lambda stream, given: np.exp(given.get("mean", 1.0) + given.get("std", 2.0) * stream.gauss(0, 1)),
    "normal": _normal,
    "poisson": lambda _, given: given["self"].round(),
    "rand": _uniform,
    "randint": _whole,
    "randn": _normal,
    "random": _whole,
    "_standard_gamma": lambda _, given: given["self"],
    "uniform": _uniform,
}


def _multinomial(given: dict[str, Any]) -> Tensor:
    if given.get("replacement"):
        return given["self"].argmax(-1, keepdim=True).expand(*given["self"].shape[:-1], given["num_samples"]).clone()
    return given["self"].topk(given["num_samples"], -1).indices


def _leaky(given: dict[str, Any]) -> Tensor:
    slope = (given.get("lower", 0.125) + given.get("upper", 1 / 3)) / 2
    return torch.nn.functional.leaky_relu(given["self"], slope)


_STILL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "native_dropout": lambda given: (given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)),
    "_fused_dropout": lambda given: (given["self"].clone(), torch.ones_like(given["self"], dtype=torch.uint8)),
    "dropout": lambda given: given["input"].clone(),
    "alpha_dropout": lambda given: given["input"].clone(),
    "feature_dropout": lambda given: given["input"].clone(),
    "feature_alpha_dropout": lambda given: given["input"].clone(),
    "rrelu": _leaky,
    "rrelu_with_noise": _leaky,
    "_sample_dirichlet": lambda given: given["self"] / given["self"].sum(-1, keepdim=True),
    "multinomial": _multinomial,
    "randperm": lambda given: torch.arange(given["n"], dtype=given.get("dtype") or torch.int64),
}
"""Operations that draw a selection or proportions of entries: they make a fixed choice."""
