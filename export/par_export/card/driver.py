"""What the runtime counts on of the CUDA driver, checked on this very one: ``backends/cuda.py``, promise by promise.

The same promises hold on the stand-ins of the tests (``tests/export/card/test_driver.py``). Where a driver differs, the
stand-ins are wrong, and every test that they carry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_export.card.lines import Emit
from par_runtime.backends import cuda
from par_runtime.backends.kernels.modules import Module, Prepared
from par_runtime.backends.program import Kernel, Launch
from par_runtime.errors import CudaError, OutOfMemory

BLOCK = 256  #: bytes of most copies here
LEAK = 2**26  #: that memory may differ by: what the driver itself takes
LARGE = 2**28  #: bytes of what must be seen in the count of free ones
#: A kernel that writes to an address that nothing has.
FAULT = """.version 7.0
.target sm_80
.address_size 64
.visible .entry fault()
{
    .reg .b64 %address;
    .reg .b32 %value;
    mov.u64 %address, 16;
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
"""


class _BrokenError(Exception):
    """A promise that does not hold, with what was found."""


def _hold(passed: bool, found: str) -> None:
    if not passed:
        raise _BrokenError(found)


@contextmanager
def _refused(kind: type[Exception], *words: str) -> Iterator[list[Exception]]:
    """The block raises ``kind``, and the error says all of ``words``."""
    caught: list[Exception] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
        missing = [word for word in words if word not in str(error)]
        _hold(not missing, f"the error {str(error)!r} does not say {missing}")
        return
    raise _BrokenError(f"no {kind.__name__} was raised; expected one that says {words}")


class _Bench:
    """A device with a stream, two blocks on it and two of pinned memory."""

    def __init__(self, index: int) -> None:
        self.device = cuda.Device.open(index)
        self.stream = self.device.stream()
        self.a, self.b = self.device.allocate(BLOCK, "a"), self.device.allocate(2 * BLOCK, "b")
        self.source, self.target = self.device.pinned(BLOCK), self.device.pinned(BLOCK)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.a, self.b, self.source, self.target, self.stream, self.device):
            each.free()

    def fetch(self, pointer: int, size: int = BLOCK) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes of the device."""
        self.stream.download(self.target, pointer, size)
        self.stream.synchronize()
        return self.target.array[:size].copy()

    def put(self, numbers: Any) -> None:
        """Have ``numbers`` at the beginning of ``a``."""
        values = np.asarray(numbers, np.uint8)
        self.source.array[: values.size] = values
        self.stream.upload(self.a.pointer, self.source, values.size)
        self.stream.synchronize()  # the pinned block is used again


def describe(index: int) -> str:
    """Name, capability and memory are what a GPU has; a count of devices, and no error of a GPU that is not there."""
    _hold(cuda.why_no_device() == "", cuda.why_no_device())
    count = cuda.device_count()
    _hold(count > index, f"{count} devices, number {index} is used")
    with cuda.Device.open(index) as gpu:
        free = gpu.free_bytes()
        _hold(0 < free <= gpu.total_bytes, f"{free} bytes free of {gpu.total_bytes}")
        _hold(gpu.name.isprintable() and bool(gpu.name), f"name {gpu.name!r}")
        text = f"{gpu.name}, SM{gpu.capability[0]}{gpu.capability[1]}, {gpu.total_bytes / 1e9:.1f} GB, "
        text += f"{free / 1e9:.1f} GB free, driver API {gpu.driver_version}"
    with _refused(CudaError, f"cuDeviceGet of GPU {count}", "CUDA_ERROR_INVALID_DEVICE = 101"):
        cuda.Device.open(count)
    return text


def contexts(index: int) -> str:
    """A context lives until the last device that shares it is closed; a closed device is refused."""
    first, second = cuda.Device.open(index), cuda.Device.open(index)
    block = first.allocate(BLOCK, "x")
    with second.stream() as stream:
        stream.fill(block.pointer, 7, BLOCK)
        stream.synchronize()
    second.close()
    with first.stream() as stream:  # the context is still there, and current
        stream.fill(block.pointer, 8, BLOCK)
        stream.synchronize()
    block.free()
    first.close()
    first.close()
    with _refused(CudaError, f"GPU {index} was closed"):
        first.activate()
    with _refused(CudaError) as caught:
        first.free_bytes()
    error: Any = caught[0]
    with cuda.Device.open(index) as again:
        again.free_bytes()
    return f"after the last close the driver says {error.code}"


def threads(index: int) -> str:
    """A thread that never asked for the context is refused, and may ask for it."""
    said: list[str] = []
    with cuda.Device.open(index) as gpu:

        def elsewhere() -> None:
            try:
                with _refused(CudaError, "CUDA_ERROR_INVALID_CONTEXT = 201", "load it in the process that uses it"):
                    gpu.free_bytes()
                gpu.activate()
                said.append("" if gpu.free_bytes() > 0 else "no memory is free")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    _hold(said == [""], said[0])
    return "refused without, served with its context"


def copies(index: int) -> str:
    """Bytes go to the device, across it and back, with offsets of the pinned side; fills end where they should."""
    with _Bench(index) as on:
        on.source.array[:] = np.arange(BLOCK)
        on.stream.upload(on.a.pointer, on.source, BLOCK)
        on.stream.copy(on.b.pointer, on.a.pointer, BLOCK)
        _hold(bool((on.fetch(on.b.pointer) == np.arange(BLOCK)).all()), "other bytes came back")
        on.stream.upload(on.a.pointer + 10, on.source, 4, 100)
        on.target.array[:] = 0
        on.stream.download(on.target, on.a.pointer + 8, 8, dst_offset=200)
        on.stream.synchronize()
        got = on.target.array[198:210].tolist()
        _hold(got == [0, 0, 8, 9, 100, 101, 102, 103, 14, 15, 0, 0], f"with offsets: {got}")
        on.stream.fill(on.b.pointer, 0xEE, 2 * BLOCK)
        on.stream.fill(on.b.pointer + 3, 7, 2)
        on.stream.fill(on.b.pointer + BLOCK, 0, BLOCK)
        both = [*on.fetch(on.b.pointer, 8).tolist(), *on.fetch(on.b.pointer + BLOCK - 2, 4).tolist()]
        _hold(both == [0xEE] * 3 + [7, 7] + [0xEE] * 3 + [0xEE, 0xEE, 0, 0], f"after fills: {both}")
        on.b.zero(on.stream)
        _hold(not on.fetch(on.b.pointer + BLOCK).any(), "zero left bytes")
        for size, offset in ((BLOCK + 1, 0), (1, BLOCK), (200, 57), (1, -1), (-1, 0)):
            with _refused(ValueError, f"{size} bytes at {offset} "):
                on.stream.upload(on.a.pointer, on.source, size, offset)
    return f"{BLOCK} bytes and their parts"


def rows(index: int) -> str:
    """A 2-D copy moves its rows and nothing between them."""
    with _Bench(index) as on:
        on.put(np.arange(BLOCK))
        on.stream.fill(on.b.pointer, 0xEE, 2 * BLOCK)
        on.stream.copy_2d(on.b.pointer + 1, 5, on.a.pointer + 32, 16, 4, 3)
        got, e = on.fetch(on.b.pointer, 20).tolist(), 0xEE
        wanted = [e, 32, 33, 34, 35, e, 48, 49, 50, 51, e, 64, 65, 66, 67, e, e, e, e, e]
        _hold(got == wanted, f"{got}, expected {wanted}")
        with _refused(CudaError, "cuMemcpy2DAsync of 3 rows of 4 bytes", "CUDA_ERROR_INVALID_VALUE"):
            on.stream.copy_2d(on.a.pointer, 3, on.b.pointer, 16, 4, 3)
    return "3 rows of 4 bytes, 16 and 5 apart"


def freed(index: int) -> str:
    """Memory that is freed is free again; freeing twice is freeing once; what is freed is refused."""
    with _Bench(index) as on:
        before = on.device.free_bytes()
        large = on.device.allocate(LARGE, "much")
        held = before - on.device.free_bytes()
        _hold(held + LEAK >= LARGE, f"{held} bytes fewer are free after {LARGE} were allocated")
        large.free()
        large.free()
        after = on.device.free_bytes()
        _hold(abs(before - after) < LEAK, f"{before} bytes free before, {after} after")
        _hold(large.pointer == 0, "a freed block has an address")
        with _refused(CudaError, "cuMemsetD8Async", "CUDA_ERROR_INVALID_VALUE"):
            large.zero(on.stream)
        pinned = on.device.pinned(BLOCK)
        pinned.free()
        pinned.free()
        with _refused(ValueError, "freed"):
            on.stream.upload(on.a.pointer, pinned, 1)
        stream = on.device.stream()
        stream.free()
        stream.free()
        with _refused(CudaError, "the stream was freed"):
            stream.synchronize()
    return f"{LARGE / 1e6:.0f} MB and back"


def out_of_memory(index: int) -> str:
    """More than there is, is refused with how much of what, and takes nothing."""
    with cuda.Device.open(index) as gpu:
        before, size = gpu.free_bytes(), 2 * gpu.total_bytes
        with _refused(
            OutOfMemory, "scratch memory needs", "CUDA_ERROR_OUT_OF_MEMORY = 2", "make fewer images"
        ) as caught:
            gpu.allocate(size, "scratch memory")
        error: Any = caught[0]
        _hold(error.requested_bytes == size and error.total_bytes == gpu.total_bytes, "other numbers in the error")
        after = gpu.free_bytes()
        _hold(abs(before - after) < LEAK, f"{before} bytes free before the refusal, {after} after")
        gpu.allocate(BLOCK, "a little").free()
    return str(error)


def graphs(index: int) -> str:
    """A capture records copies of every kind and fills and runs nothing; its graph does all of it at each launch."""
    with _Bench(index) as on:
        on.put(np.zeros(BLOCK))
        on.stream.fill(on.b.pointer, 1, 2 * BLOCK)
        on.stream.synchronize()
        on.target.array[:] = 0
        with on.stream.capture() as captured:
            _hold(on.stream.capturing(), "the stream says that it is not captured")
            on.stream.upload(on.a.pointer, on.source, BLOCK)
            on.stream.copy(on.b.pointer, on.a.pointer, BLOCK)
            on.stream.copy_2d(on.b.pointer + BLOCK, 8, on.a.pointer, 4, 4, 16)
            on.stream.fill(on.b.pointer + 10, 99, 3)
            on.stream.download(on.target, on.b.pointer, BLOCK)
        _hold(not on.stream.capturing(), "the stream is captured after the end")
        on.stream.synchronize()
        _hold(not on.target.array.any(), "what was captured ran too")
        with captured.graph as graph:
            _hold(graph.nodes == 5, f"{graph.nodes} nodes of 5 operations")
            for first in (3, 50):  # pinned memory is read when the graph runs
                on.source.array[:] = np.arange(first, first + BLOCK) % 251
                on.target.array[:] = 0
                graph.launch(on.stream)
                graph.launch(on.stream)
                on.stream.synchronize()
                wanted = on.source.array.copy()
                wanted[10:13] = 99
                _hold(bool((on.target.array == wanted).all()), "other bytes came back")
                pairs = on.fetch(on.b.pointer + BLOCK, 128).reshape(16, 8)
                _hold(bool((pairs[:, :4].ravel() == on.source.array[:64]).all()), "2-D copies of a graph moved others")
                _hold(bool((pairs[:, 4:] == 1).all()), "2-D copies of a graph wrote between rows")
    return "5 nodes, launched four times"


def broken_captures(index: int) -> str:
    """What cannot be captured is refused, ends the capture, and the stream can be used and captured afterwards."""
    with _Bench(index) as on:
        on.put(np.arange(BLOCK))
        with _refused(CudaError, "capture='call'") as caught, on.stream.capture():
            on.stream.copy(on.b.pointer, on.a.pointer, BLOCK)
            on.stream.synchronize()
        _hold(not on.stream.capturing(), "the stream is captured after the end")
        with _refused(KeyError), on.stream.capture():  # an error of ours ends a capture too
            raise KeyError
        on.stream.copy(on.b.pointer, on.a.pointer, BLOCK)
        _hold(bool((on.fetch(on.b.pointer) == np.arange(BLOCK)).all()), "the stream does not copy any more")
        with on.stream.capture() as captured:
            on.stream.fill(on.b.pointer, 5, BLOCK)
        with captured.graph as graph:
            graph.launch(on.stream)
            _hold(bool((on.fetch(on.b.pointer) == 5).all()), "a later capture does not run")
    error: Any = caught[0]
    return f"a wait in a capture is {error.code}"


def events(index: int) -> str:
    """Events give times that grow with the work between them; one that was not recorded gives none."""
    size, times = LARGE, []
    with _Bench(index) as on, on.device.allocate(size, "much") as large, on.device.event() as a, on.device.event() as b:
        on.stream.fill(large.pointer, 0, size)  # the first one loads what fills
        for repeats in (0, 4, 64):
            tries = []
            for _ in range(5):  # the least counts: another process can hold up any of them
                on.stream.record(a)
                for _ in range(repeats):
                    on.stream.fill(large.pointer, repeats, size)
                on.stream.record(b)
                b.synchronize()
                tries.append(b.elapsed_ms(a))
            times.append(min(tries))
        with on.device.event() as never, _refused(CudaError, "cuEventElapsedTime"):
            never.elapsed_ms(a)
    _hold(0 <= times[0] < times[1] < times[2], f"{times} ms for 0, 4 and 64 fills")
    return f"{times[0]:.3f}, {times[1]:.3f}, {times[2]:.3f} ms for 0, 4 and 64 fills of {size / 1e6:.0f} MB"


def in_order(index: int) -> str:
    """Work of a stream runs in its order while the host goes on; a wait of another stream is not one of this."""
    with _Bench(index) as on, on.device.stream() as other, on.device.allocate(LARGE, "much") as large:
        on.put(np.arange(BLOCK))
        for value in range(40):
            on.stream.fill(large.pointer, value, LARGE)
        on.stream.copy(on.b.pointer, large.pointer + LARGE - BLOCK, BLOCK)
        other.synchronize()
        _hold(bool((on.fetch(on.b.pointer) == 39).all()), "a copy did not wait for the fill before it")
    return "40 fills, then a copy"


def beside_pytorch(index: int, torch_device: str) -> str:
    """PyTorch in this process shares the context: neither ends what the other holds."""
    import torch  # here: nothing else in this file needs it

    device = torch.device(torch_device)
    gpu = cuda.Device.open(index)
    numbers = torch.arange(1000, device=device)
    with gpu.stream() as stream, gpu.allocate(BLOCK, "x") as block:
        stream.fill(block.pointer, 1, BLOCK)
        stream.synchronize()
        total = int((numbers * 2).sum())
        stream.fill(block.pointer, 2, BLOCK)
        stream.synchronize()
    gpu.close()
    _hold(total == int((numbers * 2).sum()) == 999000, "PyTorch computes something else")
    return f"PyTorch {torch.__version__} on {device}"


PROMISES: Mapping[str, Callable[[int], str]] = {
    "the device": describe,
    "contexts": contexts,
    "threads": threads,
    "copies": copies,
    "2-D copies": rows,
    "memory": freed,
    "out of memory": out_of_memory,
    "graphs": graphs,
    "broken captures": broken_captures,
    "events": events,
    "order": in_order,
}


def check_driver(spec: Mapping[str, Any], emit: Emit) -> None:
    """Every promise of GPU ``index``, a check each."""
    _check(emit, {name: lambda of=of: of(spec["index"]) for name, of in PROMISES.items()})  # type: ignore[misc]


def check_beside_pytorch(spec: Mapping[str, Any], emit: Emit) -> None:
    """GPU ``index`` beside PyTorch on ``torch``."""
    _check(emit, {"beside PyTorch": lambda: beside_pytorch(spec["index"], spec["torch"])})


def _check(emit: Emit, promises: Mapping[str, Callable[[], str]]) -> None:
    for name, promise in promises.items():
        emit("begin", name=f"driver: {name}")
        try:
            passed, text = True, promise()
        except (_BrokenError, CudaError, ValueError, MemoryError, RuntimeError) as error:
            passed, text = False, f"{type(error).__name__.strip('_')}: {error}"
        emit("check", name=f"driver: {name}", passed=passed, text=text)


def fault_kernel() -> tuple[Kernel, bytes]:
    """A kernel that writes where nothing is, and its PTX."""
    text = FAULT.encode() + b"\0"
    return Kernel("fault.ptx", len(text), "", "fault", "card.fault", {}, (), 0, 4, 0, 0, 0, False), text


def check_fault(spec: Mapping[str, Any], emit: Emit) -> None:
    """A kernel that fails: the error of the next wait says so, and that the process must be restarted; so do all later
    ones. GPU ``index`` cannot be used in this process afterwards.
    """

    def fails() -> str:
        gpu = cuda.Device.open(spec["index"])
        stream = gpu.stream()
        module = Module(*fault_kernel())
        prepared = Prepared({"fault": module}, [(Launch("fault", (1, 1, 1), ()), 0)], {}, stream)
        prepared.enqueue()
        with _refused(CudaError, "the process must be restarted") as caught:
            stream.synchronize()
        with _refused(CudaError, "the process must be restarted"):
            gpu.allocate(BLOCK, "x")
        error: Any = caught[0]
        return str(error.code)

    _check(emit, {"a kernel that fails": fails})
