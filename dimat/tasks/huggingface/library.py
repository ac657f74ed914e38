"""Loads the libraries of the extra `hf` when needed; turns their errors into one line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dimat.errors import ConfigError, DataError, DimatError, NetworkError, first_line

INSTALL = "pip install 'dimat[hf]'"
_quieted: set[str] = set()
"""Libraries whose progress bars and advice are turned off."""


def library(name: str) -> Any:
    """Import "transformers", "datasets" or "peft", without their progress bars and advice.

    Raises ConfigError if the package is missing.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt; errors say it in a line
    fresh = name not in _quieted
    try:
        with _working_torchvision(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = import_module(name)
            if fresh and name == "transformers":
                module.utils.logging.set_verbosity_error()
                module.utils.logging.disable_progress_bar()
                module.utils.is_torchvision_available()  # it keeps the answer
            elif fresh and name == "datasets":
                module.disable_progress_bars()
            _quieted.add(name)
            return module
    except ImportError as error:
        raise _missing(error, name) from error


def _missing(error: ImportError, name: str) -> ConfigError:
    package = (error.name or name).partition(".")[0]
    return ConfigError(f"this task needs the package {package}, which cannot be imported: {INSTALL}")


@contextmanager
def _working_torchvision() -> Generator[None]:
    """Hide a torchvision that fails on import because it was built for another torch.

    Nothing here needs it, and transformers would fail with it.
    """
    if "transformers" in sys.modules or "torchvision" in sys.modules or find_spec("torchvision") is None:
        yield
        return
    try:
        import_module("torchvision")
    except Exception:
        sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # Python's mark of what is not there
        try:
            import_module("transformers").utils.is_torchvision_available()
            yield
        finally:
            del sys.modules["torchvision"]
    else:
        yield


@contextmanager
def telling(option: str, name: str, local: bool) -> Generator[None]:
    """Turn errors of the libraries while they read `name` into one line that names `option`.

    NetworkError if the hub cannot be reached; DataError for files on disk that cannot be read; else ConfigError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DimatError:
        raise
    except ImportError as error:  # of what a library imports only when it needs it
        raise _missing(error, "datasets") from error
    except Exception as error:  # the libraries raise what their own libraries raise
        cause = first_line(error)
        if local:
            raise DataError(f"task.options.{option}: cannot read {name}: {cause}") from error
        if _unreachable(error):
            raise NetworkError(
                f"task.options.{option}: there is no folder {name!r} here, and the Hugging Face hub cannot be reached "
                f"({cause}); fetch it where there is a network and set {option} to its folder"
            ) from error
        raise ConfigError(
            f"task.options.{option}: {name!r} is no folder here, and the Hugging Face hub does not give it ({cause})"
        ) from error


def local_path(name: str, folder: Path, option: str) -> Path | None:
    """Return the path of `name` on this disk, relative to `folder`; None for a name on the hub.

    Raises DataError for a name that looks like a path if there is no such file.
    """
    path = folder / name
    if path.exists():
        return path
    hub_like = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not path.suffix
    if hub_like and "\\" not in name and not name.endswith("/"):
        return None
    raise DataError(f"task.options.{option}: there is no file or folder {path}")


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or names & {"ConnectError", "OfflineModeIsEnabled"}:
            return True
        if "couldn't connect" in text.lower() or "offline mode" in text.lower():
            return True
        error = error.__cause__ or error.__context__
    return False
