"""Runs a module under a system call filter, as systemd sets one up: `python -m tests.deploy.confined FILTER MODULE …`.

FILTER is a JSON file: "allowed" and "known" system calls, by number, and the address "families" that sockets may have.
What is known and not allowed fails with EPERM, what is not known with ENOSYS, as if the kernel did not have it.
Reference: seccomp(2), and the kernel's classic BPF. x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import runpy
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_ARCH_X86_64, _SOCKET = 0xC000003E, 41
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def rules(allowed: Iterable[int], known: Iterable[int], families: Iterable[int]) -> bytes:
    """Return the filter as BPF."""
    allowed = set(allowed)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    sockets = [(_LOAD, 0, 0, 16)]
    for family in families:
        sockets += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW)]
    sockets.append((_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT))
    code += [(_EQUAL, 0, len(sockets), _SOCKET), *sockets]
    for number in sorted(allowed - {_SOCKET}):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number in sorted(set(known) - allowed):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    return b"".join(struct.pack("<HBBI", *each) for each in code)


def confine(code: bytes) -> None:
    """Put this process, and all that it starts, under a filter."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code) // 8, code)
    for words in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    confine(rules(**json.loads(Path(sys.argv[1]).read_text())))
    module = sys.argv[2]
    sys.argv[:3] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
