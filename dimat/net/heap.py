"""Keeps freed memory for the next message: glibc would hand each one's pages back and fault them in again."""

from __future__ import annotations

import ctypes
import os

from dimat.net.profile import CHUNK_BYTES

CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
# parameters of glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 16 * CHUNK_BYTES
"""Free memory at the top of an arena that stays with the process: more than the chunks of two streams take."""
MAPPED_BYTES = 2 * CHUNK_BYTES
"""Pieces from this size on are mapped on their own, and gone when freed: a message of a transfer is smaller."""


def keep_freed() -> bool:
    """Keep up to `KEPT_BYTES` of freed memory an arena, in the whole process; return whether that was set.

    Left to itself, glibc trims an arena as soon as about two chunks are free at its top. A transfer allocates and
    frees each chunk at every hand-over, so it would pay a page fault for every 4 KiB that it moves. Nothing is done
    where the C library is another one, or where whoever starts the process has set the thresholds.
    """
    if any(name in os.environ for name in CHOSEN) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
