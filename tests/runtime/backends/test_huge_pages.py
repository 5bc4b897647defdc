"""Huge pages: which memory is asked for, that its content stays, and that nothing depends on the system's consent."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from par_runtime.backends.ort import huge_pages
from par_runtime.backends.ort.huge_pages import HUGE_BYTES, new_memory_on_huge_pages, new_ranges, use_huge_pages

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

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")


def test_large_plain_mappings_are_taken_and_nothing_else() -> None:
    assert list(new_ranges("", MAPS)) == [
        (0x55D0C0000000, 0x55D0C1000000),  # the heap
        (0x7F0000200000, 0x7F0000A00000),  # ends cut to whole huge pages
        (0x7F0008000000, 0x7F0008800000),
    ]


def test_what_was_mapped_before_is_left_alone() -> None:
    before = """\
55d0c0000000-55d0c0900000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000200000 rw-p 00000000 00:00 0
7f0000700000-7f0000701000 r--p 00000000 00:00 0
7f0008000000-7f0008700000 ---p 00000000 00:00 0
"""
    assert list(new_ranges(before, MAPS)) == [
        (0x55D0C0A00000, 0x55D0C1000000),  # what the heap grew by
        (0x7F0000200000, 0x7F0000600000),  # on both sides of what was there; the other one is too small
        (0x7F0008000000, 0x7F0008800000),  # it was only reserved
    ]
    assert list(new_ranges(MAPS, MAPS)) == []


def of_mapping(address: int, name: str) -> int:
    """An entry of the mapping at ``address``, in bytes: "Rss", or "AnonHugePages", what lies in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == f"{name}:":
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def mapped(pages: int, used: Iterable[int]) -> Iterator[tuple[mmap.mmap, int]]:
    """Plain memory of so many huge pages, with the small pages ``used`` written, and its first huge page's address."""
    with mmap.mmap(-1, (pages + 1) * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # else Linux might do it by itself
        memory.madvise(mmap.MADV_DONTDUMP, len(memory) - mmap.PAGESIZE)  # else it is one with that of the next call
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        first = -address % HUGE_BYTES
        for page in used:
            memory[first + page * mmap.PAGESIZE] = page % 251
        try:
            yield memory, address + first
        finally:
            del view


SMALL_PAGES = HUGE_BYTES // mmap.PAGESIZE  #: in a huge page


@linux
def test_memory_moves_and_its_content_stays() -> None:
    used = range(8 * SMALL_PAGES)
    with mapped(8, used) as (memory, address):
        assert of_mapping(address, "AnonHugePages") == 0
        moved = use_huge_pages(iter([(address, address + 8 * HUGE_BYTES)]))
        if not moved:
            pytest.skip("this system gives no huge pages")
        start = address - ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert moved == 8 * HUGE_BYTES
        assert of_mapping(address, "AnonHugePages") == 8 * HUGE_BYTES
        assert all(memory[start + page * mmap.PAGESIZE] == page % 251 for page in used)


@linux
def test_only_what_is_in_use_as_a_whole_moves() -> None:
    # Huge pages 0, 3 and 4 are full, 1 lacks its last page, of 2 one page is in use.
    used = [*range(2 * SMALL_PAGES - 1), 2 * SMALL_PAGES, *range(3 * SMALL_PAGES, 5 * SMALL_PAGES)]
    with mapped(5, used) as (_, address):
        held = of_mapping(address, "Rss")
        moved = use_huge_pages(iter([(address, address + 5 * HUGE_BYTES)]))
        assert sum(of_mapping(address + page * HUGE_BYTES, "Rss") for page in (0, 1, 3)) >= held  # now three mappings
        assert moved in (0, 3 * HUGE_BYTES)


@linux
def test_memory_of_before_stays_and_memory_of_meanwhile_moves() -> None:
    used = range(4 * SMALL_PAGES)
    with mapped(4, used) as (_, before):
        with new_memory_on_huge_pages():
            meanwhile = mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            meanwhile.madvise(mmap.MADV_NOHUGEPAGE)
            meanwhile.write(b"x" * len(meanwhile))
        assert of_mapping(before, "AnonHugePages") == 0
        if not of_mapping(ctypes.addressof(ctypes.c_char.from_buffer(meanwhile)) + HUGE_BYTES, "AnonHugePages"):
            pytest.skip("this system gives no huge pages")


OWN_MEMORY = """
import os, sys, warnings
from kinds import KINDS
from test_huge_pages import SMALL_PAGES, mapped, of_mapping
warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
path, load = KINDS["ONNX Runtime"]
load(path).close()  # what Python imports meanwhile
pages = range(16 * SMALL_PAGES)
with mapped(16, pages[::SMALL_PAGES]) as (_, sparse), mapped(16, pages) as (_, full):
    pipeline = load(path)
    pipeline.generate([0], seed=1)
    print(of_mapping(sparse, "Rss"), of_mapping(full, "AnonHugePages"), flush=True)
    pid = os.fork()
    if pid == 0:
        pipeline.generate([0], seed=1)
        print(of_mapping(sparse, "Rss"), of_mapping(full, "AnonHugePages"), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@linux
def test_the_memory_of_the_program_is_left_alone_also_in_a_forked_process() -> None:
    here = Path(__file__).parent
    environment = {"PYTHONPATH": ":".join([str(here), str(here.parent), str(here.parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", OWN_MEMORY], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{16 * mmap.PAGESIZE} 0"] * 2, done.stderr


def test_a_system_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert use_huge_pages(iter([(HUGE_BYTES, 3 * HUGE_BYTES)])) == 0  # nothing is there
    moved: list[object] = []
    monkeypatch.setattr(huge_pages, "use_huge_pages", lambda ranges: moved.extend(ranges))
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "no-such-maps")
    with new_memory_on_huge_pages():
        pass
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    monkeypatch.setattr(huge_pages, "system_text", lambda path: pytest.fail("only Linux has it"))
    with new_memory_on_huge_pages():
        pass
    assert moved == []


def test_mapped_files_may_have_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(b"7f0000000000-7f0000001000 r--p 00000000 08:01 12  /home/m\xfcller/b\xc3\xbc.so\n")
    monkeypatch.setattr(huge_pages, "MAPS", maps)
    with new_memory_on_huge_pages():
        pass
