"""What the C kernels read and write begins at a cache line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_runtime import Pipeline
from par_runtime.backends.native.backend import NativeBackend
from par_runtime.backends.native.decoding import NativeDecoder
from par_runtime.backends.native.library import library
from par_runtime.backends.native.memory import LINE_BYTES, copied, empty

DEMO = Path(__file__).parents[3] / "models" / "demo"
pytestmark = pytest.mark.skipif(library() is None, reason="the C step was not built")


def test_arrays_begin_at_a_line() -> None:
    for shape, dtype in (
        (0, np.uint8),
        (7, np.float32),
        ((3, 0), np.float32),
        ((2, 5, 9), np.uint16),
        (10**7, np.uint8),
    ):
        array = empty(shape, dtype)
        assert not array.size or array.ctypes.data % LINE_BYTES == 0
        assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
    numbers = np.arange(40, dtype=np.float64)[1::3]
    assert (copied(numbers, np.float32) == numbers).all()
    assert copied(numbers, np.float32).ctypes.data % LINE_BYTES == 0
    there = empty(5, np.float32)
    assert np.shares_memory(copied(there, np.float32), there)


def test_so_do_weights_caches_and_maps() -> None:
    with Pipeline.load(DEMO, "cpu", threads=1, selftest=False) as pipeline:
        pipeline.generate([0, 1], seed=1)
        backend = pipeline.backend
        assert isinstance(backend, NativeBackend)
        decoder = backend._decoder
        assert isinstance(decoder, NativeDecoder)
        assert decoder._operations is not None
        assert decoder._buffers is not None
        arrays = [backend._weights._packed, *backend._cache, *decoder._buffers._arrays]
        arrays += decoder._operations._arrays.values()
        assert all(array.ctypes.data % LINE_BYTES == 0 for array in arrays if array.size)
