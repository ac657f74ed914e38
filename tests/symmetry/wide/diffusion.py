"""The zoo's models of diffusers and torch_geometric, tiny, where those libraries are installed; dimat needs neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.symmetry.wide.entry import Built, Entry
from tests.symmetry.zoo import _torchvision_models as torchvision_models


def _diffusers(
    name: str,
    kind: str,
    options: dict[str, Any],
    inputs: Callable[[], dict[str, Any]],
    least_coverage: float = 0.95,
    exception: str = "",
) -> Entry:
    def make() -> Built:
        torchvision_models()  # diffusers imports torchvision where it is there
        import diffusers  # type: ignore[import-not-found]

        return getattr(diffusers, kind)(**options), inputs()

    return Entry(name, "diffusers", "other", make, least_coverage=least_coverage, exception=exception)


def _noisy(*shape: int, **more: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        others = {name: torch.randn(*size) for name, size in more.items()}
        return {"sample": torch.randn(*shape), "timestep": torch.tensor([3, 7]), **others}

    return inputs


def _hidden(*shape: int, **more: Callable[[], Tensor]) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        others = {name: draw() for name, draw in more.items()}
        return {"hidden_states": torch.randn(*shape), "timestep": torch.tensor([3, 7]), **others}

    return inputs


def _random(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


_GROUPS = "groups of a normalisation reach over what is joined from two layers"
_PLACES = "waves that tell places are added to the stream, and keep it in place"
_UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
_DOWN = ("DownBlock2D", "AttnDownBlock2D")
_UP = ("AttnUpBlock2D", "UpBlock2D")
_VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 16}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}

_DIFFUSERS = (
    _diffusers(
        "unet2d",
        "UNet2DModel",
        {**_UNET, "down_block_types": _DOWN, "up_block_types": _UP},
        _noisy(2, 3, 8, 8),
        0.88,
        _GROUPS,
    ),
    _diffusers(
        "unet2d_condition",
        "UNet2DConditionModel",
        {
            **_UNET,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        _noisy(2, 4, 8, 8, encoder_hidden_states=(2, 5, 12)),
        0.92,
        _GROUPS,
    ),
    _diffusers(
        "autoencoder_kl",
        "AutoencoderKL",
        {**_VAE, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
    _diffusers(
        "vq",
        "VQModel",
        {
            **_VAE,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "num_vq_embeddings": 6,
        },
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
    _diffusers(
        "dit",
        "DiTTransformer2DModel",
        {**_HEADS, "num_layers": 2, "in_channels": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        _hidden(2, 4, 8, 8, class_labels=lambda: torch.tensor([1, 2])),
        0.5,
        _PLACES,
    ),
    _diffusers(
        "pixart",
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 1,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        _hidden(2, 4, 8, 8, encoder_hidden_states=_random(2, 5, 12)),
        0.44,
        _PLACES,
    ),
    _diffusers(
        "sd3",
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 4,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        _hidden(2, 4, 8, 8, encoder_hidden_states=_random(2, 5, 12), pooled_projections=_random(2, 10)),
        0.9,
        _PLACES,
    ),
    _diffusers(
        "unet1d",
        "UNet1DModel",
        {
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "extra_in_channels": 32,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
        },
        _noisy(2, 3, 16),
        0.58,
        "resamples by a kernel that is written into a matrix of channels by number",
    ),
)


class _OfGraphs(nn.Module):
    """Two layers of one kind, and a linear one; `extra` is what each layer takes beside nodes and edges."""

    def __init__(self, one: nn.Module, two: nn.Module, width: int) -> None:
        super().__init__()
        self.one, self.two, self.out = one, two, nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x, edges)), edges)))


def _perceptron(given: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(given, width), nn.ReLU(), nn.Linear(width, width))


def _graphs(name: str, layer: Callable[[Any, int], nn.Module], widths: tuple[int, int] = (8, 8)) -> Entry:
    """Return an entry; `layer` makes one from the module of layers and the width of its input (5, then the first of
    `widths`)."""

    def make() -> Built:
        import torch_geometric.nn as layers  # type: ignore[import-not-found]

        edges = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 5], [1, 1, 0, 4, 2, 0, 3, 3]])
        return _OfGraphs(layer(layers, 5), layer(layers, widths[0]), widths[1]), (torch.randn(6, 5), edges)

    return Entry(name, "torch_geometric", "other", make)


_GRAPHS = (
    _graphs("gcn", lambda g, n: g.GCNConv(n, 8)),
    _graphs("gat", lambda g, n: g.GATConv(n, 4, heads=2)),
    _graphs("gatv2", lambda g, n: g.GATv2Conv(n, 4, heads=2)),
    _graphs("gin", lambda g, n: g.GINConv(_perceptron(n, 8), train_eps=True)),
    _graphs("sage", lambda g, n: g.SAGEConv(n, 8)),
    _graphs("graph_transformer", lambda g, n: g.TransformerConv(n, 4, heads=2)),
    _graphs("cheb", lambda g, n: g.ChebConv(n, 8, K=3)),
    _graphs("edge_conv", lambda g, n: g.EdgeConv(_perceptron(2 * n, 8))),
    _graphs("gated_graph", lambda g, n: g.GatedGraphConv(8, 2)),
)

ENTRIES = (*_DIFFUSERS, *_GRAPHS)
