"""Files that hold no text are told as what they are, with advice that fits. Reference: the bytes written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dimat.errors import DataError
from dimat.reading import read_text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("größer = 1".encode("latin-1"), r"is not UTF-8 text: byte 2 is 0xf6; save it as UTF-8"),
        ("run = 'x'".encode("utf-16"), "is not UTF-8 text: byte 0 is 0xff; save it as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0\xff", r"holds no text \(byte 9 is 0xff\); is it the right file, and undamaged\?"),
    ],
)
def test_the_advice_fits_the_bytes(data: bytes, said: str, tmp_path: Path) -> None:
    """Text of another encoding can be saved as UTF-8; what is no text can not."""
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(DataError, match=f"file {said}"):
        read_text(tmp_path / "file")


def test_a_reader_of_files_that_dimat_writes_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff text")
    with pytest.raises(DataError, match=r"file holds no text \(byte 0 is 0xff\); remove it$"):
        read_text(tmp_path / "file", mend="remove it")
