"""The screen: what is refused, and what the refusal says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dimat import merge_weights
from dimat.errors import MergeError, PeerError
from dimat.merge.screen import norm_of, screen


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"conv.weight": torch.randn(4, 3, generator=g), "bias": torch.ones(1), "count": torch.tensor(3)}


def check(peer: dict[str, Tensor], **options: float) -> None:
    own = weights()
    screen(own, peer, "lab-b", norm_of(own), **options)


def test_equal_schema_passes() -> None:
    """Same names, shapes, dtypes; other integer values do not matter."""
    check(weights() | {"count": torch.tensor(-7)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(2)}, r"lab-b: tensor 'bias' is float32\[2\], ours float32\[1\]"),
        ({"bias": torch.zeros(1).half()}, r"lab-b: tensor 'bias' is float16\[1\]"),
        ({"count": torch.tensor(3.0)}, "lab-b: tensor 'count' is float32"),
        (
            {"conv.weigth": torch.zeros(1)},
            "lab-b: tensor 'conv.weigth' is not in our model; did you mean 'conv.weight'",
        ),
        ({"bias": torch.tensor([torch.nan])}, "lab-b: tensor 'bias' holds 1 values that are not finite"),
        ({"conv.weight": torch.full((4, 3), -torch.inf)}, "lab-b: tensor 'conv.weight' holds 12 values"),
    ],
)
def test_refusals_name_agent_and_tensor(change: dict[str, Tensor], message: str) -> None:
    """Wrong shape, dtype, kind, name, NaN, infinity."""
    with pytest.raises(PeerError, match=message):
        check(weights() | change)


def test_a_missing_tensor_is_named() -> None:
    """A peer with fewer tensors is another architecture."""
    peer = weights()
    del peer["bias"]
    with pytest.raises(PeerError, match="lab-b: tensor 'bias' is missing"):
        check(peer)


def test_names_of_any_length_make_no_long_lines() -> None:
    """A large model's header has room for names of many megabytes, and refusals are kept in logs, round after round."""
    with pytest.raises(PeerError, match="lab-b: tensor 'xxxxx") as refused:
        check(weights() | {"x" * 2**22: torch.zeros(1)})
    assert len(str(refused.value)) <= PeerError.LONGEST + 2


def test_norm_bound() -> None:
    """10 times own norm by default, an option; zero own weights bound nothing."""
    large = {name: tensor * 11 for name, tensor in weights().items()}
    with pytest.raises(PeerError, match=r"exceed 10 times ours .*largest tensor 'conv\.weight'"):
        check(large)
    check(large, max_norm_ratio=12.0)
    zero = {"w": torch.zeros(2)}
    screen(zero, {"w": torch.ones(2)}, "lab-b", norm_of(zero))


def test_finite_values_of_any_size_are_finite() -> None:
    """Squares of 1e200 overflow double precision; they are too large, not "not finite"."""
    own = {"w": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(PeerError, match="exceed"):
        screen(own, {"w": torch.full((2,), 1e200, dtype=torch.float64)}, "lab-b", norm_of(own))


def test_own_weights_that_are_not_finite_are_an_error() -> None:
    """Nothing sensible can be merged into them."""
    with pytest.raises(MergeError, match="own weights: tensor 'bias' holds 1"):
        norm_of(weights() | {"bias": torch.tensor([torch.inf])})


def test_tensors_whose_numbers_cannot_be_read_one_by_one_are_told() -> None:
    """Reference: torch's own kinds of tensors; own weights and a peer's, in one line."""
    dense = {"w": torch.eye(3)}
    for odd, message in (
        (torch.eye(3).to_sparse(), "is sparse coo; give it dense"),
        (torch.empty(3, 3, device="meta"), "has no values"),
    ):
        with pytest.raises(MergeError, match=f"own weights: tensor 'w' {message}"):
            merge_weights({"w": odd}, [dense], [0.5, 0.5], method="average")
        with pytest.raises(PeerError, match=f"tensor 'w' {message}"):
            merge_weights(dense, [{"w": odd}], [0.5, 0.5], method="average")
