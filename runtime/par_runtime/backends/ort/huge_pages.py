"""Weights on huge pages, so that a call that reads a gigabyte does not translate a quarter of a million page addresses.

A CPU step is bound by reading weights. In pages of 4 KB a core spends a good part of that time on translating
addresses, above all in a virtual machine, where each translation is two; in pages of 2 MB it does not. Linux gives
huge pages to a program that asks for them. numpy asks, ONNX Runtime does not, so this module asks after a session is
made: ``MADV_COLLAPSE`` (Linux 6.1) moves the content of small pages into huge ones, at about a second per 2 GB. It is
only advice: on another system, with an older kernel or with fragmented memory, nothing changes.

The memory of the program that holds a session is not ours to move: a huge page in the place of a single small one takes
2 MB, and one in the place of pages that a forked process shares with its parent is a copy of them. So only what was
mapped while the session was made is moved, and of that only what is in use as a whole, which takes no more memory than
before. What ONNX Runtime puts into memory that the process had already, between other things, stays where it is.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from par_runtime.system import system_text

HUGE_BYTES = 2**21
SMALLEST_BYTES = 2 * HUGE_BYTES  #: smaller mappings are not worth a system call
PIECE_BYTES = 2**26  #: moved at a time; if there is no huge page for one piece, the others are still moved
MADV_COLLAPSE = 25  #: Linux 6.1; Python has no name for it
MAPS = Path("/proc/self/maps")
#: A private mapping of plain memory: readable, writable, of no file.
PLAIN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(?:\[heap\])?(?:\[anon:.*\])?$")
RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S*)")

Range = tuple[int, int]  #: the first address, and the one behind the last


@contextmanager
def new_memory_on_huge_pages() -> Iterator[None]:
    """Move the large plain memory that this process maps meanwhile into huge pages, as far as the system does.

    Never raises: what cannot be moved stays where it is. What other threads map at the same time, and fill, is moved
    too, which costs them nothing.
    """
    before = _maps()
    yield
    if before is not None:
        use_huge_pages(new_ranges(before, _maps() or ""))


def _maps() -> str | None:
    """What is mapped; None where the system does not say."""
    with suppress(OSError):
        return system_text(MAPS) if sys.platform.startswith("linux") else None
    return None


def new_ranges(before: str, after: str) -> Iterator[Range]:
    """The huge pages inside each large plain mapping that ``/proc/self/maps`` had not ``before``, and has ``after``.

    A mapping that grew is new where it grew. Addresses that were only reserved before, without access, as an allocator
    does for a heap that it will grow, held nothing, so they are new too.
    """
    held = [
        (int(found[1], 16), int(found[2], 16))
        for found in map(RANGE.match, before.splitlines())
        if found is not None and not found[3].startswith("---")
    ]
    for line in after.splitlines():
        match = PLAIN.match(line)
        if match is None:
            continue
        for low, high in _without(held, int(match[1], 16), int(match[2], 16)):
            start, end = -(-low // HUGE_BYTES) * HUGE_BYTES, high // HUGE_BYTES * HUGE_BYTES
            if end - start >= SMALLEST_BYTES:
                yield start, end


def _without(held: Sequence[Range], low: int, high: int) -> Iterator[Range]:
    """The parts of the range from ``low`` to ``high`` in none of the ranges ``held``, which are in order."""
    for start, end in held:
        if start < high and end > low:
            if start > low:
                yield low, start
            low = end
    if low < high:
        yield low, high


def use_huge_pages(ranges: Iterator[Range]) -> int:
    """Move the huge pages in ``ranges`` of which every small page is in use; returns bytes moved. Never raises."""
    moved = 0
    with suppress(OSError, AttributeError):
        c = ctypes.CDLL(None, use_errno=True)
        c.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        c.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        for start, end in ranges:
            for low in range(start, end, PIECE_BYTES):
                for first, behind in _in_use(c, low, min(low + PIECE_BYTES, end)):
                    c.madvise(first, behind - first, mmap.MADV_HUGEPAGE)  # for a kernel that has only this
                    if c.madvise(first, behind - first, MADV_COLLAPSE) == 0:
                        moved += behind - first
    return moved


def _in_use(c: ctypes.CDLL, low: int, high: int) -> Iterator[Range]:
    """The longest ranges between two addresses of huge pages whose small pages are all in memory."""
    each = HUGE_BYTES // mmap.PAGESIZE
    pages = ctypes.create_string_buffer((high - low) // mmap.PAGESIZE)
    if c.mincore(low, high - low, pages) != 0:  # another thread has given some of it back
        return
    state, first = pages.raw, low
    for at in range(low, high, HUGE_BYTES):
        page = (at - low) // mmap.PAGESIZE
        if not all(byte & 1 for byte in state[page : page + each]):
            if first < at:
                yield first, at
            first = at + HUGE_BYTES
    if first < high:
        yield first, high
