"""Huge pages: which memory is asked for, that its content stays, and that nothing depends on the system's consent."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from par_runtime.backends.ort import huge_pages
from par_runtime.backends.ort.huge_pages import HUGE_BYTES, plain_mappings, use_huge_pages

MAPS = """\
55d0c0000000-55d0c1000000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000b00000 rw-p 00000000 00:00 0 
7f0001000000-7f0001300000 rw-p 00000000 00:00 0 
7f0002000000-7f0003000000 r--p 00000000 00:00 0 
7f0004000000-7f0005000000 rw-p 00000000 fe:00 1234                       /a/weights.data
7f0006000000-7f0007000000 rw-s 00000000 00:01 99                         /dev/zero (deleted)
7f0008000000-7f0008800000 rw-p 00000000 00:00 0                          [anon:numpy]
7ffd00000000-7ffd01000000 rw-p 00000000 00:00 0                          [stack]
"""  # noqa: W291, as the kernel writes it


def test_large_plain_mappings_are_taken_and_nothing_else() -> None:
    assert list(plain_mappings(MAPS)) == [
        (0x55D0C0000000, 2**24),  # the heap
        (0x7F0000200000, 0x800000),  # ends cut to whole huge pages
        (0x7F0008000000, 0x800000),
    ]


def huge_bytes(address: int) -> int:
    """What lies in huge pages of the mapping at ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_memory_moves_and_its_content_stays() -> None:
    import ctypes

    size = 8 * HUGE_BYTES
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(0, size, 4096):
            memory[page] = page // 4096 % 251
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view) + HUGE_BYTES
        assert huge_bytes(address) == 0
        moved = use_huge_pages()
        if not moved:
            pytest.skip("this system gives no huge pages")
        found = huge_bytes(address)
        content = all(memory[page] == page // 4096 % 251 for page in range(0, size, 4096))
        del view
    assert moved >= size - HUGE_BYTES
    assert found >= size - 2 * HUGE_BYTES
    assert content


def test_a_system_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert use_huge_pages(tmp_path / "no-such-maps") == 0
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert use_huge_pages() == 0


def test_mapped_files_may_have_any_name(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(b"7f0000000000-7f0000001000 r--p 00000000 08:01 12  /home/m\xfcller/b\xc3\xbc.so\n")
    assert use_huge_pages(maps) == 0
