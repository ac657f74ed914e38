"""Freed memory stays for the next message. Reference: the kernel's count of page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# pieces as a transfer has them: read in threads, four at a time, each freed by the main thread
MOVE = """
import os, resource, tempfile
from concurrent.futures import ThreadPoolExecutor
from dimat.net.limits import CHUNK_BYTES
from dimat.net.grpc_transport import keep_freed
kept = keep_freed()
with tempfile.TemporaryFile() as file, ThreadPoolExecutor(2) as pool:
    file.truncate(4 * CHUNK_BYTES)
    def read():
        return [os.pread(file.fileno(), CHUNK_BYTES, i * CHUNK_BYTES) for i in range(4)]
    def move(times):
        ahead = pool.submit(read)
        for _ in range(times):
            chunks, ahead = ahead.result(), pool.submit(read)
            while chunks:
                bytes(memoryview(chunks.pop(0)))
        ahead.result()
    move(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    move(50)
    print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2 * 50 * 4 * 2**20 // 4096  # of the pieces and of their copies


def run(**environment: str) -> tuple[bool, int]:
    """Move the pieces in a process of its own; return whether memory was kept, and the page faults."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", MOVE], env=clean | environment, capture_output=True, text=True, check=True, timeout=120
    )
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pieces_of_a_transfer_fault_no_pages_in() -> None:
    kept, faults = run()
    assert kept
    assert faults < PAGES / 10


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_whoever_starts_the_process_has_set_stays(chosen: dict[str, str]) -> None:
    kept, _ = run(**chosen)
    assert not kept
