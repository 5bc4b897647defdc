"""What the operating system provides: cores, memory, and files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from par_runtime.errors import RequestError
from par_runtime.late import importing

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_PARTS = itertools.count()  # numbers hidden files, so that threads never write to the same one


def system_text(path: Path) -> str:
    """What a file of the system's own (in ``/proc`` or ``/sys``) says. Raises OSError.

    It may hold names of files, programs and groups, which are in any encoding, so bytes that are not of this process's
    are kept as in a path.
    """
    return os.fsdecode(path.read_bytes())


# -- cores ------------------------------------------------------------------------------------------------------------


def available_cores(cpu_max: Path = CGROUP / "cpu.max") -> int:
    """Cores this process may use; containers often allow fewer than the machine has (affinity, or a CPU quota)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = system_text(cpu_max).split()
        return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cores


# -- memory, in bytes -------------------------------------------------------------------------------------------------


def meminfo_bytes(key: str, proc: Path = PROC) -> int | None:
    """An entry of ``/proc/meminfo``, for instance "MemTotal"; None where the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        for line in system_text(proc / "meminfo").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes(pid: int | None = None) -> int | None:
    """The most memory that this process, or the one of this ``pid``, has held; pages of mapped files count while they
    are mapped.

    On Linux it is read from ``/proc``, because ``ru_maxrss`` includes what the parent process held when it forked.
    None where the system does not report it.
    """
    with suppress(OSError, IndexError, ValueError):
        status = PROC / ("self" if pid is None else str(pid)) / "status"
        return int(system_text(status).split("VmHWM:")[1].split()[0]) * 1024
    if pid is not None:
        return None
    with suppress(ImportError):
        with importing("resource"):
            import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Memory that this process can still take without paging; None where the system does not report it.

    It is the smallest of three numbers: what is free on the machine, in the container, and in the batch job.
    """
    free = meminfo_bytes("MemAvailable", proc)
    if free is None:
        return None
    groups = proc / "self" / "cgroup"
    lines = system_text(groups).splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, limit, used, prefix = cgroup, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used, prefix = cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        own = top / path.strip("/")
        # A container's limit is in the topmost folder that it sees; a batch job's limit is in a folder above its own.
        for folder in (own, *own.parents):
            free = min(free, _room(folder, limit, used, prefix))
            if folder == top:
                break
    return max(free, 0)


def _room(folder: Path, limit: str, used: str, prefix: str) -> int:
    """Bytes that a control group can still take; ``sys.maxsize`` where it has no limit.

    The group counts cached files as used. They are added here, because the system drops them when memory is needed.
    """
    try:
        room = int(system_text(folder / limit)) - int(system_text(folder / used))  # "max" is no limit
        stat = dict(line.split() for line in system_text(folder / "memory.stat").splitlines())
        return room + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return sys.maxsize


def give_back() -> None:
    """Return freed memory to the system, where the C library can do that.

    Without it, glibc keeps half a gigabyte of the layers of a checkpoint that were freed.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


# -- files ------------------------------------------------------------------------------------------------------------


def utf8_name(path: Path) -> str | None:
    """The name of ``path`` for a library that takes names in UTF-8 and no others; None where the name is not UTF-8.

    Where the system is not set to UTF-8 (LC_ALL=C), Python holds such a name as escaped bytes, which is another text.
    """
    try:
        return str(path) if os.name == "nt" else os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put ``path`` into an OSError that names no file: reading and writing an open file do not say which one it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.strerror = error.strerror or str(error)  # some have a text and no number
            error.filename = str(path)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises OSError."""
    with naming(path), path.open("rb") as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """Hex digest (sha256) of what is left to read of an opened file. Raises OSError."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """``PARVIS_CACHE``, or ``parvis`` in the user's cache folder; None for a user without a home."""
    if os.environ.get("PARVIS_CACHE"):
        return Path(os.environ["PARVIS_CACHE"])
    if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):
        return Path(os.environ["XDG_CACHE_HOME"]) / "parvis"
    with suppress(RuntimeError):  # a container that runs as a user whom nobody has named
        return Path.home() / ".cache" / "parvis"
    return None


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths are of one file or folder, by whatever links, or would be."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


def check_writable(path: Path) -> None:
    """Test that a file can be written at ``path``, in folders that may be new, before any work is done. Nothing stays.

    A file of a bundle or an engine is refused: it would be lost, and with it the whole folder. Raises RequestError,
    OSError.
    """
    if _is_part_of_a_bundle(path):
        raise RequestError(f"{path} is a file of the bundle or engine in {path.parent}; give another name")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise RequestError(
            f"{path} is a device or a pipe; give the name of a file (it is written under another name and renamed)"
        )
    _try_to_write(path)


def _try_to_write(path: Path) -> None:
    """Write a file beside ``path`` and remove it. Folders that ``path`` lacks are made inside of a hidden one: those of
    their own names may be made by another command at this moment. Raises OSError, which names ``path``.
    """
    above = next((folder for folder in path.parents if os.path.lexists(folder)), path.parent)
    if above == path.parent or not above.is_dir():
        write_beside(path, Path.touch, rename=False)
        return
    trial = _part(above / "new")
    try:
        write_beside(trial / path.relative_to(above), Path.touch, rename=False)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _is_part_of_a_bundle(path: Path) -> bool:
    """Whether the file ``path`` is a manifest beside the files that it lists, or one of these."""
    manifest = path.resolve().with_name("manifest.json") if path.is_file() else None
    if manifest is None or not manifest.is_file():
        return False
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, OSError):  # not ours, or broken: nothing to protect but what the user named
        return False
    files = found.get("files") if isinstance(found, dict) else None
    return isinstance(files, dict) and path.resolve().name in {manifest.name, *files}


