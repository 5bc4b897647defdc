"""An ``.npz`` of images that is larger than memory, takes hours to fill, and must survive a kill.

It holds ``about.json`` (what the images depend on), ``arr_1.npy`` (classes [M] int64) and, last, ``arr_0.npy`` (images
[M,H,W,3] uint8): names and order as evaluation suites expect them. Nothing is compressed, so where image i will lie is
known from the start: ``NAME.part`` is the beginning of that file, with as many images as are made. At the end its
directory is written behind them, and it gets its name. What is read back is not believed: files come from anybody.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from par_runtime.checked import load_json, open_regular, shown
from par_runtime.errors import RequestError
from par_runtime.samples.plan import MOST_SAMPLES
from par_runtime.system import check_writable, naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ABOUT, LABELS, IMAGES = "about.json", "arr_1.npy", "arr_0.npy"
MOST_FRAMES = 2**16  #: and pixels of a side, in a file that is read
MOST_ABOUT = 2**20  #: bytes of a file's own about.json that are read
BLOCK = 2**24  #: bytes that are copied at once
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  #: of a member of a zip file (APPNOTE 4.3.7)


class SampleFile:
    """The beginning of an ``.npz`` at ``path``, opened by :func:`open_samples`; ``done`` images are in it."""

    def __init__(self, file: BinaryIO, path: Path, front: bytes, shape: tuple[int, ...]) -> None:
        self._file, self.path, self._front, self.shape = file, path, front, shape
        self._image_bytes = math.prod(shape[1:])

    @property
    def part(self) -> Path:
        """Where the images are until all are made."""
        return part_of(self.path)

    @property
    def done(self) -> int:
        """How many images are there, the last one whole."""
        return min((os.fstat(self._file.fileno()).st_size - len(self._front)) // self._image_bytes, self.shape[0])

    def append(self, images: NDArray[np.uint8]) -> None:
        """Write ``images`` [b,H,W,3] behind those that are there; at the end of the call they are on the disk.

        Raises OSError; then those that were there before still are.
        """
        with naming(self.part):
            self._file.seek(len(self._front) + self.done * self._image_bytes)
            _write(self._file, np.ascontiguousarray(images).data)
            os.fsync(self._file.fileno())

    def keep(self, images: int) -> None:
        """Of the images that are there, keep the first ones. Raises OSError."""
        with naming(self.part):
            self._file.truncate(len(self._front) + images * self._image_bytes)

    def finish(self, labels: NDArray[np.int64], about: dict[str, Any]) -> None:
        """Write the directory behind all images, and give the file its name. Raises OSError."""
        assert self.done == self.shape[0]
        with naming(self.part):
            self._file.seek(0)
            place = _InPlace(self._file)  # all is there but what comes behind the images, and the size of their member
            with (
                self.part.open("rb") as images,
                zipfile.ZipFile(cast(BinaryIO, place), "w", zipfile.ZIP_STORED) as archive,
                _front_of(archive, about, labels, self.shape) as (member, _),
            ):
                images.seek(len(self._front))
                left = math.prod(self.shape)
                while left:
                    block = images.read(min(BLOCK, left))
                    member.write(block)
                    left -= len(block)
                place.there = False
            self._file.truncate()
            os.fsync(self._file.fileno())
            os.replace(self.part, self.path)


@contextmanager
def open_samples(path: Path, labels: NDArray[np.int64], about: dict[str, Any]) -> Iterator[SampleFile]:
    """The file of these images, new, or as an earlier run of the same request left it.

    Raises RequestError where ``path`` is there already, where what is begun is another request's, where another process
    writes into it, or where the disk is too small; OSError.
    """
    check_new(path)
    (front, same), shape = front_bytes(about, labels), (len(labels), *about["shape"])
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    # Without a buffer: what a disk that is full did not take would be tried again when the file is closed.
    with open(os.open(part, flags, 0o666), "r+b", buffering=0) as raw:
        file = cast(BinaryIO, raw)
        with naming(part):
            _lock(file, part)
            check_new(path)  # another process may have finished it meanwhile
            begun = file.read(same)
            if begun != front[: len(begun)]:
                raise RequestError(_other(part, file, about))
            _check_room(path, len(front) + math.prod(shape) - os.fstat(file.fileno()).st_size)
            file.seek(len(begun))  # 0 of a new one; what follows "same" has changed where the end was interrupted
            _write(file, front[len(begun) :])
            samples = SampleFile(file, path, front, shape)
            samples.keep(samples.done)
        yield samples


def check_new(path: Path) -> None:
    """Raise RequestError where ``path`` cannot be a new file of samples; they take too long to be written over."""
    if path.suffix.lower() != ".npz":
        raise RequestError(f"{path}: expected a name that ends in .npz")
    if os.path.lexists(path):
        raise RequestError(f"{path}: is there already; give another name, or remove it")
    check_writable(part_of(path))


def part_of(path: Path) -> Path:
    """The name of the file while it grows."""
    return path.with_name(path.name + ".part")


NOT_OURS = "is no file of 'parvis sample', or is damaged; give one that it finished"
#: What ``zipfile`` raises for a file that is damaged, or made to break it.
DAMAGES = (
    zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, zlib.error,
    lzma.LZMAError, struct.error,
)  # fmt: skip


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The member ``name`` of the zip file at ``path``, and its size. Raises RequestError, OSError."""
    try:
        with naming(path), open_regular(path) as file, zipfile.ZipFile(file) as archive, archive.open(name) as member:
            yield cast(BinaryIO, member), archive.getinfo(name).file_size
    except RequestError:
        raise
    except DAMAGES as error:
        raise RequestError(f"{path}: {NOT_OURS} ({' '.join(str(error).split())[:100]})") from error


