"""cuda.py through the real cuda-python, over a stub of libcuda.so.1 that is compiled here (``stub_cuda/stub_cuda.c``).

The library path is read when a process starts, so every check runs in a child: the source of a function of this file,
after ``PRELUDE``. What a GPU does is not proved here; how the driver is called, and what is freed, is.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from par_runtime.backends import cuda
from par_runtime.backends.cuda import Device
from par_runtime.errors import CudaError, OutOfMemory

pytest.importorskip("cuda.bindings", reason="needs cuda-python: pip install 'parvis[tensorrt]'")

STUB = Path(__file__).parent / "stub_cuda" / "stub_cuda.c"
KINDS = ("device", "pinned", "stream", "graph", "exec", "event")  # the order of the stub's enum kind
PRELUDE = """
from __future__ import annotations
import ctypes, os, sys, threading
from collections.abc import Iterator
from contextlib import contextmanager
import numpy as np
from par_runtime.backends import cuda
from par_runtime.backends.cuda import CudaError, Device, OutOfMemory
"""

# -- what the children use too ------------------------------------------------------------------------------------------


def live() -> dict[str, int]:
    """How many of each kind the driver holds, without those of which there are none."""
    stub = ctypes.CDLL("libcuda.so.1")
    return {kind: count for i, kind in enumerate(KINDS) if (count := stub.stub_live(i))}


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[list[Exception]]:
    """The body raises exactly ``kind``, with all ``words`` in its message; the list holds the error afterwards."""
    caught: list[Exception] = []
    try:
        yield caught
    except Exception as error:
        caught.append(error)
    assert caught, f"nothing was raised, expected {kind.__name__} with {words}"
    assert type(caught[0]) is kind, repr(caught[0])
    assert all(word in str(caught[0]) for word in words), (words, str(caught[0]))


@contextmanager
def failing(rule: str) -> Iterator[None]:
    """The stub's calls fail as ``rule`` says, "name:code" or several of them."""
    os.environ["STUB_CUDA_FAIL"] = rule
    try:
        yield
    finally:
        os.environ["STUB_CUDA_FAIL"] = ""


