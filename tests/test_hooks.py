"""Loading a user's function. Reference: what Python itself would import."""

from __future__ import annotations

from pathlib import Path

import pytest

from dimat.errors import HookError
from dimat.hooks import load_hook


def test_function_of_an_installed_module() -> None:
    import os.path

    assert load_hook("os.path:join", Path()) is os.path.join


def test_function_of_a_file_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "sibling_of_hook.py").write_text("VALUE = 3\n")
    (tmp_path / "own.py").write_text("from sibling_of_hook import VALUE\ndef make(x):\n    return x + VALUE\n")
    make = load_hook("own.py:make", tmp_path)
    assert make(1) == 4
    assert load_hook("own.py:make", tmp_path) is make  # executed once


def test_module_in_the_folder_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "module_of_hook.py").write_text("def make():\n    return 5\n")
    assert load_hook("module_of_hook:make", tmp_path)() == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own.py", "expected package.module:function"),
        ("own.py:not a name", "expected package.module:function"),
        ("none.py:make", "there is no file"),
        ("own.py:maek", r"has no function 'maek'; did you mean 'make'\?"),
        ("own.py:NUMBER", "'NUMBER' is a int, not a function"),
        ("broken.py:make", r"cannot import .*broken.py: ZeroDivisionError: division by zero"),
        ("no_such_package_here.x:make", r"cannot import no_such_package_here.x: ModuleNotFoundError"),
    ],
)
def test_errors_are_one_clear_line(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "own.py").write_text("NUMBER = 1\ndef make():\n    return 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(HookError, match=message) as caught:
        load_hook(spec, tmp_path, "task hook")
    assert str(caught.value).startswith("task hook")
    assert "\n" not in str(caught.value)
