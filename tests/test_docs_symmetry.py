"""The pages on alignment and on operations without a rule: code and commands run as they stand there, and the numbers
in the text are those that come out."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forks import dimat

pytestmark = pytest.mark.page

DOCS = Path(__file__).parent.parent / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def execute(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "dimat"
    program = [dimat(), *words[1:]]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=250, check=False)


def test_worked_example() -> None:
    """Reference: the permutations that were planted; figures as the text states them."""
    text = " ".join(page("alignment.md").split())
    space: dict[str, Any] = {}
    exec(blocks(page("alignment.md"), "python")[0], space)
    assert {name: size for name, (size, _) in space["groups"].items()} == {"1.bias/0": 6, "3.bias/0": 5}
    assert set(space["groups"]["1.bias/0"][1]) == {("1.bias", 0), ("1.weight", 0), ("3.weight", 1)}
    assert set(space["groups"]["3.bias/0"][1]) == {("3.bias", 0), ("3.weight", 0), ("5.weight", 1)}
    assert space["error"] < 1e-14
    assert f"{space['spec'].coverage:.1%}".replace("%", " %") in text
    for name in space["groups"]:
        planted, found = (space[which][name].tolist() for which in ("planted", "found"))
        assert ", ".join(map(str, planted)) in text
        assert ", ".join(map(str, found)) in text
        assert [planted[j] for j in found] == list(range(len(found)))
    assert f"off by {space['plain_change']:.2f} standard" in text
    assert space["merged_change"] < 1e-6


def test_commands_of_alignment(tmp_path: Path) -> None:
    """ "Looking at a model": each command succeeds and writes what it says."""
    listed = blocks(page("alignment.md"))[0]
    for command in listed.splitlines():
        done = execute(command, tmp_path)
        assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"groups.html", "groups.svg"}


def test_rule_of_ones_own(tmp_path: Path) -> None:
    """ "A rule for it": the file as pasted, and its commands. Without the rule nothing moves, with it 8 units do."""
    text = page("no-rule.md")
    (tmp_path / "scan.py").write_text(blocks(text, "python")[0])
    without, with_rule, verified = (execute(line, tmp_path) for line in blocks(text)[0].splitlines())
    assert (without.returncode, with_rule.returncode, verified.returncode) == (0, 0, 0), verified.stderr
    assert re.search(r"SYM-W02 no rule for mylib\.scan\.default at .*scan\.py:\d+; froze 4 axes", without.stdout)
    assert without.stdout.strip().startswith("0 groups;")
    assert re.search(r"^1  decay/0  8 +4 ", with_rule.stdout, flags=re.MULTILINE), with_rule.stdout
    assert "SYM-" not in with_rule.stdout
    assert "1 groups, error" in verified.stdout


@pytest.mark.parametrize("name", ["alignment.md", "no-rule.md"])
def test_pages_are_linked_and_links_lead_somewhere(name: str) -> None:
    """README names the pages; what they link to exists."""
    assert f"](docs/{name})" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", page(name)):
        assert (DOCS / target).exists(), target
