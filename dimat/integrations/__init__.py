"""Callbacks for Hugging Face's Trainer and Lightning's: an agent beside them.

Each is loaded when it is asked for, with the library that it is for.
"""

from importlib import import_module
from typing import Any

_HOME = {"TrainerCallback": "dimat.integrations.hf", "LightningCallback": "dimat.integrations.lightning"}

__all__ = ["LightningCallback", "TrainerCallback"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dimat.integrations' has no attribute {name!r}")
