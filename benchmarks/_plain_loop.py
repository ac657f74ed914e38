"""Five MLPs trained and mixed on a ring by hand, in torch alone: work that machines are compared by.

2,000 samples of MNIST shape each, an MLP 784-256-128-10, three rounds of one epoch, batch 64, Adam 1e-3, one thread.
`python benchmarks/_plain_loop.py` prints the CPU-seconds of the loop.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

AGENTS, SAMPLES, ROUNDS, BATCH = 5, 2000, 3, 64
SIZES = (784, 256, 128, 10)


def mnist_shaped() -> tuple[Tensor, Tensor]:
    """Return random images of MNIST's shape with labels from a random linear teacher: only the work counts here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(AGENTS * SAMPLES, SIZES[0], generator=generator)
    return images, (images @ torch.randn(SIZES[0], SIZES[-1], generator=generator)).argmax(1)


def mlp() -> nn.Module:
    a, b, c, d = SIZES
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))


def plain_loop() -> float:
    """Train five MLPs and mix them on a ring, as one would write it by hand; return CPU-seconds."""
    images, labels = mnist_shaped()
    models, optimizers, parts = [], [], torch.randperm(len(images)).split(SAMPLES)
    for seed in range(AGENTS):
        torch.manual_seed(seed)
        models.append(mlp())
        optimizers.append(torch.optim.Adam(models[-1].parameters(), lr=1e-3))
    start = time.process_time()
    for _ in range(ROUNDS):
        for model, optimizer, part in zip(models, optimizers, parts):
            for batch in part[torch.randperm(SAMPLES)].split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        states = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
        for i, model in enumerate(models):
            near = [states[(i + d) % AGENTS] for d in (-1, 0, 1)]
            model.load_state_dict({k: sum(s[k] for s in near) / 3 for k in near[0]})
    return time.process_time() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(plain_loop())
