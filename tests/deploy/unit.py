"""The systemd unit, read as systemd reads it as far as tests need: settings that may come several times, specifiers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.tools import DEPLOY

UNIT = DEPLOY / "systemd" / "dimat-agent@.service"


def settings(section: str = "Service") -> list[tuple[str, str]]:
    """Return the settings of one section, in order."""
    found: list[tuple[str, str]] = []
    inside = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if match := re.fullmatch(r"\[(\w+)\]", line):
            inside = match[1]
        elif inside == section and line and line[0] not in "#;":
            key, equals, value = line.partition("=")
            assert equals, line
            found.append((key, value))
    return found


def values(key: str) -> list[str]:
    """Return what a setting of the service is set to, once for each line."""
    return [value for name, value in settings() if name == key]


def value(key: str) -> str:
    """Return what a setting is set to, which has one line."""
    (only,) = values(key)
    return only


def expanded(text: str, specifiers: Mapping[str, str]) -> str:
    """Replace specifiers: `specifiers` by their letter. One that is not given is an error."""
    return re.sub(r"%(.)", lambda match: {"%": "%", **specifiers}[match[1]], text)


def command(specifiers: Mapping[str, str], paths: Mapping[str, Path]) -> list[str]:
    """Return the words of the unit's own ExecStart line, with other folders in the place of those of `paths`."""
    words = shlex.split(expanded(value("ExecStart"), specifiers))
    for old, new in paths.items():
        words = [word.replace(old, str(new)) for word in words]
    return words
