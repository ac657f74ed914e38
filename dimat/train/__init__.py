"""Local training between merges: trainer, optimizers, model state.

Knows no peers and no network.
"""

from dimat.train.base import TrainerState, TrainReport
from dimat.train.trainer import Trainer

__all__ = ["TrainReport", "Trainer", "TrainerState"]
