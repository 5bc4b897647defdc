"""Runs kernels of ``par_export.kernels.sources`` in Triton's interpreter, on addresses of host memory.

Triton decides at its import whether it interprets: ``TRITON_INTERPRET=1`` must be set before (``tests/conftest.py``).
Three things that the interpreter of Triton 3.9 gets wrong or has not are done here: bf16 (its rounding loses the carry
into the exponent; its ``tl.dot`` multiplies the bits as integers), instructions as text (``ptx.py``), and it knows no
dependent launches.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from double import ptx

SOURCES = "par_export.kernels.sources"
#: type of a parameter -> Triton's type and numpy's
NUMBERS: dict[str, tuple[Any, type[np.generic]]] = {
    "i32": (tl.int32, np.int32),
    "i64": (tl.int64, np.int64),
    "fp32": (tl.float32, np.float32),
}
POINTED = {
    "fp16": tl.float16,
    "bf16": tl.bfloat16,
    "fp32": tl.float32,
    "i64": tl.int64,
    "i32": tl.int32,
    "u8": tl.uint8,
}


def run_launch(
    source: str,
    constants: Mapping[str, Any],
    parameters: Sequence[tuple[str, str]],
    grid: tuple[int, int, int],
    arguments: Sequence[int | float],
    shuffle: int | None = None,
) -> None:
    """Run every block of one launch of ``source`` ("step.qkv"), one after another.

    ``parameters`` are (name, type) as in ``program.Kernel``, ``arguments`` their values: numbers, or addresses on the
    host. With ``shuffle`` the blocks run in a random order of that seed: a GPU promises none. Whatever a kernel reads
    or writes must lie in live memory: nothing is checked.
    """
    function = _function(source)
    values = {name: _argument(kind, value) for (name, kind), value in zip(parameters, arguments, strict=True)}
    values |= constants
    if "DEPENDENT" in values:  # nothing to wait for here
        values["DEPENDENT"] = False
    missing = set(function.arg_names) ^ set(values)
    if missing:
        raise TypeError(f"{source}: missing or unknown arguments: {sorted(missing)}")
    body = function.rewrite()
    # As on a GPU, x counts fastest.
    blocks = [(x, y, z) for z, y, x in itertools.product(range(grid[2]), range(grid[1]), range(grid[0]))]
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(blocks)
    with _patched(), np.errstate(all="ignore"):
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for x, y, z in blocks:
            interpreter.interpreter_builder.set_grid_idx(int(x), int(y), int(z))
            body(**values)


@functools.cache
def _function(source: str) -> Any:
    """The interpreted function of ``source``, "file.function"."""
    module, _, name = source.rpartition(".")
    function = getattr(importlib.import_module(f"{SOURCES}.{module}"), name)
    if not isinstance(function, interpreter.InterpretedFunction):
        raise TypeError("Triton was imported without TRITON_INTERPRET=1: it would compile instead of interpreting")
    return function


def _argument(kind: str, value: int | float) -> Any:
    """A number or an address as the interpreter takes it."""
    if kind.startswith("*"):
        pointer = tl.pointer_type(POINTED[kind[1:]])
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.uint64), pointer), pointer)
    kind_of, stored = NUMBERS[kind]
    return tl.tensor(interpreter.TensorHandle(np.array([value], stored), kind_of), kind_of)


@contextmanager
def _patched() -> Iterator[None]:
    """The language's functions are the interpreter's, with our bf16; nested functions do not patch it again each time,
    which takes longer than what they do.
    """
    builder: Any = interpreter.interpreter_builder
    # It looks for the language's modules in what a function sees; Triton's own functions see ``core``.
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    again = interpreter._patch_lang
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)
    builder.cast_impl = functools.partial(_cast, builder)
    builder.create_fp_to_fp = lambda handle, kind, _rounding: _cast(builder, handle, kind)
    builder.create_dot = functools.partial(_dot, builder)
    builder.create_inline_asm = _inline_asm
    try:
        yield
    finally:
        for name in ("cast_impl", "create_fp_to_fp", "create_dot", "create_inline_asm"):
            delattr(builder, name)
        interpreter._patch_lang = again
        scope.restore()


def _cast(builder: Any, handle: Any, kind: Any) -> Any:
    """Conversion between types; to bf16 to the nearest, ties to even."""
    source, target = handle.dtype.scalar, kind.scalar
    if target == tl.bfloat16 and source != tl.bfloat16:
        return interpreter.TensorHandle(to_bf16(handle.data.astype(np.float32)), target)
    if source == tl.bfloat16 and target != tl.bfloat16:
        wide = from_bf16(handle.data)
        return interpreter.TensorHandle(wide.astype(interpreter._get_np_dtype(kind)), target)
    return type(builder).cast_impl(builder, handle, kind)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """A product of matrices, bf16 as the numbers that they stand for; sums in the type of ``d``."""
    one, other = (
        from_bf16(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data.astype(d.data.dtype)
        for handle in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(one, other, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _inline_asm(text: str, constraints: str, handles: Any, kinds: Any, _pure: bool, pack: int) -> Any:
    """Instructions as text; bf16 is in the interpreter's form, its bits."""
    scalars = [kind.scalar for kind in kinds]
    dtypes = [np.dtype(np.uint16 if kind == tl.bfloat16 else interpreter._get_np_dtype(kind)) for kind in scalars]
    results = ptx.elementwise(text, constraints, [handle.data for handle in handles], dtypes, pack)
    made = [interpreter.TensorHandle(data, kind) for data, kind in zip(results, scalars, strict=True)]
    return SimpleNamespace(get_result=lambda index: made[index])


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of ``values`` (fp32) rounded to bf16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 as fp32."""
    wide: np.ndarray = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide
