"""The pages that people read, as tests see them: their blocks, and what is said about each in a comment before it.

A block of commands or of Python is run by `tests/test_pages.py`, in the order of its page, unless a comment before it
says otherwise. Comments are HTML, which readers do not see:

    <!-- file: NAME -->          the block is the content of a file, which is written
    <!-- exit: 3 -->             its last command ends with this code
    <!-- run by: tests/….py -->  another test runs it, which names the page
    <!-- not run: WHY -->        nothing runs it
    <!-- fragment: WHY -->       TOML that is no part of an experiment as it is
    <!-- sent: FILE PLACE… -->   between blocks: people carry a file to other places
    <!-- wait: FILE TEXT -->     between blocks: until a file has a text
    <!-- screenshot: NAME | … -->   a picture in the site, see docs/hooks.py

The first line of a block says where it runs: `# at the organiser`, `# at lab-a` in a folder of that name, `# here` or
nothing in one folder for the page. `# as root` changes the machine, and is not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
COMMANDS = ("", "sh", "bash", "console")
OWN_TESTS = {
    "docs/keys.md": "tests/test_docs_keys.py",
    "docs/operating.md": "tests/agent/daemon/test_docs_operating.py",
}
"""Pages whose blocks with a place in their first line are all run by a test of their own."""

_COMMENT = re.compile(r"<!-- ([\w ]+?): (.+) -->")
_PLACE = re.compile(r"# (?:at (?:the )?([\w-]+)|(here|as root))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: `place` is "" where its first line names none; `notes` are the comments before it."""

    line: int
    language: str
    text: str
    place: str = ""
    notes: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def runs(self) -> bool:
        """Whether it holds commands or code, not a file's content, output or a piece of configuration."""
        return self.language in (*COMMANDS, "python")


@dataclass(frozen=True)
class Step:
    """A comment between blocks: something that happens there."""

    line: int
    kind: str
    words: list[str]


def steps(page: Path) -> Iterator[Block | Step]:
    """Go through a page's blocks and what happens between them, in order."""
    notes: dict[str, str] = {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if (comment := _COMMENT.fullmatch(line)) is not None:
            kind, said = comment.groups()
            if kind == "screenshot":
                continue
            if kind in ("sent", "wait"):
                yield Step(number, kind, said.split(" ", 1) if kind == "wait" else said.split())
            else:
                notes[kind] = said
        elif (fence := re.fullmatch(r"```(\w*)", line)) is not None:
            inside: list[str] = []
            for _, text in lines:
                if text == "```":
                    break
                inside.append(text)
            else:
                raise AssertionError(f"{page.name}:{number}: a block without an end")
            text = "\n".join(inside) + "\n"
            where = _PLACE.match(text)
            yield Block(number, fence[1], text, "" if where is None else where[1] or where[2], notes)
            notes = {}
        elif line:
            assert not notes, f"{page.name}:{number}: {notes} is followed by no block"


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks in order."""
    return [step for step in steps(page) if isinstance(step, Block)]


def name_of(page: Path) -> str:
    """Return a page's path as people write it: docs/index.md."""
    return page.relative_to(ROOT).as_posix()
