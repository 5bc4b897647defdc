"""The few instructions of PTX that our kernels hold as text, computed by numpy: for a machine without a GPU.

A kernel's text takes registers of 32 bits, in which several elements lie, the first one in the lowest bits. Which
elements share a register is the compiler's choice on a GPU, so nothing may depend on it; here neighbours do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

HALF, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
Registers = dict[str, np.ndarray]


def elementwise(
    text: str, constraints: str, arrays: Sequence[np.ndarray], dtypes: Sequence[np.dtype[Any]], pack: int
) -> list[np.ndarray]:
    """What ``text`` makes of ``arrays``, ``pack`` elements at a time: an array of each of ``dtypes``."""
    same = np.broadcast_arrays(*arrays)
    shape, count = same[0].shape, same[0].size
    rest = -count % pack
    registers: Registers = {}
    outputs = [np.dtype(dtype).itemsize * pack // 4 for dtype in dtypes]
    number = sum(outputs)
    for array in same:
        flat = np.concatenate([np.ascontiguousarray(array).reshape(-1), np.zeros(rest, array.dtype)])
        words = flat.view(np.uint8).reshape(-1, pack * array.dtype.itemsize).view(np.uint32)
        for column in words.T:
            registers[f"${number}"] = column
            number += 1
    if constraints.split(",") != ["=r"] * sum(outputs) + ["r"] * (number - sum(outputs)):
        raise ValueError(f"{number} registers, of which {sum(outputs)} are results; the text names {constraints}")
    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            _run(line.strip(), registers)
    out, number = [], 0
    for dtype, size in zip(dtypes, outputs, strict=True):
        words = np.stack([registers[f"${number + i}"] for i in range(size)], -1)
        number += size
        out.append(words.reshape(-1).view(dtype)[:count].reshape(shape))
    return out


def _run(line: str, registers: Registers) -> None:
    name, _, rest = line.partition(" ")
    target, *operands = (part.strip() for part in rest.split(","))
    values = [registers[part] if part in registers else np.uint32(int(part, 0)) for part in operands]
    length = next(iter(registers.values())).size
    registers[target] = np.ascontiguousarray(np.broadcast_to(_INSTRUCTIONS[name](*values), length), np.uint32)


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    """The four bytes of the eight of ``a`` and ``b`` that the digits of ``selector`` name."""
    both = np.uint64(a) | np.uint64(b) << np.uint64(32)
    out = np.uint32(0)
    for i in range(4):
        digit = int(selector) >> 4 * i & 15
        if digit > 7:
            raise NotImplementedError("prmt with copies of signs")
        out = out | ((both >> np.uint64(8 * digit)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Any function of three bits: bit 4a + 2b + c of ``table``."""
    out = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _pairs(function: Callable[..., Any], dtype: np.dtype[Any]) -> Callable[..., Any]:
    """``function`` of fp64 on both numbers of each register; the result is rounded once."""

    def run(*values: Any) -> Any:
        wide = [np.atleast_1d(np.asarray(value, np.uint32)).view(dtype).astype(np.float64) for value in values]
        length = max(each.size for each in wide)
        out = function(*(np.tile(each, length // each.size) for each in wide))
        return np.ascontiguousarray(out.astype(np.float32).astype(dtype)).view(np.uint32)

    return run


def _fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "sub.f16x2": _pairs(lambda a, b: a - b, HALF),
    "fma.rn.f16x2": _pairs(_fma, HALF),
    "fma.rn.bf16x2": _pairs(_fma, BF16),
}
