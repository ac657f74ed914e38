"""An agent beside a user's own training loop: the loop trains, the agent swaps and merges.

    with dimat.Agent("lab-a.toml").attach(model, optimizer, data=loader) as agent:
        for inputs, targets in batches:
            ...
            optimizer.step()
            agent.step()

`step` counts; after `train.steps_per_round` of them it hands the model over, waits until the merge is in place, and
returns. The daemon runs in a thread of its own, the same one that `dimat agent` runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat import events
from dimat.agent.daemon.daemon import Daemon
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import ExperimentConfig, load_experiment, naming
from dimat.errors import ConfigError, DataError
from dimat.symmetry.copy_module import copy_module
from dimat.tasks.base import Data
from dimat.tasks.data import InputBatches, TensorData, input_batches
from dimat.train.model_state import ModelState, copied
from dimat.train.trainer import TrainerState, TrainReport

INPUTS_KEPT = 1024
"""Examples of the user's data, at most, that are kept to compare networks on."""
POLL_S = 0.5

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class AttachedTask:
    """A user's model and some of its inputs, as a task that is trained elsewhere."""

    name = "attached"
    classes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], metric: str) -> None:
        self.metric = metric
        self._model = copy_module(model).cpu()
        self._data = TensorData(inputs, torch.zeros(len(inputs[0])))

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """Return a copy of the model as it was attached."""
        del generator
        return copy_module(self._model)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the first few inputs."""
        return self._data.batch(torch.arange(min(4, len(self._data)))).inputs

    def data(self, split: str) -> Data:
        """Return the kept inputs, whatever the split: nothing is trained or tested on them."""
        del split
        return self._data

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Raise ConfigError: only the user's loop knows the loss."""
        raise ConfigError("a method that needs the loss (fisher) cannot merge an attached model; choose another one")

    def metrics(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """Return nothing: metrics come from the user's `evaluate`."""
        return {}


class AttachedTrainer(ModelState):
    """Trains a round by letting the user's thread do so: it waits meanwhile in the agent's.

    The two threads take turns; the model belongs to the one whose turn it is. `optimizer` keeps its place: state is
    moved in it, never replaced by another object.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, evaluate: Evaluate | None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = steps
        self._evaluate = evaluate
        self._steps = steps
        self._seen = 0
        self._turn = threading.Condition()
        self._users = False
        self._over = False
        self._optimized()  # raises where the optimizer is another model's

    # ── turns ────────────────────────────────────────────────────────────────────────────────────────────────
    def train(self, round: int) -> TrainReport:
        """Let the user's loop do a round's steps."""
        del round
        with self._turn:
            self._users = True
            self._turn.notify_all()
            while self._users and not self._over:
                self._turn.wait(POLL_S)
        self._seen += self._steps
        return TrainReport(float("nan"), 0, self._steps, 0.0, 0.0)

    def hand_over(self) -> None:
        """The user's loop has done a round's steps."""
        with self._turn:
            self._users = False
            self._turn.notify_all()

    def wait(self) -> None:
        """Wait until it is the user's turn, or the agent is through."""
        with self._turn:
            while not self._users and not self._over:
                self._turn.wait(POLL_S)

    def end(self) -> None:
        """The agent is through: nobody waits for anybody any more."""
        with self._turn:
            self._over = True
            self._turn.notify_all()

    # ── what a trainer does ──────────────────────────────────────────────────────────────────────────────────
    def evaluate(self, data: Data, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Return the user's metrics of the model, or of `weights` in its place; none where no way to them was given.
        `data` is not used: the user decides on which data they are taken."""
        if self._evaluate is None:
            return {}
        if weights is None:
            return {name: float(value) for name, value in self._evaluate(self.model).items()}
        own = self.weights()
        self.load_weights(weights)
        try:
            return self.evaluate(data)
        finally:
            self.load_weights(own)

    def input_batches(self, data: Data, batch_size: int, generator: torch.Generator | None = None) -> InputBatches:
        """Return inputs of `data` on the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return input_batches(data, batch_size, generator, samples=None, device=device)

    def state(self) -> TrainerState:
        """Return weights and optimizer state; random streams and the place in the data are the user's."""
        tensors = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for name, entries in self.optimizer_entries().items():
            tensors |= {f"optimizer/{name}/{key}": copied(torch.as_tensor(value)) for key, value in entries.items()}
        return TrainerState(tensors, {"optimizer": type(self.optimizer).__name__, "steps": self._seen})

    def load_state(self, state: TrainerState) -> None:
        """Go on from a state; DataError where it does not fit model or optimizer."""
        kind = type(self.optimizer).__name__
        if state.values.get("optimizer") != kind:
            raise DataError(f"the checkpoint is of optimizer {state.values.get('optimizer')!r}, this one is {kind!r}")
        tensors = state.tensors
        self.load_weights({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
        self.load_optimizer({n: t for n, t in tensors.items() if n.startswith("optimizer/")})
        self._seen = int(state.values.get("steps", 0))

    def _optimized(self) -> list[tuple[str, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        strangers = sum(parameter not in names for parameter in held)
        if strangers:
            raise ConfigError(f"the optimizer holds {strangers} parameters that are not the model's; give it its own")
        return [(names[parameter], parameter) for parameter in held]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer.state.clear()
        return self.optimizer


class Agent:
    """An agent of a network, for a training loop of one's own. `config`: a file, or an experiment's configuration;
    `overrides` and `name` change settings of a file.

    Raises ConfigError where the configuration cannot be used; network and data faults come out of `with` and `step`.
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
            raise ConfigError("train.steps_per_round says after how many calls of step() to merge; set it")
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
    ) -> Agent:
        """Take a model and its optimizer on; returns the agent, to be entered with `with`.

        `data`: batches of the model's inputs (a tensor, or a tuple whose first entries are the model's inputs and whose
        last is the target, as loaders give them); the first 1,024 examples are kept, to compare networks on.
        `evaluate`: returns metrics of the model, for reports, for `accept` and for `schedule.target`; `metric` is the
        one that counts.
        """
        inputs = _inputs_of(data)
        task = AttachedTask(model, inputs, metric)
        trainer = AttachedTrainer(model, optimizer, self.steps_per_round, evaluate)
        if evaluate is None:
            agent = self.config.agent.model_copy(update={"evaluate": "none"})
            self.config = self.config.model_copy(update={"agent": agent})

        self._daemon = Daemon(prepare_agent(self.config, task), trainer=trainer)
        self._trainer = trainer
        return self

    @property
    def done(self) -> bool:
        """Whether the agent is through: its last round is over, its target reached, or it was stopped."""
        return bool(self._reason) or self._fault is not None

    @property
    def round(self) -> int:
        """The round that the agent is in."""
        return 0 if self._daemon is None else self._daemon.round

    def step(self) -> None:
        """Count an optimizer step; with a round's last one wait for the merge. Does nothing once `done`. Raises what
        ended the agent, if it did not end well."""
        if self._trainer is None or self._thread is None:
            raise ConfigError("step() belongs inside `with agent.attach(model, optimizer, data=…) as agent:`")
        self._left -= 1
        if self._left > 0 or self.done:
            self._raise()
            return
        self._left = self.steps_per_round
        self._trainer.hand_over()
        self._trainer.wait()
        self._raise()

    def __enter__(self) -> Agent:
        daemon, trainer = self._daemon, self._trainer
        if daemon is None or trainer is None:
            raise ConfigError(
                "attach a model first: with dimat.Agent(config).attach(model, optimizer, data=…) as agent:"
            )
        daemon.listeners += self.listeners
        self._thread = threading.Thread(target=self._serve, args=(daemon, trainer), name="dimat-agent", daemon=True)
        self._thread.start()
        trainer.wait()
        self._raise()
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

        try:
            self._reason = asyncio.run(run())
        except BaseException as fault:  # told to the user's thread, which raises it
            self._fault = fault
        finally:
            trainer.end()

    def _raise(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            self._reason = self._reason or "failed"
            raise fault


def _inputs_of(data: Iterable[Any]) -> tuple[Tensor, ...]:
    """Return the first examples' inputs, concatenated; DataError where there are none that can be read."""
    parts: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in data:
        entries = tuple(cast("Sequence[Any]", batch)) if isinstance(batch, Sequence) else (batch,)
        inputs = entries[:-1] if len(entries) > 1 else entries
        if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
            raise DataError("data must give tensors, or tuples of tensors with the target last")
        parts.append(tuple(tensor.detach().cpu() for tensor in inputs))
        count += len(inputs[0])
        if count >= INPUTS_KEPT:
            break
    if count < 2:
        raise DataError("data gives fewer than two examples; networks are compared on some hundred")
    return tuple(torch.cat(column)[:INPUTS_KEPT] for column in zip(*parts, strict=True))
