"""Local training between merges: trainer, optimizers, model state.

Knows no peers and no network.
"""

from dimat.train.trainer import Trainer, TrainerState, TrainReport

__all__ = ["TrainReport", "Trainer", "TrainerState"]
