"""A test stand for single launches of an engine: what a kernel read, what it left, in float64.

A bundle is loaded as always, an image is made, and one call of it is walked through again, launch by launch. Before
each launch its inputs are read from the device, and everything that it is to write is poisoned; what it leaves is
compared with a reference that computes in float64 from the same inputs and from the weights as the bundle has them. So
errors do not add up, and packing is tested too.

Letters: R rows, q positions, M = R * q rows of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from par_export.card.subject import gpu_backend, kernels_of, programs
from par_export.weights import TORCH_DTYPE
from par_runtime.backends.kernels.modules import Prepared
from par_runtime.backends.program import Launch, Pointer
from par_runtime.bundle import WEIGHTS
from par_runtime.pipeline import Pipeline
from par_runtime.quantised import MOST_CODE, SCALE, unpacked

#: type of a parameter -> torch's
TYPES = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*u8": torch.uint8,
}
#: Largest allowed ||out - reference|| / ||reference|| of numbers of a type, from what rounding to it costs.
ALLOWED = {"*fp16": 2e-3, "*bf16": 1.6e-2, "*fp32": 1e-4}
POISON = 0xFF  #: each byte: NaN of every floating-point type, -1 of integers
#: Compares what a launch left with what it was to leave: the error relative to what is allowed, and words.
Judge = Callable[[Tensor], tuple[float, str]]


@dataclass
class Expected:
    """What a launch is to leave in the buffer of ``parameter``, of this shape.

    ``where`` (bool, of that shape; None: everywhere): what it writes; the rest must stay as it was. ``values``:
    float64. ``allowed``: the relative error; ``judge`` decides in place of it where numbers alone do not say it.
    ``fresh``: it is written without being read, so it is poisoned before.
    """

    parameter: str
    shape: tuple[int, ...]
    values: Tensor
    where: Tensor | None = None
    allowed: float | None = None
    judge: Judge | None = None
    fresh: bool = True


@dataclass(frozen=True)
class Outcome:
    """One comparison. ``error`` and ``allowed`` are 0 and 1 where ``text`` alone says it."""

    parameter: str
    passed: bool
    error: float
    allowed: float
    text: str


class View:
    """A launch as its reference sees it. ``memory`` goes from launch to launch."""

    def __init__(self, stand: Stand, launch: Launch, layer: int, prepared: Prepared, memory: dict[str, Any]) -> None:
        self.stand, self.launch, self.layer, self.memory = stand, launch, layer, memory
        self._prepared = prepared
        kernel = stand.kernels.kernels[launch.kernel]
        self.source, self.constants = kernel.source, dict(kernel.constants)
        self.kinds = dict(kernel.parameters)
        self._arguments = dict(zip(self.kinds, launch.arguments, strict=True))

    def number(self, name: str) -> int:
        """A number among the arguments."""
        return int(self._arguments[name])  # type: ignore[arg-type]

    def name(self, parameter: str) -> str:
        """What the argument ``parameter`` points to: the name of a tensor, of scratch memory or of weights."""
        pointer = self._arguments[parameter]
        assert isinstance(pointer, Pointer)
        return pointer.of_layer(self.layer)[0]

    def address(self, parameter: str) -> int:
        """Where it is."""
        pointer = self._arguments[parameter]
        assert isinstance(pointer, Pointer)
        name, offset = pointer.of_layer(self.layer)
        return self._prepared.address(name) + offset

    def stored(self, parameter: str, *shape: int) -> Tensor:
        """The numbers of this shape that lie there now, in their own type."""
        kind = TYPES[self.kinds[parameter]]
        return self.stand.read(self.address(parameter), kind, shape)

    def tensor(self, parameter: str, *shape: int) -> Tensor:
        """The same in float64; integers as int64."""
        stored = self.stored(parameter, *shape)
        return stored.double() if stored.is_floating_point() else stored.long()

    def weight(self, parameter: str) -> Tensor:
        """The tensor of the bundle that lies packed there, in float64, rounded to the type of the packed numbers; codes
        times their scales, not rounded.
        """
        return self.stand.raw(self.name(parameter), TYPES[self.kinds[parameter]])


#: Makes what a launch is to leave.
Reference = Callable[[View], list[Expected]]


class Stand:
    """A pipeline on an engine of kernels; ``device`` is the one on which PyTorch computes references."""

    def __init__(self, pipeline: Pipeline, device: str) -> None:
        self.pipeline, self.device = pipeline, torch.device(device)
        self.backend = gpu_backend(pipeline)
        self.kernels = kernels_of(pipeline)
        self._data = np.memmap(pipeline.bundle.path / WEIGHTS, np.uint8, "r")

    # -- memory -------------------------------------------------------------------------------------------------------

    def read(self, address: int, kind: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Numbers of the GPU's memory, on :attr:`device`."""
        size = math.prod(shape) * kind.itemsize
        with self.backend.device.pinned(size) as staging:
            self.backend.stream.download(staging, address, size)
            self.backend.stream.synchronize()
            content = torch.from_numpy(staging.array.copy())
        return content.view(kind).reshape(tuple(shape)).to(self.device)

    def write(self, address: int, content: Tensor) -> None:
        """Put the numbers of ``content`` there."""
        raw = content.contiguous().cpu().view(torch.uint8).reshape(-1).numpy()
        with self.backend.device.pinned(raw.size) as staging:
            staging.array[:] = raw
            self.backend.stream.upload(address, staging, raw.size)
            self.backend.stream.synchronize()

    def raw(self, name: str, kind: torch.dtype) -> Tensor:
        """The stored tensor of the weight ``name`` in float64, rounded to ``kind`` unless it is codes and scales."""
        weight = self.kernels.weights[name]
        assert weight.stored is not None
        at = weight.stored
        content = torch.from_numpy(np.array(self._data[at.offset : at.offset + at.length]))
        if at.dtype in MOST_CODE:
            codes = torch.from_numpy(unpacked(content.numpy(), at.dtype, at.shape)).to(self.device).double()
            stored = self.kernels.weights[name + SCALE].stored
            assert stored is not None
            scales = self.raw(name + SCALE, TORCH_DTYPE[stored.dtype])
            return (codes.reshape(len(scales), -1, at.shape[1]) * scales[:, None]).reshape(at.shape)
        return content.view(TORCH_DTYPE[at.dtype]).reshape(at.shape).to(self.device).to(kind).double()

    # -- launches -----------------------------------------------------------------------------------------------------

    def walk(
        self,
        program: str,
        images: int,
        prepared: Prepared,
        references: Mapping[str, Reference],
        each: Callable[[View, list[Outcome]], None],
        begin: Callable[[View], None],
    ) -> None:
        """Launch all of ``program`` for the profile of ``images``, one after the other, and compare each.

        ``begin`` gets every launch before, ``each`` after it, with what was found. Raises CudaError, KeyError for a
        kernel that has no reference.
        """
        memory: dict[str, Any] = {}
        for i, (launch, layer) in enumerate(programs(self.pipeline)[program].program.launches(images)):
            view = View(self, launch, layer, prepared, memory)
            begin(view)
            expected = references[view.source](view)
            before = [self._poisoned(view, one) for one in expected]
            prepared.enqueue([i])
            self.backend.stream.synchronize()
            each(view, [self._compare(view, one, old) for one, old in zip(expected, before, strict=True)])

    def _poisoned(self, view: View, one: Expected) -> Tensor:
        """What lies there before the launch, after what it is to write was made invalid."""
        old = view.stored(one.parameter, *one.shape)
        if one.fresh:
            bytes_of = old.view(torch.uint8).reshape(*one.shape, -1)
            where = torch.ones(one.shape, dtype=torch.bool, device=self.device) if one.where is None else one.where
            bytes_of[where] = POISON
            self.write(view.address(one.parameter), old)
        return old

    def _compare(self, view: View, one: Expected, before: Tensor) -> Outcome:
        after = view.stored(one.parameter, *one.shape)
        where = one.where
        if where is not None:
            changed = _bits(after)[~where] != _bits(before)[~where]
            if bool(changed.any()):
                text = f"{int(changed.sum())} numbers were written that it has no business with"
                return Outcome(one.parameter, False, 0.0, 1.0, text)
        if one.judge is not None:
            error, text = one.judge(after)
            return Outcome(one.parameter, error <= 1.0, error, 1.0, text)
        got = (after if where is None else after[where]).double()
        wanted = one.values if where is None else one.values[where]
        if not bool(got.isfinite().all()):
            count = int((~got.isfinite()).sum())
            return Outcome(one.parameter, False, 0.0, 1.0, f"{count} of {got.numel()} numbers are not finite")
        allowed = ALLOWED[view.kinds[one.parameter]] if one.allowed is None else one.allowed
        error = relative(got, wanted)
        return Outcome(one.parameter, error <= allowed, error, allowed, f"error {error:.2g}, allowed {allowed:g}")


def relative(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||; 0 where both are zeros."""
    size = float(wanted.norm())
    return float((got - wanted).norm()) / size if size else float(got.norm())


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as integers: NaN is equal to itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
