"""Cores, memory and files as the operating system gives them."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from par_runtime import system
from par_runtime.errors import RequestError
from par_runtime.system import available_cores, check_folder_writable, check_writable, write_beside

GB = 10**9


def test_a_cpu_quota_limits_the_threads(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    whole = available_cores(tmp_path / "none")
    for text, cores in (
        ("max 100000\n", whole),
        ("50000 100000\n", 1),
        (f"{10 * whole}00000 100000\n", whole),
        ("?", whole),
    ):
        quota.write_text(text)
        assert available_cores(quota) == cores


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def machine(tmp_path: Path, cgroups: str) -> tuple[Path, Path]:
    """A /proc that has 20 GB available, and an empty /sys/fs/cgroup."""
    group(tmp_path / "proc", meminfo=f"MemTotal: 1 kB\nMemAvailable:   {20 * GB // 1024} kB\nBuffers: 2 kB")
    group(tmp_path / "proc" / "self", cgroup=cgroups)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "proc", tmp_path / "cgroup"


def gigabytes(proc: Path, cgroup: Path) -> float:
    free = system.available_bytes(proc, cgroup)
    assert free is not None
    return round(free / GB, 3)


def test_a_control_group_may_have_any_name(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "")
    (proc / "self" / "cgroup").write_bytes(b"0::/m\xfcller\n")
    group(cgroup / os.fsdecode(b"m\xfcller"), memory__max=5 * GB, memory__current=3 * GB, memory__stat="anon 5")
    assert gigabytes(proc, cgroup) == 2


@pytest.mark.parametrize(("name", "utf8"), [("bünd", "bünd"), (os.fsdecode(b"b\xff"), None)])
def test_names_for_libraries_that_take_utf8(name: str, utf8: str | None) -> None:
    assert system.utf8_name(Path(name)) == utf8


def test_available_memory_of_a_machine(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "0::/user.slice")
    assert gigabytes(proc, cgroup) == 20  # no such folder
    group(cgroup / "user.slice", memory__max="max", memory__current=3 * GB, memory__stat="anon 5")
    assert gigabytes(proc, cgroup) == 20
    (proc / "self" / "cgroup").unlink()
    assert gigabytes(proc, cgroup) == 20
    (proc / "meminfo").write_text("MemTotal: 1 kB")
    assert system.available_bytes(proc, cgroup) is None  # the system does not say
    assert system.available_bytes(tmp_path / "none", cgroup) is None


def test_available_memory_of_a_container_and_a_batch_job(tmp_path: Path) -> None:
    """Cached files count as free; the lowest of a job's own limit and the limits above it counts."""
    proc, cgroup = machine(tmp_path, "0::/job/step")
    cached = f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file {1 * GB}"
    group(cgroup, memory__max=16 * GB, memory__current=10 * GB, memory__stat=cached)
    assert gigabytes(proc, cgroup) == 10
    group(cgroup / "job", memory__max=8 * GB, memory__current=6 * GB, memory__stat="anon 1")
    group(cgroup / "job" / "step", memory__max="max", memory__current=6 * GB, memory__stat="anon 1")
    assert gigabytes(proc, cgroup) == 2
    group(cgroup / "job", memory__current=9 * GB)
    assert gigabytes(proc, cgroup) == 0


def test_available_memory_with_control_groups_of_version_1(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/of/the/host\n0::/")
    stat = f"inactive_file 7\ntotal_inactive_file {GB}\ntotal_active_file 0"
    v1 = {"memory__limit_in_bytes": 6 * GB, "memory__usage_in_bytes": 4 * GB, "memory__stat": stat}
    group(cgroup / "memory", **v1)  # what a container sees of its own group; the path is the host's
    assert gigabytes(proc, cgroup) == 3
    group(cgroup / "memory", **v1 | {"memory__limit_in_bytes": 9223372036854771712})
    assert gigabytes(proc, cgroup) == 20


def test_the_peak_memory_of_a_process_grows_with_it() -> None:
    before = system.peak_bytes()
    held = bytearray(64 * 2**20)
    after = system.peak_bytes()
    assert before is not None
    assert after is not None
    assert after >= before
    assert after >= len(held)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps no memory"
)
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks in the middle of the heap, which the C library keeps: a later one is still in use."""
    code = """
import os
from pathlib import Path
from par_runtime.system import give_back

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

start = megabytes()
blocks = [b"x" * (60_000 + i) for i in range(1000)]
blocks = blocks[-1:]
kept = megabytes()
give_back()
print(start, kept, megabytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, kept, now = map(float, done.stdout.split())
    assert kept > start + 50
    assert now < start + 10


def test_a_check_leaves_nothing_and_names_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment is there a folder of a new name: a command that begins beside it could lose it."""
    (tmp_path / "file").touch()
    made, real = list[Path](), os.mkdir

    def mkdir(path: Path, *mode: int) -> None:
        made.append(Path(path))
        real(path, *mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.chdir(tmp_path)
    for base in (tmp_path, Path()):
        for path in (base / "new" / "deep" / "x.png", base / "new" / ".." / "x.png", base / "x.png"):
            check_writable(path)
        check_folder_writable(base / "new")
        too_long, in_file = base / ("x" * 300) / "y" / "z.png", base / "file" / "new" / "x.png"
        with pytest.raises(OSError, match="too long") as long:
            check_writable(too_long)
        assert long.value.filename == str(too_long)
        with pytest.raises(OSError, match="Not a directory") as file:
            check_writable(in_file)
        assert file.value.filename == str(base / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    hidden = [part for path in made for part in path.relative_to(tmp_path if path.is_absolute() else ".").parts[:1]]
    assert {name[0] for name in hidden if name != "file"} == {"."}


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_beside(path, lambda part: part.write_text("first"))
    assert path.read_text() == "first"

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_beside(path, fail)
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOENT, "No such file", "/proc/x"),
            "/proc/x: no such file or folder; check the name, or choose",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many open files, at x; raise the limit (ulimit -n)"),
        (OSError(errno.ENOSPC, "No space"), "no space left on the disk of the output; free some or choose another"),
    ],
)
def test_an_error_of_the_system_says_what_to_do(error: OSError, line: str) -> None:
    assert system.explain(error).startswith(line)


@pytest.mark.parametrize(("to", "how"), [("link", "in a circle"), ("nothing", "nowhere")])
def test_a_link_that_leads_to_no_folder_is_named(tmp_path: Path, to: str, how: str) -> None:
    """Not the file that would lie in it, and not as a file."""
    link = tmp_path / "link"
    link.symlink_to(to)
    for path in (link / "a.png", link / "deep" / "a.png"):
        for check in (check_writable, lambda path: write_beside(path, Path.touch), check_folder_writable):
            with pytest.raises(OSError, match=r".") as caught:
                check(path)
            assert system.explain(caught.value) == f"{link}: its links lead {how}; choose another place"
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a folder; give a file name"):
        check_writable(tmp_path)
    with pytest.raises(RequestError, match="is a device or a pipe"):
        check_writable(Path("/dev/null"))
    check_writable(tmp_path / "x.png")
    (tmp_path / "x").mkdir()
    check_folder_writable(tmp_path)  # whatever names are in it
    assert not (tmp_path / "x.png").exists()
