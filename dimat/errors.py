"""All errors that dimat raises on purpose, each with its command's exit code.

A message is one line: what is wrong, where, and what to do next. Exit codes are part of the interface
(scripts and service managers read them): 0 ok, 1 runtime, 2 usage or configuration, 3 network or peers,
4 security, 5 checkpoint or data, 130 and 143 for signals.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar


class DimatError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the exit code of a command that fails with it."""

    exit_code: ClassVar[int] = 1


class TrainingError(DimatError):
    """Local training went wrong: a loss or weights that are not finite."""


class MergeError(DimatError):
    """A merge could not be computed; the agent's own weights are unchanged."""


class SymmetryError(DimatError):
    """A model's symmetry groups could not be derived, or a permutation does not fit them."""


class ConfigError(DimatError):
    """A configuration value, flag or file is wrong."""

    exit_code = 2


class TopologyError(ConfigError):
    """A graph, schedule or mixing matrix that cannot exist or cannot be used."""


class HookError(ConfigError):
    """A user's `module:function` or `file.py:function` cannot be imported or called."""


class PartitionError(ConfigError):
    """A data set cannot be split among the agents as asked."""


class NetworkError(DimatError):
    """The network or all peers are out of reach."""

    exit_code = 3


class PeerError(NetworkError):
    """A peer sent something that cannot be used (missing or mis-shaped tensors, non-finite values).

    A message is cut at `LONGEST` characters: it may hold the peer's own names, and is kept in logs.
    """

    LONGEST: ClassVar[int] = 2000

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= self.LONGEST else f"{message[: self.LONGEST]} …")


class SecurityError(DimatError):
    """A key, certificate or signature is missing or wrong."""

    exit_code = 4


class DataError(DimatError):
    """A data file, snapshot, checkpoint or run folder is missing, damaged or belongs to another."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    # of a name of any length, as a stranger may give it, none is looked for
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6) if len(name) <= 200 else []
    return f"; did you mean {matches[0]!r}?" if matches else ""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> str:
    """Compose the message for an unknown name, e.g. of a graph or merge method."""
    names = sorted(known)
    place = f" in {where}" if where else ""
    return f"unknown {kind} {name!r}{place}{nearest(name, names)} (known: {', '.join(names)})"


def unknown_agent(where: str, name: str, agents: Sequence[str]) -> str:
    """Compose the message for a name at `where` that is not one of the topology's agents, which may be many."""
    advice = nearest(name, agents) or f"; use one of its {len(agents)} agents, e.g. {agents[0]!r}"
    return f"{where}: no agent {name!r} in the topology{advice}"


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def told_os_error(error: OSError) -> str:
    """Compose the message for an error of the operating system that nothing has explained: what, where, what to do."""
    reason = error.strerror or str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes | str) else ""
    if error.errno == errno.ENAMETOOLONG and name:
        size = len(os.fsencode(name))
        part = max(len(os.fsencode(part)) for part in name.split(os.sep))
        return (
            f"cannot use {name[:60] + '…'!r}: file systems hold names of up to 255 bytes and paths of up to 4,095, and "
            f"this path has {size:,}, its longest name {part:,}; give a shorter one"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"to {name}" if name else "the output"
        return f"cannot write {where}: {reason}; free some space, or write elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM) and name:
        return f"cannot use {name}: {reason}; give this user the right, or run as the owner"
    return f"cannot use {name}: {reason}" if name else reason
