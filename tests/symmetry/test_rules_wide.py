"""Transfer rules of operations outside the usual layers: each keeps its group, proven by numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dimat.symmetry import derive_symmetry, verify_symmetry
from tests.symmetry.test_rules import Around

# name: (operation on (N, 5, 8), shapes of extra parameters, sizes of the groups to be found)
Case = tuple[Callable[[Around, Tensor], Tensor], tuple[tuple[int, ...], ...], list[int]]


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    source, target = torch.tensor([0, 1, 2, 3, 3, 4]), torch.tensor([1, 1, 0, 4, 2, 0])
    return x[0][source], target


def _column(target: Tensor) -> Tensor:
    return target[:, None].expand(-1, 8)


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0.4] = 0.1
    return y


def _rows_written(m: Around, x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.tensor([[True, False, True, False, True]] * 3)] = m.extra[1]
    return y


SCATTERED: dict[str, Case] = {
    "index_add": (lambda m, x: x.new_zeros(5, 8).index_add(0, _edges(x)[1], _edges(x)[0]) @ m.extra[0], ((8, 2),), [8]),
    "index_copy": (
        lambda m, x: x[0].clone().index_copy_(0, torch.tensor([1, 3]), x[1][:2]) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "index_fill": (lambda m, x: x.index_fill(1, torch.tensor([1, 3]), 0.5) @ m.extra[0], ((8, 2),), [8]),
    "index_reduce": (
        lambda m, x: x.new_zeros(5, 8).index_reduce(0, _edges(x)[1], _edges(x)[0], "amax") @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "scatter_add": (
        lambda m, x: x.new_zeros(5, 8).scatter_add(0, _column(_edges(x)[1]), _edges(x)[0]) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "scatter_reduce": (
        lambda m, x: x.new_zeros(5, 8).scatter_reduce(0, _column(_edges(x)[1]), _edges(x)[0], "mean") @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "scatter": (
        lambda m, x: x[0].scatter(0, _column(torch.tensor([2, 4])), x[1, :2]) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "scatter over units": (
        lambda m, x: x.scatter_add(2, torch.arange(8).flip(0).expand(3, 5, 8), x) @ m.extra[0],
        ((8, 2),),
        [],
    ),
    "one_hot": (lambda m, x: F.one_hot((x > 0).long(), 2)[..., 0].to(x) @ m.extra[0], ((8, 2),), [8]),
    "take_along_dim": (
        lambda m, x: x.take_along_dim(torch.zeros(3, 2, 1).long() + 1, 1) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "repeat_interleave by counts": (
        lambda m, x: x[0].repeat_interleave(torch.tensor([1, 0, 2, 1, 1]), 0, output_size=5) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "mask of positions": (
        lambda m, x: (x[torch.tensor([[True, False, True, False, True]] * 3)] @ m.extra[0]).sum(0),
        ((8, 2),),
        [8],
    ),
    "mask of units": (lambda m, x: x[..., torch.tensor([True, False] * 4)] @ m.extra[0], ((4, 2),), []),
    "written by a mask": (lambda m, x: _written(x) @ m.extra[0], ((8, 2),), [8]),
    "rows written by a mask": (lambda m, x: _rows_written(m, x) @ m.extra[0], ((8, 2), (8,)), [8]),
    "nonzero": (lambda m, x: (x[0][x[0, :, 0].abs().ge(0).nonzero()[:, 0]] @ m.extra[0]).sum(0), ((8, 2),), [7]),
    "masked_scatter of rows": (
        lambda m, x: (
            x.masked_scatter(torch.tensor([True, False, True, False, False])[None, :, None].expand(3, 5, 8), m.extra[1])
            @ m.extra[0]
        ),
        ((8, 2), (6, 8)),
        [8],
    ),
    "masked_scatter of entries": (lambda m, x: x.masked_scatter(x > 0.9, x.abs()) @ m.extra[0], ((8, 2),), []),
    "embedding_bag": (
        lambda m, x: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), m.extra[0]) @ m.extra[1] + x.sum(),
        ((4, 6), (6, 2)),
        [6, 8],
    ),
}

ALGEBRA: dict[str, Case] = {
    "vdot": (lambda m, x: torch.vdot(x[0, 0], m.extra[0]), ((8,),), [8]),
    "inner": (lambda m, x: torch.inner(x, m.extra[0]), ((2, 8),), [8]),
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, m.extra[0]), ((8,),), [8]),
    "tensordot": (lambda m, x: torch.tensordot(x, m.extra[0], dims=([1, 2], [1, 0])), ((8, 5, 2),), [8]),
    "kron": (lambda m, x: torch.kron(x[0, 0], m.extra[0]) @ m.extra[1], ((3,), (24, 2)), [8, 3]),
    "cdist": (lambda m, x: torch.cdist(x, m.extra[0][None]), ((4, 8),), [8]),
    "cdist, centres": (lambda m, x: torch.cdist(x, m.extra[0][None]).exp() @ m.extra[1], ((4, 8), (4, 2)), [8, 4]),
    "cosine": (lambda m, x: F.cosine_similarity(x, m.extra[0], dim=-1), ((8,),), [8]),
    "cosine of pairs": (
        lambda m, x: F.cosine_similarity(x[:, :, None], m.extra[0], dim=-1) @ m.extra[1],
        ((4, 8), (4, 2)),
        [8, 4],
    ),
    "pairwise_distance": (lambda m, x: F.pairwise_distance(x, m.extra[0]), ((8,),), [8]),
    "dist": (lambda m, x: torch.dist(x[0, 0], m.extra[0]), ((8,),), [8]),
    "linalg norm": (lambda m, x: x / torch.linalg.norm(m.extra[0], 2) @ m.extra[0], ((8, 4),), [8]),
    "matrix norm": (lambda m, x: x / torch.linalg.matrix_norm(m.extra[0]) @ m.extra[0], ((8, 4),), [8]),
    "nuclear norm": (lambda m, x: x / m.extra[0].norm("nuc") @ m.extra[0], ((8, 4),), [8]),
    "inverse": (lambda m, x: x @ torch.linalg.inv(m.extra[0]) @ m.extra[1], ((8, 8), (8, 2)), [8, 8]),
    "matrix_exp": (lambda m, x: x @ torch.matrix_exp(m.extra[0] * 0.1) @ m.extra[1], ((8, 8), (8, 2)), [8]),
    "diag_embed": (lambda m, x: (torch.diag_embed(x) @ m.extra[0]).sum(2), ((8, 2),), [8]),
    "windows of positions": (lambda m, x: x.unfold(1, 3, 1).transpose(2, 3) @ m.extra[0], ((8, 2),), [8]),
    "diagonal of positions": (lambda m, x: (x @ x.mT).diagonal(dim1=1, dim2=2), (), [8]),
    "einsum, ellipsis": (lambda m, x: torch.einsum("...e,ef->...f", x, m.extra[0]), ((8, 4),), [8]),
    "einsum, two ellipses": (
        lambda m, x: torch.einsum("...se,...te->...st", x, m.extra[0].expand(3, 5, 8)),
        ((8,),),
        [8],
    ),
    "slice with a step": (lambda m, x: x[..., ::2] @ m.extra[0] + x[..., 1::2] @ m.extra[1], ((4, 2), (4, 2)), [4]),
    "fft over positions": (lambda m, x: torch.fft.fft(x, dim=1).real @ m.extra[0], ((8, 2),), [8]),
    "rfft there and back": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * 2, n=5, dim=1) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "fft over two axes": (lambda m, x: torch.fft.fft2(x[None], dim=(0, 2)).real[0] @ m.extra[0], ((8, 2),), [8]),
    "fft over units": (lambda m, x: torch.fft.fft(x).real @ m.extra[0], ((8, 2),), []),
    "pairs as complex": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * 1j).flatten(-2) @ m.extra[0],
        ((8, 2),),
        [4],
    ),
    "conjugate": (lambda m, x: (torch.fft.fft(x, dim=1).conj().resolve_conj().imag) @ m.extra[0], ((8, 2),), [8]),
    "special_erf": (lambda m, x: torch.special.erf(x) @ m.extra[0], ((8, 2),), [8]),
    "special_log1p": (lambda m, x: torch.special.log1p(x.abs()) @ m.extra[0], ((8, 2),), [8]),
    "aminmax": (lambda m, x: sum(torch.aminmax(x, dim=-1)), (), [8]),
    "new_empty": (lambda m, x: x.new_empty(x.shape).copy_(x) @ m.extra[0], ((8, 2),), [8]),
    "grid_sample": (
        lambda m, x: F.grid_sample(
            x.transpose(1, 2)[..., :4].unflatten(2, (2, 2)), x.new_full((3, 3, 3, 2), 0.3), align_corners=False
        ).sum(1),
        (),
        [8],
    ),
    "fold": (
        lambda m, x: F.fold(x.transpose(1, 2).repeat_interleave(4, 1)[..., :1], (2, 2), 2).flatten(2).mT @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "fake quantisation": (
        lambda m, x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -8, 7).to(x) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
}

OTHERS: dict[str, Case] = {
    "det": (lambda m, x: x @ m.extra[0] * torch.linalg.det(m.extra[0][:2]), ((8, 2),), [6]),
    "det of a square": (lambda m, x: x @ m.extra[0] @ m.extra[1] * m.extra[0].det(), ((8, 8), (8, 2)), [8]),
    "matrix_power": (lambda m, x: x @ m.extra[0].matrix_power(3) @ m.extra[1], ((8, 8), (8, 2)), [8]),
    "trace": (lambda m, x: x @ m.extra[0] @ m.extra[1] * m.extra[0].trace(), ((8, 8), (8, 2)), [8]),
    "solve": (
        lambda m, x: torch.linalg.solve(m.extra[0].expand(3, 8, 8), x.mT).mT @ m.extra[1],
        ((8, 8), (8, 2)),
        [8, 8],
    ),
    "outer": (lambda m, x: torch.outer(x[0, 0], m.extra[0]).flatten() @ m.extra[1], ((3,), (24, 2)), [8, 3]),
    "cross": (lambda m, x: torch.linalg.cross(x[:, :3], m.extra[0][None], dim=1) @ m.extra[1], ((3, 8), (8, 2)), [8]),
    "take": (lambda m, x: x.take(torch.tensor([0, 9, 30])), (), []),
    "put": (lambda m, x: x.put(torch.tensor([0, 9]), m.extra[0]) @ m.extra[1], ((2,), (8, 2)), []),
    "masked_select": (lambda m, x: x.masked_select(x > x.min() - 1).view(15, 8) @ m.extra[0], ((8, 2),), []),
    "slice_scatter": (lambda m, x: x.slice_scatter(m.extra[0], 2, 0, 4) @ m.extra[1], ((3, 5, 4), (8, 2)), []),
    "channel fake quantisation": (
        lambda m, x: (
            torch.fake_quantize_per_channel_affine(
                x.float(), m.extra[0].float().abs() / 9 + 0.1, torch.zeros(8, dtype=torch.int32), 2, -8, 7
            ).to(x)
            @ m.extra[1]
        ),
        ((8,), (8, 2)),
        [8],
    ),
    "affine_grid": (
        lambda m, x: F.affine_grid(x[:, :2, :3], [3, 1, 2, 2], align_corners=False).flatten(1) @ m.extra[0],
        ((8, 2),),
        [5],
    ),
    "stft over positions": (
        lambda m, x: (
            torch.stft(x.mT.flatten(0, 1), 4, 2, window=torch.ones(4, dtype=x.dtype), return_complex=True, center=False)
            .abs()
            .unflatten(0, (3, 8))
            .sum((2, 3))
            @ m.extra[0]
        ),
        ((8, 2),),
        [8],
    ),
    "meshgrid": (
        lambda m, x: torch.meshgrid(m.extra[0], m.extra[1], indexing="xy")[0].T @ m.extra[2] @ x.sum(2)[0, :1],
        ((4,), (6,), (6, 1)),
        [6, 6, 8],
    ),
    "local response": (lambda m, x: F.local_response_norm(x.mT, 3).mT @ m.extra[0], ((8, 2),), []),
    "channel_shuffle": (lambda m, x: F.channel_shuffle(x.mT[..., None], 2)[..., 0].mT @ m.extra[0], ((8, 2),), [2, 4]),
    "bucketize": (
        lambda m, x: (torch.bucketize(x, torch.tensor([0.0, 0.5]).to(x)).to(x) + x) @ m.extra[0],
        ((8, 2),),
        [],
    ),
    "randperm": (lambda m, x: x[:, torch.randperm(5)] @ m.extra[0], ((8, 2),), [8]),
    "cauchy": (lambda m, x: (x + torch.empty_like(x).cauchy_()) @ m.extra[0], ((8, 2),), [8]),
    "geometric": (lambda m, x: (x * torch.empty_like(x).geometric_(0.4)) @ m.extra[0], ((8, 2),), [8]),
    "log_normal": (lambda m, x: (x * torch.empty_like(x).log_normal_(0.1, 0.3)) @ m.extra[0], ((8, 2),), [8]),
    "binomial": (lambda m, x: torch.binomial(x.abs().ceil() + 2, x.sigmoid()) @ m.extra[0], ((8, 2),), [8]),
    "gamma": (lambda m, x: torch._standard_gamma(x.abs() + 1) @ m.extra[0], ((8, 2),), [8]),
    "unit of the largest": (lambda m, x: x.argmax(-1).to(x), (), []),
}


@pytest.mark.parametrize("name", [*SCATTERED, *ALGEBRA, *OTHERS])
@pytest.mark.filterwarnings("ignore:SYM-W02:dimat.symmetry.SymmetryWarning")
def test_rule(name: str) -> None:
    """Reference: groups by hand; the network itself in float64 under random permutations of them."""
    operation, shapes, sizes = {**SCATTERED, **ALGEBRA, **OTHERS}[name]
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Around(operation, *shapes)
    inputs = torch.randn(3, 5, 3, generator=generator)
    spec = derive_symmetry(model, inputs)
    assert sorted(group.size for group in spec.groups) == sorted(sizes), spec.unknown_ops
    error = verify_symmetry(model, spec, inputs, generator)
    assert error < (1e-5 if "fake quantisation" in name else 1e-9)


class Stepped(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell: Any = kind(3, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: type[nn.RNNCellBase]) -> None:
    """Reference: one group of 8 hidden units in both weights, both biases and the head."""
    model, inputs = Stepped(kind), torch.randn(2, 4, 3)
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [8]
    assert verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(2)) < 1e-9


class Packed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 6)
        self.cells = nn.LSTM(6, 5, batch_first=True, **options)
        self.head = nn.Linear(options.get("proj_size", 5), 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(torch.tanh(self.layer(x)), lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize(("options", "sizes"), [({}, [5, 6]), ({"proj_size": 2}, [2, 5, 6])])
def test_packed_and_projected(options: dict[str, Any], sizes: list[int]) -> None:
    """Reference: by hand, the inputs' units, the cells', and those of the projection."""
    model, inputs = Packed(**options), (torch.randn(3, 4, 3), torch.tensor([4, 3, 1]))
    spec = derive_symmetry(model, inputs)
    assert sorted(group.size for group in spec.groups) == sizes, spec.warnings
    assert verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(2)) < 1e-9


class Unsorted(nn.Module):
    """Two ways through sequences of any order of lengths; torch sorts the last states back, which nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(3, 6, batch_first=True, bidirectional=True), nn.Linear(12, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0])


def test_states_that_nothing_uses_tie_no_units() -> None:
    """Reference: by hand, units for each direction; their last states lie in one tensor."""
    model, inputs = Unsorted(), (torch.randn(3, 4, 3), torch.tensor([3, 4, 1]))
    spec = derive_symmetry(model, inputs)
    assert [group.size for group in spec.groups] == [6, 6]
    assert verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(2)) < 1e-9
