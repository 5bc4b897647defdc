"""Memory of a GPU filled with random numbers, without a kernel: copies of one block, from another place each time.

Benchmarks need numbers that are not all zero: zeros can be faster, and hide what was never written. Speed depends on
the numbers in no other way, so a block that is repeated serves as well as fresh ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends import cuda

STEP_BYTES = 256  #: places of the block at which a copy begins are multiples of this


class Pool:
    """The bytes of ``numbers`` on ``device``, to be copied from on ``stream``. Use it in ``with``. Raises CudaError."""

    def __init__(self, device: cuda.Device, stream: cuda.Stream, numbers: NDArray[Any]) -> None:
        content = np.frombuffer(numbers.tobytes(), np.uint8)
        if content.size < STEP_BYTES or content.size % STEP_BYTES:
            raise ValueError(f"a block of {content.size} bytes; expected a multiple of {STEP_BYTES}")
        self._stream, self._size, self._next = stream, content.size, 0
        self._block = device.allocate(content.size, "random numbers")
        with device.pinned(content.size) as staging:
            staging.array[:] = content
            stream.upload(self._block.pointer, staging, staging.size)
            stream.synchronize()  # before the staging memory is freed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.synchronize()
        self._block.free()

    def fill(self, pointer: int, size: int) -> None:
        """Fill ``size`` bytes, in stream order; the next call takes other numbers for the same places."""
        done, at = 0, self._next
        while done < size:
            piece = min(size - done, self._size - at)
            self._stream.copy(pointer + done, self._block.pointer + at, piece)
            done, at = done + piece, 0
        # A third of the block, in steps: far from the places before and after.
        self._next = (self._next + self._size // 3) % self._size // STEP_BYTES * STEP_BYTES
