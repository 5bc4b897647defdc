"""The stand-in driver's modules, functions and launches: what CUDA refuses is refused, the rest runs a kernel's twin.

A cubin is known by its content (:meth:`Modules.register`). A launch copies its arguments at once, as CUDA does, and
runs when the stream gets there.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cuda.bindings import driver as real

from par_runtime.backends.program import MOST_GRID, POINTERS, Kernel

OK = real.CUresult.CUDA_SUCCESS
ERROR = real.CUresult
WITHOUT_ASKING = 48 * 1024
#: Bytes of shared memory that a block can have, by compute capability.
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"} | dict.fromkeys(POINTERS, "<Q")


class ViolationError(AssertionError):
    """Something that is undefined behaviour on a GPU."""


class Twin(Protocol):
    """What computes launches."""

    def __call__(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float], at: int
    ) -> None: ...  # ``at``: where the launch's arguments lay, by which it can be recognised

    def done(self) -> None:
        """The stream is empty."""


@dataclass
class _Function:
    kernel: Kernel
    shared: int = WITHOUT_ASKING  #: how much it may ask for


class Modules:
    """A part of :class:`double.driver.Driver`, which has ``capability``, ``submit`` and ``launched_last``."""

    capability: tuple[int, int]

    def __init__(self) -> None:
        self.cubins: dict[str, tuple[Kernel, tuple[int, int]]] = {}
        self.modules: dict[int, _Function] = {}
        self.functions: dict[int, _Function] = {}
        #: Computes a launch; None where launches are only checked.
        self.twin: Twin | None = None
        self.carveouts: dict[str, int] = {}  #: percent of shared memory that kernels prefer, by their source
        self.launches: list[tuple[str, bool]] = []  #: names of kernels as they were launched, and whether dependent

    def register(self, content: bytes, kernel: Kernel, capability: tuple[int, int]) -> None:
        """A cubin of this content is ``kernel``, compiled for a GPU of ``capability``."""
        self.cubins[hashlib.sha256(content).hexdigest()] = kernel, capability

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, Any]:  # noqa: N802
        found = self.cubins.get(hashlib.sha256(image).hexdigest())
        if found is None:
            return ERROR.CUDA_ERROR_INVALID_IMAGE, None
        kernel, (major, minor) = found
        if major != self.capability[0] or minor > self.capability[1]:
            return ERROR.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        handle = self._fresh(1)
        self.modules[handle] = _Function(kernel)
        return OK, real.CUmodule(handle)

    def cuModuleUnload(self, module: Any) -> tuple[Any]:  # noqa: N802
        gone = self.modules.pop(int(module), None)
        self.functions = {handle: f for handle, f in self.functions.items() if f is not gone}
        return (OK if gone else ERROR.CUDA_ERROR_INVALID_HANDLE,)

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any, Any]:  # noqa: N802
        function = self.modules[int(module)]
        if name.decode() != function.kernel.function:
            return ERROR.CUDA_ERROR_NOT_FOUND, None
        handle = self._fresh(1)
        self.functions[handle] = function
        return OK, real.CUfunction(handle)

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any]:  # noqa: N802
        if attribute == real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            self.carveouts[self.functions[int(function)].kernel.source] = value
            return (OK if -1 <= value <= 100 else ERROR.CUDA_ERROR_INVALID_VALUE,)
        if attribute != real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            return (ERROR.CUDA_ERROR_INVALID_VALUE,)
        if value > 1024 * SHARED[self.capability]:
            return (ERROR.CUDA_ERROR_INVALID_VALUE,)
        self.functions[int(function)].shared = value
        return (OK,)

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: int, extra: int) -> tuple[Any]:  # noqa: N802
        found = self.functions.get(int(function))
        if found is None:
            raise ViolationError("launch of a function whose module was unloaded")
        kernel = found.kernel
        grid = (int(config.gridDimX), int(config.gridDimY), int(config.gridDimZ))
        block = (int(config.blockDimX), int(config.blockDimY), int(config.blockDimZ))
        shared, stream = int(config.sharedMemBytes), config.hStream
        if any(not 1 <= size <= most for size, most in zip(grid, MOST_GRID, strict=True)):
            return (ERROR.CUDA_ERROR_INVALID_VALUE,)
        if block != (32 * kernel.warps, 1, 1):
            raise ViolationError(f"{kernel.source}: {block} threads; it was compiled for {32 * kernel.warps}")
        if shared > found.shared:
            return (ERROR.CUDA_ERROR_INVALID_VALUE,)
        if shared < kernel.shared:
            raise ViolationError(f"{kernel.source}: {shared} bytes of shared memory; it uses {kernel.shared}")
        given = self._arguments(kernel, arguments)
        dependent = self._dependent(config)
        if dependent:
            if self.capability < (9, 0):
                return (ERROR.CUDA_ERROR_NOT_SUPPORTED,)
            if not kernel.dependent or not kernel.constants.get("DEPENDENT", True):
                raise ViolationError(f"{kernel.source}: may begin before the kernel before it ends, and does not wait")
            if not self.launched_last(stream):
                raise ViolationError(f"{kernel.source}: is to wait for a kernel, but none was launched before it")
        self.launches.append((kernel.source, dependent))
        twin = self.twin

        def work() -> None:
            if twin is not None:
                twin(kernel, grid, given, arguments)

        work.is_kernel = True  # type: ignore[attr-defined]
        return (self.submit(stream, work),)

    def _arguments(self, kernel: Kernel, address: int) -> list[int | float]:
        """The arguments of a launch, copied; trailing ones must be null."""
        kinds = [kind for _, kind in kernel.parameters] + ["*u8"] * kernel.trailing
        places = (ctypes.c_uint64 * len(kinds)).from_address(address)
        values: list[int | float] = []
        for kind, place in zip(kinds, places, strict=True):
            raw = ctypes.string_at(place, struct.calcsize(FORMATS[kind]))
            values += struct.unpack(FORMATS[kind], raw)
        count = len(kernel.parameters)
        if any(values[count:]):
            raise ViolationError(f"{kernel.source}: addresses of the compiler's scratch memory are not null")
        for (name, kind), value in zip(kernel.parameters, values, strict=False):
            if kind in POINTERS and (not value or int(value) % 16):
                raise ViolationError(f"{kernel.source}: {name} is at {int(value):#x}, which is no multiple of 16")
        return values[:count]

    @staticmethod
    def _dependent(config: Any) -> bool:
        """Whether a launch may begin before the kernel before it has ended."""
        attributes = config.attrs
        if len(attributes) != config.numAttrs:
            raise ViolationError(f"{config.numAttrs} attributes are named, {len(attributes)} are there")
        kind = real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        return any(a.id == kind and a.value.programmaticStreamSerializationAllowed for a in attributes)

    def submit(self, stream: Any, work: Callable[[], None]) -> Any:
        raise NotImplementedError

    def launched_last(self, stream: Any) -> bool:
        raise NotImplementedError

    def _fresh(self, size: int) -> int:
        raise NotImplementedError
