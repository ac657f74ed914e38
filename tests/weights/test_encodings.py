"""Encodings of honest weights. References: the definition of each encoding in float64, torch's own casts, and
safetensors' reader and writer."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.encodings import ENCODINGS, SMALLEST, decode_weights, encode_weights, encoded_bytes
from dimat.weights.tensors import encode as whole
from dimat.weights.tensors import write_weights
from tests.weights.models import DTYPES, bits, network, same, weights

FORMS = ENCODINGS[1:]


@settings(max_examples=150)
@given(weights, st.sampled_from(FORMS))
def test_a_form_decodes_to_what_is_published(own: dict[str, Tensor], encoding: str) -> None:
    """decode(encode(w)) is x̂ to the last bit, for all types and shapes; x̂ has w's names, types and shapes, is
    finite, and is no larger than was announced; w is left as it was."""
    before = {name: bits(tensor) for name, tensor in own.items()}
    encoded = encode_weights(own, encoding)
    assert encoded.data is not None
    assert same(decode_weights(encoded.data), encoded.weights)
    assert {n: (t.dtype, t.shape) for n, t in encoded.weights.items()} == {
        n: (t.dtype, t.shape) for n, t in own.items()
    }
    assert all(bool(t.isfinite().all()) for t in encoded.weights.values() if t.dtype == torch.float32)
    assert len(encoded.data) <= encoded_bytes(own, encoding)
    assert {name: bits(tensor) for name, tensor in own.items()} == before


@settings(max_examples=60)
@given(weights, weights)
def test_a_delta_decodes_to_what_is_published(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same of int8 deltas, whatever the snapshot before was, by mapping and by file."""
    held = {
        name: other[name] if name in other and bits(other[name])[:2] == bits(tensor)[:2] else torch.zeros_like(tensor)
        for name, tensor in own.items()
    }
    encoded = encode_weights(own, "int8", after=held)
    assert encoded.data is not None
    assert encoded.residual == {}
    assert same(decode_weights(encoded.data, after=held), encoded.weights)
    assert all(bool(t.isfinite().all()) for t in encoded.weights.values() if t.dtype == torch.float32)
    assert len(encoded.data) <= encoded_bytes(own, "int8")


@settings(max_examples=50)
@given(weights)
def test_fp32_is_the_payload_itself(own: dict[str, Tensor]) -> None:
    """No form, no loss; and the bound is one of what `snapshot.encode` writes."""
    encoded = encode_weights(own, "fp32")
    assert encoded.data is None
    assert encoded.residual == {}
    assert same(encoded.weights, own)
    assert len(whole(own)) <= encoded_bytes(own, "fp32")


