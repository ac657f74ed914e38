"""The zoo's own models that put known parts together in other ways: lists and stacks of layers, experts under several
gates, cells that take over from layers, scans, long convolutions, rotations as complex numbers, looked-up places.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.symmetry.test_mapped import Ensemble
from tests.symmetry.wide.entry import own


class EdgeConvolution(nn.Module):
    """A perceptron on both ends of each edge; what it makes is added up where the edge ends."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 8))

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        x = torch.relu(self.into(x))
        made = self.mlp(torch.cat([x[end], x[start] - x[end]], -1))
        return self.out(torch.zeros_like(x).index_put((end,), made, accumulate=True))


class ManyWays(nn.Module):
    """Mean, largest and smallest of a node's neighbours, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 8), nn.Linear(24, 2)

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        places = end[:, None].expand(-1, 8)
        ways = (torch.zeros_like(x).scatter_reduce(0, places, x[start], how, include_self=False) for how in _WAYS)
        return self.out(torch.cat([*ways], 1))


_WAYS = ("mean", "amax", "amin")


class LongConvolution(nn.Module):
    """A kernel as long as the sequence, by Fourier transforms, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.kernel, self.out = nn.Linear(4, 8), nn.Parameter(torch.randn(8, 16) / 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).mT
        spectrum = torch.fft.rfft(x, n=32) * torch.fft.rfft(self.kernel, n=32)
        mixed = torch.fft.irfft(spectrum, n=32)[..., :16]
        return self.out((mixed * torch.sigmoid(x)).mT.mean(1))


class Rotated(nn.Module):
    """Attention whose queries and keys are rotated as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 2)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("turns", torch.randn(6, 1, 2), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        turns = self.get_buffer("turns").to(x)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(turns), turns)
        return torch.view_as_real(pairs).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = (layer(x).unflatten(-1, (4, 4)) for layer in (self.q, self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (self.turned(q), self.turned(k), v))
        mixed: Any = F.scaled_dot_product_attention(q, k, v)
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))


class Translates(nn.Module):
    """An LSTM reads, and a cell that begins with its state writes, from what it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes, self.out = nn.LSTM(4, 8, batch_first=True), nn.LSTMCell(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cells) = self.reads(x)
        state, word, words = (hidden[0], cells[0]), x.new_zeros(x.shape[0], 3), []
        for _ in range(3):
            state = self.writes(word, state)
            word = self.out(state[0])
            words.append(word)
        return torch.stack(words, 1)


class Scans(nn.Module):
    """A selective state-space layer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.decay, self.out = nn.Linear(4, 8), nn.Parameter(torch.rand(8, 3)), nn.Linear(8, 2)
        self.takes, self.gives, self.step = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        takes, gives, steps = self.takes(x), self.gives(x), F.softplus(self.step(x))
        state, made = x.new_zeros(x.shape[0], 8, 3), []
        for n in range(x.shape[1]):
            step = steps[:, n, :, None]
            state = state * torch.exp(-step * self.decay) + step * x[:, n, :, None] * takes[:, n, None]
            made.append((state * gives[:, n, None]).sum(-1))
        return self.out(torch.stack(made, 1))


class Displaced(nn.Module):
    """Features are looked up where a flow field says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.flow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.mix, self.out = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        places = F.affine_grid(torch.eye(2, 3).to(x).expand(x.shape[0], 2, 3), list(x.shape), align_corners=False)
        x = F.grid_sample(x, places + self.flow(x).permute(0, 2, 3, 1).tanh(), align_corners=False)
        return self.out(torch.relu(self.mix(x)).amax((2, 3)))


