"""Codes and scales of quantised matrices, and their entries in a manifest."""

from __future__ import annotations

import numpy as np
import pytest

from par_runtime.quantised import LEAST_CODE, MOST_CODE, Quantised, packed, unpacked


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_survive_their_bytes(dtype: str) -> None:
    codes = np.random.default_rng(0).integers(LEAST_CODE[dtype], MOST_CODE[dtype] + 1, (64, 6)).astype(np.int8)
    stored = np.frombuffer(packed(codes, dtype), np.uint8)
    assert stored.size == codes.size // (2 if dtype == "int4" else 1)
    assert (unpacked(stored, dtype, codes.shape) == codes).all()


def test_the_first_code_of_int4_is_in_the_low_half_of_a_byte() -> None:
    assert packed(np.array([[1, -2], [7, -8]], np.int8), "int4") == bytes([0xE1, 0x87])


@pytest.mark.parametrize(("dtype", "code"), [("int8", -128), ("int4", 8), ("int4", -9)])
def test_codes_beyond_the_dtype_are_refused(dtype: str, code: int) -> None:
    with pytest.raises(ValueError, match=f"codes from .* {dtype} has"):
        packed(np.array([[code, 0]], np.int8), dtype)


def test_each_block_of_rows_has_its_own_scale() -> None:
    matrix = Quantised(
        "int8", np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.int8), np.array([[1, 10], [2, 0.5]], np.float32)
    )
    assert matrix.group == 2
    assert matrix.dequantised().tolist() == [[1, 20], [3, 40], [10, 3], [14, 4]]
