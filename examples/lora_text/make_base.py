"""Train a tiny GPT-2 on general.txt, in a few seconds, and save it to base/ as transformers does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dimat.config import TaskConfig, TrainConfig
from dimat.tasks import load_task
from dimat.train import Trainer


def main() -> None:
    torch.set_num_threads(1)  # more would wait for each other over so small a model
    folder = Path(__file__).parent
    sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    data = {"name": "general.txt", "tokenizer": "bytes", "max_length": 64}
    options: dict[str, Any] = {"data": data, "model": {"config": sizes}}
    task = load_task(TaskConfig(name="hf-causal-lm", options=options), folder)
    config = TrainConfig.model_validate({"epochs_per_round": 4, "batch_size": 16, "optimizer": {"lr": 5e-3}})
    trainer = Trainer(task, task.data("train"), config, seed=0)
    trainer.train(1)
    sys.stdout.write(f"perplexity {trainer.evaluate(task.data('test'))['perplexity']:.2f}\n")
    model: Any = trainer.model
    model.save_pretrained(folder / "base")


if __name__ == "__main__":
    main()
