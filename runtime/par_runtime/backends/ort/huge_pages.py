"""Weights on huge pages, so that a call that reads a gigabyte does not translate a quarter of a million page addresses.

A CPU step is bound by reading weights. In pages of 4 KB a core spends a good part of that time on translating
addresses, above all in a virtual machine, where each translation is two; in pages of 2 MB it does not. Linux gives
huge pages to a program that asks for them. numpy asks, ONNX Runtime does not, so this module asks after a session is
made: ``MADV_COLLAPSE`` (Linux 6.1) moves the content of small pages into huge ones, at about a second per 2 GB, without
taking more memory. It is only advice: on another system, with an older kernel or with fragmented memory, nothing
changes.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from par_runtime.system import system_text

HUGE_BYTES = 2**21
SMALLEST_BYTES = 2 * HUGE_BYTES  #: smaller mappings are not worth a system call
PIECE_BYTES = 2**26  #: moved at a time; if there is no huge page for one piece, the others are still moved
MADV_COLLAPSE = 25  #: Linux 6.1; Python has no name for it
#: A private mapping of plain memory: readable, writable, of no file.
PLAIN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(?:\[heap\])?(?:\[anon:.*\])?$")


def use_huge_pages(maps: Path = Path("/proc/self/maps")) -> int:
    """Move the large plain mappings of this process into huge pages, as far as the system does; returns bytes moved.

    Never raises: what cannot be moved stays where it is.
    """
    if not sys.platform.startswith("linux"):
        return 0
    moved = 0
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, size in plain_mappings(system_text(maps)):
            madvise(start, size, mmap.MADV_HUGEPAGE)
            for offset in range(0, size, PIECE_BYTES):
                piece = min(PIECE_BYTES, size - offset)
                if madvise(start + offset, piece, MADV_COLLAPSE) == 0:
                    moved += piece
    return moved


def plain_mappings(maps: str) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the huge pages inside each large plain mapping of ``/proc/self/maps``."""
    for line in maps.splitlines():
        match = PLAIN.match(line)
        if match is None:
            continue
        low, high = (int(text, 16) for text in match.groups())
        start, end = -(-low // HUGE_BYTES) * HUGE_BYTES, high // HUGE_BYTES * HUGE_BYTES
        if end - start >= SMALLEST_BYTES:
            yield start, end - start
