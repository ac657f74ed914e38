"""Operations that few models use: each keeps the units that it should, proven by numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dimat.symmetry import derive_symmetry, verify_symmetry
from tests.symmetry.test_rules import Around

Operation = Callable[[Around, Tensor], Tensor]
Case = tuple[Operation, tuple[tuple[int, ...], ...], list[int]]

_SPECIAL = (
    *(
        "erf",
        "erfc",
        "erfinv",
        "exp2",
        "expm1",
        "log1p",
        "sinc",
        "round",
        "digamma",
        "gammaln",
        "psi",
        "logit",
        "expit",
    ),
    *("i0", "i0e", "i1", "i1e", "erfcx", "entr", "ndtr", "ndtri", "log_ndtr"),
)
_PLAIN = (
    *("arcsin", "arccos", "arctan", "arcsinh", "arctanh", "absolute", "negative", "fix", "positive", "square", "frac"),
    *("isfinite", "isreal", "isinf", "isnan", "logical_not", "nan_to_num", "rsqrt", "reciprocal", "sign", "signbit"),
    *("lgamma", "deg2rad", "floor", "ceil", "trunc", "cosh", "sgn"),
)
_LAYERS = (
    *("selu", "celu", "relu6", "softplus", "mish", "silu", "elu", "gelu", "hardtanh", "hardswish", "hardsigmoid"),
    *("logsigmoid", "softsign", "tanhshrink", "softshrink", "hardshrink", "leaky_relu", "rrelu"),
)
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"special {name}": getattr(torch.special, name) for name in _SPECIAL},
    **{name: getattr(torch, name) for name in _PLAIN},
    **{f"functional {name}": getattr(F, name) for name in _LAYERS},
    "arccosh": lambda x: torch.arccosh(x + 1),
    "polygamma": lambda x: torch.special.polygamma(1, x),
    "multigammaln": lambda x: torch.special.multigammaln(x + 2, 2),
    "threshold": lambda x: F.threshold(x, 0.5, 0.1),
    "clip": lambda x: x.clip(0.4, 0.6),
    "clamp_min in place": lambda x: x.clone().clamp_min_(0.5),
    "to integers and back": lambda x: (x * 9).to(torch.int64).type_as(x),
    "shifts": lambda x: (((x * 9).long() << 2) >> 1).to(x),
    "bits": lambda x: (((x > 0.5) ^ (x < 0.4)) | ((x > 0.3) & ~(x > 0.9))).to(x),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "feature dropout": lambda x: F.dropout1d(x, 0.4, training=False),
    "fill": lambda x: x.clone().fill_(0.3) + x,
    "full_like": lambda x: torch.full_like(x, 0.3) + torch.ones_like(x) * x,
    "new_ones": lambda x: x.new_ones(x.shape) * x + x.new_full((8,), 0.2),
    "empty_strided": lambda x: torch.empty_strided((3, 5, 8), (40, 8, 1), dtype=x.dtype).copy_(x),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randint_like": lambda x: x * torch.randint_like(x, 1, 5),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, -1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "renorm": lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(0.1),
    "polar": lambda x: torch.polar(x, x * 2).real,
    "complex": lambda x: torch.complex(x, x * 2).abs(),
    "physical conjugate": lambda x: torch.conj_physical(torch.complex(x, x * 2)).imag.resolve_neg(),
    "inverse transform": lambda x: torch.fft.ifft(x, dim=1).real,
    "hermitian transforms": lambda x: torch.fft.hfft(torch.fft.ihfft(x, dim=1), n=5, dim=1),
    "shifted frequencies": lambda x: torch.fft.ifftshift(torch.fft.fftshift(x * 2, dim=1), dim=1).roll(1, 1),
    "lowest": lambda x: x - x.amin(-1, keepdim=True) + x.nansum(-1, keepdim=True) - x.nanmean(-1, keepdim=True),
    "moments": lambda x: x - sum(torch.var_mean(x, -1, keepdim=True)) + torch.std_mean(x, -1, keepdim=True)[0],
    "counted": lambda x: x * torch.count_nonzero(x > 0.5, -1)[..., None],
    "middle of positions": lambda x: x + x.median(1, keepdim=True)[0] + x.kthvalue(2, 1, keepdim=True)[0],
    "ranks of positions": lambda x: x + x.argsort(1).to(x) + x.sort(1)[0] + x.argmin(1, keepdim=True).to(x),
    "most frequent": lambda x: x + x.mode(1, keepdim=True)[0],
    "running": lambda x: x.cumprod(1) + x.logcumsumexp(1) + x.cummax(1)[0] + x.cummin(1)[0],
    "differences": lambda x: torch.cat([x[:, :1], x.diff(dim=1)], 1),
    "quantile of positions": lambda x: x + x.quantile(0.4, dim=1, keepdim=True),
    "axes swapped": lambda x: x.swapaxes(1, 2).swapdims(0, 1).moveaxis(0, -1),
    "adjoint": lambda x: x.adjoint().mH.mT.mH,
    "flat": lambda x: x.ravel().view_as(x).reshape_as(x),
    "tiles": lambda x: x.tile(1, 2, 1)[:, 5:],
    "broadcast": lambda x: x[:, :1].broadcast_to(3, 5, 8) + x,
    "averages of positions": lambda x: x + F.avg_pool1d(x.mT, 3, 1, 1).mT + F.adaptive_avg_pool1d(x.mT, 5).mT,
    "largest of positions": lambda x: x + F.max_pool1d(x.mT, 3, 1, 1).mT + F.adaptive_max_pool1d(x.mT, 1).mT,
    "norm pool": lambda x: x + F.lp_pool1d(x.mT, 2, 5).mT,
    "replicated": lambda x: F.pad(x.mT, (2, 1), mode="replicate").mT[:, 1:6],
    "circular": lambda x: F.pad(x.mT, (2, 1), mode="circular").mT[:, 1:6],
    "enlarged": lambda x: F.interpolate(x.mT, 5, mode="linear").mT + F.interpolate(x.mT, 5, mode="nearest-exact").mT,
    "enlarged in two": lambda x: F.interpolate(x.mT[..., None], (5, 2), mode="bicubic").mean(-1).mT,
    "enlarged in three": lambda x: F.interpolate(x.mT[..., None, None], (5, 2, 2), mode="trilinear").mean((3, 4)).mT,
    "smoothed in two": lambda x: F.interpolate(x.mT[..., None], (5, 2), mode="bilinear", antialias=True).mean(-1).mT,
    "group norm of one": lambda x: F.group_norm(x.mT, 1).mT,
    "instance norm": lambda x: F.instance_norm(x.mT).mT,
    "root mean square": lambda x: F.rms_norm(x, (8,)),
}


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("lerp", "multiply", "divide", "subtract", "arctan2", "float_power")},
    **{
        name: getattr(torch, name)
        for name in ("greater", "greater_equal", "less", "less_equal", "not_equal", "isclose")
    },
    **{name: getattr(torch, name) for name in ("floor_divide", "true_divide", "rsub", "hypot", "fmod", "isclose")},
    **{f"special {n}": getattr(torch.special, n) for n in ("xlogy", "xlog1py", "gammainc", "gammaincc", "zeta")},
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.5),
    "heaviside": lambda x, y: torch.heaviside(x - 0.5, y),
    "copysign": torch.copysign,
}
BINARY["lerp"] = lambda x, y: torch.lerp(x, y, 0.3)
BINARY["special zeta"] = lambda x, y: torch.special.zeta(x + 2, y)

SHAPED: dict[str, Case] = {
    "mv": (lambda m, x: torch.mv(m.extra[0], x[0, 0]), ((2, 8),), [8]),
    "dot": (lambda m, x: torch.dot(x[0, 0], m.extra[0]), ((8,),), [8]),
    "mm": (lambda m, x: torch.mm(x[:, 0], m.extra[0]), ((8, 2),), [8]),
    "baddbmm": (lambda m, x: torch.baddbmm(m.extra[1], x, m.extra[0].expand(3, 8, 2)), ((8, 2), (2,)), [8]),
    "addmv": (lambda m, x: torch.addmv(m.extra[1], m.extra[0], x[0, 0]), ((2, 8), (2,)), [8]),
    "addbmm": (lambda m, x: torch.addbmm(m.extra[1], x, m.extra[0].expand(3, 8, 2)), ((8, 2), (2,)), [8]),
    "addr": (lambda m, x: torch.addr(m.extra[1], x[0, 0], m.extra[0]).sum(0), ((2,), (8, 2)), [8]),
    "chain": (lambda m, x: torch.linalg.multi_dot([x[0], m.extra[0], m.extra[1]]), ((8, 6), (6, 2)), [6, 8]),
    "narrow": (lambda m, x: x.narrow(2, 0, 3) @ m.extra[0] + x[..., 3:] @ m.extra[1], ((3, 2), (5, 2)), [3, 5]),
    "tensor_split": (lambda m, x: sum(p @ m.extra[0] for p in x.tensor_split(2, -1)), ((4, 2),), [4]),
    "split by sizes": (
        lambda m, x: x.split([3, 5], -1)[0] @ m.extra[0] + x.split_with_sizes([3, 5], -1)[1] @ m.extra[1],
        ((3, 2), (5, 2)),
        [3, 5],
    ),
    "unsafe pieces": (
        lambda m, x: x.unsafe_chunk(2, -1)[0] @ m.extra[0] + x.unsafe_split(4, -1)[1] @ m.extra[0],
        ((4, 2),),
        [4],
    ),
    "padded": (lambda m, x: F.pad(x, (2, 1), value=0.3) @ m.extra[0], ((11, 2),), [2, 8]),
    "cut by a pad": (lambda m, x: F.pad(x, (-2, 0)) @ m.extra[0], ((6, 2),), [2, 6]),
    "concatenated": (lambda m, x: torch.concatenate([x, x * 2], -1) @ m.extra[0], ((16, 2),), [8]),
    "stacked columns": (lambda m, x: torch.column_stack([x[0], x[1]]) @ m.extra[0], ((16, 2),), [8]),
    "vectors as columns": (
        lambda m, x: torch.column_stack([m.extra[0], x[0].mT, m.extra[1]]).mT @ m.extra[2],
        ((8,), (8, 2), (8, 2)),
        [8],
    ),
    "vectors as rows": (lambda m, x: torch.vstack([x[0], m.extra[0], x[1]]) @ m.extra[1], ((8,), (8, 2)), [8]),
    "vectors one after the other": (
        lambda m, x: torch.hstack([x[0, 0], m.extra[0]]) @ m.extra[1],
        ((3,), (11, 2)),
        [3, 8],
    ),
    "select_scatter": (lambda m, x: x.select_scatter(m.extra[0], 1, 2) @ m.extra[1], ((3, 8), (8, 2)), []),
    "positions of a pattern": (
        lambda m, x: x * torch.linspace(0, 1, 5, dtype=x.dtype)[:, None] @ m.extra[0] * torch.logspace(0, 1, 2).to(x),
        ((8, 2),),
        [8],
    ),
    "windows": (
        lambda m, x: sum(x * window(5, dtype=x.dtype)[:, None] for window in WINDOWS) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
    "frequencies": (
        lambda m, x: x * torch.fft.fftfreq(5, dtype=x.dtype)[:, None] @ m.extra[0] + torch.fft.rfftfreq(2)[0],
        ((8, 2),),
        [8],
    ),
    "triangle": (lambda m, x: (x @ x.mT).triu() @ (x @ x.mT).tril() @ x @ m.extra[0], ((8, 2),), [8]),
    "logdet": (lambda m, x: x @ m.extra[0] * (m.extra[0].mT @ m.extra[0]).logdet(), ((8, 2),), [8]),
    "slogdet": (lambda m, x: x @ m.extra[0] * torch.linalg.slogdet(m.extra[0].mT @ m.extra[0])[1], ((8, 2),), [8]),
    "pinv": (lambda m, x: x @ torch.linalg.pinv(m.extra[0]), ((2, 8),), [8]),
    "searched": (
        lambda m, x: torch.searchsorted(torch.tensor([0.0, 0.5]).to(x), x.sum(-1)).to(x),
        (),
        [8],
    ),
    "histogram": (lambda m, x: torch.bincount((x[0, :, 0] > 0).long(), minlength=2).to(x) + x.sum(-1).sum(), (), [7]),
    "rotated": (lambda m, x: x.mT[..., None].rot90(2, (2, 3))[..., 0].mT @ m.extra[0], ((8, 2),), [8]),
    "shuffled pixels": (
        lambda m, x: F.pixel_shuffle((x @ m.extra[0]).mT[..., None].expand(3, 8, 5, 5), 2).sum((2, 3)) @ m.extra[1],
        ((8, 8), (2, 2)),
        [2, 8],
    ),
    "unshuffled pixels": (
        lambda m, x: F.pixel_unshuffle(x.mT[..., :4].unflatten(2, (2, 2)), 2).flatten(1) @ m.extra[0],
        ((32, 2),),
        [8],
    ),
    "columns of an image": (
        lambda m, x: F.unfold(x.mT[..., :4].unflatten(2, (2, 2)), 2).mT @ m.extra[0],
        ((32, 2),),
        [8],
    ),
    "volume": (
        lambda m, x: (
            F.grid_sample(x.mT[..., :4].reshape(3, 8, 1, 2, 2), x.new_full((3, 1, 2, 2, 3), 0.2), align_corners=False)
            .flatten(2)
            .mT
            @ m.extra[0]
        ),
        ((8, 2),),
        [8],
    ),
    "learned quantisation": (
        lambda m, x: (
            torch._fake_quantize_learnable_per_channel_affine(
                x.float(), m.extra[0].float().abs() / 9 + 0.1, m.extra[1].float() * 0, 2, -8, 7, 1.0
            ).to(x)
            @ m.extra[2]
        ),
        ((8,), (8,), (8, 2)),
        [8],
    ),
    "learned quantisation, one scale": (
        lambda m, x: (
            torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), m.extra[0].float().abs() / 9 + 0.1, m.extra[0].float() * 0, -8, 7, 1.0
            ).to(x)
            @ m.extra[1]
        ),
        ((1,), (8, 2)),
        [8],
    ),
    "there and back in time": (
        lambda m, x: (
            torch.istft(
                torch.stft(x.mT.flatten(0, 1).repeat(1, 4), 4, 2, window=x.new_ones(4), return_complex=True) * 2,
                4,
                2,
                window=x.new_ones(4),
                length=20,
            )
            .unflatten(0, (3, 8))
            .mT
            @ m.extra[0]
        ),
        ((8, 2),),
        [8],
    ),
    "once each": (lambda m, x: (torch.unique((x[0, :, 0] * 9).long()).to(x).sum() + x.sum(-1)).sum(), (), [7]),
    "where not zero": (lambda m, x: x[0][torch.argwhere(x[0, :, 0].abs() >= 0)[:, 0]] @ m.extra[0], ((8, 2),), [7]),
    "rows put": (lambda m, x: x[0].index_put((torch.tensor([1, 3]),), m.extra[0]) @ m.extra[1], ((2, 8), (8, 2)), [8]),
    "rows added": (
        lambda m, x: x[0].index_put((torch.tensor([1, 1]),), m.extra[0], accumulate=True) @ m.extra[1],
        ((2, 8), (8, 2)),
        [8],
    ),
    "gathered rows": (
        lambda m, x: x[0].gather(0, torch.tensor([[1], [3]]).expand(2, 8)) @ m.extra[0],
        ((8, 2),),
        [8],
    ),
}

WINDOWS = (torch.hann_window, torch.hamming_window, torch.bartlett_window, torch.blackman_window, torch.kaiser_window)


AT_ONCE = 12
"""Operations in one model: a trace of each would take ten times as long."""


def _check(operation: Operation, shapes: tuple[tuple[int, ...], ...], sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Around(operation, *shapes)
    inputs = torch.randn(3, 5, 3, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = derive_symmetry(model, inputs)
    assert sorted(group.size for group in spec.groups) == sorted(sizes), spec.unknown_ops
    assert verify_symmetry(model, spec, inputs, generator) < 1e-5


def _batches(names: Iterable[str]) -> list[object]:
    listed = list(names)
    batches = [listed[start : start + AT_ONCE] for start in range(0, len(listed), AT_ONCE)]
    return [pytest.param(batch, id=f"{batch[0]} and on") for batch in batches]


@pytest.mark.parametrize("names", _batches(UNARY))
def test_each_entry_alone(names: list[str]) -> None:
    """Reference: eight units, by hand; the network itself under random permutations of them."""

    def operation(m: Around, x: Tensor) -> Tensor:
        x = x.abs() * 0.4 + 0.3
        return sum((UNARY[name](x).to(x) for name in names), x) @ m.extra[0]

    _check(operation, ((8, 2),), [8])


@pytest.mark.parametrize("names", _batches(BINARY))
def test_entries_of_two(names: list[str]) -> None:
    """Reference: eight units in both tensors, by hand; the network itself."""

    def operation(m: Around, x: Tensor) -> Tensor:
        x, y = x.abs() * 0.4 + 0.3, m.extra[1].abs() + 0.5
        return sum((BINARY[name](x, y).to(x) for name in names), x) @ m.extra[0]

    _check(operation, ((8, 2), (8,)), [8])


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.filterwarnings("ignore:SYM-W02:dimat.symmetry.SymmetryWarning")
def test_shapes(name: str) -> None:
    """Reference: groups by hand; the network itself."""
    _check(*SHAPED[name])
