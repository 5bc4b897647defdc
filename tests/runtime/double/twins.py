"""A launch's twin: the kernel's own source, run on the stand-in's memory, every access checked.

It runs in ``language.py``; or, to compare, in Triton's interpreter as well.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from triton.runtime.interpreter import InterpretedFunction

from double import interpreter, language
from double.driver import Driver, ViolationError
from par_runtime.backends.program import POINTERS, Kernel

POINTED = {
    "*fp16": np.float16,
    "*bf16": ml_dtypes.bfloat16,
    "*fp32": np.float32,
    "*i64": np.int64,
    "*i32": np.int32,
    "*u8": np.uint8,
}
NUMBERS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


@functools.lru_cache(maxsize=1024)
def _of_source(source: str, names: frozenset[str]) -> InterpretedFunction:
    """The function of ``source``, which takes arguments of these names. Raises ViolationError."""
    function: InterpretedFunction = interpreter._function(source)
    wanted = frozenset(inspect.signature(function.fn).parameters)
    if wanted != names:
        raise ViolationError(f"{source} takes {sorted(wanted)}; it is given {sorted(names)}")
    return function


def _compiled(kernel: Kernel) -> tuple[InterpretedFunction, dict[str, Any]]:
    """The function of ``kernel`` and its constants."""
    constants = dict(kernel.constants)
    function = _of_source(kernel.source, frozenset(constants).union(name for name, _ in kernel.parameters))
    if "DEPENDENT" in constants:  # nothing to wait for here
        constants["DEPENDENT"] = False
    return function, constants


class Parts(Protocol):
    """Places (address, bytes) inside of allocations that are buffers of their own."""

    def __call__(self, at: int) -> Sequence[tuple[int, int]]:
        """Those of a launch whose arguments lie at that place of the host's memory."""

    def clear(self) -> None:
        """They may be others from now on."""


class Twins:
    """Computes launches on the memory of ``driver``; blocks run in a random order, since a GPU promises none.

    ``parts``: as far as they are known.
    """

    def __init__(self, driver: Driver, compare: bool = False) -> None:
        self._driver, self.compare = driver, compare
        self._random = np.random.default_rng(0)
        self.parts: Parts | None = None
        self._buffers: list[tuple[int, np.ndarray]] = []
        self._buffers_of: dict[int, tuple[list[tuple[int, np.ndarray]], Sequence[tuple[int, int]]]] = {}
        self._known: tuple[int, ...] = ()
        self.compared: dict[str, int] = {}  #: launches by source

    def __call__(self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float], at: int) -> None:
        function, constants = _compiled(kernel)
        self._refresh(() if self.parts is None else self.parts(at))
        values: dict[str, Any] = dict(constants)
        for (name, kind), value in zip(kernel.parameters, arguments, strict=True):
            if kind in POINTERS:
                values[name] = self._address(kernel, name, np.dtype(POINTED[kind]), int(value))
            else:
                values[name] = language._array(NUMBERS[kind](value))
        blocks = list(itertools.product(*map(range, grid)))
        self._random.shuffle(blocks)
        before = {start: array.copy() for start, array in self._driver.device.items()} if self.compare else {}
        try:
            language.run(function, grid, blocks, values)
        except language.OutsideError as error:
            raise ViolationError(f"{kernel.source} {error}") from error
        if self.compare:
            self._check(kernel, grid, arguments, before)

    def done(self) -> None:
        """The stream is empty: the memory may be another's next time."""
        self._buffers_of.clear()
        if self.parts is not None:
            self.parts.clear()

    # -- private --------------------------------------------------------------------------------------------------

    def _refresh(self, parts: Sequence[tuple[int, int]]) -> None:
        """The buffers of a launch: the live allocations, and the parts of them that are known."""
        if tuple(self._driver.device) != self._known:
            self._known = tuple(self._driver.device)
            self._buffers_of.clear()
        if id(parts) not in self._buffers_of:
            buffers = dict(self._driver.device)
            for address, size in parts:
                buffers[address] = self._driver.span(address, size, "part")
            # With the parts, so that their id is not another's.
            self._buffers_of[id(parts)] = sorted(buffers.items(), key=lambda item: item[0]), parts
        self._buffers = self._buffers_of[id(parts)][0]

    def _address(self, kernel: Kernel, name: str, dtype: np.dtype[Any], address: int) -> language.Address:
        """An address argument as a place in the buffer that holds it."""
        index = bisect_right(self._buffers, address, key=lambda buffer: buffer[0]) - 1
        start, memory = self._buffers[index]
        if index < 0 or address >= start + memory.size:
            raise ViolationError(f"{kernel.source}: {name} is at {address:#x}, outside of every allocation")
        offset = (address - start) // dtype.itemsize
        whole = memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
        return language.Address(whole, np.asarray(offset, np.int64).view(language.Array), name)

    def _check(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float], before: dict[int, np.ndarray]
    ) -> None:
        """Run the launch in Triton's interpreter too, from the same memory: its numbers must be the same, almost."""
        after = {start: array.copy() for start, array in self._driver.device.items()}
        for start, array in self._driver.device.items():
            array[:] = before[start]
        moved = []
        for (_, kind), value in zip(kernel.parameters, arguments, strict=True):
            if kind in POINTERS:
                start = next(s for s, array in before.items() if s <= value < s + array.size)
                value += self._driver.device[start].ctypes.data - start
            moved.append(value)
        interpreter.run_launch(kernel.source, kernel.constants, kernel.parameters, grid, moved)
        for start, array in self._driver.device.items():
            changed = np.flatnonzero((array != before[start]) | (after[start] != before[start]))
            if changed.size:
                self._same(kernel, arguments, start, array, after[start])
        self.compared[kernel.source] = self.compared.get(kernel.source, 0) + 1

    def _same(
        self, kernel: Kernel, arguments: list[int | float], start: int, one: np.ndarray, other: np.ndarray
    ) -> None:
        """Raise AssertionError unless the bytes ``one`` and ``other`` of the allocation at ``start`` agree, read as the
        types of the addresses that the kernel was given there."""
        places = sorted(
            (int(value) - start, np.dtype(POINTED[kind]))
            for (_, kind), value in zip(kernel.parameters, arguments, strict=True)
            if kind in POINTERS and start <= value < start + one.size
        )
        ends = [offset for offset, _ in places[1:]] + [one.size]
        for (offset, dtype), end in zip(places, ends, strict=True):
            size = (end - offset) // dtype.itemsize * dtype.itemsize
            a, b = (each[offset : offset + size].view(dtype).astype(np.float64) for each in (one, other))
            far = 2e-3 if dtype.itemsize == 2 else 1e-5
            np.testing.assert_allclose(b, a, rtol=far, atol=far, equal_nan=True, err_msg=kernel.source)
