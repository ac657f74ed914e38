"""`dimat.Agent` counts a user's steps, and runs the daemon in a thread beside their loop.

    with dimat.Agent("lab-a.toml").attach(model, optimizer, data=loader) as agent:
        for inputs, targets in batches:
            ...
            optimizer.step()
            agent.step()

`step` counts; after `train.steps_per_round` of them it hands the model over, waits until the merge is in place, and
returns. The daemon is the same one that `dimat agent` runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from dimat import events
from dimat.agent.attach.followers import Follower
from dimat.agent.attach.inputs import read_inputs
from dimat.agent.attach.part import part_of
from dimat.agent.attach.task import AttachedTask
from dimat.agent.attach.trainer import AttachedTrainer, Evaluate
from dimat.agent.daemon.daemon import Daemon
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import ExperimentConfig, load_experiment, naming
from dimat.device import streams_kept
from dimat.errors import ConfigError
from dimat.merge import needs_symmetry, plan_merge
from dimat.train.model_state import check_whole


class Agent:
    """An agent of a network, for your own training loop. `config`: a file, or an experiment's configuration;
    `overrides` and `name` change settings of a file.

    Raises ConfigError if the configuration cannot be used; `with` and `step` raise errors of the network and the data.
    """

    def __init__(
        self, config: str | Path | ExperimentConfig, overrides: Sequence[str] = (), *, name: str | None = None
    ) -> None:
        if not isinstance(config, ExperimentConfig):
            config = load_experiment(config, (*overrides, *naming(name)))
        elif overrides or name is not None:
            raise ConfigError("name and overrides are for a file; set them in the ExperimentConfig itself")
        self.config = config
        if self.config.train.steps_per_round is None:
            raise ConfigError("train.steps_per_round says after how many calls of step() to merge: set it")
        self.steps_per_round = self.config.train.steps_per_round
        self.listeners: list[events.Listener] = []
        """Are told every event, in the agent's thread."""
        self._trainer: AttachedTrainer | None = None
        self._daemon: Daemon | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault: BaseException | None = None
        self._left = self.steps_per_round
        self._reason = ""

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data: Iterable[Any],
        evaluate: Evaluate | None = None,
        metric: str = "accuracy",
        follow: Iterable[Follower] | None = None,
        classes: Sequence[str] = (),
        agreement: Mapping[str, str] | None = None,
    ) -> Agent:
        """Attach a model and its optimizer; returns the agent, to be entered with `with`.

        `data`: batches of the model's inputs, as loaders give them: a tensor, a sequence whose first entries are the
        model's inputs and whose last is the target, or a dict of tensors by the names of the model's arguments; the
        first 1,024 examples are kept, to compare networks on. A loader's random generators, and the process's, are
        left as they were. `evaluate`: returns metrics of the model, for reports, for `accept` and for
        `schedule.target`; `metric` is the one that counts. Model and `evaluate` are tried once, here.

        `follow`: objects whose units must move with the model's: copies (EMA, SWA, a target network) as modules or as
        tables of tensors by the model's names, other optimizers of it, and functions that are called with a function
        that moves such a table. Without it, a UserWarning says once when units have moved.

        `classes`: names of the model's outputs, in order; `agreement`: texts by name that give the weights their
        meaning, such as a hash of the tokenizer's vocabulary. Agents that say different ones refuse each other.

        Of a model with adapters on a frozen base (PEFT) only the trained tensors are exchanged, and factors are merged
        as products. Raises ConfigError for a model that is wrapped for several processes or cannot be merged, DataError
        for data that cannot be read, or that the model cannot take.
        """
        model, optimizer = _unwrapped(model, optimizer)
        check_whole(model)
        with streams_kept():
            inputs = read_inputs(data, model)
            part = part_of(model)
            task = AttachedTask(model, inputs, part, metric, classes, agreement)
            fresh = self.config.optimizer_state == "fresh"
            trainer = AttachedTrainer(
                model,
                optimizer,
                self.steps_per_round,
                evaluate,
                part,
                inputs.names,
                fresh=fresh,
                needed=self._needed(evaluate, metric),
                follow=follow,
            )
            if evaluate is None:
                agent = self.config.agent.model_copy(update={"evaluate": "none"})
                self.config = self.config.model_copy(update={"agent": agent})
            trainer.take()
            try:
                setup = prepare_agent(self.config, task)
                plan = setup.experiment.loaded.plan
                trainer.try_out(
                    inputs.tensors,
                    needed=needs_symmetry(plan) or bool(plan.statistics) or plan.repairs,
                    evaluated=self.config.agent.evaluate != "none",
                )
                self._daemon = Daemon(setup, trainer=trainer)
            finally:
                trainer.give_back()
        self._trainer = trainer
        return self

    def _needed(self, evaluate: Evaluate | None, metric: str) -> str:
        """Return the metric that merges or the end of the run go by, "" for none; ConfigError where there is no way to
        it."""
        plan = plan_merge(self.config.merge)
        judged = plan.judges
        if judged and evaluate is None:
            raise ConfigError(
                f'merge.accept = "{plan.accept.name}" judges merges by metrics; give attach(…, evaluate=…)'
            )
        return metric if judged or self.config.schedule.target is not None else ""

    @property
    def done(self) -> bool:
        """Whether the agent has finished: its last round is over, its target reached, or it was stopped."""
        return bool(self._reason) or self._fault is not None

    @property
    def round(self) -> int:
        """The agent's current round."""
        return 0 if self._daemon is None else self._daemon.round

    def step(self) -> None:
        """Count an optimizer step; after a round's last step, wait for the merge. Does nothing once `done`. Raises the
        error that ended the agent, if any."""
        if self._trainer is None or self._thread is None:
            raise ConfigError("step() belongs inside `with agent.attach(model, optimizer, data=…) as agent:`")
        self._left -= 1
        if self._left > 0 or self.done:
            self._raise()
            return
        self._left = self.steps_per_round
        with streams_kept():
            self._trainer.hand_over()
            self._trainer.wait()
        self._raise()
        self._trainer.followers.warn()

    def __enter__(self) -> Agent:
        daemon, trainer = self._daemon, self._trainer
        if daemon is None or trainer is None:
            raise ConfigError(
                "attach a model first: with dimat.Agent(config).attach(model, optimizer, data=…) as agent:"
            )
        daemon.listeners += self.listeners
        self._thread = threading.Thread(target=self._serve, args=(daemon, trainer), name="dimat-agent", daemon=True)
        with streams_kept():
            self._thread.start()
            trainer.wait()
        self._raise()
        trainer.followers.warn()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is not None and self._daemon is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._daemon.stop, "left")
        if self._trainer is not None:
            self._trainer.end()
        if self._thread is not None:
            self._thread.join()
        if error is None:
            self._raise()

    def _serve(self, daemon: Daemon, trainer: AttachedTrainer) -> None:
        async def run() -> str:
            self._loop = asyncio.get_running_loop()
            return await daemon.run()

        trainer.take()
        try:
            self._reason = asyncio.run(run())
        except BaseException as fault:  # told to the user's thread, which raises it
            self._fault = fault
        finally:
            trainer.give_back(for_good=True)
            trainer.end()

    def _raise(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            self._reason = self._reason or "failed"
            raise fault


def _unwrapped(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what torch.compile and accelerate have wrapped: the same parameters, under their own names."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        if inner.state is not optimizer.state:
            break  # one with a state of its own, such as Lookahead
        optimizer = inner
    return model, optimizer
