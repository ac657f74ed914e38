"""What mkdocs does beside building: puts pictures of the dashboard into pages, where `make screenshots` has made them.

They are not kept in the repository. A page asks for one with `<!-- screenshot: NAME | what it shows -->`;
its two files are NAME-light.png and NAME-dark.png.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PICTURE = re.compile(r"<!-- screenshot: (\S+) \| (.+?) -->")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Return a page with the pictures that are there, light or dark as the page is, each a link to itself; mkdocs calls
    it for each page."""
    folder = Path(config["docs_dir"]) / "screenshots"

    def picture(found: re.Match[str]) -> str:
        name, shows = found.groups()
        there = [theme for theme in ("light", "dark") if (folder / f"{name}-{theme}.png").exists()]
        if len(there) < 2:
            return ""
        return " ".join(
            f"[![{shows}](screenshots/{name}-{theme}.png#only-{theme})](screenshots/{name}-{theme}.png)"
            for theme in there
        )

    return _PICTURE.sub(picture, markdown)
