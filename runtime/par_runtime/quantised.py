"""Quantised matrices: whole numbers of 8 or 4 bits, and a scale for each block of ``group`` rows in each column.

A matrix [K,N] (in, out) is stored as codes [K,N] and scales [K/group,N]; its number at (k, n) is
``codes[k,n] * scales[k // group, n]``. There are no zero points, so zero stays zero: int8 has -127 .. 127, int4
-8 .. 7 (both as ONNX's ``DequantizeLinear`` reads them, with ``axis=0`` and ``block_size=group``). Two codes of
int4 share a byte, the first one in its low half, in the order of the matrix's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.dtypes import STORAGE, Float, to_float32

#: dtype -> the largest code, and the smallest. Of int4 all 16 are used: with 15 the demo's divergence is a seventh
#: larger. Of int8 -128 is not: the C kernels read sign and magnitude in 8 bits, and one of 256 is no loss.
MOST_CODE = {"int8": 127, "int4": 7}
LEAST_CODE = {"int8": -127, "int4": -8}
#: What a group of rows may be: a multiple of what the C kernels and GPU tiles take at a time.
GROUPS = (32, 64, 128)
SCALE = ".scale"  #: what follows the name of a matrix in the name of its scales

Codes = NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Quantised:
    """One matrix: ``codes`` int8 [K,N] and ``scales`` fp32 [K/group,N]."""

    dtype: str  #: "int8" or "int4"
    codes: Codes
    scales: Float

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        return int(self.codes.shape[0] // self.scales.shape[0])

    def dequantised(self) -> Float:
        """The matrix [K,N] in fp32."""
        return dequantised(self.codes, self.scales)

    def code_bytes(self) -> bytes:
        """The codes as a weights file stores them."""
        return packed(self.codes, self.dtype)


def dequantised(codes: Codes, scales: Float) -> Float:
    """``codes`` [K,N] times ``scales`` [K/group,N]: the matrix [K,N] in fp32."""
    blocks, columns = scales.shape
    numbers: Float = codes.reshape(blocks, -1, columns).astype(np.float32) * scales[:, None].astype(np.float32)
    return numbers.reshape(codes.shape)


def scale_fault(scales: NDArray[Any], dtype: str) -> str | None:
    """Why ``scales`` cannot be those of a quantised matrix, or None: each is a positive number, and finite.

    Their numbers are of ``dtype``, held in the numpy type of ``dtypes.STORAGE``. A scale of zero or below would be a
    matrix that no calibration writes, and TensorRT refuses it.
    """
    storage = np.dtype(STORAGE[dtype])
    bits = scales.reshape(-1).view(f"u{storage.itemsize}")
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[dtype]
    # Bits of positive numbers grow with them up to infinity; zero less one is the largest of all.
    wrong = bits - bits.dtype.type(1) >= infinity - 1
    if not wrong.any():
        return None
    at = int(wrong.argmax())
    value = float(to_float32(bits[at : at + 1].view(storage), dtype)[0])
    return f"holds the scale {value:g} (number {at} of {bits.size}); expected positive, finite numbers"


def packed(codes: Codes, dtype: str) -> bytes:
    """``codes`` [K,N] as a weights file stores them; for int4, N is even.

    Raises ValueError beyond the dtype's codes.
    """
    least, most = LEAST_CODE[dtype], MOST_CODE[dtype]
    if codes.size and (codes.max() > most or codes.min() < least):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}; {dtype} has {least} .. {most}")
    if dtype == "int8":
        return codes.tobytes()
    halves = codes.reshape(-1).view(np.uint8) & 0x0F
    return (halves[::2] | halves[1::2] << 4).tobytes()


def unpacked(stored: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Codes:
    """The codes int8 [K,N] of ``stored`` bytes: the inverse of :func:`packed`."""
    if dtype == "int8":
        return stored.view(np.int8).reshape(shape)
    out = np.empty((stored.size, 2), np.int8)
    out[:, 0] = (stored << 4).view(np.int8) >> 4  # the shift of a signed number fills with its sign
    out[:, 1] = stored.view(np.int8) >> 4
    return out.reshape(shape)
