"""The zoo's own models: small classics, recurrent networks, torch's encoder, and control flow that needs data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.symmetry.wide.entry import Built, Entry, words
from tests.symmetry.zoo import MLP, LeNet, ResNet20, UNet


class Reader(nn.Module):
    """Embeds tokens, reads them with an LSTM or a GRU, and classifies by the mean state."""

    def __init__(self, recurrent: type[nn.LSTM | nn.GRU], bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 24)
        self.recurrent = recurrent(24, 32, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(64 if bidirectional else 32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states.mean(1))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` (two layers, four heads) over embedded tokens with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 64)
        self.position = nn.Parameter(0.02 * torch.randn(1, 10, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))


class Settles(nn.Module):
    """Applies a residual block `while` its state is still small: how often depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        steps = 0
        while float(x.abs().mean()) < 1.0 and steps < 4:
            x = x + torch.relu(self.down(torch.relu(self.up(x)))) + 0.2 * x
            steps += 1
        return self.head(x)


def _images(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    return lambda: (make(), (torch.randn(*shape),))


def _read(recurrent: type[nn.LSTM | nn.GRU], bidirectional: bool) -> Callable[[], Built]:
    return lambda: (Reader(recurrent, bidirectional), (words(),))


ENTRIES = (
    Entry("mlp", "own", "other", _images(MLP, 3, 12), 2),
    Entry("lenet", "own", "cnn", _images(LeNet, 2, 1, 28, 28), 4),
    Entry("resnet20_a", "own", "cnn", _images(lambda: ResNet20("A", 16), 2, 3, 32, 32), 14),
    Entry("resnet20_b", "own", "cnn", _images(lambda: ResNet20("B", 16), 2, 3, 32, 32), 12),
    Entry("lstm", "own", "other", _read(nn.LSTM, True), 5),
    Entry("gru", "own", "other", _read(nn.GRU, False), 3),
    Entry("transformer_encoder", "own", "other", lambda: (Encoder(), (words(),)), 9, 4),
    Entry("unet", "own", "cnn", _images(UNet, 2, 2, 16, 16), 9),
    Entry("while_loop", "own", "other", _images(Settles, 3, 10), 2),
)
