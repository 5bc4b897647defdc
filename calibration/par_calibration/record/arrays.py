"""Files of arrays that are read as what they must be, or not at all.

Such a file may be damaged, or come from anybody. numpy's own reader allocates what a header claims, and raises whatever
its parser does.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

BYTES_AT_ONCE = 2**22
MOST_OF_ANY_LENGTH = 2**20  #: numbers of an array whose length is not known before

#: dtype and shape of an array; a length of None may be any up to :data:`MOST_OF_ANY_LENGTH`.
Form = tuple[str, tuple[int | None, ...]]


def read_arrays(path: Path, forms: Mapping[str, Form]) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.npz`` file that ``numpy.savez`` wrote, each of its form; it may hold others.

    Raises ValueError where the file is another one or damaged (the checksum of each array is compared), OSError.
    """
    if not path.is_file() and path.exists():
        raise ValueError("not a file")  # opening a pipe would wait for ever
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _array(archive, f"{name}.npy", *form) for name, form in forms.items()}
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"not a file of arrays: {error}") from error
    except (KeyError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise ValueError(f"not a file of arrays: {error}") from error


def _array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name}: is packed")
    with archive.open(name) as entry:
        found, fortran, kind = _header(entry)
        known = len(found) == len(shape) and all(
            size == wanted or (wanted is None and 0 <= size <= MOST_OF_ANY_LENGTH)
            for size, wanted in zip(found, shape, strict=True)
        )
        if not known or fortran or kind != np.dtype(dtype):
            raise ValueError(f"{name}: has another shape or type")
        out: NDArray[Any] = np.empty(math.prod(found), kind)
        to, at = out.view(np.uint8), 0
        while part := entry.read(BYTES_AT_ONCE):
            if at + len(part) > len(to):
                raise ValueError(f"{name}: is longer than it says")
            to[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        if at < len(to):
            raise ValueError(f"{name}: ends early")
    return out.reshape(found)


def _header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(entry)
        if version != (1, 0):
            raise ValueError(f"an array of version {version}")
        return np.lib.format.read_array_header_1_0(entry)
    except (OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # the parser of Python raises many kinds: MemoryError for parentheses in parentheses
        raise ValueError("a header that cannot be read") from error
