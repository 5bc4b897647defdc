"""The part of Triton's language that our kernels use, on numpy: a kernel's own source, some 30 times as fast as in
Triton's interpreter, so that whole images can be made in tests.

A kernel is plain Python. Its function is taken as it is, with this module's :data:`TL` in the place of ``tl``. Numbers
are arrays of numpy with a method ``to``; an address is a place in a buffer, and never leaves it. What Triton leaves
undefined (numbers that a mask hides and for which nothing else is named) is NaN, or a number far off.

``test_kernels_language.py`` compares it with Triton's interpreter, kernel by kernel.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from double import ptx

F32, F64, I32, I64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int32), np.dtype(np.int64)
BF16 = np.dtype(ml_dtypes.bfloat16)
NONE = np.dtype(bool)


class OutsideError(Exception):
    """An access outside of the buffer that an address belongs to."""


class Array(np.ndarray):
    """Numbers of one type, of any shape; () is one number."""

    def to(self, dtype: np.dtype[Any], bitcast: bool = False) -> Array:
        if bitcast:
            return self.view(dtype)  # type: ignore[no-any-return]
        return self if self.dtype is dtype else self.astype(dtype)


def _array(values: Any) -> Array:
    return np.asarray(values).view(Array)  # type: ignore[no-any-return]


def _binary(name: str, function: Callable[..., Any], swapped: bool) -> None:
    def method(self: Array, other: Any) -> Any:
        if type(other) is Address:
            return NotImplemented
        out = function(other, self) if swapped else function(self, other)
        if out.dtype is F64:  # of an integer and a floating-point number: in Triton, of the type of the latter
            out = function(_single(other), _single(self)) if swapped else function(_single(self), _single(other))
        return out if type(out) is Array else _array(out)

    setattr(Array, name, method)


def _single(value: Any) -> Any:
    return np.float32(value) if isinstance(value, int | float) else value.astype(F32)


def _quotient(a: Any, b: Any) -> Any:
    """Towards zero, as C divides."""
    return np.floor_divide(np.subtract(a, np.fmod(a, b)), b)


_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": _quotient,
    "mod": np.fmod,  # has the sign of the first, as in C
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}
_COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
for _name, _function in _ARITHMETIC.items():
    _binary(f"__{_name}__", _function, False)
    _binary(f"__r{_name}__", _function, True)
    # In place means a new array: a name that was bound to the old one keeps it, as in Triton.
    setattr(Array, f"__i{_name}__", getattr(Array, f"__{_name}__"))
for _name, _function in _COMPARISONS.items():
    _binary(f"__{_name}__", _function, False)


class Address:
    """Places in ``buffer``, an array of one type, as indices."""

    __slots__ = ("buffer", "index", "name")

    def __init__(self, buffer: np.ndarray, index: Any, name: str) -> None:
        self.buffer, self.index, self.name = buffer, index, name

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.buffer.dtype)

    def __add__(self, offset: Any) -> Address:
        return Address(self.buffer, self.index + offset, self.name)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Address:
        return Address(self.buffer, self.index - offset, self.name)

    def __getitem__(self, key: Any) -> Address:
        return Address(self.buffer, self.index[key], self.name)

    def check(self, index: Any, what: str) -> None:
        # Also those below 0.
        if index.size and np.maximum.reduce(index.view(np.uint64), axis=None) >= self.buffer.size:
            at = int(index.min()) if index.min() < 0 else int(index.max())
            raise OutsideError(f"{what} number {at} of {self.name}, which has {self.buffer.size}")


def _load(
    place: Address, mask: Any = None, other: Any = None, cache_modifier: str = "", eviction_policy: str = "",
    volatile: bool = False,
) -> Array:  # fmt: skip
    index, buffer = place.index, place.buffer
    if mask is None:
        place.check(index, "reads")
        return _array(buffer[index])
    index, mask = np.asarray(index), np.asarray(mask)
    shape = index.shape if index.shape == mask.shape else np.broadcast_shapes(index.shape, mask.shape)
    if _every(mask):
        place.check(index, "reads")
        out = buffer[index]
    else:
        if not _some(mask):
            index = np.zeros(shape, np.int64)
        else:
            index = np.where(mask, index, index[np.broadcast_to(mask, index.shape)][0] if index.shape else index)
            place.check(index, "reads")
        out = np.where(mask, buffer[index], _hidden(buffer.dtype) if other is None else np.asarray(other, buffer.dtype))
    return _array(out if np.shape(out) == shape else np.broadcast_to(out, shape))


def _every(mask: np.ndarray) -> bool:
    """As ``np.all``, which takes several times as long for few numbers."""
    return bool(np.logical_and.reduce(mask, axis=None))


def _some(mask: np.ndarray) -> bool:
    return bool(np.logical_or.reduce(mask, axis=None))


@functools.cache
def _hidden(dtype: np.dtype[Any]) -> Any:
    """What a mask hides where nothing else is named."""
    return np.asarray(np.nan if dtype.kind == "f" or dtype == BF16 else -77, np.float32).astype(dtype)


def _store(place: Address, value: Any, mask: Any = None, cache_modifier: str = "", eviction_policy: str = "") -> None:
    index, buffer = np.asarray(place.index), place.buffer
    given = np.asarray(value)
    if given.dtype != buffer.dtype:
        given = given.astype(buffer.dtype)
    if mask is not None and not _every(mask := np.asarray(mask)):
        if not index.shape == given.shape == mask.shape:
            shape = np.broadcast_shapes(index.shape, mask.shape)
            index, given, mask = (np.broadcast_to(each, shape) for each in (index, given, mask))
        index, given = index[mask], given[mask]
    place.check(index, "writes")
    buffer[index] = given


def _atomic_add(place: Address, value: Any, mask: Any = None, sem: str = "", scope: str = "") -> Array:
    if np.shape(place.index) or mask is not None:
        raise NotImplementedError("atomic_add of one number without a mask")
    place.check(place.index, "counts")
    before = place.buffer[place.index]
    place.buffer[place.index] += value
    return _array(before)


def _where(condition: Any, one: Any, other: Any) -> Array:
    out = np.where(condition, one, other)
    return _array(out.astype(F32) if out.dtype is F64 else out)


def _dot(
    a: Array, b: Array, acc: Any = None, input_precision: str = "", allow_tf32: Any = None, out_dtype: Any = F32
) -> Array:  # fmt: skip
    if a.dtype is not b.dtype:
        raise TypeError(f"dot of {a.dtype} and {b.dtype}")
    out = np.matmul(a.astype(F32), b.astype(F32))
    return _array(out if acc is None else out + acc)


def _split(values: Array) -> tuple[Array, Array]:
    return values[..., 0], values[..., 1]


def _unary(function: Callable[[Any], Any]) -> Callable[[Any], Array]:
    return lambda x: _array(function(x))


def _combine(function: Any) -> Callable[..., Array]:
    def of(x: Any, y: Any) -> Array:
        out = function(x, y)
        return _array(out.astype(F32) if out.dtype is F64 else out)

    return of


def _reduce(function: Any) -> Callable[..., Array]:
    def of(x: Array, axis: int, keep_dims: bool = False) -> Array:
        if x.dtype is NONE:
            raise NotImplementedError("reductions of truth values")
        return _array(function.reduce(np.asarray(x), axis, x.dtype, keepdims=keep_dims))

    return of


def _fma(x: Any, y: Any, z: Any) -> Array:
    return _array((np.float64(1) * x * y + z).astype(F32))


@functools.cache
def _arange(start: int, end: int) -> Array:
    out = _array(np.arange(start, end, dtype=np.int32))
    out.flags.writeable = False
    return out


def _inline_asm(text: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Any:
    several = isinstance(dtype, tuple)
    results = ptx.elementwise(text, constraints, args, dtype if several else (dtype,), pack)
    arrays = tuple(_array(result) for result in results)
    return arrays if several else arrays[0]


def _program_id(axis: int) -> Array:
    return _here.block[axis]  # type: ignore[no-any-return]


def _num_programs(axis: int) -> Array:
    return _here.grid[axis]  # type: ignore[no-any-return]


def _static_assert(condition: bool, message: str = "") -> None:
    if not condition:
        raise AssertionError(message)


class _Language(SimpleNamespace):
    """What kernels know as ``tl``."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"a kernel uses tl.{name}, which is not in {Path(__file__).name} yet")


