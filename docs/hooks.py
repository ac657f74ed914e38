"""What mkdocs does beside building: puts pictures of the dashboard into pages, where `make screenshots` has made them.

They are not kept in the repository. A page asks for one with `<!-- screenshot: FILE | what it shows -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PICTURE = re.compile(r"<!-- screenshot: (\S+) \| (.+?) -->")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Return a page with the pictures that are there; mkdocs calls it for each page."""
    folder = Path(config["docs_dir"]) / "screenshots"

    def picture(found: re.Match[str]) -> str:
        file, shows = found.groups()
        return f"![{shows}](screenshots/{file})" if (folder / file).exists() else ""

    return _PICTURE.sub(picture, markdown)
