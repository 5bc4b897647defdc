"""Finished samples, read back. They may come from anybody, so nothing in them is believed."""

from __future__ import annotations

import errno
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from par_runtime.arguments import file_name
from par_runtime.checked import load_json, open_regular
from par_runtime.errors import RequestError
from par_runtime.samples.file import ABOUT, BLOCK, CLASSES, IMAGES, LOCAL_HEADER, MOST_ABOUT, npy_header
from par_runtime.samples.plan import LABELS, MOST_SAMPLES
from par_runtime.system import naming

NOT_OURS = "is no file of 'parvis sample', or is damaged; give one that it finished"
MOST_SIDE = 2**16  #: pixels, and frames
#: What ``zipfile`` raises for a file that is damaged, or made to break it (and EINVAL: a seek before the beginning).
DAMAGES = (
    zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, zlib.error,
    lzma.LZMAError, struct.error,
)  # fmt: skip


def read_about(path: Path) -> dict[str, Any]:
    """What the samples at ``path`` say about themselves, as far as joining needs it checked.

    Raises RequestError, OSError.
    """
    with _ours(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        if archive.getinfo(ABOUT).file_size > MOST_ABOUT:
            raise ValueError(f"{ABOUT} is larger than {MOST_ABOUT} bytes")
        about = load_json(archive.read(ABOUT), ABOUT, ValueError)
        if not isinstance(about, dict):
            raise ValueError(f"{ABOUT} is no object")
        numbers = [about.get(key) for key in ("start", "stop", "count", "seed", "classes")]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{ABOUT}: start, stop, count, seed or classes is no whole number")
        start, stop, count, seed, classes = cast(list[int], numbers)
        if not 0 <= start < stop <= count <= MOST_SAMPLES or not 0 <= seed < 2**64 or not 1 <= classes < 2**32:
            raise ValueError(f"{ABOUT}: start, stop, count, seed or classes cannot be so")
        shape = about.get("shape")
        fits = isinstance(shape, list) and len(shape) in (3, 4)
        if not fits or not all(type(size) is int and 1 <= size <= MOST_SIDE for size in cast(list[Any], shape)):
            raise ValueError(f"{ABOUT}: shape cannot be so")
        if about.get("labels") not in LABELS:
            raise ValueError(f"{ABOUT}: labels cannot be so")
        return about


def read_array(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """The numbers of the array ``name`` of the samples at ``path``, in blocks; before the last one comes, the checksum
    of all was tested. Raises RequestError, OSError.
    """
    header, left = npy_header(dtype, shape), math.prod(shape) * np.dtype(dtype).itemsize
    with ExitStack() as opened:
        with _ours(path):
            file = opened.enter_context(open_regular(path))
            archive = opened.enter_context(zipfile.ZipFile(file))
            member = opened.enter_context(archive.open(name))
            if archive.getinfo(name).file_size != len(header) + left or member.read(len(header)) != header:
                raise ValueError(f"{name} is not {dtype} of shape {shape}")
        while left:
            with _ours(path):
                block = member.read(min(BLOCK, left))
                if not block:
                    raise EOFError(f"{name} ends early")
            left -= len(block)
            yield block


def read_images(path: Path, about: dict[str, Any]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The images [m,H,W,3] of the samples at ``path`` (of clips [m,T,H,W,3]), some at a time, with the number in the
    file of the first of them; before the last ones come, the checksum of all was tested. ``about``: what they say about
    themselves. Raises RequestError, OSError.
    """
    shape = tuple(about["shape"])
    left, first, size = b"", 0, math.prod(shape)
    for block in read_array(path, IMAGES, "|u1", (about["stop"] - about["start"], *shape)):
        left += block
        images = len(left) // size
        if images:
            yield first, np.frombuffer(left[: images * size], np.uint8).reshape(-1, *shape)
            left, first = left[images * size :], first + images


def open_images(path: str | Path) -> NDArray[np.uint8]:
    """The images [M,H,W,3] uint8 of the samples at ``path`` (of clips [M,T,H,W,3]), which are read from the disk where
    they are used. Their checksum is not tested. Raises RequestError, OSError.
    """
    path = file_name("path", path)
    about = read_about(path)
    shape = (about["stop"] - about["start"], *about["shape"])
    header = npy_header("|u1", shape)
    with _ours(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        info = archive.getinfo(IMAGES)
        file.seek(info.header_offset)
        *_, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        begin = info.header_offset + LOCAL_HEADER.size + name + extra
        file.seek(begin)
        if info.compress_type != zipfile.ZIP_STORED or file.read(len(header)) != header:
            raise ValueError(f"{IMAGES} is not uint8 of shape {shape}")
        return np.memmap(path, np.uint8, "r", begin + len(header), shape)


@contextmanager
def _ours(path: Path) -> Iterator[None]:
    """Make one RequestError of whatever a damaged file raises."""
    try:
        with naming(path):
            yield
    except RequestError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise RequestError(f"{path}: {NOT_OURS}") from error
    except DAMAGES as error:
        raise RequestError(f"{path}: {NOT_OURS} ({' '.join(str(error).split())[:100]})") from error


def checked_part(path: Path, about: dict[str, Any], labels: NDArray[np.int64]) -> None:
    """Read all of the part at ``path``; raises RequestError where anything of it is damaged, or it has other classes
    than these ``labels``; OSError.
    """
    found = b"".join(read_array(path, CLASSES, "<i8", labels.shape))
    if found != labels.astype("<i8").tobytes():
        raise RequestError(f"{path}: {NOT_OURS} (its labels are not those of its seeds)")
    for _ in read_array(path, IMAGES, "|u1", (len(labels), *about["shape"])):
        pass