def check_different(files: Sequence[Path]) -> None:
    """Raise RequestError where two of the ``files`` to be written are one, so that the first would be lost, or one
    would be a folder of another.
    """
    parents = {file.parent for file in files}  # of "." and "/" they are these
    folders = {folder: os.path.realpath(folder) for parent in parents for folder in (parent, *parent.parents)}
    places: dict[str, Path] = {}
    for file in files:
        place = os.path.join(folders[file.parent], file.name)
        if place in places:
            raise RequestError(f"{file}: two outputs of this command have this name, so one would be lost; change one")
        places[place] = file
    for folder, place in folders.items():
        if (other := places.get(place)) is not None and not os.path.isdir(place):  # of a folder check_writable says it
            below = next(file for file in files if folder in file.parents)
            raise RequestError(f"{below}: lies in {other}, another output of this command, which is a file; change one")


def check_folder_writable(folder: Path) -> None:
    """Test that a file can be written into ``folder``, which may be new, whatever it holds. Nothing stays. Raises
    OSError.
    """
    try:
        _try_to_write(folder / "x")
    except OSError as error:
        if error.filename == str(folder / "x"):
            error.filename = str(folder)
        raise


def write_beside(path: Path, write_to: Callable[[Path], object], rename: bool = True) -> None:
    """Call ``write_to`` with the path of a hidden file beside ``path``, then rename that file to ``path``.

    On any error ``path`` stays as it was, and the hidden file is removed. An OSError names ``path``, not the hidden
    file; one that comes of a file in the place of a folder names that file.
    """
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to(part)
        if rename:
            os.replace(part, path)
    except OSError as error:
        if error.filename in (None, str(part), part, str(path.parent), path.parent):
            error.filename, error.filename2 = str(_file_above(path) or path), None
        raise
    finally:
        with suppress(OSError):
            if part.is_file():  # not a device, whatever it is a link to
                part.unlink()


def _part(path: Path) -> Path:
    """A hidden name beside ``path``, short, so that it fits wherever the name of ``path`` does."""
    name = path.name.encode("ascii", "ignore")[:40].decode()
    return path.parent / f".{name}.{os.getpid()}-{next(_PARTS)}.part"


def _file_above(path: Path) -> Path | None:
    """The first of the folders of ``path``, from the top, that is no folder, as a link that leads nowhere; None where
    all are, or are not there.
    """
    # os.path, because the methods of Path raise where a folder may not be read
    return next((f for f in reversed(path.parents) if os.path.lexists(f) and not os.path.isdir(f)), None)


HALF = "; nothing was half-written"
#: errno -> what is wrong with the file or folder, and what to do.
_EXPLAINED = {
    errno.EACCES: "no permission for {}; choose another place or change its permissions",
    errno.EPERM: "no permission for {}; choose another place or change its permissions",
    errno.EROFS: "no permission for {}: it is on a read-only file system; choose another place",
    errno.ENOSPC: "no space left on the disk of {}; free some or choose another place" + HALF,
    errno.EFBIG: "{} is larger than this system or its limit (ulimit -f) allows; choose another place",
    errno.EIO: "{}: the disk reports an error (EIO); check the disk, or choose another place",
    errno.EISDIR: "{} is a folder where a file is expected; choose another place",
    errno.ENOTDIR: "{} is a file where a folder is expected; choose another place",
    errno.EEXIST: "{} is a file where a folder is expected; choose another place",
    errno.ENAMETOOLONG: "{}: the name is too long for this file system; give a shorter one",
    errno.ELOOP: "{}: its links lead in a circle; choose another place",
    errno.ENOENT: "{}: no such file or folder; check the name, or choose another place",
    errno.EMFILE: "too many open files, at {}; raise the limit (ulimit -n)",
    errno.ENFILE: "the whole system has too many open files, at {}; end what holds them (or raise fs.file-max)",
    errno.ENOMEM: "the system is out of memory, at {}; free some",
    errno.ESTALE: "{}: the network's disk has lost it (ESTALE); try again, or mount that disk again",
    errno.EDQUOT: "the disk quota is used up, at {}; free some space or choose another place",
}


#: What only writing can meet; writing to an open file does not say to which.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: OSError) -> str:
    """What went wrong with which file and what to do, in one line, for an error of the operating system."""
    if error.filename is None and error.errno in (errno.EMFILE, errno.ENFILE):  # as where a process is started
        return "too many open files; raise the limit (ulimit -n)"
    if error.filename is None and error.errno not in NO_ROOM:
        return error.strerror or str(error)
    where = "the output" if error.filename is None else os.fsdecode(error.filename)
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
        link = _broken_link(where)
        if link is not None:
            return f"{link[0]}: its links lead {link[1]}; choose another place"
    if len(where) > 300:
        where = f"{where[:140]}...{where[-140:]}"
    if error.errno in _EXPLAINED:
        return _EXPLAINED[error.errno].format(where)
    return f"{where}: {error.strerror or ' '.join(map(str, error.args))}"


def _broken_link(path: str) -> tuple[str, str] | None:
    """The first link on ``path`` that leads to nothing, and where it leads, in words; None where there is none."""
    for each in (*reversed(Path(path).parents), Path(path)):
        if os.path.islink(each) and not os.path.exists(each):
            try:
                os.stat(each)
            except OSError as error:
                return str(each), "in a circle" if error.errno == errno.ELOOP else "nowhere"
    return None
