"""What all callbacks share: an agent begins, counts steps and leaves with the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dimat.agent.attach import Agent
from dimat.agent.attach.followers import Follower
from dimat.agent.attach.trainer import Evaluate
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.tasks.huggingface.tokens import vocabulary_of


def imported(module: str, extra: str) -> Any:
    """Import a library's module; ConfigError, which says what to install, where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise ConfigError(f"this callback needs the package {missing}: pip install 'dimat[{extra}]'") from error


class Beside:
    """An agent beside somebody else's trainer. The arguments are those of `dimat.Agent` and `Agent.attach`; `data`:
    batches to compare networks on, the trainer's own where none are given.

    `agent` is there from the beginning of training on, a new one for each.
    """

    def __init__(
        self,
        config: str | Path | ExperimentConfig,
        overrides: Sequence[str] = (),
        *,
        name: str | None = None,
        data: Iterable[Any] | None = None,
        evaluate: Evaluate | None = None,
        metric: str = "accuracy",
        follow: Iterable[Follower] | None = None,
        classes: Sequence[str] = (),
        agreement: Mapping[str, str] | None = None,
    ) -> None:
        self._make = lambda: Agent(config, overrides, name=name)
        self._make()  # a fault of the configuration comes now, not when training begins
        self._data = data
        self._evaluate = evaluate
        self._metric = metric
        self._classes = classes if isinstance(classes, str) else [*classes]  # an iterator gives them once
        self._agreement = dict(agreement or {})
        self._follow = None if follow is None else list(follow)
        self.agent: Agent | None = None

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        data: Iterable[Any] | None,
        processes: int,
        *,
        tokenizer: Any = None,
    ) -> bool:
        """Attach to a trainer's model; returns whether there is nothing to train.

        `tokenizer`: the trainer's, if it has one; peers must have the same vocabulary. The first optimizer's state is
        kept with the weights, others follow. ConfigError where several processes train.
        """
        if processes > 1:
            raise ConfigError(
                f"{processes} processes train this model; one process trains an agent's model for now: start the "
                "trainer with one"
            )
        chosen = data if self._data is None else self._data
        if chosen is None:
            raise ConfigError("the trainer has no data to compare networks on; give the callback data=")
        follow = self._follow if len(optimizers) == 1 else [*(self._follow or ()), *optimizers[1:]]
        agent = self._make()
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's, of text and images
        known = {"tokenizer": vocabulary_of(tokenizer)} if callable(getattr(tokenizer, "get_vocab", None)) else {}
        agent.attach(
            model,
            optimizers[0],
            data=chosen,
            evaluate=self._evaluate,
            metric=self._metric,
            follow=follow,
            classes=self._classes,
            agreement={**known, **self._agreement},
        )
        self.agent = agent.__enter__()
        return agent.done

    def step(self) -> bool:
        """Count an optimizer step; returns whether the agent is through."""
        if self.agent is None:
            return False
        self.agent.step()
        return self.agent.done

    def end(self, error: BaseException | None = None) -> None:
        """Leave the network; `error`: what ended training, if it did not end well."""
        agent, self.agent = self.agent, None
        if agent is not None:
            agent.__exit__(None if error is None else type(error), error, None)
