"""cuda.py through the real cuda-python, over a stub of libcuda.so.1 that is compiled here (``stub_cuda/stub_cuda.c``).

The library path is read when a process starts, so every check runs in a child: the source of a function of this file,
after ``PRELUDE``. What a GPU does is not proved here; how the driver is called, and what is freed, is.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from stub_cuda.children import failing, live, needs_cuda_python, refused

from par_runtime.backends import cuda
from par_runtime.backends.cuda import Device
from par_runtime.errors import CudaError, OutOfMemory

pytestmark = needs_cuda_python


def check_device() -> None:
    assert cuda.device_count() == 2
    assert cuda.why_no_device() == ""
    with Device.open(1) as gpu:
        assert (gpu.index, gpu.name, gpu.capability, gpu.driver_version) == (1, "Stub GPU 1", (8, 1), "13.1")
        assert gpu.total_bytes == gpu.free_bytes() == 1 << 20
        with gpu.allocate(1000, "x"):
            assert gpu.free_bytes() == (1 << 20) - 1000
        assert gpu.free_bytes() == 1 << 20
    gpu.close()  # twice is once
    with refused(CudaError, "GPU 1 was closed"):
        gpu.activate()
    for index in (2, -1):
        with refused(
            CudaError, f"cuDeviceGet of GPU {index}", "CUDA_ERROR_INVALID_DEVICE = 101", "invalid device ordinal"
        ):
            Device.open(index)

    # The context belongs to the thread that asks for it.
    gpu, said = Device.open(0), []

    def elsewhere() -> None:
        with refused(
            CudaError, "cuMemGetInfo", "CUDA_ERROR_INVALID_CONTEXT = 201", "load it in the process that uses it"
        ):
            gpu.free_bytes()
        gpu.activate()
        said.append(gpu.free_bytes())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == [1 << 20]
    # A second opening shares the context; it lives until the last one closes it.
    refs = ctypes.CDLL("libcuda.so.1").stub_context_refs
    again = Device.open(0)
    assert refs(0) == 2
    again.close()
    assert (refs(0), gpu.free_bytes()) == (1, 1 << 20)
    gpu.close()
    assert refs(0) == 0
    with refused(CudaError, "CUDA_ERROR_CONTEXT_IS_DESTROYED = 709", "load it again"):
        gpu.free_bytes()
    # A device that cannot be opened whole is not held.
    for call in (
        "cuCtxSetCurrent",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem",
        "cuDriverGetVersion",
    ):
        with failing(f"{call}:999"), refused(CudaError, call, "CUDA_ERROR_UNKNOWN = 999"):
            Device.open(0)
        assert refs(0) == 0, call


def check_memory() -> None:
    gpu = Device.open(0)
    stream = gpu.stream()
    source, target = gpu.pinned(256), gpu.pinned(256)
    a, b = gpu.allocate(256, "a"), gpu.allocate(300, "b")
    assert (a.size, source.array.shape, source.array.dtype) == (256, (256,), np.uint8)
    assert source.array.ctypes.data == source.pointer
    assert stream.handle != 0

    source.array[:] = np.arange(256)
    stream.upload(a.pointer, source, 256)
    stream.copy(b.pointer, a.pointer, 256)
    stream.download(target, b.pointer, 256)
    stream.synchronize()
    assert np.array_equal(target.array, np.arange(256))

    # Offsets are of the pinned side; the device's are in its address.
    target.array[:] = 0
    stream.upload(a.pointer + 10, source, 4, 100)
    stream.download(target, a.pointer + 8, 8, dst_offset=200)
    assert target.array[198:210].tolist() == [0, 0, 8, 9, 100, 101, 102, 103, 14, 15, 0, 0]

    # 3 rows of 4 bytes, 16 apart in a, 5 apart in b; nothing between them is touched.
    source.array[:] = np.arange(256)
    stream.upload(a.pointer, source, 256)
    stream.fill(b.pointer, 0xEE, 300)
    stream.copy_2d(b.pointer + 1, 5, a.pointer + 32, 16, 4, 3)
    stream.download(target, b.pointer, 20)
    e = 0xEE
    assert target.array[:20].tolist() == [e, 32, 33, 34, 35, e, 48, 49, 50, 51, e, 64, 65, 66, 67, e, e, e, e, e]

    b.zero(stream)
    stream.fill(b.pointer + 3, 7, 2)
    stream.download(target, b.pointer + 44, 256)
    assert not target.array.any()
    stream.download(target, b.pointer, 8)
    assert target.array[:8].tolist() == [0, 0, 0, 7, 7, 0, 0, 0]

    # Out of range: of pinned memory before the driver is asked, of device memory by the driver.
    with failing("cuMemcpyHtoDAsync:999,cuMemcpyDtoHAsync:999"):
        for size, offset in ((257, 0), (1, 256), (200, 57), (1, -1), (-1, 0)):
            with refused(ValueError, f"{size} bytes at {offset} ", "256 bytes"):
                stream.upload(a.pointer, source, size, offset)
            with refused(ValueError, f"{size} bytes at {offset} ", "256 bytes"):
                stream.download(target, a.pointer, size, offset)
    with refused(CudaError, "cuMemcpyDtoDAsync of 257 bytes", "CUDA_ERROR_INVALID_VALUE = 1", "invalid argument"):
        stream.copy(a.pointer, b.pointer, 257)
    with refused(CudaError, "cuMemsetD8Async of 2 bytes", "CUDA_ERROR_INVALID_VALUE"):
        stream.fill(a.pointer + 255, 0, 2)
    with refused(CudaError, "cuMemcpy2DAsync of 3 rows of 4 bytes", "CUDA_ERROR_INVALID_VALUE"):
        stream.copy_2d(a.pointer, 127, b.pointer, 16, 4, 3)

    # Freeing twice is freeing once; what is freed is not used.
    view = source.array
    del view
    for item in (a, b, source, target):
        item.free()
        item.free()
    assert (a.pointer, source.pointer, source.array.size) == (0, 0, 0)
    assert live() == {"stream": 1}
    with refused(CudaError, "cuMemsetD8Async", "CUDA_ERROR_INVALID_VALUE"):
        a.zero(stream)
    with gpu.allocate(64, "c") as c, refused(ValueError, "64 bytes", "freed"):
        stream.upload(c.pointer, source, 64)
    stream.free()
    stream.free()
    # None would be the default stream, which is always there: a freed stream must not become it.
    calls = (stream.synchronize, stream.capturing, lambda: stream.fill(0, 0, 1), lambda: stream.capture().__enter__())
    for call in calls:
        with refused(CudaError, "the stream was freed"):
            call()
    assert live() == {}
    gpu.close()


def check_out_of_memory() -> None:
    gpu = Device.open(0)
    first = gpu.allocate(6_000_000, "caches")
    with refused(OutOfMemory) as caught:
        gpu.allocate(5_000_000, "scratch memory")
    error, said = caught[0], str(caught[0])
    assert (error.requested_bytes, error.free_bytes, error.total_bytes) == (5_000_000, 4_000_000, 10_000_000)
    assert error.code == "CUDA_ERROR_OUT_OF_MEMORY"
    assert said.startswith("scratch memory needs 5 MB of GPU memory, 4 MB of 10 MB are free. "), said
    assert "cuMemAlloc of 5000000 bytes for scratch memory failed: CUDA_ERROR_OUT_OF_MEMORY = 2 (out of memory)" in said
    assert said.endswith("make fewer images at once"), said
    assert live() == {"device": 1}  # a refusal takes nothing
    first.free()
    gpu.allocate(10_000_000, "all of it").free()
    with (
        failing("cuMemAlloc:700"),
        refused(CudaError, "cuMemAlloc of 8 bytes for x", "CUDA_ERROR_ILLEGAL_ADDRESS = 700"),
    ):
        gpu.allocate(8, "x")
    with failing("cuMemHostAlloc:2"), refused(CudaError, "cuMemHostAlloc of 99 bytes", "CUDA_ERROR_OUT_OF_MEMORY"):
        gpu.pinned(99)


def test_devices_are_opened_and_released(stub: Path, run: Callable[..., None]) -> None:
    run(check_device, stub, STUB_CUDA_DEVICES="2", STUB_CUDA_MEMORY_BYTES=str(1 << 20))


def test_memory_goes_there_and_back(stub: Path, run: Callable[..., None]) -> None:
    run(check_memory, stub)


def test_out_of_memory_says_how_much_of_what(stub: Path, run: Callable[..., None]) -> None:
    run(check_out_of_memory, stub, STUB_CUDA_MEMORY_BYTES="10000000")
