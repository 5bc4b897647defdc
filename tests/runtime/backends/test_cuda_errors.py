"""``cuda.py`` on the stub of libcuda: errors, and drivers that are missing or old. How it runs:
``stub_cuda/children.py``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stub_cuda.children import failing, needs_cuda_python, refused

from par_runtime.backends import cuda
from par_runtime.backends.cuda import Device
from par_runtime.errors import CudaError

pytestmark = needs_cuda_python


def check_errors() -> None:
    from cuda.bindings import driver

    codes = {code.name: int(code) for code in driver.CUresult if int(code)}
    assert len(codes) > 50
    assert set(cuda.HINTS) <= set(codes)  # a hint for a code that is not is never read
    gpu = Device.open(0)
    for name, number in codes.items():
        with failing(f"cuStreamCreate:{number}"), refused(CudaError) as caught:
            gpu.stream()
        said = str(caught[0])
        assert caught[0].code == name
        assert said.startswith(f"cuStreamCreate failed: {name} = {number}"), said
        assert said.endswith("; " + cuda.HINTS.get(name, "see the CUDA driver API's list of error codes")), said
    # A code that this cuda-python has no name for; and an error of the description.
    with failing("cuStreamCreate:12345"), refused(CudaError, "cuStreamCreate failed", "12345", "update cuda-python"):
        gpu.stream()
    with failing("cuStreamCreate:1,cuGetErrorString:1"), refused(CudaError, "CUDA_ERROR_INVALID_VALUE = 1; an address"):
        gpu.stream()
    # Every call that cuda.py makes says its own name.
    stream, memory, pinned, event = gpu.stream(), gpu.allocate(8, "x"), gpu.pinned(8), gpu.event()
    with stream.capture() as captured:
        pass
    for name, call in {
        "cuMemsetD8Async": lambda: memory.zero(stream),
        "cuMemcpyHtoDAsync": lambda: stream.upload(memory.pointer, pinned, 8),
        "cuMemcpyDtoHAsync": lambda: stream.download(pinned, memory.pointer, 8),
        "cuMemcpyDtoDAsync": lambda: stream.copy(memory.pointer, memory.pointer + 4, 4),
        "cuMemcpy2DAsync": lambda: stream.copy_2d(memory.pointer, 4, memory.pointer, 4, 4, 2),
        "cuStreamSynchronize": stream.synchronize,
        "cuStreamIsCapturing": stream.capturing,
        "cuEventRecord": lambda: stream.record(event),
        "cuEventSynchronize": event.synchronize,
        "cuEventElapsedTime": lambda: event.elapsed_ms(event),
        "cuEventCreate": gpu.event,
        "cuGraphLaunch": lambda: captured.graph.launch(stream),
        "cuGraphExecDestroy": lambda: captured.graph.free(),
        "cuCtxSetCurrent": gpu.activate,
        "cuMemFree": memory.free,
        "cuMemFreeHost": pinned.free,
        "cuEventDestroy": event.free,
        "cuStreamDestroy": stream.free,
        "cuDevicePrimaryCtxRelease": gpu.close,
    }.items():
        with failing(f"{name}:719"), refused(CudaError, name, "CUDA_ERROR_LAUNCH_FAILED = 719", "compute-sanitizer"):
            call()


def check_no_device() -> None:
    assert cuda.device_count() == 0
    said = cuda.why_no_device()
    assert "CUDA_ERROR_NO_DEVICE = 100 (no CUDA-capable device is detected)" in said
    assert "CUDA_VISIBLE_DEVICES" in said
    assert "\n" not in said
    with refused(CudaError, "cuInit", "CUDA_ERROR_NO_DEVICE"):
        Device.open(0)
    # A driver that starts and shows nothing, and one that breaks while it is asked.
    os.environ["STUB_CUDA_DEVICES"] = "1"
    assert cuda.device_count() == 1
    os.environ["STUB_CUDA_DEVICES"] = "0"
    with failing("cuInit:803"):
        assert cuda.device_count() == 0
        assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803" in cuda.why_no_device()
        assert "reboot" in cuda.why_no_device()
    os.environ["STUB_CUDA_DEVICES"] = "1"
    with failing("cuDeviceGetCount:4"):
        assert cuda.device_count() == 0
        assert "cuDeviceGetCount failed: CUDA_ERROR_DEINITIALIZED = 4" in cuda.why_no_device()


def check_no_library() -> None:
    assert cuda.device_count() == 0
    said = cuda.why_no_device()
    assert "no NVIDIA driver found (libcuda is missing); with a driver, nvidia-smi works" in said
    assert "\n" not in said
    with refused(CudaError, "no NVIDIA driver found"):
        Device.open(0)
    # cuda-python would not help.
    cuda.driver = None
    sys.modules["cuda.bindings"] = None
    assert cuda.device_count() == 0
    assert cuda.why_no_device() == said


def check_no_cuda_python() -> None:
    sys.modules["cuda.bindings"] = None
    assert cuda.device_count() == 0
    assert "needs cuda-python" in cuda.why_no_device()
    assert "pip install 'cuda-python>=13'" in cuda.why_no_device()
    with refused(CudaError, "needs cuda-python"):
        Device.open(0)


def check_old_driver() -> None:
    assert cuda.device_count() == 1
    with refused(CudaError, "cuStreamCreate", "new enough"), Device.open(0) as gpu:
        gpu.stream()


def check_no_error_text() -> None:
    with refused(CudaError, "CUDA_ERROR_INVALID_DEVICE = 101; there is no GPU of that number"):
        Device.open(7)


def test_every_error_has_its_call_its_code_and_a_hint(stub: Path, run: Callable[..., None]) -> None:
    run(check_errors, stub)


def test_no_device_is_a_count_of_zero_with_a_reason(stub: Path, run: Callable[..., None]) -> None:
    run(check_no_device, stub, STUB_CUDA_DEVICES="0")


def test_no_driver(run: Callable[..., None]) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        run(check_no_library, None)
    else:
        pytest.skip("this machine has a CUDA driver")


def test_a_driver_without_cuda_python(stub: Path, run: Callable[..., None]) -> None:
    run(check_no_cuda_python, stub)


def test_a_driver_that_lacks_a_call(stub: Path, run: Callable[..., None]) -> None:
    run(check_old_driver, stub, STUB_CUDA_HIDE="cuStreamCreate")
    run(check_no_error_text, stub, STUB_CUDA_HIDE="cuGetErrorString")
