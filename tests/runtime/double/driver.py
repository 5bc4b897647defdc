"""A stand-in for ``cuda.bindings.driver``: "device" memory on the host, streams that really are asynchronous.

Nothing runs before the stream is synchronised: whoever reads a result, or overwrites an input, too early gets what
a GPU would give at its worst. Every pointer is checked against live allocations. What CUDA forbids during capture is
refused, and invalidates the capture.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from double.modules import Modules, ViolationError

__all__ = ["Driver", "ViolationError"]
OK = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE


@dataclass
class _Graph:
    work: list[Callable[[], None]] = field(default_factory=list)
    valid: bool = True


class Driver(Modules):
    """One device. Names that are not defined here (enums, structs) are the real module's."""

    #: What fresh memory is full of: no token, no number and no address, so what is not written is seen.
    fill = 0xFB
    #: Device memory that each entry of an instantiated graph takes, and that the driver itself has taken.
    node_bytes = own_bytes = 0

    def __init__(self, memory_bytes: int = 2**33, capability: tuple[int, int] = (8, 0), devices: int = 1) -> None:
        super().__init__()
        self.memory_bytes, self.capability, self.devices = memory_bytes, capability, devices
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, _Graph] = {}
        self.graphs: dict[int, _Graph] = {}
        self.executables: dict[int, _Graph] = {}
        self.refuse_capture_over: int | None = None  #: most entries of a capture, to test what follows a refusal
        self.counts: dict[str, int] = {}
        self.events: dict[int, float | None] = {}
        self.recorded_on: dict[int, int] = {}  # event -> its stream
        self.contexts = 0  #: how often the context was asked for and not yet released
        self._of_thread = threading.local()
        self.broken: Any = None  #: what every call answers after a kernel failed
        self._next = 0x1000

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    # -- what the stand-ins ask -----------------------------------------------------------------------------------

    def span(self, pointer: int, size: int, where: str) -> np.ndarray:
        """The ``size`` bytes of device memory at ``pointer``; they must lie in one live allocation."""
        for start, array in self.device.items():
            if start <= pointer and pointer + size <= start + array.size:
                return array[pointer - start : pointer - start + size]
        raise ViolationError(f"{where}: {size} bytes at {pointer:#x} are not in one allocation")

    def submit(self, stream: Any, work: Callable[[], None]) -> Any:
        """Queue ``work``, or record it where the stream is being captured."""
        handle = int(stream)
        if handle not in self.queues:
            raise ViolationError(f"stream {handle:#x} does not exist")
        if handle in self.captures:
            graph = self.captures[handle]
            graph.work.append(work)
            if self.refuse_capture_over is not None and len(graph.work) > self.refuse_capture_over:
                graph.valid = False
                return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        else:
            self.queues[handle].append(work)
        return OK

    def launched_last(self, stream: Any) -> bool:
        """Whether the last work of the stream, or of what is captured of it, is a kernel."""
        handle = int(stream)
        work = self.captures[handle].work if handle in self.captures else self.queues[handle]
        return bool(work) and getattr(work[-1], "is_kernel", False)

    def capturing(self, stream: Any) -> bool:
        return int(stream) in self.captures

    # -- device ---------------------------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> tuple[Any]:  # noqa: N802
        return (OK,)

    def cuDriverGetVersion(self) -> tuple[Any, int]:  # noqa: N802
        return OK, 13000

    def cuDeviceGetCount(self) -> tuple[Any, int]:  # noqa: N802
        return OK, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, int]:  # noqa: N802
        return (OK, ordinal) if ordinal < self.devices else (real.CUresult.CUDA_ERROR_INVALID_DEVICE, 0)

    def cuDeviceGetName(self, length: int, device: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, b"Stand-in GPU\0".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> tuple[Any, int]:  # noqa: N802
        major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return OK, self.capability[0 if attribute == major else 1]

    def cuDeviceTotalMem(self, device: Any) -> tuple[Any, int]:  # noqa: N802
        return OK, self.memory_bytes

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, Any]:  # noqa: N802
        self.contexts += 1
        return OK, real.CUcontext(0xC0)

    def cuDevicePrimaryCtxRelease(self, device: Any) -> tuple[Any]:  # noqa: N802
        self.contexts -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any]:  # noqa: N802
        self._of_thread.has_context = True
        return (OK,)

    # -- memory ---------------------------------------------------------------------------------------------------

    def cuMemGetInfo(self) -> tuple[Any, int, int]:  # noqa: N802
        if not getattr(self._of_thread, "has_context", False):
            return real.CUresult.CUDA_ERROR_INVALID_CONTEXT, 0, 0
        if not self.contexts:
            return real.CUresult.CUDA_ERROR_CONTEXT_IS_DESTROYED, 0, 0
        return OK, self.memory_bytes - self._used(), self.memory_bytes

    def cuMemAlloc(self, size: int) -> tuple[Any, Any]:  # noqa: N802
        if self.broken is not None:
            return self.broken, None
        if self.captures:
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        if size <= 0:
            return INVALID, None
        if size > self.memory_bytes - self._used():
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        array = np.full(size, self.fill, np.uint8)
        pointer = self._fresh(size)
        self.device[pointer] = array
        return OK, real.CUdeviceptr(pointer)

    def cuMemFree(self, pointer: Any) -> tuple[Any]:  # noqa: N802
        if any(self.queues.values()):
            self._flush_all()  # cuMemFree waits for the device
        return (OK,) if self.device.pop(int(pointer), None) is not None else (INVALID,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, int]:  # noqa: N802
        array = np.full(size, self.fill, np.uint8)
        pointer = int(array.ctypes.data)
        self.pinned[pointer] = array
        return OK, pointer

    def cuMemFreeHost(self, pointer: Any) -> tuple[Any]:  # noqa: N802
        return (OK,) if self.pinned.pop(int(pointer), None) is not None else (INVALID,)

    def cuMemsetD8Async(self, pointer: Any, value: int, count: int, stream: Any) -> tuple[Any]:  # noqa: N802
        if not int(pointer):
            return (INVALID,)
        target = self.span(int(pointer), count, "memset")

        def work() -> None:
            target[:] = value

        return (self.submit(stream, work),)

    def cuMemcpyHtoDAsync(self, dst: Any, src: Any, size: int, stream: Any) -> tuple[Any]:  # noqa: N802
        target, source = self.span(int(dst), size, "upload"), self._host(src, size)

        def work() -> None:
            target[:] = source  # read when it runs, as the copy engine does

        return (self.submit(stream, work),)

    def cuMemcpyDtoHAsync(self, dst: Any, src: Any, size: int, stream: Any) -> tuple[Any]:  # noqa: N802
        target, source = self._host(dst, size), self.span(int(src), size, "download")

        def work() -> None:
            target[:] = source

        return (self.submit(stream, work),)

    def cuMemcpyDtoDAsync(self, dst: Any, src: Any, size: int, stream: Any) -> tuple[Any]:  # noqa: N802
        target, source = self.span(int(dst), size, "copy"), self.span(int(src), size, "copy")

        def work() -> None:
            target[:] = source

        return (self.submit(stream, work),)

    def cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[Any]:  # noqa: N802
        width, height = int(copy.WidthInBytes), int(copy.Height)
        if width > min(int(copy.dstPitch), int(copy.srcPitch)):
            return (INVALID,)
        pairs = []
        for y in range(height):
            target = self.span(int(copy.dstDevice) + y * int(copy.dstPitch), width, "2-D copy, target")
            source = self.span(int(copy.srcDevice) + y * int(copy.srcPitch), width, "2-D copy, source")
            pairs.append((target, source))

        def work() -> None:
            for target, source in pairs:
                target[:] = source

        return (self.submit(stream, work),)

    # -- streams and graphs ---------------------------------------------------------------------------------------

    def cuStreamCreate(self, flags: Any) -> tuple[Any, Any]:  # noqa: N802
        handle = self._fresh(1)
        self.queues[handle] = []
        return OK, real.CUstream(handle)

    def cuStreamDestroy(self, stream: Any) -> tuple[Any]:  # noqa: N802
        return (OK,) if self.queues.pop(int(stream), None) is not None else (INVALID,)

    def cuStreamSynchronize(self, stream: Any) -> tuple[Any]:  # noqa: N802
        self._count("synchronize")
        if self.capturing(stream):
            self.captures[int(stream)].valid = False
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._flush(int(stream))
        return (OK if self.broken is None else self.broken,)

    def cuStreamIsCapturing(self, stream: Any) -> tuple[Any, Any]:  # noqa: N802
        status = real.CUstreamCaptureStatus
        active = self.capturing(stream)
        return OK, status.CU_STREAM_CAPTURE_STATUS_ACTIVE if active else status.CU_STREAM_CAPTURE_STATUS_NONE

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:  # noqa: N802
        self.captures[int(stream)] = _Graph()
        return (OK,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:  # noqa: N802
        graph = self.captures.pop(int(stream))
        if not graph.valid:
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, real.CUgraph(0)
        handle = self._fresh(1)
        self.graphs[handle] = graph
        return OK, real.CUgraph(handle)

    def cuGraphGetNodes(self, graph: Any, count: int = 0) -> tuple[Any, list[Any], int]:  # noqa: N802
        return OK, [], len(self.graphs[int(graph)].work)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:  # noqa: N802
        handle = self._fresh(1)
        self.executables[handle] = self.graphs[int(graph)]
        self._count("instantiate")
        return OK, real.CUgraphExec(handle)

    cuGraphInstantiateWithFlags = cuGraphInstantiate  # noqa: N815

    def cuGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any]:  # noqa: N802
        self._count("launch")
        for work in self.executables[int(executable)].work:
            self.submit(stream, work)
        return (OK,)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:  # noqa: N802
        return (OK,) if self.graphs.pop(int(graph), None) is not None else (INVALID,)

    def cuGraphExecDestroy(self, executable: Any) -> tuple[Any]:  # noqa: N802
        return (OK,) if self.executables.pop(int(executable), None) is not None else (INVALID,)

    # -- events: the time at which the stream comes by ----------------------------------------------------------------

    def cuEventCreate(self, flags: int) -> tuple[Any, Any]:  # noqa: N802
        handle = self._fresh(1)
        self.events[handle] = None
        return OK, real.CUevent(handle)

    def cuEventRecord(self, event: Any, stream: Any) -> tuple[Any]:  # noqa: N802
        handle = int(event)
        self.recorded_on[handle] = int(stream)

        def work() -> None:
            self.events[handle] = time.perf_counter()

        return (self.submit(stream, work),)

    def cuEventSynchronize(self, event: Any) -> tuple[Any]:  # noqa: N802
        self._flush(self.recorded_on[int(event)])
        return (OK,)

    def cuEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, float]:  # noqa: N802
        first, last = self.events[int(start)], self.events[int(end)]
        if first is None or last is None:
            return real.CUresult.CUDA_ERROR_NOT_READY, 0.0
        return OK, 1e3 * (last - first)

    def cuEventDestroy(self, event: Any) -> tuple[Any]:  # noqa: N802
        if int(event) not in self.events:
            return (INVALID,)
        del self.events[int(event)]
        return (OK,)

    # -- private --------------------------------------------------------------------------------------------------

    def _host(self, pointer: Any, size: int) -> np.ndarray:
        """Pinned memory: copies of pageable memory are neither asynchronous nor allowed in a capture."""
        at = int(pointer)
        for start, array in self.pinned.items():
            if start <= at and at + size <= start + array.size:
                return array[at - start : at - start + size]
        raise ViolationError(f"copy of {size} bytes at {at:#x}: not in pinned memory")

    def _flush(self, handle: int) -> None:
        work, self.queues[handle] = self.queues[handle], []
        try:
            for item in work:
                item()
        finally:
            if self.twin is not None:
                self.twin.done()

    def _flush_all(self) -> None:
        for handle in self.queues:
            self._flush(handle)

    def _used(self) -> int:
        """Bytes of device memory that are not free."""
        nodes = sum(len(graph.work) for graph in self.executables.values())
        return sum(array.size for array in self.device.values()) + self.node_bytes * nodes + self.own_bytes

    def _fresh(self, size: int) -> int:
        """An address that was never used; allocations are 512 bytes apart, so that an overrun is not in the next."""
        self._next += 512
        start, self._next = self._next, (self._next + size + 511) // 512 * 512
        return start

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
