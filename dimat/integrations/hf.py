"""An agent beside Hugging Face's `Trainer`.

    with TrainerCallback("lab-a.toml", name="lab-a") as callback:
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()

The context leaves the network also where `train` raises, of which callbacks are not told.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch

from dimat.errors import ConfigError
from dimat.integrations.beside import Beside, imported

_Base: Any = imported("transformers", "hf").TrainerCallback


class TrainerCallback(_Base):
    """Trains a `Trainer`'s model together with a network's agents: after every `train.steps_per_round` optimizer steps
    it publishes, gathers, aligns and merges, and training stops once the agent is through. Agents with different
    tokenizers refuse each other.

    Arguments: see `dimat.integrations.beside.Beside`. Adapters of PEFT are merged as products. Raises ConfigError where
    several processes train; faults of network and data come out of `Trainer.train`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.beside = Beside(*args, **options)
        self._kept: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.beside.end(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Join the network before the first step."""
        if getattr(args, "deepspeed", None):
            raise ConfigError("DeepSpeed shards what it trains; one process trains an agent's model for now")
        done = self.beside.begin(
            kwargs["model"],
            [kwargs["optimizer"]],
            kwargs.get("train_dataloader"),
            int(args.world_size),
            tokenizer=kwargs.get("processing_class", kwargs.get("tokenizer")),  # its name before 4.46
        )
        control.should_training_stop |= done
        if done:  # `Trainer` looks at that after its first step only, which must leave the model as the agent left it
            model = kwargs["model"]
            self._kept = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients away where there is nothing to train, so that optimizers change nothing."""
        if self._kept:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimizer step, whatever number of batches it was made of."""
        control.should_training_stop |= self.beside.step()
        kept, self._kept = self._kept, {}
        if kept:
            with torch.no_grad():
                for name, tensor in kwargs["model"].state_dict(keep_vars=True).items():
                    tensor.copy_(kept[name])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the network."""
        self.beside.end()
