"""Tensors as the bytes of a file, and files under other names. Reference: safetensors' own writer and reader."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from dimat.errors import DataError
from dimat.weights import durable
from dimat.weights.durable import share_file
from dimat.weights.header import CODES
from dimat.weights.snapshot import checksum, checksum_file, checksum_pieces
from dimat.weights.tensors import EncodedTensors, encode, open_tensors, record_tensors

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=3)


@given(st.dictionaries(names, st.tuples(st.sampled_from([*CODES.values()]), shapes), min_size=1, max_size=9))
def test_the_bytes_are_those_of_safetensors(infos: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    """To the byte, for all types, shapes and names: addresses of equal weights are equal, whoever wrote them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (dtype, shape) in infos.items()
    }
    data = encode(tensors)
    assert data == save(tensors)
    assert EncodedTensors(tensors).bytes == len(data)


def test_views_and_shared_memory_are_written_out() -> None:
    """Transposed, cut out, conjugated, tied and trained tensors: as their copies are."""
    whole = torch.randn(6, 4, requires_grad=True)
    odd = torch.randn(3, dtype=torch.complex64)
    tensors = {"a": whole, "b": whole.t(), "c": whole[2:], "d": whole, "e": odd.conj(), "f": torch.zeros(1).expand(5)}
    copies = {name: tensor.detach().resolve_conj().contiguous().clone() for name, tensor in tensors.items()}
    assert encode(tensors) == save(copies)


def test_a_type_that_no_file_holds_is_refused() -> None:
    with pytest.raises(DataError, match=r"tensor 'w' is of type torch\.complex128, which no file holds"):
        encode({"w": torch.zeros(1, dtype=torch.complex128)})


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6), st.integers(1, 70))
def test_a_checksum_does_not_depend_on_the_pieces(data: bytes, cuts: list[int], block: int) -> None:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(ends)]
    assert checksum_pieces(pieces, block) == checksum(data, block)


def test_recorded_tensors_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the address of their bytes; equal content that lies there, or elsewhere, is not written; a file of another
    length under that address is no such content."""
    monkeypatch.setattr(durable, "FICLONE", 0)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    tensors = {"w": torch.randn(1000)}
    payload = record_tensors(one, tensors, durable=False)
    path = one / f"{payload.root}.safetensors"
    assert path.read_bytes() == save(tensors)
    assert checksum_file(path) == payload
    before = path.stat()
    assert record_tensors(one, tensors) == payload
    assert record_tensors(two, tensors, elsewhere=(tmp_path / "none", one)) == payload
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert (two / path.name).stat().st_ino == before.st_ino
    path.unlink()
    path.write_bytes(b"")
    record_tensors(one, tensors)
    assert torch.equal(load(path.read_bytes())["w"], tensors["w"])


def test_a_file_is_shared_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clone or a link, and where the file system has neither, by a copy; no source is told from a fault."""
    source, path = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 10_000)
    path.write_bytes(b"before")
    for _ in range(2):
        share_file(source, path)
        assert path.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        share_file(tmp_path / "none", path)

    def no_links(*_: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(durable, "FICLONE", 0)
    monkeypatch.setattr(os, "link", no_links)
    share_file(source, path)
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_ino != source.stat().st_ino
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*folder"):
        share_file(source, tmp_path / "folder")
    assert {each.name for each in tmp_path.iterdir()} == {"a", "b", "folder"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the reference is the kernel's RssAnon, of Linux")
def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    """Reference: anonymous memory after 40,000 reads, of which the library's own reader loses 32 bytes each (1.3 MB);
    to ask whether a tensor is there reads none."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    (tmp_path / "w").write_bytes(save({"w": torch.ones(64, 64)}))
    with open_tensors(tmp_path / "w", "") as tensors:
        for _ in range(5000):
            tensors["w"]
        before = anonymous()
        for _ in range(40_000):
            tensors["w"]
        assert anonymous() - before < 300_000
        (tmp_path / "w").write_bytes(b"")
        assert "w" in tensors
        assert "v" not in tensors
        with pytest.raises(DataError, match="cut short"):
            tensors["w"]
