"""The index of the code in CONTRIBUTING.md, made from the first sentences of docstrings (`make index`)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- begin of index, which `make index` writes -->\n", "<!-- end of index -->\n"


def index() -> str:
    """Return the index as Markdown: all folders with what is in them, then the files of each."""
    packages = sorted(path.parent for path in (ROOT / "dimat").rglob("__init__.py"))
    lines = [f"- `{shown(folder)}/` {first_sentence(folder / '__init__.py')}" for folder in packages]
    for folder in packages:
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py" and "_pb2" not in path.name)
        if files:
            lines += ["", f"### `{shown(folder)}/`", ""]
            lines += [f"- `{path.name}` {first_sentence(path)}" for path in files]
    return "\n".join(lines) + "\n"


def first_sentence(file: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def shown(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix()


def with_index(page: str) -> str:
    """Return the page with a current index between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{index()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_index(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
