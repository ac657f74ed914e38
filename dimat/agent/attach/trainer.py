"""A trainer that lets the user's thread do a round's steps, and takes turns with it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.agent.attach.followers import Follower, Followers
from dimat.agent.attach.inputs import ByName
from dimat.agent.attach.part import Part
from dimat.errors import ConfigError, DataError
from dimat.symmetry import Permutations, SymmetrySpec
from dimat.symmetry.trace import eval_mode, modes_kept
from dimat.tasks.base import Data
from dimat.tasks.data import InputBatches, input_batches
from dimat.train.base import TrainerState, TrainReport
from dimat.train.contract import described, first_line
from dimat.train.model_state import ModelState
from dimat.train.optimizer_state import family, group_values

POLL_S = 0.5
TRIED = 4
"""Examples that the model is tried on."""

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class AttachedTrainer(ModelState):
    """Lets the user's thread train a round, while the agent's thread waits.

    The two threads take turns; the model belongs to the one whose turn it is. In the agent's turn its state dict holds
    only `part`, and it takes its inputs by position, whatever `names` they have. Optimizers stay the same objects, and
    state is moved inside them; with `fresh` it is cleared before every round. `needed`: the metric that decides on
    merges or the end of the run, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        evaluate: Evaluate | None,
        part: Part,
        names: Sequence[str] = (),
        *,
        fresh: bool = False,
        needed: str = "",
        follow: Iterable[Follower] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = steps
        self.fresh = fresh
        self._needed = needed
        self.followers = Followers(model, follow)
        self._evaluate = evaluate
        self._part = part
        self._names = tuple(names)
        self._steps = steps
        self._seen = 0
        self._turn = threading.Condition()
        self._users = False
        self._over = False
        self._agents = ExitStack()
        self._through = False
        self.optimized()  # raises where the optimizer is another model's
        # the groups stay what they are, whatever state begins anew
        self._began = [group_values(each) for each in self.optimizers()]

    # ── turns ────────────────────────────────────────────────────────────────────────────────────────────────
    def train(self, round: int) -> TrainReport:
        """Let the user's loop do a round's steps."""
        del round
        if self.fresh:
            self.clear_optimizer()
        self.give_back()
        with self._turn:
            self._users = True
            self._turn.notify_all()
            while self._users and not self._over:
                self._turn.wait(POLL_S)
        self.take()
        self._part.check(self.model)
        if self.fresh:  # a checkpoint would hold it for nothing
            self.clear_optimizer()
        self._seen += self._steps
        return TrainReport(float("nan"), 0, self._steps, 0.0, 0.0)

    def hand_over(self) -> None:
        """The user's loop has done a round's steps."""
        with self._turn:
            self._users = False
            self._turn.notify_all()

    def wait(self) -> None:
        """Wait until it is the user's turn, or the agent has finished."""
        with self._turn:
            while not self._users and not self._over:
                self._turn.wait(POLL_S)

    def end(self) -> None:
        """The agent has finished: no thread waits for the other any more."""
        with self._turn:
            self._over = True
            self._turn.notify_all()

    def take(self) -> None:
        """Begin the agent's turn: the model shows what agents exchange, and takes inputs by position."""
        with self._turn:
            self._agents.close()
            if self._through:
                return
            self._agents.enter_context(self._part.alone(self.model))
            if self._names:
                hook = self.model.register_forward_pre_hook(ByName(self._names), prepend=True, with_kwargs=True)
                self._agents.callback(hook.remove)

    def give_back(self, *, for_good: bool = False) -> None:
        """End the agent's turn: the model is as its user knows it. `for_good`: this was the last turn."""
        with self._turn:
            self._agents.close()
            self._through |= for_good

    @contextmanager
    def users(self) -> Generator[None]:
        """Context in which user code runs in the agent's turn, on the model as the user knows it."""
        self.give_back()
        try:
            yield
        finally:
            self.take()

    # ── what a trainer does ──────────────────────────────────────────────────────────────────────────────────
    def evaluate(self, data: Data, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Return the user's metrics of the model, or of `weights` in its place; none without the user's `evaluate`.

        `data` is not used: the user chooses the data. Modes are left as they were.
        """
        if self._evaluate is None:
            return {}
        if weights is None:
            return self._metrics(self._evaluate)
        own = self.weights()
        self.load_weights(weights)
        try:
            return self.evaluate(data)
        finally:
            self.load_weights(own)

    def _metrics(self, evaluate: Evaluate) -> dict[str, float]:
        with self.users(), modes_kept(self.model):
            found: Any = evaluate(self.model)
        return self._checked(found)

    def _checked(self, found: Any) -> dict[str, float]:
        """Return metrics as plain numbers; ConfigError where they are none, or lack the one that is needed."""
        if not isinstance(found, Mapping):
            raise ConfigError(f"evaluate returned a {type(found).__name__}; it returns metrics by name, as a dict")
        values: dict[str, float] = {}
        for name, value in cast("Mapping[str, Any]", found).items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"evaluate: {name} is not a single number: {value!r:.60}") from error
        if self._needed and self._needed not in values:
            raise ConfigError(
                f"evaluate returned {', '.join(values) or 'nothing'}, but merge.accept or schedule.target needs "
                f"{self._needed}; return that too, or give attach(…, metric=…) another name"
            )
        return values

    def try_out(self, inputs: Sequence[Tensor], *, needed: bool, evaluated: bool) -> None:
        """Before the first round, run the model on a few of the inputs on which networks are compared, and the user's
        `evaluate` if `evaluated`.

        Raises DataError if the model cannot take the inputs and merges need them (`needed`), else warns; ConfigError
        for values that are not metrics. Errors of `evaluate` itself pass through.
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        few = tuple(tensor[:TRIED].to(device) for tensor in inputs)
        try:
            with eval_mode(self.model), torch.no_grad():
                self.model(*few)
        except Exception as error:  # a user's module may fail in any way
            shapes = ", ".join(described(tensor) for tensor in few)
            by_name = f" (by name: {', '.join(self._names)})" if self._names else ""
            fault = (
                f"data: the model cannot take {shapes}{by_name}: {type(error).__name__}: {first_line(error)}; batches "
                "are the model's inputs, and of a sequence the last entry is the target, which is left out"
            )
            if needed:
                raise DataError(fault) from error
            warnings.warn(f"{fault}. Merges by this method do not need them", stacklevel=4)
        if evaluated and self._evaluate is not None:
            self._metrics(self._evaluate)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the user's optimizer, those that follow, and those inside them, each once."""
        found: list[torch.optim.Optimizer] = []
        for given in (self.optimizer, *self.followers.optimizers):
            found += [each for each in family(given) if not any(each is other for other in found)]
        return found

    def input_batches(self, data: Data, batch_size: int, generator: torch.Generator | None = None) -> InputBatches:
        """Return the inputs of `data` on the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return input_batches(data, batch_size, generator, samples=None, device=device)

    def permute(self, spec: SymmetrySpec, permutations: Permutations) -> str:
        """Move model, gradients, optimizers' state and followers into another basis."""
        move = self.followers.moving(spec, permutations)
        note = super().permute(spec, permutations)
        with self.users():
            move()
        return note

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Adopt all weights of another agent, for the model and its followers."""
        super().start_from(weights)
        with self.users():
            self.followers.start_from(weights)

    def state(self, *, copy: bool = True) -> TrainerState:
        """Return weights and optimizers' state; random streams and the position in the data are the user's."""
        tensors = {f"model/{name}": tensor for name, tensor in self.weights(copy=copy).items()}
        state, texts = self.optimizer_state(copy=copy)
        kinds = [type(each).__name__ for each in self.optimizers()]
        values: dict[str, Any] = {"optimizer": kinds[0], "optimizers": " ".join(kinds), "steps": self._seen}
        return TrainerState(tensors | state, {**values, **texts})

    def load_state(self, state: TrainerState) -> None:
        """Continue from a state; raises DataError if it does not fit model or optimizer."""
        # one that the checkpoint does not know begins anew; what it has of one that is not there any more is left
        before = str(state.values.get("optimizers", state.values.get("optimizer"))).split()
        for number, (kept, each) in enumerate(zip(before, self.optimizers())):
            if kept != type(each).__name__:
                where = f"optimizer {number + 1}" if number else "optimizer"
                raise DataError(f"the checkpoint's {where} is {kept!r}, this one is {type(each).__name__!r}")
        tensors = state.tensors
        self.load_weights({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
        self.load_optimizer(tensors, state.values)
        self._seen = int(state.values.get("steps", 0))

    def _renew_optimizer(self) -> None:
        self.clear_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer
