"""Forms made by an enemy: `decode_weights` raises DataError, and takes little memory. Reference: forms that decode."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.errors import DataError
from dimat.weights.encodings import FORMAT, decode_weights, encode_weights
from tests.weights.models import network

HELD = network(0)
FORMS = {encoding: encode_weights(network(1), encoding).data or b"" for encoding in ("bf16", "fp16", "int8")}
FORMS["delta"] = encode_weights(network(1), "int8", after=HELD).data or b""


def form(tensors: dict[str, Tensor], encoding: str = "int8", kind: str = "whole", format_: str = FORMAT) -> bytes:
    metadata = {"dimat.encoding": encoding, "dimat.kind": kind, "format": format_}
    return safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


def file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


METADATA = {"dimat.encoding": "int8", "dimat.kind": "whole", "format": FORMAT}
VALUES = torch.ones(8, 100, dtype=torch.int8)
SCALES = torch.ones(4)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_the_form_that_the_others_are_bent_from_is_good() -> None:
    """800 ones with scale 1 decode to 800 ones."""
    assert torch.equal(decode_weights(form({"value:w": VALUES, "scale:w": SCALES}))["w"], torch.ones(8, 100))
    good = file({"__metadata__": METADATA, "exact:w": entry("F32", [2], 0, 8)}, struct.pack("<2f", 1, 2))
    assert decode_weights(good)["w"].tolist() == [1, 2]


BAD: list[tuple[bytes, str]] = [
    (b"", "0 bytes"),
    (b"\0" * 9, "9 bytes"),
    (b"\xff" * 100, "header claims 18,446,744,073,709,551,615 bytes"),
    (file(b"[" * 100_000), "not JSON"),
    (file(b"{}" + b"x"), "not JSON"),
    (file(b"\xff\xfe{\0}\0"), "not JSON"),
    (file([]), "no table"),
    (file({}), "not a form that this dimat reads"),
    (file({"__metadata__": {"format": 1}}), "metadata are malformed"),
    (file({"__metadata__": "format"}), "metadata are malformed"),
    (file({"__metadata__": {**METADATA, "format": "9" * 1000}}), "format '99999999999999999999'"),
    (file(b" " * (2**20 * 8 // 7 + 9)), "header claims"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [2**40], 0, 8)}, bytes(8)), "does not fit its 8 bytes"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [0, 2**62, 2**62], 0, 0)}), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [2**63, 0], 0, 0)}), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [-1, -2], 0, 8)}, bytes(8)), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [True, 2], 0, 8)}, bytes(8)), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [2], -8, 0)}, bytes(8)), "malformed"),
    (file({"__metadata__": METADATA, "exact:w": entry("F4", [2], 0, 1)}, bytes(1)), "of type F4"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [2], 0, 8)}, bytes(4)), "cut short"),
    (file({"__metadata__": METADATA, "exact:w": entry("F32", [2], 0, 8)}, bytes(9)), "too long"),
    (
        file({"__metadata__": METADATA, **{f"exact:{n}": entry("F32", [2], 0, 8) for n in "ab"}}, bytes(8)),
        "overlap others",
    ),
    (file(b'{"exact:w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' * 2 + b'"a":1}', bytes(4)), "not JSON"),
    (
        file(b'{"w":%b,"w":%b}' % ((json.dumps(entry("F32", [], 0, 4)).encode(),) * 2), bytes(4)),
        "not JSON",
    ),
    (file({"__metadata__": METADATA, "exact:\ud800": entry("F32", [1], 0, 4)}, bytes(4)), "not JSON"),
    (file({"__metadata__": METADATA, "exact:w": entry("BOOL", [2], 0, 2)}, b"\0\2"), "neither true nor false"),
    (form({"w": SCALES}), "'w' is part of nothing"),
    (form({"w" * 10**6: SCALES}), "is part of nothing"),
    (form({"exact:w": SCALES, "value:w": VALUES, "scale:w": SCALES}), "'w' is there twice"),
    (form({"value:w": VALUES}), r"'w' (I8[8, 100]) need scales F32[4]"),
    (form({"scale:w": SCALES}), "scales of 'w' belong to no values"),
    (form({"value:w": VALUES, "scale:w": torch.ones(3)}), "need scales F32[4]"),
    (form({"value:w": VALUES, "scale:w": torch.ones(5)}), "need scales F32[4]"),
    (form({"value:w": VALUES, "scale:w": torch.ones(1)}), "need scales F32[4]"),
    (form({"value:w": VALUES, "scale:w": torch.ones(4, 1)}), "need scales F32[4]"),
    (form({"value:w": VALUES, "scale:w": SCALES.double()}), "need scales F32[4]"),
    (form({"value:w": VALUES.float(), "scale:w": SCALES}), "not of type I8"),
    (form({"value:w": VALUES.to(torch.uint8), "scale:w": SCALES}), "not of type I8"),
    (form({"value:w": VALUES.half()}, "bf16"), "not of type BF16"),
    (form({"value:w": VALUES}, "fp16"), "of type F16"),
    (form({"value:w": VALUES.half(), "scale:w": SCALES}, "fp16"), "belong to no values"),
    (form({"exact:w": SCALES}, "fp32"), "encoding 'fp32'"),
    (form({"exact:w": SCALES}, "int4"), "encoding 'int4'"),
    (form({"exact:w": SCALES}, kind="both"), "kind 'both'"),
    (form({"exact:w": SCALES}, format_="2"), "format '2'"),
    (form({"exact:w": SCALES}, kind="delta"), "is a delta"),
    (safetensors.torch.save({"exact:w": SCALES}), "format 'none'"),
    *(
        (form({"value:w": VALUES, "scale:w": torch.tensor([1.0, scale, 1.0, 1.0])}), "not between 0 and 2^120")
        for scale in (float("nan"), float("inf"), -1.0, 1e38)
    ),
]


@pytest.mark.parametrize(("data", "said"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_malformed_forms_are_refused_and_named(data: bytes, said: str, tmp_path: Path) -> None:
    """Attack: one form for each rule, as bytes and as a file, which is named; the message is one short line."""
    with pytest.raises(DataError) as refused:
        decode_weights(data)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800
    path = tmp_path / "form"
    path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
        decode_weights(path)


def test_deltas_to_another_snapshot_are_refused(tmp_path: Path) -> None:
    """Attack: a delta to tensors that the held snapshot does not have, or has in another shape or type."""
    data = form({"value:w": VALUES, "scale:w": SCALES}, kind="delta")
    good = torch.full((8, 100), 2.0)
    assert torch.equal(decode_weights(data, after={"w": good})["w"], good + 1)
    for held in ({}, {"w": good.T}, {"w": good.reshape(-1)}, {"w": good[:1]}, {"w": good.double()}, {"w": VALUES}):
        with pytest.raises(DataError, match=r"'w'"):
            decode_weights(data, after=held)
        (tmp_path / "held").write_bytes(safetensors.torch.save({n: t.contiguous() for n, t in held.items()}))
        with pytest.raises(DataError, match=r"'w'"):
            decode_weights(data, after=tmp_path / "held")
    (tmp_path / "held").write_bytes(b"damaged")
    for path in (tmp_path / "held", tmp_path / "none"):
        with pytest.raises(DataError, match=str(path)):
            decode_weights(data, after=path)
    with pytest.raises(DataError, match="cannot read"):
        decode_weights(tmp_path / "none")


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    """Attack: garbage, bare and behind a length that fits."""
    for content in (data, file(data)):
        with pytest.raises(DataError):
            decode_weights(content, after=HELD)


@settings(max_examples=400)
@given(st.data())
def test_bent_forms_are_refused_or_whole(data: st.DataObject) -> None:
    """Attack: bytes of a good form changed, cut out or put in, mostly in its header. Where it still decodes, each
    tensor takes no more than four times what the form has, and can be written again."""
    content = bytearray(FORMS[data.draw(st.sampled_from(sorted(FORMS)))])
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    if data.draw(st.booleans()):  # the header's length still fits
        content[:8] = (header - 8 + len(content)).to_bytes(8, "little")
    try:
        weights = decode_weights(bytes(content), after=HELD)
    except DataError:
        return
    assert sum(tensor.nbytes for tensor in weights.values()) <= 4 * len(content)
    safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=10,
)
entries = json_values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BF16", "F4", "C64"]),
        "shape": st.lists(st.integers(-1, 300) | st.integers(), max_size=3),
        "data_offsets": st.lists(st.integers(0, 1200) | st.integers(), max_size=3),
    }
)
parts = st.sampled_from(["value:w", "scale:w", "exact:w", "exact:v", "value:v", ""])


@settings(max_examples=400)
@given(st.dictionaries(parts, entries, max_size=4), st.sampled_from(["whole", "delta"]), st.binary(max_size=1200))
def test_headers_of_anything_are_refused_or_whole(header: dict[str, Any], kind: str, data: bytes) -> None:
    """Attack: headers that are JSON, with entries that claim anything."""
    try:
        content = file({"__metadata__": {**METADATA, "dimat.kind": kind}, **header}, data)
        weights = decode_weights(content, after=HELD)
    except DataError:
        return
    assert sum(tensor.nbytes for tensor in weights.values()) <= 4 * len(content)


def test_hostile_forms_take_little_memory(tmp_path: Path) -> None:
    """Attack: headers as long as are read, made to grow as they are parsed, in a process that may take 300 MB more
    than it has: a list of lists, ten thousand empty tensors, and ones whose claims are not true."""
    script = """
        import json, resource, struct, torch
        from dimat.errors import DataError
        from dimat.weights.encodings import FORMAT, decode_weights
        metadata = {"dimat.encoding": "int8", "dimat.kind": "whole", "format": FORMAT}
        longest = 2**20
        entry = '"exact:%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        empty = "{" + ",".join(['"__metadata__":' + json.dumps(metadata)] + [entry % i for i in range(15000)]) + "}"
        assert longest * 0.8 < len(empty) < longest
        huge = {"__metadata__": metadata, "exact:w": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}}
        vast = {"__metadata__": metadata, "value:w": {"dtype": "I8", "shape": [2**33], "data_offsets": [0, 2**33]}}
        lists = "[" + "{}," * (longest // 3 - 2) + "{}]"
        deep = "[" * longest
        texts = [text.encode() for text in (lists, deep, json.dumps(huge), json.dumps(vast), empty)]
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number, text in enumerate(texts):
            try:
                decode_weights(struct.pack("<Q", len(text)) + text)
            except DataError as error:
                print(number, error)
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "d"]
    assert "does not fit" in lines[2] or "cut short" in lines[2]
    assert "cut short" in lines[3]
