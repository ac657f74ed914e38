"""Transfer rules one by one: small networks around one operation, checked by numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.symmetry import derive_symmetry, verify_symmetry


class Around(nn.Module):
    """One hidden layer of 8 units on (batch, 5, 3), the operation under test, and a fixed read-out."""

    steady: Tensor

    def __init__(self, operation: Callable[[Around, Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.operation = operation
        self.layer = nn.Linear(3, 8)
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        return self.operation(self, hidden)


# name: (operation on (N, 5, 8), shapes of extra parameters, sizes of the groups to be found)
CASES: dict[str, tuple[Callable[[Around, Tensor], Tensor], tuple[tuple[int, ...], ...], list[int]]] = {
    "matmul": (lambda m, x: x @ m.extra[0], ((8, 4),), [8]),
    "batched matmul": (lambda m, x: (x @ x.transpose(1, 2)) @ m.extra[0], ((5, 2),), [8]),
    "vector": (lambda m, x: x @ m.extra[0], ((8,),), [8]),
    "bmm": (lambda m, x: torch.bmm(x, m.extra[0].expand(x.shape[0], 8, 4)), ((8, 4),), [8]),
    "addmm": (lambda m, x: torch.addmm(m.extra[1], x[:, 0], m.extra[0]), ((8, 4), (4,)), [8]),
    "einsum": (lambda m, x: torch.einsum("bse,ef->bsf", x, m.extra[0]), ((8, 4),), [8]),
    "einsum, ellipsis": (lambda m, x: torch.einsum("...e,ef->...f", x, m.extra[0]), ((8, 4),), [8]),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.extra[0], m.extra[1]), ((4, 8, 8), (4,)), [8]),
    "outer": (lambda m, x: torch.outer(x[0, 0], m.extra[0]).sum(0), ((4,),), [8]),
    "prelu": (lambda m, x: F.prelu(x.transpose(1, 2), m.extra[0]).sum(1), ((8,),), [8]),
    "softmax": (lambda m, x: torch.softmax(x, -1) @ m.extra[0], ((8, 4),), [8]),
    "glu": (lambda m, x: F.glu(x) @ m.extra[0], ((4, 4),), [4]),
    "layer norm": (lambda m, x: F.layer_norm(x, (8,), m.extra[0], m.extra[1]).amax(2), ((8,), (8,)), [8]),
    "rms norm": (lambda m, x: F.rms_norm(x, (8,), m.extra[0]).amax(2), ((8,),), [8]),
    "instance norm": (lambda m, x: F.instance_norm(x.transpose(1, 2), None, None, m.extra[0]).amax(1), ((8,),), [8]),
    "local response norm": (lambda m, x: F.local_response_norm(x.transpose(1, 2), 3).sum(1), (), []),
    "l2 norm": (lambda m, x: F.normalize(x, dim=-1) @ m.extra[0], ((8, 4),), [8]),
    "cosine": (lambda m, x: F.cosine_similarity(x, m.extra[0], dim=-1), ((8,),), [8]),
    "variance": (lambda m, x: x.var(-1, keepdim=True) + x.std(-1, keepdim=True), (), [8]),
    "max with index": (lambda m, x: x.max(-1)[0], (), [8]),
    "amax": (lambda m, x: x.amax(-1), (), [8]),
    "logsumexp": (lambda m, x: x.logsumexp(-1), (), [8]),
    "argmax": (lambda m, x: x.argmax(-1).float() + x.mean(-1), (), []),
    "topk": (lambda m, x: x.topk(3, -1)[0], (), [8]),
    "sort": (lambda m, x: x.sort(1)[0] @ m.extra[0], ((8, 2),), [8]),
    "cumsum over units": (lambda m, x: x.cumsum(-1) @ m.extra[0], ((8, 2),), []),
    "cumsum over positions": (lambda m, x: x.cumsum(1) @ m.extra[0], ((8, 2),), [8]),
    "flip": (lambda m, x: x.flip(-1) @ m.extra[0], ((8, 2),), []),
    "roll": (lambda m, x: x.roll(1, 1) @ m.extra[0], ((8, 2),), [8]),
    "triangle": (lambda m, x: (torch.tril(x @ x.transpose(1, 2)) @ x).sum(-1), (), [8]),
    "gather": (lambda m, x: x.gather(1, torch.zeros(x.shape[0], 2, 8).long()).sum(-1), (), [8]),
    "index": (lambda m, x: x[:, [0, 2]] @ m.extra[0], ((8, 2),), [8]),
    "index units": (lambda m, x: x[:, :, [0, 2]] @ m.extra[0], ((2, 2),), []),
    "index_select": (lambda m, x: x.index_select(1, torch.tensor([3, 1])).sum(-1), (), [8]),
    "slice": (lambda m, x: x[..., 2:5] @ m.extra[0], ((3, 2),), [3, 2, 3]),
    "slice with a step": (lambda m, x: x[..., ::2] @ m.extra[0], ((4, 2),), [4]),
    "select": (lambda m, x: x[..., 0] + x.sum(-1), (), [7]),
    "unbind": (lambda m, x: x.unbind(1)[1] @ m.extra[0], ((8, 2),), [8]),
    "split": (lambda m, x: torch.cat(x.split([3, 5], -1)[::-1], -1) @ m.extra[0], ((8, 2),), [3, 5]),
    "chunk added": (lambda m, x: sum(x.chunk(2, -1)) @ m.extra[0], ((4, 2),), [4]),
    "stack": (lambda m, x: torch.stack([x, x.sin()], 1).sum(1) @ m.extra[0], ((8, 2),), [8]),
    "pad": (lambda m, x: F.pad(x, (1, 2)) @ m.extra[0], ((11, 2),), [8, 2]),
    "negative pad": (lambda m, x: F.pad(x, (-1, 1)) @ m.extra[0], ((8, 2),), [7]),
    "reflection pad": (lambda m, x: F.pad(x, (2, 2), mode="reflect") @ m.extra[0], ((12, 2),), []),
    "repeat": (lambda m, x: x.repeat(1, 1, 2) @ m.extra[0], ((16, 2),), [8, 2]),
    "repeat_interleave": (lambda m, x: x.repeat_interleave(2, -1) @ m.extra[0], ((16, 2),), [8, 2]),
    "expand": (lambda m, x: (x + m.extra[0].expand(5, 8)).sum(-1), ((8,),), [8]),
    "view as pairs": (lambda m, x: x.view(-1, 5, 4, 2).sum(-1) @ m.extra[0], ((4, 2),), [4, 2]),
    "permute and flatten": (lambda m, x: x.permute(0, 2, 1).flatten(1) @ m.extra[0], ((40, 2),), [8]),
    "movedim": (lambda m, x: x.movedim(2, 0).sum(0), (), [8]),
    "channel shuffle": (
        lambda m, x: x.view(-1, 5, 2, 4).transpose(2, 3).flatten(2) @ m.extra[0],
        ((8, 2),),
        [4, 2],
    ),
    "zeros filled in place": (lambda m, x: _filled(x) @ m.extra[0], ((9, 2),), [8]),
    "where": (lambda m, x: torch.where(x > 0, x, m.extra[0]).sum(-1), ((8,),), [8]),
    "masked_fill": (lambda m, x: x.masked_fill(x < 0, 0.3) @ m.extra[0], ((8, 2),), [8]),
    "max pool": (lambda m, x: F.max_pool1d(x.transpose(1, 2), 2).sum(1), (), [8]),
    "pooling units": (lambda m, x: F.avg_pool1d(x, 2) @ m.extra[0], ((4, 2),), []),
    "interpolate": (lambda m, x: F.interpolate(x.transpose(1, 2), size=7, mode="linear").sum(1), (), [8]),
    "pixel unshuffle": (
        lambda m, x: F.pixel_unshuffle(x.transpose(1, 2)[..., :4].unflatten(2, (2, 2)), 2).flatten(1) @ m.extra[0],
        ((32, 2),),
        [8],
    ),
    "unfold": (
        lambda m, x: F.unfold(x.transpose(1, 2)[..., :4].unflatten(2, (2, 2)), 2).flatten(1) @ m.extra[0],
        ((32, 2),),
        [8],
    ),
    "weight norm by hand": (
        lambda m, x: x @ (m.extra[0] / m.extra[0].norm(dim=0, keepdim=True) * m.extra[1]),
        ((8, 4), (4,)),
        [8],
    ),
    "weight norm": (lambda m, x: x @ torch._weight_norm(m.extra[0], m.extra[1], 1), ((8, 4), (1, 4)), [8]),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(x @ m.extra[0], x @ m.extra[1], x @ m.extra[2]) @ m.extra[3],
        ((8, 4), (8, 4), (8, 6), (6, 2)),
        [8, 4, 6],
    ),
    "causal attention with heads": (
        lambda m, x: F.scaled_dot_product_attention(*[_heads(x @ w) for w in m.extra[:3]], is_causal=True).sum((1, 3)),
        ((8, 6), (8, 6), (8, 6)),
        [8, 3, 2, 2],
    ),
    "hardswish in place": (lambda m, x: F.hardswish(x, inplace=True) @ m.extra[0], ((8, 2),), [8]),
}


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 2)).transpose(1, 2)


def _filled(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], 5, 9)
    made[..., 1:] = x
    return made


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], final: bool, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 6)
        self.cells = kind(6, 5, batch_first=True, **options)
        self.head = nn.Linear(5 if final or not self.cells.bidirectional else 10, 2)
        self.final = final

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.cells(torch.tanh(self.layer(x)))
        state = state[0] if isinstance(state, tuple) else state
        return self.head(state.sum(0) if self.final else out[:, -1])


@pytest.mark.parametrize(
    ("kind", "options", "final", "sizes"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}, False, [6, 5, 5, 5, 5]),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}, True, [6, 5]),
        (nn.GRU, {"bias": False}, False, [6, 5]),
        (nn.RNN, {}, True, [6, 5]),
        (nn.LSTM, {"proj_size": 2}, True, [6, 5, 2]),
    ],
)
@pytest.mark.filterwarnings("ignore:SYM-W02:dimat.symmetry.SymmetryWarning")
def test_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any], final: bool, sizes: list[int]) -> None:
    """Reference: each layer and direction has units of its own, unless their states are used together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent(kind, final and "proj_size" not in options, **options)
        if "proj_size" in options:
            model.head = nn.Linear(2, 2)
    inputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    spec = derive_symmetry(model, inputs)
    assert sorted(group.size for group in spec.groups) == sorted(sizes)
    assert verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(2)) < 1e-9


class Continued(nn.Module):
    """An LSTM whose cell state is an input, and whose hidden state starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 5)

    def forward(self, x: Tensor, cell: Tensor) -> Tensor:
        return self.cells(x, (torch.zeros(1, 2, 5, dtype=x.dtype), cell))[0].sum(-1)


def test_state_handed_in_pins_the_units() -> None:
    """Reference: the input's axis must not move, so the units that meet it must not either."""
    spec = derive_symmetry(Continued(), (torch.randn(4, 2, 3), torch.randn(1, 2, 5)))
    assert spec.groups == ()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:SYM-W02:dimat.symmetry.SymmetryWarning")
def test_rule(name: str) -> None:
    """Reference: groups by hand; the network itself in float64 under random permutations of them."""
    operation, shapes, sizes = CASES[name]
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Around(operation, *shapes)
    inputs = torch.randn(3, 5, 3, generator=generator)
    spec = derive_symmetry(model, inputs)
    assert spec.trace_kind == "export", spec.warnings
    assert sorted(group.size for group in spec.groups) == sorted(sizes), spec.unknown_ops
    assert verify_symmetry(model, spec, inputs, generator) < 1e-9
