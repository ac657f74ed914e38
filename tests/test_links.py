"""Links of the pages that people read: files and anchors that they lead to exist. Links to other sites are looked at
for their form alone: no test goes to the internet. The pages as a site: built strictly, from local files alone."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import DOCS, README, ROOT, name_of

OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md", "topology/README.md", "benchmarks/README.md")
PAGES = [README, *DOCS, *(ROOT / name for name in OTHERS if (ROOT / name).exists())]
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Return a page without its blocks, comments and inline code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "").replace("]", ""), re.sub(r"<!--.*?-->", "", text))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the web pages of git hosts make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(prose(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[\w./%~?=&#:+-]*)?", link), link
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{link}: no such file"
        if page.parent == ROOT / "docs" and path:
            assert target.is_relative_to(ROOT / "docs"), f"{link}: the site has the files of docs/ alone"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_links_are_found() -> None:
    """The check above is of something: pages refer to each other, and README to all of docs/."""
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 100
    named = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README)) if "://" not in link}
    assert set(DOCS) <= named


def test_pages_are_few() -> None:
    """A reader finds the right one by its name."""
    assert len(DOCS) <= 16


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs-material (extra docs)")
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """mkdocs finds no dead link or anchor, no page outside the navigation; pages fetch no font, script or picture."""
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    for page in DOCS:
        text = (tmp_path / "site" / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert "```" not in text, f"{page.name}: a block that is not shown as one"
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)", text)
        fetched += re.findall(r"<link[^>]+href=\"([^\"]+)", text)
        assert fetched
        assert not [url for url in fetched if "://" in url or url.startswith("//")]
