"""An agent beside Lightning's `Trainer`.

Trainer(max_epochs=-1, callbacks=[LightningCallback("lab-a.toml", name="lab-a")]).fit(module, loader)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dimat.integrations.beside import Beside, imported

_MODULE = (
    "pytorch_lightning" if find_spec("lightning") is None and find_spec("pytorch_lightning") else "lightning.pytorch"
)
_Base: Any = imported(_MODULE, "lightning").Callback


class LightningCallback(_Base):
    """Trains a LightningModule together with a network's agents: after every `train.steps_per_round` optimizer steps it
    publishes, gathers, aligns and merges, and training stops once the agent is through.

    Arguments: see `dimat.integrations.beside.Beside`. The module's `forward` takes a batch's inputs. Of several
    optimizers the first one's state is kept with the weights, and the others follow. Raises ConfigError where several
    processes train; faults of network and data come out of `Trainer.fit`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.beside = Beside(*args, **options)
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Join the network before the first step."""
        self._seen = int(trainer.global_step)
        done = self.beside.begin(pl_module, trainer.optimizers, trainer.train_dataloader, int(trainer.world_size))
        trainer.should_stop |= done

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count an optimizer step where this batch ended one, be it of several optimizers."""
        if trainer.global_step > self._seen:
            self._seen = int(trainer.global_step)
            trainer.should_stop |= self.beside.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the network."""
        self.beside.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the network; what ended training is raised by the trainer."""
        self.beside.end(exception)
