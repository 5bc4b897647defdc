"""The part of the CUDA driver that the runtime needs. Only this file imports cuda-python.

Everything that can fail raises :class:`CudaError` with the call, the driver's code and what to do about it. Memory,
streams and graphs are objects with a method ``free``, which may be called more than once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.errors import CudaError, OutOfMemory, how_to_install
from par_runtime.late import importing

#: The module cuda.bindings.driver, imported at first use; tests put a stand-in here.
driver: Any = None
#: The process that initialised the driver. CUDA cannot be used in a process that is forked from it.
_process: int | None = None

NO_DRIVER = "no NVIDIA driver found (libcuda is missing); with a driver, nvidia-smi works"
REPORT_IT = "please report it, with the output of 'parvis verify'"
HINTS = {
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number; nvidia-smi lists them",
    "CUDA_ERROR_OUT_OF_MEMORY": "free GPU memory (nvidia-smi shows who holds it), or make fewer images at once",
    "CUDA_ERROR_NOT_INITIALIZED": (
        "the driver is shutting down or was not initialised in this process; do not fork after loading"
    ),
    "CUDA_ERROR_INVALID_CONTEXT": (
        "the pipeline was used after it was closed, or in a forked process; load it in the process that uses it"
    ),
    "CUDA_ERROR_ILLEGAL_ADDRESS": (f"a kernel read or wrote out of bounds; the process must be restarted: {REPORT_IT}"),
    "CUDA_ERROR_LAUNCH_FAILED": (
        "a kernel failed; the process must be restarted. Run it under compute-sanitizer to see where"
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (
        "the kernel module and libcuda are of different versions; reboot after a driver update"
    ),
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": "the driver is older than the CUDA libraries need; update the driver",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "the pipeline was used after it was closed; load it again",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda is the toolkit's stub; put the driver's own first in the library path",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": (
        "something in the stream cannot be captured; load with capture='call' or 'none'"
    ),
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": (
        "the capture was broken by an earlier call; load with capture='call' or 'none'"
    ),
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": (
        "the driver is older than the compiler that made the engine; update the driver"
    ),
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the engine holds no kernels for this GPU; build it again for this target",
    "CUDA_ERROR_INVALID_IMAGE": (
        "a file of the engine is no cubin that this driver reads; update the driver, or build the engine again"
    ),
    "CUDA_ERROR_INVALID_PTX": "a file of the engine is no cubin that this driver reads; build the engine again",
    "CUDA_ERROR_NOT_FOUND": "the engine's file holds no such function; build the engine again",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": (
        "a kernel takes more registers or threads than this GPU has; build the engine again for this target"
    ),
    "CUDA_ERROR_MISALIGNED_ADDRESS": (
        f"a kernel was given an address that it cannot use; the process must be restarted: {REPORT_IT}"
    ),
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": (
        "a kernel was compiled for another GPU; the process must be restarted. Build the engine again for this target"
    ),
    "CUDA_ERROR_INVALID_VALUE": f"an address or size is wrong; {REPORT_IT}",
}


def device_count() -> int:
    """GPUs that the driver shows; 0 where there is none, no driver or no cuda-python."""
    return 0 if why_no_device() else int(call("cuDeviceGetCount"))


def why_no_device() -> str:
    """Why there is no GPU, as one line; "" where there is one."""
    try:
        call("cuInit", 0)
        return "" if int(call("cuDeviceGetCount")) else "the driver shows no GPU (CUDA_VISIBLE_DEVICES?)"
    except CudaError as error:
        return str(error)


def has_driver() -> bool:
    """Whether the driver's library is there, or something stands in for it; nothing of it is called."""
    if driver is not None and not isinstance(driver, ModuleType):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def library() -> Any:
    """The module cuda.bindings.driver, or what stands in for it. Raises CudaError where it is missing."""
    global driver
    if driver is None:
        try:
            with importing("cuda.bindings.driver"):
                from cuda.bindings import driver as loaded
        except ImportError as error:
            if not has_driver():  # then cuda-python would not help
                raise CudaError(NO_DRIVER, "NO_DRIVER") from error
            raise CudaError(f"a GPU needs cuda-python ({error}); {how_to_install('kernels')}") from error
        driver = loaded
    return driver


