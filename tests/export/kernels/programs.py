"""A planned program on host memory: weights packed by its kernels, buffers full of NaN, launches one after another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from double import interpreter, language
from double.twins import NUMBERS, POINTED

from par_export.kernels.spec import Planned
from par_runtime.backends.program import Launch, Pointer
from par_runtime.bundle import WEIGHTS


def memory(size: int) -> np.ndarray:
    """``size`` bytes at a multiple of 256 that are NaN in every floating-point type, and 0xFFFF... as integers."""
    block = np.full(size + 256, 0xFF, np.uint8)
    start = -block.ctypes.data % 256
    return block[start : start + size]


class Host:
    """``planned`` with the weights of the bundle at ``bundle``; constants come from the plan.

    Kernels run in ``double.language``, which lets none of them leave a buffer; with ``triton`` in Triton's interpreter.
    """

    def __init__(self, planned: Planned, bundle: Path, triton: bool = False) -> None:
        self.planned, self.triton = planned, triton
        data = np.memmap(bundle / WEIGHTS, mode="r")
        self.weights = {name: memory(weight.bytes) for name, weight in planned.weights.items()}
        for name, weight in planned.weights.items():
            if weight.stored is None:
                raw = np.frombuffer(planned.constants[name], np.uint8)
            else:
                raw = np.array(data[weight.stored.offset : weight.stored.offset + weight.stored.length])
            if weight.pack is None:
                self.weights[name][:] = raw
            else:
                self._launch(weight.pack, {"raw": raw, "packed": self.weights[name]}, 0, None)

    def run(self, program: str, images: int, bound: Mapping[str, np.ndarray], shuffle: int | None = None) -> None:
        """One run of ``program`` on the tensors ``bound``; scratch memory holds NaN before it.

        With ``shuffle`` blocks run in a random order of that seed.
        """
        planned = self.planned.programs[program]
        profile = planned.profiles[images]
        scratch = memory(profile.scratch_bytes)
        tensors = dict(bound) | self.weights
        for name, (offset, size) in profile.scratch.items():
            assert name not in tensors
            tensors[name] = scratch[offset : offset + size]
        for launch, layer in planned.launches(images):
            self._launch(launch, tensors, layer, shuffle)

    def _launch(self, launch: Launch, tensors: Mapping[str, np.ndarray], layer: int, shuffle: int | None) -> None:
        spec = self.planned.specs[launch.kernel]
        values: list[Any] = []
        for (parameter, kind), argument in zip(spec.parameters, launch.arguments, strict=True):
            if isinstance(argument, Pointer):
                name, offset = argument.of_layer(layer)
                assert 0 <= offset < tensors[name].nbytes
                values.append(
                    tensors[name].ctypes.data + offset
                    if self.triton
                    else _address(tensors[name], np.dtype(POINTED[kind]), offset, parameter)
                )
            else:
                values.append(argument if self.triton else language._array(NUMBERS[kind](argument)))
        if self.triton:
            interpreter.run_launch(spec.source, dict(spec.constants), spec.parameters, launch.grid, values, shuffle)
            return
        named = dict(zip((name for name, _ in spec.parameters), values, strict=True)) | dict(spec.constants)
        if "DEPENDENT" in named:  # nothing to wait for here
            named["DEPENDENT"] = False
        blocks = list(itertools.product(*map(range, launch.grid)))
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(blocks)
        language.run(interpreter._function(spec.source), launch.grid, blocks, named)


def _address(tensor: np.ndarray, dtype: np.dtype[Any], offset: int, name: str) -> language.Address:
    """The place ``offset`` bytes behind the start of ``tensor``."""
    flat = tensor.reshape(-1).view(np.uint8)
    numbers = flat[: flat.size // dtype.itemsize * dtype.itemsize].view(dtype)
    return language.Address(numbers, np.asarray(offset // dtype.itemsize, np.int64).view(language.Array), name)
