"""What is checked of a real driver: it holds on both stand-ins, and each promise fails where its code is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from double.bare import Failing
from double.driver import Driver
from stub_cuda.children import needs_cuda_python

from par_export.card import driver as card
from par_runtime.backends import cuda

pytestmark = needs_cuda_python


class Lines(list[dict[str, Any]]):
    def __call__(self, kind: str, **fields: Any) -> None:
        self.append({"kind": kind} | fields)

    def wrong(self) -> dict[str, str]:
        """Text of the checks that failed, by what they check."""
        checks = [line for line in self if line["kind"] == "check"]
        return {line["name"].removeprefix("driver: "): line["text"] for line in checks if not line["passed"]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work than on a GPU."""
    monkeypatch.setattr(card, "LARGE", 2**20)
    monkeypatch.setattr(card, "LEAK", 2**10)


def checked() -> Lines:
    lines = Lines()
    card.check_driver({"index": 0}, lines)
    card.check_beside_pytorch({"index": 0, "torch": "cpu"}, lines)
    return lines


def test_every_promise_holds_on_the_stand_in(driver: Driver, small: None) -> None:
    lines = checked()
    assert lines.wrong() == {}
    begun = [line["name"] for line in lines if line["kind"] == "begin"]
    assert begun == [f"driver: {name}" for name in (*card.PROMISES, "beside PyTorch")]
    assert (driver.device, driver.pinned, driver.queues, driver.executables, driver.contexts) == ({}, {}, {}, {}, 0)


def test_every_promise_holds_through_cuda_python(stub: Path) -> None:
    """On the stub of libcuda, as the report runs it: a process of its own."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(stub), "STUB_CUDA_MEMORY_BYTES": str(2**24)}
    script = (
        "import sys; from par_export.card import driver, stages; driver.LARGE, driver.LEAK = 2**20, 2**10; "
        "sys.exit(stages.main(sys.argv[1:]))"
    )
    spec, lines = json.dumps({"index": 0, "torch": "cpu"}), Lines()
    for stage in ("driver", "driver_pytorch"):
        command = [sys.executable, "-c", script, stage, spec]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        lines += [json.loads(line) for line in run.stdout.splitlines()]
    assert lines.wrong() == {}
    assert sum(line["kind"] == "check" for line in lines) == len(card.PROMISES) + 1


def swapped_pitches(patch: pytest.MonkeyPatch) -> None:
    real = cuda.Stream.copy_2d

    def copy_2d(self: cuda.Stream, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int) -> None:
        real(self, dst, src_pitch, src, dst_pitch, width, height)

    patch.setattr(cuda.Stream, "copy_2d", copy_2d)


def offset_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = cuda.Stream.upload

    def upload(self: cuda.Stream, dst: int, src: cuda.Pinned, size: int, src_offset: int = 0) -> None:
        cuda._inside(src, src_offset, size)
        real(self, dst, src, size)

    patch.setattr(cuda.Stream, "upload", upload)


def graph_does_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Graph, "launch", lambda self, stream: None)


def captures_go_on_after_an_error(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(self: cuda.Stream) -> Any:
        captured = cuda.Captured()
        mode = cuda.library().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        cuda.call("cuStreamBeginCapture", self.raw, mode)
        yield captured
        captured.graph = cuda.Graph(cuda.call("cuStreamEndCapture", self.raw))

    patch.setattr(cuda.Stream, "capture", capture)


def memory_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Buffer, "free", lambda self: setattr(self, "pointer", 0))


def memory_errors_are_plain(patch: pytest.MonkeyPatch) -> None:
    def allocate(self: cuda.Device, size: int, what: str) -> cuda.Buffer:
        return cuda.Buffer(int(cuda.call("cuMemAlloc", size, note=what)), size)

    patch.setattr(cuda.Device, "allocate", allocate)


def no_time_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Event, "elapsed_ms", lambda self, since: 0.0)


def context_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Device, "close", lambda self: setattr(self, "_context", None))


def context_released_early(patch: pytest.MonkeyPatch) -> None:
    def close(self: cuda.Device) -> None:
        if self._context is not None:
            self._context = None
            for _ in range(2):
                cuda.call("cuDevicePrimaryCtxRelease", self._device)

    patch.setattr(cuda.Device, "close", close)


def context_of_the_first_thread(patch: pytest.MonkeyPatch) -> None:
    real = cuda.Device.activate
    active: list[cuda.Device] = []

    def activate(self: cuda.Device) -> None:
        if self not in active:
            active.append(self)
            real(self)

    patch.setattr(cuda.Device, "activate", activate)


def waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Stream, "synchronize", lambda self: self.raw and None)


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (swapped_pitches, {"2-D copies", "graphs"}),
        (offset_forgotten, {"copies"}),
        (graph_does_nothing, {"graphs", "broken captures"}),
        (captures_go_on_after_an_error, {"broken captures"}),
        (memory_is_kept, {"memory"}),
        (memory_errors_are_plain, {"out of memory"}),
        (no_time_passes, {"events"}),
        (context_kept, {"contexts"}),
        (context_released_early, {"contexts"}),
        (context_of_the_first_thread, {"threads"}),
        (waits_for_nothing, {"copies", "2-D copies", "graphs", "order"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_promise_is_seen(
    driver: Driver, small: None, monkeypatch: pytest.MonkeyPatch, bug: Callable[[Any], None], seen: set[str]
) -> None:
    bug(monkeypatch)
    wrong = checked().wrong()
    assert seen <= set(wrong), wrong


def test_a_kernel_that_fails_says_so_until_the_process_ends(driver: Driver) -> None:
    kernel, text = card.fault_kernel()
    driver.register(text, kernel, (8, 0))
    driver.twin = Failing(driver)
    lines = Lines()
    card.check_fault({"index": 0}, lines)
    assert lines.wrong() == {}
    assert lines[-1]["text"] == "CUDA_ERROR_ILLEGAL_ADDRESS"
    driver.twin, driver.broken = None, None  # a driver that does not notice
    card.check_fault({"index": 0}, lines)
    assert "no CudaError was raised" in lines.wrong()["a kernel that fails"]