def read_about(path: Path) -> dict[str, Any]:
    """What the finished samples at ``path`` say about themselves. Raises RequestError, OSError."""
    with _opened(path, ABOUT) as (member, _):
        return _checked(member.read(MOST_ABOUT), path)


def _checked(text: bytes, path: Path) -> dict[str, Any]:
    """``text`` as an object of JSON with what joining needs. Raises RequestError."""
    about = load_json(text, f"{path}: {ABOUT}", RequestError)
    whole = isinstance(about, dict) and all(type(about.get(key)) is int for key in ("count", "start", "stop"))
    if not whole or not 0 <= about["start"] < about["stop"] <= about["count"] <= MOST_SAMPLES:
        raise RequestError(f"{path}: {NOT_OURS}")
    shape = about.get("shape")
    sizes = isinstance(shape, list) and all(type(size) is int and 1 <= size <= MOST_FRAMES for size in shape)
    if not sizes or len(shape) not in (3, 4):
        raise RequestError(f"{path}: {NOT_OURS}")
    return cast(dict[str, Any], about)


@contextmanager
def open_array(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """The array ``name`` of the finished samples at ``path``, at its first number. Raises RequestError, OSError."""
    header = _npy_header(dtype, shape)
    with _opened(path, name) as (member, size):
        if size != len(header) + math.prod(shape) * np.dtype(dtype).itemsize or member.read(len(header)) != header:
            raise RequestError(f"{path}: {NOT_OURS} ({name} is not {dtype} of shape {shape})")
        yield member


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
    archive.writestr(zipfile.ZipInfo(LABELS), _npy_header("<i8", labels.shape) + labels.astype("<i8").tobytes())
    info = zipfile.ZipInfo(IMAGES)
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(_npy_header("|u1", shape))
        yield member, info.header_offset


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
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
        except OSError:  # a file system without locks
            return
        if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
            raise busy  # it was finished, and renamed, between the opening and the lock


def _check_room(path: Path, needed: int) -> None:
    """Raise RequestError where the disk of ``path`` has less than ``needed`` bytes."""
    statvfs = getattr(os, "statvfs", None)
    if statvfs is not None:
        disk = statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise RequestError(
                f"{path}: takes {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free on its disk; free "
                "some, give a place elsewhere, or fewer images (--count)"
            )


def _other(part: Path, file: BinaryIO, about: dict[str, Any]) -> str:
    """Why what is begun in ``part`` is not of the request ``about``, and what to do."""
    file.seek(0)
    head = file.read(LOCAL_HEADER.size)
    advice = "give the options that it was begun with, another --out, or remove it"
    try:
        magic, *_, size, name, extra = LOCAL_HEADER.unpack(head)
        if magic != b"PK\3\4" or size > MOST_ABOUT or file.read(name) != ABOUT.encode():
            raise ValueError("no beginning of ours")
        file.read(extra)
        begun = _checked(file.read(size), part)
    except (ValueError, struct.error):
        return f"{part}: is no file that 'parvis sample' began; give another --out, or remove it"
    flat, wanted = _flat(begun), _flat(about)
    other = [key for key in wanted if flat.get(key) != wanted[key]]
    said = [f"{key} {shown(flat.get(key))} then, {shown(wanted[key])} now" for key in other[:4]]
    return f"{part}: was begun otherwise ({'; '.join(said) or 'in another form'}): {advice}"


def _flat(about: dict[str, Any], before: str = "") -> dict[str, Any]:
    """``about`` with the entries of objects as its own, for a message."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        flat |= _flat(value, f"{before}{key} ") if isinstance(value, dict) else {before + key: value}
    return flat
