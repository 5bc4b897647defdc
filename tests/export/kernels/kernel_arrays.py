"""Arrays for kernels in the interpreter: numbers of a type as numpy holds their bits, and launches on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from double.interpreter import from_bf16, run_launch, to_bf16

KIND = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
#: Half a unit in the last place, relative.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}


def stored(values: np.ndarray, precision: str) -> np.ndarray:
    """``values`` rounded to ``precision``; bf16 as its bits in uint16."""
    wide = np.ascontiguousarray(values, np.float32)
    return to_bf16(wide) if precision == "bf16" else wide.astype({"fp16": np.float16, "fp32": np.float32}[precision])


def wide(values: np.ndarray) -> np.ndarray:
    """What an array of :func:`stored` stands for, in float64."""
    return (from_bf16(values) if values.dtype == np.uint16 else values).astype(np.float64)


def empty(shape: tuple[int, ...], precision: str) -> np.ndarray:
    """Memory that nobody has written: all NaN."""
    return stored(np.full(shape, np.nan, np.float32), precision)


def launch(
    source: str,
    constants: Mapping[str, Any],
    grid: tuple[int, ...],
    arguments: Mapping[str, tuple[str, Any]],
    shuffle: int | None = None,
) -> None:
    """Run ``source`` with ``arguments``: name -> (type, array or number)."""
    values = []
    for _, value in arguments.values():
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            values.append(value.ctypes.data)
        else:
            values.append(value)
    sizes = (*grid, 1, 1)
    run_launch(
        source,
        constants,
        [(name, kind) for name, (kind, _) in arguments.items()],
        (sizes[0], sizes[1], sizes[2]),
        values,
        shuffle,
    )
