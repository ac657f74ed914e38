"""A user's model and some of its inputs, as a task that is trained elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.agent.attach.inputs import ByName, Inputs
from dimat.agent.attach.part import Part
from dimat.errors import ConfigError
from dimat.symmetry.copy_module import copy_module
from dimat.tasks.base import Data
from dimat.tasks.data import TensorData
from dimat.tasks.huggingface.lora import KeepNames


class AttachedTask:
    """A task made of a user's model: its copies, the kept inputs, which part of it is exchanged, and what peers must
    have in common beside it: `classes` and `agreement` as in `Task`.

    ConfigError for a model that cannot be copied, and for classes that are no list of names.
    """

    name = "attached"

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        part: Part,
        metric: str,
        classes: Sequence[str] = (),
        agreement: Mapping[str, str] | None = None,
    ) -> None:
        names: Any = None if isinstance(classes, str) or not isinstance(cast("Any", classes), Iterable) else [*classes]
        if names is None or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"attach(…, classes=…) got {classes!r}; give the names of the model's outputs, in order")
        if agreement is not None and not isinstance(cast("Any", agreement), Mapping):
            raise ConfigError(f"attach(…, agreement=…) got {agreement!r}; give texts by name, as a dict")
        self.metric = metric
        self.classes = tuple(names)
        self.agreement = dict(agreement or {})
        self.base_hash = part.base_hash
        self.merge_stages: Mapping[str, str] | None = part.merge_stages
        try:
            self._model = copy_module(model, {} if part.names is None else _frozen_on_cpu(model)).cpu()
        except Exception as error:  # a user's module may fail in any way
            first = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"the model cannot be copied ({type(error).__name__}: {first}), and its symmetries are found on a "
                "copy; fix its __deepcopy__, or keep what cannot be copied outside the model"
            ) from error
        self._shared: dict[int, Any] = {}
        if part.names is not None:
            self._shared = _frozen_on_cpu(self._model)
            self._model.register_state_dict_post_hook(KeepNames(part.names))
        if inputs.names:
            self._model.register_forward_pre_hook(ByName(inputs.names), prepend=True, with_kwargs=True)
        self._data = TensorData(inputs.tensors, torch.zeros(len(inputs.tensors[0])))

    def build_model(self, generator: torch.Generator) -> nn.Module:
        """Return a copy of the model as it was attached."""
        del generator
        return copy_module(self._model, self._shared)

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


def _frozen_on_cpu(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return plain frozen parameters by id, on the CPU: they are never written, and need not be held twice."""
    frozen = [p for p in model.parameters() if not p.requires_grad and type(p) is nn.Parameter]
    return {id(p): p if p.device.type == "cpu" else nn.Parameter(p.detach().cpu(), requires_grad=False) for p in frozen}
