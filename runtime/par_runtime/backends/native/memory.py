"""Memory for the C kernels: arrays that begin at a cache line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LINE_BYTES = 64  #: of a cache line, which is also a vector of AVX-512


def empty(shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of ``shape``, not filled, at a multiple of :data:`LINE_BYTES`.

    numpy begins large arrays 16 bytes behind one, and then every vector lies in two lines: the decoder of the demo took
    6 % longer. numpy asks the system for huge pages here as well. Raises MemoryError.
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    size = math.prod(sizes) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return memory[first : first + size].view(dtype).reshape(sizes)


def copied(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """``array`` as it is, where it is contiguous, of ``dtype`` and begins at a cache line; else a copy that does."""
    given = np.ascontiguousarray(array, dtype)
    if given.ctypes.data % LINE_BYTES == 0:
        return given
    out = empty(given.shape, dtype)
    out[...] = given
    return out