def test_files_are_safetensors_and_the_same_for_equal_weights(tmp_path: Path) -> None:
    """safetensors' own reader reads a form; order and strides of what is handed in change no byte; a file, read
    tensor by tensor, gives what its bytes give, and so does the snapshot before."""
    own, held = network(1), network(0)
    encoded = encode_weights(own, "int8", after=held)
    assert encoded.data is not None
    read = safetensors.torch.load(encoded.data)
    assert read["value:first.weight"].dtype == torch.int8
    assert read["scale:first.weight"].shape == (-(-96 * 61 // 256),)
    assert torch.equal(read["exact:first.bias"], own["first.bias"])
    with (tmp_path / "form").open("wb") as file:
        file.write(encoded.data)
    with safetensors.safe_open(tmp_path / "form", "pt") as opened:
        assert opened.metadata() == {"dimat.encoding": "int8", "dimat.kind": "delta", "format": "1"}
    write_weights(tmp_path / "held", held)
    assert same(decode_weights(tmp_path / "form", after=tmp_path / "held"), encoded.weights)
    strided = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in own.items()}
    again = encode_weights(dict(reversed(strided.items())), "int8", after=tmp_path / "held")
    assert again.data == encoded.data
    assert same(again.weights, encoded.weights)


def test_tied_weights_are_written_out() -> None:
    """Tensors that share memory are each stored whole, as in a snapshot."""
    matrix = torch.randn(40, 40)
    tied = {"a": matrix, "b": matrix, "bias": matrix[0], "turned": matrix.T, "aux.c": matrix}
    for encoding in FORMS:
        encoded = encode_weights(tied, encoding)
        assert encoded.data is not None
        assert same(decode_weights(encoded.data), encoded.weights)


def test_what_is_stored_as_it_is() -> None:
    """Small tensors, other types, statistics, and tensors with numbers too large for the encoding."""
    own = {
        "small": torch.randn(SMALLEST - 1),
        "aux.gram.w": torch.randn(64, 64),
        "huge": torch.full((SMALLEST,), 1e38),
        **{str(dtype): torch.ones(SMALLEST, dtype=dtype) for dtype in DTYPES if dtype != torch.float32},
    }
    for encoding in FORMS:
        encoded = encode_weights({**own, "large": torch.randn(SMALLEST)}, encoding)
        assert encoded.data is not None
        stored = safetensors.torch.load(encoded.data)
        expected = own.keys() - ({"huge"} if encoding == "bf16" else set())
        assert {name.removeprefix("exact:") for name in stored if name.startswith("exact:")} == expected
        assert same({name: encoded.weights[name] for name in expected}, {name: own[name] for name in expected})
        assert not torch.equal(encoded.weights["large"], own["small"].new_zeros(SMALLEST))


@pytest.mark.parametrize(
    ("encoding", "dtype", "largest"), [("bf16", torch.bfloat16, 3.4e38), ("fp16", torch.float16, 65505.0)]
)
def test_halves_are_torchs_casts_unless_they_overflow(encoding: str, dtype: torch.dtype, largest: float) -> None:
    """x̂ is the cast to half and back; one number beyond the type's range, and the tensor is kept in fp32."""
    own = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    over = own.clone()
    over[3, 4] = -largest
    encoded = encode_weights({"w": own, "over": over}, encoding)
    assert bits(encoded.weights["w"]) == bits(own.to(dtype).to(torch.float32))
    assert bits(encoded.weights["over"]) == bits(over)
    relative = (encoded.weights["w"] - own).abs() / own.abs()
    assert float(relative[own.abs() > 1e-4].max()) <= 2.0 ** (-8 if encoding == "bf16" else -11)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -3.4e38, 1.6e38])
def test_differences_and_residuals_that_overflow_are_not_quantised(odd: float) -> None:
    """A snapshot before, or a residual, with one number that is no number or huge: that tensor is stored as it is,
    its residual is forgotten, and what is published is finite."""
    own = network()
    held = {**own, "last.weight": own["last.weight"].clone()}
    held["last.weight"][3, 4] = odd
    residual = {"last.weight": held["last.weight"]}
    delta, plain = encode_weights(own, "int8", after=held), encode_weights(own, "int8", residual=residual)
    for encoded in (delta, plain):
        assert encoded.data is not None
        assert same(decode_weights(encoded.data, after=held), encoded.weights)
        assert bits(encoded.weights["last.weight"]) == bits(own["last.weight"])
        assert "value:first.weight" in safetensors.torch.load(encoded.data)
    assert plain.residual.keys() == {"first.weight"}


def scales_of(data: bytes | None, name: str, count: int) -> Tensor:
    assert data is not None
    return safetensors.torch.load(data)[f"scale:{name}"].double().repeat_interleave(256)[:count]