def call(name: str, *arguments: Any, note: str = "") -> Any:
    """Call a function of the driver. Returns its results without the error code: one value, or a tuple.

    Raises CudaError. ``note`` describes the arguments in errors.
    """
    global _process
    if forked():
        raise CudaError(
            f"CUDA was initialised in process {_process}, from which this one was forked; it cannot be used here: load "
            "the pipeline in the process that uses it (multiprocessing: start method 'spawn')",
            "FORKED",
        )
    try:
        code, *values = getattr(library(), name)(*arguments)
    except RuntimeError as error:  # cuda-python's own: the library is missing, or too old to know the call
        if type(error).__name__ == "DynamicLibNotFoundError":
            message = NO_DRIVER
        else:
            message = (
                f"{name}: {str(error).splitlines()[0]}; is an NVIDIA driver installed (nvidia-smi), and new enough?"
            )
        raise CudaError(message, "NO_DRIVER") from error
    except ValueError as error:  # cuda-python's own: a code that it has no name for
        if "CUresult" not in str(error):
            raise
        raise CudaError(f"{name} failed: {error}; the driver is too new: update cuda-python", "UNKNOWN") from error
    if int(code) != 0:
        raise _error(name, code, note)
    if name == "cuInit":
        _process = os.getpid()
    return values[0] if len(values) == 1 else tuple(values)


def forked() -> bool:
    """Whether the driver was initialised in a process from which this one was forked. Every call is an error then."""
    return _process not in (None, os.getpid())


def _error(name: str, code: Any, note: str) -> CudaError:
    label = getattr(code, "name", str(code))
    text = ""
    with suppress(Exception):  # an error while describing an error must not hide it
        status, raw = library().cuGetErrorString(code)
        text = f" ({raw.decode()})" if int(status) == 0 and raw else ""
    hint = HINTS.get(label, "see the CUDA driver API's list of error codes")
    return CudaError(f"{name}{f' of {note}' if note else ''} failed: {label} = {int(code)}{text}; {hint}", label)


class Owned:
    """A resource of the driver, which ``free`` or the end of a ``with`` block frees."""

    def free(self) -> None:
        """Free it; a second call does nothing. Raises CudaError."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Device(Owned):
    """One GPU and its primary context. ``capability`` is (8, 0) for an A100."""

    def __init__(self, index: int) -> None:
        call("cuInit", 0)
        self.index = index
        self._device = call("cuDeviceGet", index, note=f"GPU {index}")
        self._context: Any = call("cuDevicePrimaryCtxRetain", self._device, note=f"GPU {index}")
        try:
            self._describe()
        except BaseException:
            with suppress(CudaError):  # the error that matters is the first one
                self.close()
            raise

    def _describe(self) -> None:
        self.activate()
        raw = call("cuDeviceGetName", 256, self._device)
        self.name = bytes(raw).split(b"\0")[0].decode()
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        self.total_bytes = int(call("cuDeviceTotalMem", self._device))
        version = int(call("cuDriverGetVersion"))
        self.driver_version = f"{version // 1000}.{version % 1000 // 10}"

    def _attribute(self, name: str) -> int:
        kind = getattr(library().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", kind, self._device))

    @staticmethod
    def open(index: int) -> Device:
        """GPU ``index``, its context current in this thread. Raises CudaError."""
        return Device(index)

    def activate(self) -> None:
        """Make the context current in this thread, which may be another one than the pipeline was loaded in."""
        if self._context is None:
            raise CudaError(f"GPU {self.index} was closed; load the pipeline again", "CLOSED")
        call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Memory that is free now."""
        return int(call("cuMemGetInfo")[0])

    def allocate(self, size: int, what: str) -> Buffer:
        """``size`` bytes of device memory; ``what`` names it in errors. Raises OutOfMemory."""
        try:
            pointer = int(call("cuMemAlloc", size, note=f"{size} bytes for {what}"))
        except CudaError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            free, total = self.free_bytes(), self.total_bytes
            mega = f"needs {size / 1e6:.0f} MB of GPU memory, {free / 1e6:.0f} MB of {total / 1e6:.0f} MB are free"
            raise OutOfMemory(f"{what} {mega}. {error}", size, free, total) from error
        return Buffer(pointer, size)

    def pinned(self, size: int) -> Pinned:
        """``size`` bytes of host memory that the GPU copies to and from asynchronously."""
        return Pinned(int(call("cuMemHostAlloc", size, 0, note=f"{size} bytes of pinned memory")), size)

    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""
        return Stream(call("cuStreamCreate", 1))

    def event(self) -> Event:
        """A new event with timing."""
        return Event(call("cuEventCreate", 0))

    def close(self) -> None:
        """Release the context. What was allocated on it must be freed before."""
        if self._context is not None:
            self._context = None
            call("cuDevicePrimaryCtxRelease", self._device)

    free = close


