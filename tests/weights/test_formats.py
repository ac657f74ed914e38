"""Files of other formats that are given as safetensors are named. Reference: what the formats' own writers write."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dimat import merge_weights
from dimat.cli import main
from dimat.errors import DataError
from dimat.weights.tensors import Tensors

WEIGHTS = {"weight": torch.arange(600.0).reshape(20, 30)}


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


OTHERS = {
    "a zip archive, as torch.save": written(lambda file: torch.save(WEIGHTS, file)),
    "a pickle, as older": written(lambda file: torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)),
    "a NumPy array": written(lambda file: np.save(file, WEIGHTS["weight"].numpy())),
    "compressed with gzip": gzip.compress(save(WEIGHTS), mtime=0),
    "compressed with bzip2": bz2.compress(save(WEIGHTS)),
    "compressed with xz": lzma.compress(save(WEIGHTS)),
    "JSON, not a model": json.dumps({"error": "Repository not found"}).encode(),
    "a web page": b"<!doctype html><title>Sign in</title>",
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_formats_are_named_wherever_weights_are_read(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "b.safetensors"
    file.write_bytes(OTHERS[what])
    with pytest.raises(DataError, match=f"^{file} is {what}"):
        merge_weights(WEIGHTS, [file], [0.5, 0.5], method="average")
    assert main(["merge", str(file), str(file), "-o", str(tmp_path / "out")]) == 5
    assert f"dimat: {file} is {what}" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_all_protocols_are_named(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    file.write_bytes(pickle.dumps({"weight": [0.0] * 300}, protocol))
    with pytest.raises(DataError, match="is a pickle"):
        Tensors(file)


def test_a_file_that_is_cut_short_is_told_as_that(tmp_path: Path) -> None:
    """Its header's length may begin as a pickle does: 640 is 0x0280."""
    data = save(WEIGHTS)
    for length in (640, 640 + 256):
        head = data[8 : 8 + int.from_bytes(data[:8], "little")].ljust(length)
        (tmp_path / "b.safetensors").write_bytes(length.to_bytes(8, "little") + head + bytes(10))
        with pytest.raises(DataError, match="is cut short"):
            Tensors(tmp_path / "b.safetensors")


def test_a_stopped_download_and_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="begins with zeros, as a download does that was stopped"):
        Tensors(tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="is a folder: name the safetensors file in it"):
        merge_weights(WEIGHTS, [tmp_path], [0.5, 0.5], method="average")
