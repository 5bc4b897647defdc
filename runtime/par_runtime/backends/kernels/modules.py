"""Compiled kernels on a GPU: loaded from cubins, and launched with arguments that were laid out before.

An image is thousands of launches, so all that can be done before is. A list of launches has one block of values: each
different argument lies there once, however many launches take it. The driver copies the values when a launch is
enqueued, so an address that changes from call to call is written once, whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from par_runtime.backends import cuda
from par_runtime.backends.engines import POINTER_ALIGN
from par_runtime.backends.program import Kernel, Launch, Pointer

WITHOUT_ASKING = 48 * 1024  #: bytes of shared memory that every kernel may take
PERCENT = 100  #: of a processor's shared memory
WARP = 32  #: threads


class Module(cuda.Owned):
    """One cubin in device memory, and its function.

    ``most_shared``: its processors are asked to be divided into as much shared memory and as little L1 cache as they
    can. Where a kernel wants another division than the one before it, it waits until that one has left a processor.
    """

    def __init__(self, kernel: Kernel, image: bytes, most_shared: bool = False) -> None:
        self.kernel, self.note = kernel, f"{kernel.source} ({kernel.file})"
        self._module: Any = cuda.call("cuModuleLoadData", image, note=self.note)
        try:
            self.function = cuda.call("cuModuleGetFunction", self._module, kernel.function.encode(), note=self.note)
            kinds = cuda.library().CUfunction_attribute
            if kernel.shared > WITHOUT_ASKING:
                kind = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                note = f"{kernel.shared} bytes of shared memory for {self.note}"
                cuda.call("cuFuncSetAttribute", self.function, kind, kernel.shared, note=note)
            if most_shared:
                kind = kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                cuda.call("cuFuncSetAttribute", self.function, kind, PERCENT, note=self.note)
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        if self._module is not None:
            module, self._module = self._module, None
            cuda.call("cuModuleUnload", module)


class Prepared:
    """Launches in the order in which they run on ``stream``, with their arguments.

    ``launches``: each with the number of its layer. ``addresses`` are of the names that have one; the others are given
    by :meth:`set`. A launch of a kernel that waits for its predecessor by itself is allowed to begin before that one
    has ended, except for the first: what runs before a list need not be a kernel.
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        launches: Iterable[tuple[Launch, int]],
        addresses: Mapping[str, int],
        stream: cuda.Stream,
    ) -> None:
        slots: dict[tuple[Any, ...], int] = {("null",): 0}
        lists: list[tuple[Module, Launch, list[int]]] = []
        for launch, layer in launches:
            module = modules[launch.kernel]
            lists.append((module, launch, _slots(slots, module.kernel, launch, layer)))
        self._values = np.zeros(len(slots), np.uint64)
        places: dict[str, list[tuple[int, int]]] = {}
        for key, slot in slots.items():
            if key[0] == "address":
                places.setdefault(key[1], []).append((slot, key[2]))
            elif key[0] != "null":
                place = self._values[slot : slot + 1]
                place.view(np.float32 if key[0] == "fp32" else np.int64)[0] = key[1]
        self._places = {
            name: tuple(np.array(x, np.uint64) for x in zip(*at, strict=True)) for name, at in places.items()
        }
        self.unset = set(self._places)
        base = self._values.ctypes.data
        self._pointers = [np.array([base + 8 * slot for slot in taken], np.uint64) for _, _, taken in lists]
        configs: dict[tuple[Any, ...], Any] = {}
        self._calls: list[tuple[Any, Any, int, str]] = []
        self._first: list[Any] = []  # how to launch each where it is the first one
        for index, ((module, launch, _), pointers) in enumerate(zip(lists, self._pointers, strict=True)):
            either = []
            for dependent in (False, module.kernel.dependent and index > 0):
                shape = (launch.grid, module.kernel.warps, module.kernel.shared, dependent)
                if shape not in configs:
                    configs[shape] = _config(*shape, stream)
                either.append(configs[shape])
            self._first.append(either[0])
            self._calls.append((either[1], module.function, pointers.ctypes.data, module.note))
        for name, address in addresses.items():
            self.set(name, address)

    def set(self, name: str, address: int) -> None:
        """Later launches find ``name`` at ``address``; a name that no launch takes is ignored.

        Raises ValueError where the address is not a multiple of 16 bytes.
        """
        if address % POINTER_ALIGN or not address:
            raise ValueError(f"address {address:#x} of {name!r}; expected a multiple of {POINTER_ALIGN} bytes")
        places = self._places.get(name)
        if places is not None:
            slots, offsets = places
            self._values[slots] = offsets + np.uint64(address)
            self.unset.discard(name)

    def address(self, name: str) -> int:
        """Where launches find ``name`` now. Raises KeyError for a name that no launch takes."""
        slots, offsets = self._places[name]
        return int(self._values[slots[0]] - offsets[0])

    def enqueue(self, which: Iterable[int] | None = None) -> None:
        """Launch all of them, or only those with the numbers ``which``. Raises CudaError, which names the kernel."""
        if self.unset:
            raise ValueError(f"no address for {', '.join(sorted(self.unset))}")
        calls = self._calls
        if which is not None:
            numbers = list(which)
            calls = [(self._first[i], *calls[i][1:]) if i == numbers[0] else calls[i] for i in numbers]
        call = cuda.call
        for config, function, arguments, note in calls:
            call("cuLaunchKernelEx", config, function, arguments, 0, note=note)


def _slots(slots: dict[tuple[Any, ...], int], kernel: Kernel, launch: Launch, layer: int) -> list[int]:
    """The places of the arguments of ``launch`` in the block of values; ``slots`` gets those that are new."""
    out = []
    for (_, kind), argument in zip(kernel.parameters, launch.arguments, strict=True):
        if isinstance(argument, Pointer):
            key: tuple[Any, ...] = ("address", *argument.of_layer(layer))
        else:
            key = (kind, argument, math.copysign(1, argument))  # 0.0 and -0.0 are equal
        out.append(slots.setdefault(key, len(slots)))
    return out + [0] * kernel.trailing


def _config(grid: Sequence[int], warps: int, shared: int, dependent: bool, stream: cuda.Stream) -> Any:
    """How to launch: a ``CUlaunchConfig``."""
    driver = cuda.library()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = WARP * warps, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream.raw
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
    config.numAttrs = int(dependent)
    return config