class Buffer(Owned):
    """Device memory."""

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size

    def zero(self, stream: Stream) -> None:
        """Fill with zeros, in stream order."""
        stream.fill(self.pointer, 0, self.size)

    def free(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            call("cuMemFree", pointer)


class Pinned(Owned):
    """Pinned host memory; ``array`` [size] uint8 is empty after ``free``."""

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def free(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self.array, self.size = np.empty(0, np.uint8), 0
            call("cuMemFreeHost", pointer)


class Stream(Owned):
    """A stream: copies and launches on it run one after the other, in the order of their calls."""

    def __init__(self, raw: Any) -> None:
        self._stream: Any = raw
        self.handle = int(raw)

    @property
    def raw(self) -> Any:
        if self._stream is None:  # the driver takes None as the default stream
            raise CudaError("the stream was freed; load the pipeline again", "CLOSED")
        return self._stream

    def synchronize(self) -> None:
        """Wait for everything on the stream. Raises CudaError, also for what failed earlier on it."""
        call("cuStreamSynchronize", self.raw)

    def upload(self, dst: int, src: Pinned, size: int, src_offset: int = 0) -> None:
        """Copy ``size`` bytes of pinned memory to the device. They are read when the copy runs."""
        _inside(src, src_offset, size)
        call("cuMemcpyHtoDAsync", dst, src.pointer + src_offset, size, self.raw, note=f"{size} bytes")

    def download(self, dst: Pinned, src: int, size: int, dst_offset: int = 0) -> None:
        """Copy ``size`` bytes of the device to pinned memory; they are there after ``synchronize``."""
        _inside(dst, dst_offset, size)
        call("cuMemcpyDtoHAsync", dst.pointer + dst_offset, src, size, self.raw, note=f"{size} bytes")

    def copy(self, dst: int, src: int, size: int) -> None:
        """Copy ``size`` bytes on the device."""
        call("cuMemcpyDtoDAsync", dst, src, size, self.raw, note=f"{size} bytes")

    def copy_2d(self, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int) -> None:
        """Copy ``height`` rows of ``width`` bytes on the device, rows ``pitch`` bytes apart."""
        module = library()
        copy = module.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = module.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = src, src_pitch
        copy.dstDevice, copy.dstPitch = dst, dst_pitch
        copy.WidthInBytes, copy.Height = width, height
        call("cuMemcpy2DAsync", copy, self.raw, note=f"{height} rows of {width} bytes")

    def fill(self, dst: int, value: int, size: int) -> None:
        """Set ``size`` bytes on the device."""
        call("cuMemsetD8Async", dst, value, size, self.raw, note=f"{size} bytes")

    def record(self, event: Event) -> None:
        """Mark this place of the stream."""
        call("cuEventRecord", event.raw, self.raw)

    def capturing(self) -> bool:
        """Whether the stream is being captured: its work is recorded instead of run."""
        return int(call("cuStreamIsCapturing", self.raw)) != 0

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        """Record the work of the stream; afterwards ``captured.graph`` replays it.

        Raises CudaError where a call cannot be recorded; the stream can still be used then.
        """
        captured = Captured()
        call("cuStreamBeginCapture", self.raw, library().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            yield captured
        except BaseException:
            with suppress(CudaError):  # ends the capture; the error that matters is the first one
                call("cuGraphDestroy", call("cuStreamEndCapture", self.raw))
            raise
        captured.graph = Graph(call("cuStreamEndCapture", self.raw))

    def free(self) -> None:
        if self._stream is not None:
            raw, self._stream = self._stream, None
            call("cuStreamDestroy", raw)


class Captured:
    """The result of a capture: its graph, once the capture has ended."""

    graph: Graph


class Graph(Owned):
    """An instantiated CUDA graph."""

    def __init__(self, raw: Any) -> None:
        try:
            self.nodes = int(call("cuGraphGetNodes", raw)[1])
            self._executable: Any = call("cuGraphInstantiate", raw, 0, note=f"{self.nodes} nodes")
        finally:
            call("cuGraphDestroy", raw)

    def launch(self, stream: Stream) -> None:
        """Run everything that was recorded, in the same order."""
        call("cuGraphLaunch", self._executable, stream.raw)

    def free(self) -> None:
        if self._executable is not None:
            executable, self._executable = self._executable, None
            call("cuGraphExecDestroy", executable)


class Event(Owned):
    """A place in a stream, with its time."""

    def __init__(self, raw: Any) -> None:
        self.raw: Any = raw

    def synchronize(self) -> None:
        """Wait until the stream reaches the event."""
        call("cuEventSynchronize", self.raw)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds on the device from the event ``since`` to this one; both are recorded."""
        return float(call("cuEventElapsedTime", since.raw, self.raw))

    def free(self) -> None:
        if self.raw is not None:
            raw, self.raw = self.raw, None
            call("cuEventDestroy", raw)


def _inside(pinned: Pinned, offset: int, size: int) -> None:
    """Raise ValueError unless ``size`` bytes from ``offset`` on lie inside ``pinned``."""
    if offset < 0 or size < 0 or offset + size > pinned.size:
        block = f"pinned block of {pinned.size} bytes" if pinned.pointer else "pinned block that was freed"
        raise ValueError(f"copy of {size} bytes at {offset} of a {block}")
