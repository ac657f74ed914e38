"""CONTRIBUTING.md: its index of the code is what the docstrings say, and the files that its walks name exist."""

from __future__ import annotations

import re

from tests.code_index import BEGIN, PAGE, ROOT, first_sentence, with_index

FILES = [path for path in (ROOT / "dimat").rglob("*.py") if "_pb2" not in path.name]


def test_the_index_is_current() -> None:
    """`make index` would change nothing."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_index(page), "run make index"


def test_every_module_says_what_it_is() -> None:
    """Folders and files of the package have a docstring, whose first sentence fits a line of the index."""
    files = [path for path in FILES if path.name != "__main__.py"]
    assert len(files) > 200
    assert [path for path in files if not first_sentence(path)] == []
    assert [path for path in files if len(first_sentence(path)) > 90] == []


def test_files_are_small() -> None:
    """No file of the package has more than 400 lines; what protoc writes is not counted."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_files_that_walks_name_are_there() -> None:
    """Each step of a walk stands in a file of the package."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    named = re.findall(r"`(dimat/[\w/]+\.\w+)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
