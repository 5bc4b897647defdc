"""A launch's twin: the kernel's own source, run by Triton's interpreter on the stand-in's memory, every access checked.

An address must lie in a live allocation, and be a multiple of its number's size. Where many are read at once, they lie
in one allocation: kernels do not read two tensors with one load.

Triton's interpreter prepares itself anew for each launch. Here that is done once for all launches that are waiting.
"""

from __future__ import annotations

import inspect
import itertools
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from double import interpreter as sources
from double.driver import Driver, ViolationError
from par_runtime.backends.program import Kernel

BUILDER = interpreter.interpreter_builder


class Twins:
    """Computes launches on the memory of ``driver``; blocks run in a random order, since a GPU promises none."""

    def __init__(self, driver: Driver, seed: int = 0) -> None:
        self._driver = driver
        self._random = np.random.default_rng(seed)
        self._patched: ExitStack | None = None
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._arrays: list[np.ndarray] = []
        self._known: tuple[int, ...] = ()
        self._kernel = ""
        self.blocks: dict[str, int] = {}  #: that were run, by source

    def __call__(self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float]) -> None:
        function = sources._function(kernel.source)
        if self._patched is None:
            self._begin()
        self._refresh()
        self._kernel = kernel.source
        values = {
            name: sources._argument(kind, value)
            for (name, kind), value in zip(kernel.parameters, arguments, strict=True)
        }
        values |= kernel.constants
        if "DEPENDENT" in values:  # nothing to wait for here
            values["DEPENDENT"] = False
        wanted = set(inspect.signature(function.fn).parameters)
        if wanted != set(values):
            raise ViolationError(f"{kernel.source} takes {sorted(wanted)}; it is given {sorted(values)}")
        body = function.rewrite()
        blocks = list(itertools.product(*map(range, grid)))
        self._random.shuffle(blocks)
        BUILDER.set_grid_dim(*grid)
        with np.errstate(all="ignore"):  # as on a GPU
            for block in blocks:
                BUILDER.grid_idx = block
                body(**values)
        self.blocks[kernel.source] = self.blocks.get(kernel.source, 0) + len(blocks)

    def done(self) -> None:
        """Leave Triton as it was."""
        if self._patched is not None:
            patched, self._patched = self._patched, None
            patched.close()

    # -- private --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._patched = ExitStack()
        self._patched.enter_context(sources._patched())
        self._set("create_masked_load", self._load)
        self._set("create_masked_store", self._store)
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            self._set(name, self._atomic(getattr(BUILDER, name)))

    def _set(self, name: str, value: Any) -> None:
        assert self._patched is not None
        setattr(BUILDER, name, value)
        self._patched.callback(delattr, BUILDER, name)

    def _refresh(self) -> None:
        """The live allocations of now."""
        device = self._driver.device
        known = tuple(device)
        if known != self._known:
            self._known = known
            self._starts = sorted(device)
            self._arrays = [device[start] for start in self._starts]
            self._ends = [start + device[start].size for start in self._starts]

    def _place(self, pointers: np.ndarray, size: int, what: str) -> tuple[int, np.ndarray]:
        """The allocation that holds ``size`` bytes at each of ``pointers``: its start and its bytes."""
        low, high = int(pointers.min()), int(pointers.max()) + size
        index = bisect_right(self._starts, low) - 1
        if index < 0 or high > self._ends[index]:
            outside = high if index >= 0 and low < self._ends[index] else low
            where = f"{outside:#x} in block {BUILDER.grid_idx}"
            raise ViolationError(f"{self._kernel} {what} at {where}, which is outside of every allocation")
        if size > 1 and int(np.bitwise_or.reduce(pointers, axis=None)) & (size - 1):
            raise ViolationError(f"{self._kernel} {what} numbers of {size} bytes at {low:#x}, which are not aligned")
        return self._starts[index], self._arrays[index]

    def _load(self, pointers: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: bool) -> Any:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        data, chosen = pointers.data, mask.data
        whole = bool(chosen.all())
        if not whole:
            data = np.broadcast_to(data, np.broadcast_shapes(data.shape, chosen.shape))
            chosen = np.broadcast_to(chosen, data.shape)
        wanted = data if whole else data[chosen]
        if not wanted.size:
            out = (
                np.zeros(data.shape, dtype) if other is None else np.broadcast_to(other.data, data.shape).astype(dtype)
            )
            return interpreter.TensorHandle(out, kind)
        start, memory = self._place(wanted, dtype.itemsize, "reads")
        numbers = memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
        index = ((wanted - np.uint64(start)) // np.uint64(dtype.itemsize)).astype(np.intp)
        if whole:
            return interpreter.TensorHandle(numbers[index], kind)
        out = np.zeros(data.shape, dtype) if other is None else np.broadcast_to(other.data, data.shape).astype(dtype)
        out[chosen] = numbers[index]
        return interpreter.TensorHandle(out, kind)

    def _store(self, pointers: Any, value: Any, mask: Any, cache_policy: Any) -> None:
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        data, chosen = pointers.data, mask.data
        given = np.broadcast_to(value.data, data.shape)
        if not chosen.all():
            chosen = np.broadcast_to(chosen, data.shape)
            data, given = data[chosen], given[chosen]
        if data.size:
            start, memory = self._place(data, dtype.itemsize, "writes")
            numbers = memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
            numbers[((data - np.uint64(start)) // np.uint64(dtype.itemsize)).astype(np.intp)] = given

    def _atomic(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            at = next(i for i, a in enumerate(arguments) if isinstance(getattr(a, "dtype", None), tl.pointer_type))
            pointers = arguments[at]
            size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            start, memory = self._place(pointers.data, size, "counts")
            moved = pointers.data - np.uint64(start) + np.uint64(memory.ctypes.data)
            here = interpreter.TensorHandle(moved, pointers.dtype)
            return real(*arguments[:at], here, *arguments[at + 1 :])

        return checked
