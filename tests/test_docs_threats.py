"""docs/threat-model.md rests on tests: those that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_is_named_exists() -> None:
    text = (TESTS.parent / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+/test_\w+\.py)`", text))
    assert len(named) > 15
    assert not [name for name in sorted(named) if not (TESTS / name).is_file()]
