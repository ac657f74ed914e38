"""What a module prints while it is traced is kept away, and nothing else is. Reference: what arrives on the streams."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor, nn

from dimat.symmetry import derive_symmetry
from dimat.symmetry.mute import muted


class Talks(nn.Module):
    """Prints in its forward pass, and lets another thread print in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        print("of the model")
        other = threading.Thread(target=say)
        other.start()
        other.join()
        return self.layer(x)


def say() -> None:
    print("of another")
    sys.stderr.write("trouble of another\n")


def test_other_threads_are_heard_while_a_module_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    """As an agent that is told to leave in the middle of a merge."""
    assert derive_symmetry(Talks(), torch.randn(2, 3)).trace_kind == "export"
    said = capsys.readouterr()
    assert set(said.out.splitlines()) == {"of another"}
    assert set(said.err.splitlines()) == {"trouble of another"}


def test_a_stream_that_was_kept_speaks_again(capsys: pytest.CaptureFixture[str]) -> None:
    """A log handler that was made meanwhile keeps the stream that it found."""
    with muted():
        kept = sys.stderr
        print("inside", file=kept)
        assert kept.encoding
        kept.flush()
    print("after", file=kept)
    assert capsys.readouterr().err == "after\n"


def test_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with muted():
        print("nowhere")
        sys.stdout.flush()
