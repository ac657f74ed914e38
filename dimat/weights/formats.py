"""Names what a file is that was given in place of safetensors, by its first bytes."""

from __future__ import annotations

from collections.abc import Mapping

_UNPACK = "unpack it first"
_CONVERT = "convert it to safetensors first"
_PICKLE = f"is a pickle, as older versions of torch.save write it, which can run code: {_CONVERT}"
_PAGE = "is a web page, not a model: is the download right?"
_GGML = "is GGML, an old format of llama.cpp: take the model that it was made from, as safetensors"

FORMATS: Mapping[bytes, str] = {
    b"GGUF": "is GGUF, llama.cpp's format: take the model that it was made from, as safetensors",
    b"ggjt": _GGML,
    b"lmgg": _GGML,
    b"\x89HDF": f"is HDF5, as Keras and TensorFlow write it: {_CONVERT}",
    b"PK\x03\x04": f"is a zip archive, as torch.save and NumPy write it, which may hold a pickle: {_CONVERT}",
    **{bytes((0x80, protocol)): _PICKLE for protocol in range(2, 6)},
    b"\x93NUMPY": f"is a NumPy array: {_CONVERT}",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull",
    b"<!DOCTYPE": _PAGE,
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": "is XML, not a model: is the download right?",
    b"{": "is JSON, not a model: is it an index of shards, or a server's reply in place of the download?",
    b"Entry not found": "is a server's reply, not a model: is the name that was downloaded right?",
    b"\x1f\x8b": f"is compressed with gzip: {_UNPACK}",
    b"BZh": f"is compressed with bzip2: {_UNPACK}",
    b"\xfd7zXZ": f"is compressed with xz: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"is compressed with zstd: {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"is a 7z archive: {_UNPACK}",
    bytes(16): "begins with zeros, as a download does that was stopped: fetch it again",
}
"""First bytes of files that are often given instead of safetensors → the format, and what to do."""

LONGEST = max(map(len, FORMATS))


def other_format(start: bytes) -> str:
    """Return what a file that is not safetensors is, and what to do, from its first `LONGEST` bytes; "" if unknown."""
    found = next((what for beginning, what in FORMATS.items() if start.startswith(beginning)), "")
    length = int.from_bytes(start[:8], "little")  # two bytes of a pickle may also begin a header's length
    return "" if found is _PICKLE and length % 8 == 0 and length < 2**27 else found
