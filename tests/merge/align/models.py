"""Networks with heads, for the tests of alignment: attention in its usual kinds, and a recurrent one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """One pre-norm block over word vectors; `kept` < `heads` shares keys and values among query heads."""

    def __init__(self, heads: int, kept: int, width: int = 24, size: int = 6) -> None:
        super().__init__()
        self.heads, self.kept, self.size = heads, kept, size
        self.words = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * size)
        self.k, self.v = nn.Linear(width, kept * size), nn.Linear(width, kept * size)
        self.o = nn.Linear(heads * size, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (f(y).unflatten(-1, (self.kept, self.size)).transpose(1, 2) for f in (self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kept)
        x = x + self.o(z.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own encoder layers, whose projections of queries, keys and values are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(5, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers: hidden units stand on both axes of its recurrent weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 12, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def tokens() -> Tensor:
    return torch.arange(60).view(12, 5) * 7 % 11


def signals() -> Tensor:
    return torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "heads": (lambda: Attention(4, 4), tokens),
    "grouped-heads": (lambda: Attention(4, 2), tokens),
    "encoder": (Encoder, signals),
    "lstm": (Recurrent, signals),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a network with weights of a seed, vectors (of norms, biases) not all alike, and its inputs."""
    build, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.rand_like(parameter) * 0.1
    return model, inputs()
