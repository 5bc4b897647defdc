"""Arrays for kernels in the interpreter: numbers of a type as numpy holds their bits, and launches on arrays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from double import language
from double.interpreter import _function, from_bf16, run_launch, to_bf16
from double.twins import NUMBERS, POINTED

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
    quick: bool = False,
    blocks: Sequence[tuple[int, ...]] | None = None,
) -> None:
    """Run ``source`` with ``arguments``: name -> (type, array or number); ``quick`` as in ``programs.Host``, which can
    run some ``blocks`` alone.
    """
    if quick:
        _quickly(source, constants, grid, arguments, blocks)
        return
    assert blocks is None
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


def _quickly(
    source: str,
    constants: Mapping[str, Any],
    grid: tuple[int, ...],
    arguments: Mapping[str, tuple[str, Any]],
    blocks: Sequence[tuple[int, ...]] | None,
) -> None:
    values: dict[str, Any] = dict(constants)
    if "DEPENDENT" in values:
        values["DEPENDENT"] = False
    for name, (kind, value) in arguments.items():
        if isinstance(value, np.ndarray):
            start = np.asarray(0, np.int64).view(language.Array)
            values[name] = language.Address(value.reshape(-1).view(POINTED[kind]), start, name)
        else:
            values[name] = language._array(NUMBERS[kind](value))
    sizes = (*grid, 1, 1)[:3]
    language.run(_function(source), sizes, blocks or list(itertools.product(*map(range, sizes))), values)