# -- running them -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the compiled stub."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler (cc) for the stub driver")
    folder = tmp_path_factory.mktemp("stub_cuda")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(folder / "libcuda.so.1"), str(STUB)], check=True)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run a function of this file in a child, with the stub of that folder (or none) and environment settings."""

    def child(check: Callable[[], None], library: Path | None, **settings: str) -> None:
        shared = [inspect.getsource(f) for f in (live, refused, failing)]
        script = tmp_path / f"{check.__name__}.py"
        parts = [PRELUDE, f"KINDS = {KINDS}\n", *shared, inspect.getsource(check), f"{check.__name__}()\n"]
        script.write_text("\n".join([*parts, "print('reached the end')\n"]))
        env = {k: v for k, v in os.environ.items() if not k.startswith("STUB_CUDA_") and k != "LD_LIBRARY_PATH"}
        env |= {"PYTHONPATH": str(Path(cuda.__file__).parents[2])} | settings
        if library is not None:
            env["LD_LIBRARY_PATH"] = str(library)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script)], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.stdout == "reached the end\n"
        assert done.stderr == ""

    return child


# -- the checks ---------------------------------------------------------------------------------------------------------


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
        with refused(CudaError, "cuMemGetInfo", "CUDA_ERROR_INVALID_CONTEXT = 201", "load it there"):
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


def check_capture() -> None:
    gpu = Device.open(0)
    stream, other = gpu.stream(), gpu.stream()
    source, target = gpu.pinned(8), gpu.pinned(8)
    a, b = gpu.allocate(8, "a"), gpu.allocate(8, "b")
    idle = live()
    target.array[:] = 0
    with stream.capture() as captured:
        assert stream.capturing()
        assert not other.capturing()
        stream.upload(a.pointer, source, 8)
        stream.copy_2d(b.pointer, 4, a.pointer, 4, 4, 2)
        stream.fill(b.pointer, 9, 1)
        stream.download(target, b.pointer, 8)
        other.fill(b.pointer, 0x11, 8)  # a stream that is not captured runs
    assert not stream.capturing()
    graph = captured.graph
    assert graph.nodes == 4
    stream.synchronize()
    assert not target.array.any()  # recorded, not run
    other.download(target, b.pointer, 8)
    assert set(target.array.tolist()) == {0x11}
    for base in (20, 30):  # a graph reads what the pinned block holds when it is launched
        source.array[:] = np.arange(base, base + 8)
        graph.launch(stream)
        stream.synchronize()
        assert target.array.tolist() == [9, *range(base + 1, base + 8)]
    graph.launch(other)  # on any stream
    assert live() == idle | {"exec": 1}  # the graph that was instantiated is gone

    # A body that raises: its error, no graph left, the stream as before.
    with refused(KeyError, "mine"), stream.capture() as captured:
        stream.fill(a.pointer, 1, 8)
        raise KeyError("mine")
    assert not hasattr(captured, "graph")
    assert not stream.capturing()
    assert live() == idle | {"exec": 1}

    # Waiting inside a capture is refused, by name, and the stream lives on.
    with (
        refused(CudaError, "cuStreamSynchronize failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900", "capture='call'"),
        stream.capture(),
    ):
        stream.fill(a.pointer, 1, 8)
        stream.synchronize()
    assert not stream.capturing()
    # Who hides that error still gets no graph.
    with refused(CudaError, "cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901"), stream.capture():
        with refused(CudaError, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900"):
            gpu.allocate(8, "x")
        assert stream.capturing()
        with refused(CudaError, "cuMemsetD8Async", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901"):
            stream.fill(a.pointer, 1, 8)
    with (
        refused(CudaError, "cuStreamBeginCapture failed: CUDA_ERROR_ILLEGAL_STATE = 401"),
        stream.capture(),
        stream.capture(),
    ):
        pass
    # A graph that cannot be made leaves nothing behind.
    for call in ("cuGraphInstantiateWithFlags", "cuGraphGetNodes"):
        with failing(f"{call}:2"), refused(CudaError, "CUDA_ERROR_OUT_OF_MEMORY = 2"), stream.capture():
            stream.fill(a.pointer, 1, 8)
    assert live() == idle | {"exec": 1}
    with stream.capture() as captured:  # and after all that the stream captures, and runs
        stream.fill(a.pointer, 5, 8)
    captured.graph.launch(stream)
    stream.download(target, a.pointer, 8)
    stream.synchronize()
    assert target.array.tolist() == [5] * 8
    with stream.capture() as empty:
        pass
    assert empty.graph.nodes == 0
    empty.graph.launch(stream)

    # What a graph points to must outlive it: the next wait says so.
    a.free()
    captured.graph.launch(stream)
    with refused(CudaError, "cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS = 700", "must be restarted"):
        stream.synchronize()
    for item in (graph, captured.graph, empty.graph):
        item.free()
        item.free()
        with refused(CudaError, "cuGraphLaunch failed"):
            item.launch(stream)
    for item in (b, source, target, stream, other):
        item.free()
    assert live() == {}


def check_events() -> None:
    gpu = Device.open(0)
    first, second = gpu.stream(), gpu.stream()
    a, b = gpu.event(), gpu.event()
    assert first.handle != second.handle
    with refused(CudaError, "cuEventElapsedTime failed: CUDA_ERROR_INVALID_HANDLE = 400"):
        b.elapsed_ms(a)  # never recorded
    first.record(a)
    threading.Event().wait(0.02)
    second.record(b)
    b.synchronize()
    assert 20 <= b.elapsed_ms(a) < 5000
    assert a.elapsed_ms(b) == -b.elapsed_ms(a)
    # In a capture an event is no place in time.
    with first.capture() as captured:
        first.record(b)
    with refused(CudaError, "cuEventSynchronize failed: CUDA_ERROR_CAPTURED_EVENT = 907"):
        b.synchronize()
    with refused(CudaError, "cuEventElapsedTime failed: CUDA_ERROR_CAPTURED_EVENT = 907"):
        b.elapsed_ms(a)
    # Two streams capture apart.
    memory, seen = gpu.allocate(2, "x"), gpu.pinned(2)
    memory.zero(first)
    with first.capture() as one, second.capture() as two:
        first.fill(memory.pointer, 1, 1)
        second.fill(memory.pointer + 1, 2, 1)
    for captured_one, expected in ((two, [0, 2]), (one, [1, 2])):
        captured_one.graph.launch(first)
        first.download(seen, memory.pointer, 2)
        assert seen.array.tolist() == expected
    for item in (a, b, captured.graph, one.graph, two.graph, memory, seen, first, second):
        item.free()
        item.free()
    with refused(CudaError, "cuEventSynchronize failed: CUDA_ERROR_INVALID_HANDLE = 400"):
        a.synchronize()
    assert live() == {}


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
    assert "no NVIDIA driver here (libcuda was not found); nvidia-smi must work" in said
    assert "\n" not in said
    with refused(CudaError, "no NVIDIA driver here"):
        Device.open(0)
    # Without cuda-python it is that which is named, and what installs it.
    cuda.driver = None
    sys.modules["cuda.bindings"] = None
    assert cuda.device_count() == 0
    assert "needs cuda-python" in cuda.why_no_device()
    assert "pip install 'parvis[tensorrt]'" in cuda.why_no_device()
    with refused(CudaError, "needs cuda-python"):
        Device.open(0)


def check_old_driver() -> None:
    assert cuda.device_count() == 1
    with refused(CudaError, "cuStreamCreate", "new enough"), Device.open(0) as gpu:
        gpu.stream()


def check_no_error_text() -> None:
    with refused(CudaError, "CUDA_ERROR_INVALID_DEVICE = 101; there is no GPU of that number"):
        Device.open(7)


# -- the tests ----------------------------------------------------------------------------------------------------------


def test_devices_are_opened_and_released(stub: Path, run: Callable[..., None]) -> None:
    run(check_device, stub, STUB_CUDA_DEVICES="2", STUB_CUDA_MEMORY_BYTES=str(1 << 20))


def test_memory_goes_there_and_back(stub: Path, run: Callable[..., None]) -> None:
    run(check_memory, stub)


def test_out_of_memory_says_how_much_of_what(stub: Path, run: Callable[..., None]) -> None:
    run(check_out_of_memory, stub, STUB_CUDA_MEMORY_BYTES="10000000")


def test_captured_graphs_replay_and_failures_leave_the_stream(stub: Path, run: Callable[..., None]) -> None:
    run(check_capture, stub)


def test_events_and_two_streams(stub: Path, run: Callable[..., None]) -> None:
    run(check_events, stub)


def test_every_error_has_its_call_its_code_and_a_hint(stub: Path, run: Callable[..., None]) -> None:
    run(check_errors, stub)


def test_no_device_is_a_count_of_zero_with_a_reason(stub: Path, run: Callable[..., None]) -> None:
    run(check_no_device, stub, STUB_CUDA_DEVICES="0")


def test_no_driver_and_no_cuda_python(run: Callable[..., None]) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        run(check_no_library, None)
    else:
        pytest.skip("this machine has a CUDA driver")


def test_a_driver_that_lacks_a_call(stub: Path, run: Callable[..., None]) -> None:
    run(check_old_driver, stub, STUB_CUDA_HIDE="cuStreamCreate")
    run(check_no_error_text, stub, STUB_CUDA_HIDE="cuGetErrorString")
