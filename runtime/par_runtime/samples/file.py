"""An ``.npz`` of images that is larger than memory, takes hours to fill, and must survive a kill.

It holds ``about.json`` (what the images depend on), ``arr_1.npy`` (classes [M] int64) and, last, ``arr_0.npy`` (images
[M,H,W,3] uint8): names and order as evaluation suites expect them. Nothing is compressed, so where image i will lie is
known from the start: ``NAME.part`` is the beginning of that file, with as many images as are made. At the end its
directory is written behind them, and it gets its name. ``reading.py`` reads it back.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from par_runtime.checked import load_json, shown
from par_runtime.errors import RequestError
from par_runtime.system import check_writable, naming

try:
    import fcntl
except ImportError:  # a system without locks
    fcntl = None  # type: ignore[assignment]

ABOUT, CLASSES, IMAGES = "about.json", "arr_1.npy", "arr_0.npy"
MOST_ABOUT = 2**20  #: bytes of a file's own about.json that are read
BLOCK = 2**24  #: bytes that are copied, or made another size, at once
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  #: of a member of a zip file (APPNOTE 4.3.7)


class SampleFile:
    """The beginning of an ``.npz`` at ``path``, opened by :func:`open_samples`; ``done`` images are in it."""

    def __init__(self, file: BinaryIO, path: Path, begin: int, shape: tuple[int, ...]) -> None:
        """``begin``: where the first image lies; ``shape``: [M,H,W,3], of all images."""
        self._file, self.path, self._begin, self.shape = file, path, begin, shape
        self.image_bytes = math.prod(shape[1:])
        status = os.fstat(file.fileno())
        self._has_directory = status.st_nlink > 1 and status.st_size > begin + math.prod(shape)

    @property
    def part(self) -> Path:
        """Where the images are until all are made."""
        return part_of(self.path)

    @property
    def done(self) -> int:
        """How many images are there, the last one whole."""
        return max(min((os.fstat(self._file.fileno()).st_size - self._begin) // self.image_bytes, self.shape[0]), 0)

    def append(self, images: NDArray[np.uint8]) -> None:
        """Write ``images`` [b,H,W,3] behind those that are there; at the end of the call they are on the disk.

        Raises OSError; then those that were there before still are.
        """
        with naming(self.part):
            self._file.seek(self._begin + self.done * self.image_bytes)
            _write(self._file, np.ascontiguousarray(images).data)
            os.fsync(self._file.fileno())

    def keep(self, images: int) -> None:
        """Of the images that are there, keep the first ones. Raises OSError."""
        with naming(self.part):
            self._file.truncate(self._begin + images * self.image_bytes)

    def finish(self, labels: NDArray[np.int64], about: dict[str, Any]) -> None:
        """Write the directory behind all images, and give the file its name.

        Raises RequestError where another program has made a file of that name meanwhile; OSError.
        """
        assert self.done == self.shape[0]
        if self._has_directory:  # and had its name once, when an earlier run was killed: others may have it
            self._publish()
            return
        with naming(self.part):
            self._file.seek(0)
            place = _InPlace(self._file)  # all is there but what comes behind the images, and the size of their member
            with (
                self.part.open("rb") as images,
                zipfile.ZipFile(cast(BinaryIO, place), "w", zipfile.ZIP_STORED) as archive,
                _front_of(archive, about, labels, self.shape) as (member, _),
            ):
                images.seek(self._begin)
                left = math.prod(self.shape)
                while left:
                    block = images.read(min(BLOCK, left))
                    member.write(block)  # for its checksum
                    left -= len(block)
                place.there = False
            self._file.truncate()
            os.fsync(self._file.fileno())
        self._publish()

    def _publish(self) -> None:
        taken = RequestError(
            f"{self.path}: another program has made it meanwhile; all images are in {self.part}: rename the one or the "
            "other, and run this again"
        )
        with naming(self.path):
            try:
                os.link(self.part, self.path)  # unlike a renaming, it never replaces a file
            except FileExistsError:
                raise taken from None
            except OSError:  # a disk without links
                if os.path.lexists(self.path):
                    raise taken from None
                os.rename(self.part, self.path)
            else:
                self.part.unlink()


@contextmanager
def open_samples(path: Path, labels: NDArray[np.int64], about: dict[str, Any]) -> Iterator[SampleFile]:
    """The file of these images, new, or as an earlier run of the same request left it.

    Raises RequestError where ``path`` is there already, where what is begun is another request's, where another process
    writes into it, or where the disk is too small; OSError.
    """
    check_new(path)
    (front, same), shape, part = front_bytes(about, labels), (len(labels), *about["shape"]), part_of(path)
    _check_room(path, len(front) + math.prod(shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    # Without a buffer: what a disk that is full did not take would be tried again when the file is closed.
    with open(os.open(part, flags, 0o666), "r+b", buffering=0) as raw:
        file = cast(BinaryIO, raw)
        with naming(part):
            _lock(file, part)
            if os.path.lexists(path) and not os.fstat(file.fileno()).st_size:
                part.unlink()  # another process has just finished it, and the opening made a new one
            check_new(path)
            begun = file.read(same)
            if begun != front[: len(begun)]:
                raise RequestError(_other(part, file, about))
            samples = SampleFile(file, path, len(front), shape)
            if not samples._has_directory:
                file.seek(len(begun))  # 0 of a new one; what follows "same" has changed where the end was interrupted
                _write(file, front[len(begun) :])
                samples.keep(samples.done)
            del front, begun
        yield samples


def check_new(path: Path) -> None:
    """Raise RequestError where ``path`` cannot be a new file of samples, which take too long to be written over;
    OSError where it cannot be written.
    """
    if path.suffix.lower() != ".npz":
        raise RequestError(f"{path}: expected a name that ends in .npz, for instance samples.npz")
    part = part_of(path)
    if os.path.lexists(path):
        raise RequestError(f"{path}: is there already; give another name, or remove it")
    if os.path.lexists(part) and not part.is_file():
        raise RequestError(
            f"{part}: is no file, but the images would be collected there; give another --out, or remove it"
        )
    check_writable(part)


def part_of(path: Path) -> Path:
    """The name of the file while it grows."""
    return path.with_name(path.name + ".part")


def front_bytes(about: dict[str, Any], labels: NDArray[np.int64]) -> tuple[bytes, int]:
    """All that lies before the first image, and how many bytes of it stay the same until the end."""
    file, shape = io.BytesIO(), (len(labels), *about["shape"])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, _front_of(archive, about, labels, shape) as (_, at):
        return file.getvalue(), at


@contextmanager
def _front_of(
    archive: zipfile.ZipFile, about: dict[str, Any], labels: NDArray[np.int64], shape: tuple[int, ...]
) -> Iterator[tuple[Any, int]]:
    """Write all members but the images into ``archive``; yields that of the images, where the first image begins, and
    where its own header lies, which changes at its end.
    """
    archive.writestr(zipfile.ZipInfo(ABOUT), json.dumps(about))
    archive.writestr(zipfile.ZipInfo(CLASSES), npy_header("<i8", labels.shape) + labels.astype("<i8").tobytes())
    info = zipfile.ZipInfo(IMAGES)
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(npy_header("|u1", shape))
        yield member, info.header_offset


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What an ``.npy`` has before its numbers (NEP 1)."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of ``data``: a file without a buffer may take a part at a time. Raises OSError."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


class _InPlace:
    """A file for ``zipfile``, which takes what is there already as written."""

    there = True

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek, self.flush = file.tell, file.seek, file.flush

    def write(self, data: bytes) -> int:
        if self.there:
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            _write(self._file, data)
        return len(data)


def _lock(file: BinaryIO, part: Path) -> None:
    """Keep other processes out until ``file`` is closed. Raises RequestError where one is at work."""
    busy = RequestError(
        f"{part}: another process writes into it now; wait until that one has ended, or give another --out"
    )
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a disk without locks
            return
        if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
            raise busy  # it was finished, and got its name, between the opening and the lock


def _check_room(path: Path, size: int) -> None:
    """Raise RequestError where the disk of ``path`` has no room for a file of ``size`` bytes, as far as it is not there
    yet.
    """
    statvfs = getattr(os, "statvfs", None)
    if statvfs is None:
        return
    with suppress(OSError):
        size -= part_of(path).stat().st_size
    disk = statvfs(next(folder for folder in path.absolute().parents if folder.is_dir()))
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        raise RequestError(
            f"{path}: takes {size / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free on its disk; free some, or give "
            "a place on another disk"
        )


def _other(part: Path, file: BinaryIO, about: dict[str, Any]) -> str:
    """Why what is begun in ``part`` is not of the request ``about``, and what to do."""
    file.seek(0)
    head = file.read(LOCAL_HEADER.size)
    try:
        magic, *_, size, name, extra = LOCAL_HEADER.unpack(head)
        if magic != b"PK\3\4" or size > MOST_ABOUT or file.read(name) != ABOUT.encode():
            raise ValueError("no beginning of ours")
        file.read(extra)
        begun = load_json(file.read(size), ABOUT, ValueError)
        if not isinstance(begun, dict):
            raise ValueError("no beginning of ours")
    except (ValueError, struct.error):
        return f"{part}: is no file that 'parvis sample' began; give another --out, or remove it"
    flat, wanted = _flat(begun), _flat(about)
    other = [key for key in wanted if flat.get(key) != wanted[key]]
    said = [f"{key} {shown(flat.get(key))} then, {shown(wanted[key])} now" for key in other[:4]]
    return (
        f"{part}: was begun otherwise ({'; '.join(said) or 'in another form'}); give what it was begun with, another "
        "--out, or remove it"
    )


def _flat(about: dict[str, Any], before: str = "") -> dict[str, Any]:
    """``about`` with the entries of objects as its own, for a message."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        flat |= _flat(value, f"{before}{key} ") if isinstance(value, dict) else {before + key: value}
    return flat