_here = SimpleNamespace(block=(), grid=())
TL = _Language(
    constexpr=tl.constexpr,
    float16=np.dtype(np.float16),
    bfloat16=BF16,
    float32=F32,
    int64=I64,
    int32=I32,
    uint8=np.dtype(np.uint8),
    int1=NONE,
    program_id=_program_id,
    num_programs=_num_programs,
    arange=_arange,
    zeros=lambda shape, dtype: _array(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype: _array(np.full(shape, value, dtype)),
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    where=_where,
    dot=_dot,
    sum=_reduce(np.add),
    max=_reduce(np.fmax),
    min=_reduce(np.fmin),
    maximum=_combine(np.fmax),
    minimum=_combine(np.fmin),
    cumsum=lambda x, axis: _array(np.cumsum(x, axis, x.dtype)),
    exp=_unary(np.exp),
    exp2=_unary(np.exp2),
    sqrt=_unary(np.sqrt),
    rsqrt=lambda x: _array(np.float32(1) / np.sqrt(x)),
    sigmoid=lambda x: _array(np.float32(1) / (np.float32(1) + np.exp(-x))),
    div_rn=lambda x, y: _array(np.divide(x, y, dtype=F32)),
    fma=_fma,
    log=_unary(np.log),
    log2=_unary(np.log2),
    abs=_unary(np.abs),
    floor=_unary(np.floor),
    cast=lambda x, dtype, bitcast=False: x.to(dtype, bitcast),
    broadcast_to=lambda x, *shape: _array(np.broadcast_to(x, shape[0] if len(shape) == 1 else shape)),
    expand_dims=lambda x, axis: _array(np.expand_dims(x, axis)),
    reshape=lambda x, *shape: x.reshape(*shape),
    permute=lambda x, *order: x.transpose(*order),
    trans=lambda x: x.transpose(),
    join=lambda x, y: _array(np.stack([x, y], -1)),
    split=_split,
    range=range,
    static_range=range,
    static_assert=_static_assert,
    multiple_of=lambda x, _: x,
    max_contiguous=lambda x, _: x,
    debug_barrier=lambda: None,
    inline_asm_elementwise=_inline_asm,
    cdiv=triton.cdiv,
)
_TRITON = SimpleNamespace(next_power_of_2=triton.next_power_of_2, cdiv=triton.cdiv, language=TL)


@functools.cache
def function_of(kernel: InterpretedFunction) -> FunctionType:
    """The function of ``kernel`` in this language."""
    function = kernel.fn
    return FunctionType(
        function.__code__, _names(function.__module__), function.__name__, function.__defaults__, function.__closure__
    )


@functools.cache
def _names(module: str) -> dict[str, Any]:
    """The global names of a module of kernels, in this language."""
    names: dict[str, Any] = {}
    for name, value in vars(sys.modules[module]).items():
        if value is tl:
            names[name] = TL
        elif value is triton:
            names[name] = _TRITON
        elif isinstance(value, tl.constexpr):
            names[name] = value.value
        elif isinstance(value, InterpretedFunction):
            names[name] = _later(value)
        else:
            names[name] = value
    return names


def _later(kernel: InterpretedFunction) -> Callable[..., Any]:
    """A function that is made when it is called: functions of a module use each other."""

    def call(*arguments: Any, **named: Any) -> Any:
        return function_of(kernel)(*arguments, **named)

    return call


def run(kernel: InterpretedFunction, grid: Sequence[int], blocks: Sequence[Sequence[int]], values: Any) -> None:
    """Run ``blocks`` of a launch in this order; ``values``: each argument by name."""
    function = function_of(kernel)
    _here.grid = tuple(_array(np.int32(size)) for size in grid)
    with np.errstate(all="ignore"):  # as on a GPU
        for block in blocks:
            _here.block = tuple(_array(np.int32(at)) for at in block)
            function(**values)
