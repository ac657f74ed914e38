"""Tasks by name and by hook, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dimat.config import TaskConfig
from dimat.errors import ConfigError, HookError
from dimat.tasks import list_tasks, load_task

HOOK = """
import torch
from dimat.tasks import ClassificationTask, TensorData, mlp, seeded

def task(units=4, *, scale):
    data = TensorData(scale * torch.ones(6, 3), torch.arange(6) % 2)
    return ClassificationTask("own", seeded(lambda: mlp((3, units, 2))), data, data, data, ("a", "b"))

def where(folder):
    made = task(scale=1.0)
    object.__setattr__(made, "name", str(folder))
    return made

def partial():
    class Half:
        name = metric = "x"
        classes = ()
        def build_model(self, generator): ...
        def data(self, split): ...
    return Half()

def broken():
    raise ValueError("no licence today")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(HOOK)
    return tmp_path


def test_bundled_tasks_are_listed() -> None:
    assert set(list_tasks()) >= {"digits", "images"}
    assert all(line.endswith(".") for line in list_tasks().values())


def test_a_hook_with_options(folder: Path) -> None:
    task = load_task(TaskConfig(hook="own.py:task", options={"scale": 2.0, "units": 7}), folder)
    assert task.name == "own"
    assert task.example_inputs()[0].tolist() == [[2.0] * 3] * 2


def test_a_hook_is_given_the_folder_if_it_asks(folder: Path) -> None:
    assert load_task(TaskConfig(hook="own.py:where"), folder).name == str(folder)


@pytest.mark.parametrize(
    ("hook", "options", "kind", "message"),
    [
        ("own.py:task", {}, ConfigError, "missing a required .*'scale'"),
        ("own.py:task", {"scael": 1.0}, ConfigError, r"has no option 'scael'; did you mean 'scale'\?"),
        ("own.py:tsk", {}, HookError, r"no function 'tsk'; did you mean 'task'\?"),
        ("own.py:broken", {}, HookError, "failed: ValueError: no licence today"),
        ("own.py:partial", {}, HookError, "Half, which is not a Task: it has no example_inputs, loss, metrics"),
        ("missing.py:task", {}, HookError, "there is no file"),
    ],
)
def test_hook_errors(folder: Path, hook: str, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_task(TaskConfig(hook=hook, options=options), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, r"unknown task 'digit'; did you mean 'digits'\? \(known: digits, hf-causal-lm, hf-image"),
        ("digits", {"modle": "cnn"}, r"task 'digits' has no option 'modle'; did you mean 'model'\?"),
        ("digits", {"model": "vgg"}, "option 'model': Input should be 'cnn', 'mlp' or 'vit' .got 'vgg'"),
        ("digits", {"width": "wide"}, "option 'width': Input should be a valid integer"),
        ("images", {"test": "x"}, "task 'images' needs the option 'train'"),
        ("images", {"train": "x", "test": "x", "folder": "/"}, "has no option 'folder'"),
    ],
)
def test_errors_of_bundled_tasks(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(TaskConfig(name=name, options=options))