@settings(max_examples=80)
@given(
    st.integers(SMALLEST, 3000),
    st.integers(0, 10**6),
    st.sampled_from([1e-45, 1e-42, 1e-38, 1e-5, 1.0, 1e10, 2.0**124]),
    st.integers(0, 40),
)
def test_int8_is_off_by_half_a_scale_at_most(count: int, seed: int, size: float, spread: int) -> None:
    """|x̂ - w| ≤ scale / 2 in float64, with scale = max|w| / 127 of each block of 256 (the smallest normal number where
    that is smaller); subnormal weights, blocks of zeros and blocks of very unequal numbers too."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, generator=generator).clamp(-3, 3) * torch.rand(count, generator=generator) ** spread * size
    own[256:512] = 0
    encoded = encode_weights({"w": own}, "int8")
    scale = scales_of(encoded.data, "w", count)
    largest = torch.stack([block.abs().max() for block in own.double().split(256)]).repeat_interleave(256)[:count]
    expected = torch.where(largest > 0, (largest / 127).clamp_min(2.0**-126), 0)
    assert torch.allclose(scale, expected, rtol=1e-6, atol=0)
    missed = (encoded.weights["w"].double() - own.double()).abs()
    # a quotient next to a half may be rounded to either side: a few units in the last place of 127
    assert bool((missed <= scale / 2 * (1 + 1e-4)).all())
    assert bits(encoded.weights["w"][256:512]) == bits(torch.zeros(256))


def test_int8_of_a_block_written_out() -> None:
    """By hand: max 127 gives scale 1, halves go to the even side, and x̂ are whole numbers."""
    own = torch.zeros(SMALLEST)
    own[:6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -2.5, -3.4])
    encoded = encode_weights({"w": own}, "int8")
    assert encoded.weights["w"][:6].tolist() == [127, 0, 2, 2, -2, -3]
    assert encoded.residual["w"][:6].tolist() == pytest.approx([0, 0.5, -0.5, 0.5, -0.5, -0.4], abs=1e-6)
    assert bits(encoded.weights["w"][1:2]) == bits(torch.zeros(1))


def test_what_int8_misses_is_made_up_for() -> None:
    """Error feedback: with weights that stand still, the mean of x̂ over T rounds is off by half a scale / T at most,
    where without it the error stays; encoded + residual is always what was to be encoded."""
    own = network()
    rounds = 64
    total = torch.zeros_like(own["first.weight"], dtype=torch.float64)
    residual: dict[str, Tensor] = {}
    for _ in range(rounds):
        before = own["first.weight"].double() + residual.get("first.weight", torch.zeros(1)).double()
        encoded = encode_weights(own, "int8", residual=residual)
        residual = encoded.residual
        assert residual.keys() == {"first.weight", "last.weight"}
        assert torch.allclose(encoded.weights["first.weight"] + residual["first.weight"].double(), before, atol=1e-8)
        total += encoded.weights["first.weight"]
    plain = encode_weights(own, "int8")
    scale = float(scales_of(plain.data, "first.weight", 1).max())
    missed = (total / rounds - own["first.weight"]).abs().max()
    assert float(missed) <= scale / rounds
    assert float((plain.weights["first.weight"] - own["first.weight"]).abs().max()) > 10 * float(missed)


def test_deltas_close_in() -> None:
    """With weights that stand still each delta leaves a hundredth or less of the error before, down to float32's
    precision; without an error there is nothing to send but zeros."""
    own, held = network(1), network(0)
    worst = [float((held["last.weight"] - own["last.weight"]).abs().max())]
    for _ in range(5):
        held = encode_weights(own, "int8", after=held).weights
        worst.append(float((held["last.weight"] - own["last.weight"]).abs().max()))
    precision = float(own["last.weight"].abs().max()) * 2.0**-23
    assert worst[0] > 1
    assert all(later <= max(sooner / 100, precision) for sooner, later in pairwise(worst))
    assert worst[-1] <= precision
    still = encode_weights(held, "int8", after=held)
    assert still.data is not None
    assert same(still.weights, held)
    assert not safetensors.torch.load(still.data)["value:last.weight"].any()


def test_threads_change_no_bit() -> None:
    """One thread or two, a tensor of several pieces: the same form, x̂, and decoded weights."""
    generator = torch.Generator().manual_seed(0)
    own = {"w": torch.randn(700_001, generator=generator), "v": torch.randn(999, 700, generator=generator)}
    held = {name: tensor + torch.randn(tensor.shape, generator=generator) / 100 for name, tensor in own.items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            plain, delta = encode_weights(own, "int8"), encode_weights(own, "int8", after=held)
            assert plain.data is not None
            assert delta.data is not None
            decoded = [decode_weights(plain.data), decode_weights(delta.data, after=held)]
            assert same(decoded[0], plain.weights)
            assert same(decoded[1], delta.weights)
            results.append((plain.data, delta.data, {n: bits(t) for n, t in decoded[1].items()}))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_vector_instructions_change_no_bit(tmp_path: Path) -> None:
    """Decoded without vector instructions and with this machine's widest, a form gives the same address; the same
    operations in numpy give it too."""
    own, held = network(1), network(0)
    encoded = encode_weights(own, "int8", after=held)
    assert encoded.data is not None
    (tmp_path / "form").write_bytes(encoded.data)
    write_weights(tmp_path / "held", held)
    script = """
        import sys
        from pathlib import Path
        from dimat.weights.snapshot import checksum
        from dimat.weights.tensors import encode
        from dimat.weights.encodings import decode_weights
        folder = Path(sys.argv[1])
        print(checksum(encode(decode_weights(folder / "form", after=folder / "held"))).root)
    """
    command = [sys.executable, "-c", dedent(script), str(tmp_path)]
    environments = [{"ATEN_CPU_CAPABILITY": "default"}, {}]
    roots = {
        subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True).stdout
        for more in environments
    }
    assert len(roots) == 1
    stored = safetensors.torch.load(encoded.data)
    scale = stored["scale:last.weight"].numpy().repeat(256)[: 40 * 96].reshape(40, 96)
    by_hand = stored["value:last.weight"].numpy().astype("float32") * scale + held["last.weight"].numpy()
    assert by_hand.tobytes() == encoded.weights["last.weight"].numpy().tobytes()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["first.weight", "first.bias", "aux.fisher.first.weight"])
def test_weights_that_are_not_finite_are_never_published(encoding: str, value: float, name: str) -> None:
    """Bad input: one number of one tensor; the tensor is named."""
    own = network()
    own[name].view(-1)[17] = value
    with pytest.raises(DataError, match=f"'{name}' holds numbers that are not finite"):
        encode_weights(own, encoding)


def test_what_does_not_fit_together_is_said() -> None:
    """Bad input of the program's own: unknown encodings, deltas where there are none, another model's snapshot."""
    own = network()
    with pytest.raises(DataError, match=r"unknown encoding 'bf61'.*did you mean 'bf16'"):
        encode_weights(own, "bf61")
    for encoding in ("fp32", "bf16", "fp16"):
        with pytest.raises(DataError, match=f"no delta in {encoding}"):
            encode_weights(own, encoding, after=own)
    with pytest.raises(DataError, match="not both"):
        encode_weights(own, "int8", after=own, residual={"last.weight": torch.zeros(40, 96)})
    with pytest.raises(DataError, match=r"`after` has no tensor 'first\.weight'"):
        encode_weights(own, "int8", after={})
    with pytest.raises(DataError, match=r"'last\.weight' of `after` is F32\[96, 40\], not F32\[40, 96\]"):
        encode_weights(own, "int8", after={**own, "last.weight": torch.zeros(96, 40)})
    with pytest.raises(DataError, match="of `residual` is F64"):
        encode_weights(own, "int8", residual={"last.weight": torch.zeros(40, 96, dtype=torch.float64)})
    with pytest.raises(DataError, match=r"'z' is of type torch\.complex128"):
        encode_weights({"z": torch.zeros(2, dtype=torch.complex128)}, "int8")


def test_bounds_need_no_tensors() -> None:
    """`encoded_bytes` takes a model on the meta device: types and shapes are enough."""
    own = network()
    for encoding in ENCODINGS:
        assert encoded_bytes({n: t.to("meta") for n, t in own.items()}, encoding) == encoded_bytes(own, encoding)


def test_more_names_than_numbers_have_no_form() -> None:
    """A header that a reader would not parse is not written: there is no form then, and x̂ is the same."""
    own = {f"{'layer' * 30}.{i}": torch.ones(2) for i in range(8000)}
    encoded = encode_weights(own, "int8")
    assert encoded.data is None
    assert same(encoded.weights, own)