class ManyGates(nn.Module):
    """Experts under a gate for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))
        self.gates = nn.ModuleList(nn.Linear(3, 4) for _ in range(2))
        self.tasks = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.tanh(torch.stack([expert(x) for expert in self.experts], 1))
        mixed = ((gate(x).softmax(-1)[..., None] * made).sum(1) for gate in self.gates)
        return torch.stack([task(each) for task, each in zip(self.tasks, mixed)], -1)


class Blocks(nn.Module):
    """Two transformer blocks, each of whose matrices is taken from a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.qkv, self.proj = nn.Parameter(torch.randn(2, 24, 8) / 2), nn.Parameter(torch.randn(2, 8, 8) / 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 16, 8) / 2), nn.Parameter(torch.randn(2, 8, 16) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for qkv, proj, up, down in zip(self.qkv, self.proj, self.up.chunk(2), self.down.split(1)):
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in F.linear(x, qkv).chunk(3, -1))
            mixed: Any = F.scaled_dot_product_attention(q, k, v)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), proj)
            x = x + F.linear(F.gelu(F.linear(x, up[0])), down[0])
        return self.out(x)


class PrunedConvolutions(nn.Module):
    """Whole channels of one layer are cut, single weights and biases of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        prune.ln_structured(self.one, "weight", 0.3, n=2, dim=0)
        for name in ("weight", "bias"):
            prune.l1_unstructured(self.two, name, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Layers(nn.Module):
    """Three residual layers on top of each other in one tensor for each of their matrices, taken in three ways."""

    def __init__(self, how: str = "number") -> None:
        super().__init__()
        self.how = how
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.up, self.bias = nn.Parameter(torch.randn(3, 12, 8) / 3), nn.Parameter(torch.randn(3, 12))
        self.down = nn.Parameter(torch.randn(8, 3, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        if self.how == "unbind":
            taken = zip(self.up.unbind(0), self.bias.unbind(0), self.down.unbind(1))
        elif self.how == "chunk":
            pieces = zip(self.up.chunk(3), self.bias.split(1), self.down.chunk(3, 1))
            taken = ((up[0], bias[0], down[:, 0]) for up, bias, down in pieces)
        else:
            taken = ((self.up[n], self.bias[n], self.down[:, n]) for n in range(3))
        for up, bias, down in taken:
            x = x + F.linear(torch.relu(F.linear(x, up, bias)), down)
        return self.out(x)


class SideBySide(nn.Module):
    """The best of three experts for each row; a list for each of their matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate, self.out = nn.Linear(3, 8), nn.Linear(8, 3, bias=False), nn.Linear(8, 2)
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        share, chosen = self.gate(x).softmax(-1).max(-1)
        made = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down)):
            rows = (chosen == number).nonzero().flatten()
            made = made.index_add(0, rows, down(torch.relu(up(x[rows]))) * share[rows, None])
        return self.out(x + made)


class Soft(nn.Module):
    """Every expert, with a normalisation of its own, on every row, weighted, at once or one after the other."""

    def __init__(self, singly: bool = False) -> None:
        super().__init__()
        self.singly = singly
        self.into, self.gate, self.out = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        shares = self.gate(x).softmax(-1)
        if self.singly:
            return self.out(x + sum(shares[:, n, None] * expert(x) for n, expert in enumerate(self.experts)))
        made = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out(x + (made * shares[:, None]).sum(-1))


def _draw(*shape: int) -> Any:
    return lambda: torch.randn(*shape)


def _ids() -> Tensor:
    return torch.randint(5, (6,))


ENTRIES = (
    own("edge_convolution", EdgeConvolution, _draw(5, 3), _ids, _ids),
    own("many_aggregations", ManyWays, _draw(5, 3), _ids, _ids),
    own("long_convolution", LongConvolution, _draw(2, 16, 4), least_coverage=0.55, exception="places of a kernel"),
    own("complex_rotary", Rotated, _draw(2, 6, 4)),
    own("translates", Translates, _draw(2, 5, 4)),
    own("scans", Scans, _draw(2, 6, 4)),
    own("displaced_grid", Displaced, _draw(2, 3, 8, 8)),
    own("many_gates", ManyGates, _draw(5, 3)),
    own("listed_experts", SideBySide, _draw(5, 3)),
    own("soft_experts", lambda: Soft(singly=True), _draw(5, 3)),
    own("stacked_layers", Layers, _draw(5, 3)),
    own("stacked_blocks", Blocks, _draw(2, 5, 3)),
    own("mapped_ensemble", lambda: Ensemble(mean=True), _draw(5, 3)),
    own("pruned_convolutions", PrunedConvolutions, _draw(2, 3, 6, 6)),
)
