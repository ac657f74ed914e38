"""The zoo's own models of structures that no library of the zoo has: spectral and complex nets, grids, looped experts,
quantisation-aware and re-parametrised layers, graphs, recommendation, random draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations

from tests.symmetry.test_model_kinds import (
    EDGES,
    ComplexNet,
    GraphAttention,
    GraphConvolution,
    GraphIsomorphism,
    Interleaved,
    Looped,
)
from tests.symmetry.test_numbered import Experts, Local, LookedUp, Sloped
from tests.symmetry.wide.entry import own


class Spectral(nn.Module):
    """A Fourier neural operator: the lowest frequencies of each channel are mixed, beside a pointwise path."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 1, 1)
        self.paths = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.modes = nn.ParameterList(nn.Parameter(torch.randn(8, 8, 4, dtype=torch.cfloat) / 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for path, modes in zip(self.paths, self.modes):
            spectrum = torch.fft.rfft(x)
            mixed = torch.einsum("bik,iok->bok", spectrum[..., :4], modes.to(spectrum.dtype))
            x = F.gelu(torch.fft.irfft(F.pad(mixed, (0, spectrum.shape[-1] - 4)), n=x.shape[-1]) + path(x))
        return self.out(x)


class Transformer2d(nn.Module):
    """A spatial transformer: where to look is predicted, and looked up on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 6))
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.where(x).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.body(F.grid_sample(x, grid, align_corners=False))


class Quantised(nn.Module):
    """Fake quantisation of weights by channel and of activations as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8) / 50 + 0.01, requires_grad=False)
        self.register_buffer("zero", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        zero = self.get_buffer("zero").to(torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.one.weight, self.scale, zero, 0, -128, 127)
        hidden = torch.relu(F.linear(x, weight, self.one.bias))
        return self.two(torch.fake_quantize_per_tensor_affine(hidden, 0.05, 0, 0, 255))


class Speech(nn.Module):
    """Magnitudes of short-time spectra, and a convolutional reader of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(9, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU())
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(16, dtype=x.dtype)
        spectrum = torch.stft(x, 16, 4, window=window, return_complex=True).abs()
        return self.out(self.body(spectrum).mean(-1))


class Recommends(nn.Module):
    """Bags of categories and numbers, their inner products, and a perceptron on top (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(2))
        self.numbers = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(11, 10), nn.ReLU(), nn.Linear(10, 1))

    def forward(self, numbers: Tensor, one: Tensor, two: Tensor) -> Tensor:
        dense = self.numbers(numbers)
        parts = torch.stack([dense, *(bag(ids) for bag, ids in zip(self.bags, (one, two)))], 1)
        products = torch.bmm(parts, parts.mT)[:, [0, 0, 1], [1, 2, 2]]
        return self.top(torch.cat([dense, products], 1))


class Radial(nn.Module):
    """Distances to centres, and a kernel of them."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.centres = nn.Linear(3, 8), nn.Parameter(torch.randn(6, 8))
        self.width, self.out = nn.Parameter(torch.rand(6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((-self.width.exp() * torch.cdist(torch.tanh(self.into(x)), self.centres)).exp())


class Normed(nn.Module):
    """Weight normalisation, spectral normalisation and an orthogonal matrix, all as parametrisations."""

    def __init__(self) -> None:
        super().__init__()
        self.one = parametrizations.weight_norm(nn.Linear(4, 8))
        self.two = parametrizations.spectral_norm(nn.Linear(8, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Modulated(nn.Module):
    """A condition scales and shifts the channels of a convolution (FiLM), which then mix in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.condition, self.out = nn.Linear(5, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[..., None, None].chunk(2, 1)
        return self.out(torch.relu(self.two(torch.relu(self.one(x) * (1 + scale) + shift))).mean((2, 3)))


class Stepped(nn.Module):
    """A cell that is stepped by hand through a sequence, its state projected to be read."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(11, 6), kind(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state: Any = None
        for step in self.embed(tokens).unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Projected(nn.Module):
    """An LSTM in both directions whose states are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.cells = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, proj_size=4)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.cells(self.embed(tokens))[0].mean(1))


class Variational(nn.Module):
    """An autoencoder that draws its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))
        self.decode = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encode(x).chunk(2, -1)
        return self.decode(mean + torch.randn_like(mean) * (spread / 2).exp())


class Flexible(nn.Module):
    """Flex attention of four heads in two groups, scores changed by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.q, self.o = nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.k, self.v, self.out = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = (layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed: Any = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j) * 0.1, enable_gqa=True)
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))


class Unfolds(nn.Module):
    """Patches as columns, a perceptron on each, and the image put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 1), nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 24))
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.stem(x), 2, stride=2)
        return self.out(F.fold(self.mix(columns.mT).mT, list(x.shape[-2:]), 2, stride=2))


class Picks(nn.Module):
    """Keeps what a mask says, of a number that only the data tell."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        hidden = torch.tanh(self.two(torch.relu(self.one(x))[kept]))
        return self.out(hidden).sum(0)


def _draw(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _ids(most: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(most, shape)


_FP32 = {"tolerance": 1e-5, "exception": "an operation of it is of float32 only"}
_FOURIER = "frequencies of a transform have their places"
_NODES = (_draw(5, 3), lambda: EDGES)

ENTRIES = (
    own("fourier_operator", Spectral, _draw(2, 2, 16), least_coverage=0.7, exception=_FOURIER),
    own("spatial_transformer", Transformer2d, _draw(2, 2, 8, 8)),
    own("quantisation_aware", Quantised, _draw(3, 4), **_FP32),
    own("speech_spectra", Speech, _draw(2, 96), least_coverage=0.7, exception=_FOURIER),
    own("recommendation", Recommends, _draw(3, 4), _ids(20, 3, 2), _ids(20, 3, 2)),
    own("radial_basis", Radial, _draw(4, 3)),
    own("normed_weights", Normed, _draw(4, 4)),
    own("modulated", Modulated, _draw(2, 3, 6, 6), _draw(2, 5)),
    own("lstm_cell", lambda: Stepped(nn.LSTMCell), _ids(11, 2, 4)),
    own("gru_cell", lambda: Stepped(nn.GRUCell), _ids(11, 2, 4)),
    own("projected_lstm", Projected, _ids(11, 2, 4)),
    own("variational", Variational, _draw(4, 6)),
    own("flex_attention", Flexible, _draw(2, 16, 3)),
    own("unfolded_patches", Unfolds, _draw(2, 3, 4, 4)),
    own("masked_rows", Picks, _draw(5, 4), lambda: torch.tensor([True, False, True, True, False])),
    own("complex", ComplexNet, _draw(4, 3)),
    own("graph_convolution", GraphConvolution, *_NODES),
    own("graph_attention", GraphAttention, *_NODES),
    own("graph_isomorphism", GraphIsomorphism, *_NODES, lambda: torch.tensor([0, 0, 1, 1, 1])),
    own("looped_experts", Looped, _draw(5, 3)),
    own("interleaved_experts", Interleaved, _draw(5, 3)),
    own("dense_experts", Experts, _draw(5, 3)),
    own("looked_up_experts", LookedUp, _draw(5, 3)),
    own("slopes_by_head", Sloped, _draw(2, 5, 3)),
    own("local_layers", Local, _draw(2, 5, 3)),
)
