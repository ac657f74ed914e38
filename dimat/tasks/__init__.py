"""Tasks (model, data, loss): bundled ones by name, a user's by hook, and their parts.

Knows no agents, no training loop and no network.
"""

from dimat.tasks.base import Batch, Data, Task
from dimat.tasks.classification import ClassificationTask
from dimat.tasks.data import InputBatches, Subset, TensorData, from_dataset, input_batches
from dimat.tasks.models import DigitsCNN, ImageCNN, ImageViT, ResNet20, mlp, resnet20, seeded
from dimat.tasks.partition import histogram, partition
from dimat.tasks.registry import TASKS, list_tasks, load_task

__all__ = [
    "TASKS",
    "Batch",
    "ClassificationTask",
    "Data",
    "DigitsCNN",
    "ImageCNN",
    "ImageViT",
    "InputBatches",
    "ResNet20",
    "Subset",
    "Task",
    "TensorData",
    "from_dataset",
    "histogram",
    "input_batches",
    "list_tasks",
    "load_task",
    "mlp",
    "partition",
    "resnet20",
    "seeded",
]
