"""``cuda.py`` on the stub of libcuda: capture, graphs, events and streams. How it runs: ``stub_cuda/children.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from stub_cuda.children import failing, live, needs_cuda_python, refused

from par_runtime.backends.cuda import Device
from par_runtime.errors import CudaError

pytestmark = needs_cuda_python


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


def test_captured_graphs_replay_and_failures_leave_the_stream(stub: Path, run: Callable[..., None]) -> None:
    run(check_capture, stub)


def test_events_and_two_streams(stub: Path, run: Callable[..., None]) -> None:
    run(check_events, stub)
