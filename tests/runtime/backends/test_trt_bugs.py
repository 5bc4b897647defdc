"""Planted bugs of the TensorRT backend, each one that was made or nearly made: the stand-ins of ``double/`` catch all
of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from double import tensorrt
from double.bugs import no_wait_before_the_copy_is_read
from double.driver import ViolationError
from double.fixtures import SETTINGS, Make
from planted import one_by_default

from par_runtime.backends import cuda
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.gpu.tables import Tables
from par_runtime.backends.trt.plan import LoadedPlan, PlanContext
from par_runtime.errors import EngineError
from par_runtime.pipeline import Pipeline


def wrong_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoadedPlan.context
    monkeypatch.setattr(LoadedPlan, "context", lambda self, profile, *rest: real(self, max(profile - 1, 0), *rest))


def swapped_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of one layer bound to each other's buffers, in and out alike, at the second call."""
    real = GpuBackend._run

    def run(self: GpuBackend, at: Any, launch: Any, index: int, ids: int) -> None:
        if index == 1:
            k, v = (self._memory.caches[f"past_{kind}.0"].pointer for kind in "kv")
            for name in ("past", "present"):
                at.contexts[launch.program].bind(f"{name}_k.0", v)
                at.contexts[launch.program].bind(f"{name}_v.0", k)
        real(self, at, launch, index, ids)

    monkeypatch.setattr(GpuBackend, "_run", run)


def write_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.fill_launch

    def fill(self: Tables, block: Any, index: int, launch: Any) -> None:
        real(self, block, index, launch)
        if launch.call.phase.name == "group":
            self.view(block, "write", index, launch.query)[...] += 1

    monkeypatch.setattr(Tables, "fill_launch", fill)


def missing_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt.Engine, "get_aliased_input_tensor", lambda self, name: None)


def staging_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next image's inputs written while the upload of this one still waits."""
    real = GpuBackend._captured

    def captured(self: GpuBackend, at: Any, decode: bool) -> Any:
        graphs = real(self, at, decode)
        for graph in graphs:
            graph.launch(self.stream)
        at.staging.array[:] = 0
        return []

    monkeypatch.setattr(GpuBackend, "_captured", captured)


def separate_present_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PlanContext.bind

    given: dict[str, int] = {}

    def other(self: PlanContext, name: str, address: int) -> None:
        given[name] = address
        real(self, name, given["past_k.0"] if name == "present_v.0" else address)

    monkeypatch.setattr(PlanContext, "bind", other)


def length_counts_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.fill_launch

    def fill(self: Tables, block: Any, index: int, launch: Any) -> None:
        real(self, block, index, launch)
        self.view(block, "length", index, launch.query)[...] = launch.call.write + launch.query

    monkeypatch.setattr(Tables, "fill_launch", fill)


def capture_without_a_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuBackend, "_warm", lambda self, at: None)


def sync_inside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    real = GpuBackend._enqueue

    def enqueue(self: GpuBackend, at: Any, index: int) -> None:
        real(self, at, index)
        self.stream.synchronize()

    monkeypatch.setattr(GpuBackend, "_enqueue", enqueue)


def unzeroed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Buffer, "zero", lambda self, stream: stream.fill(self.pointer, 0xFF, self.size))


def copy_of_the_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transition takes the last initial token from the slot behind it."""
    real = cuda.Stream.copy_2d

    def copy(self: Any, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int) -> None:
        real(self, dst, dst_pitch, src + (8 if width == 8 and height > 4 else 0), src_pitch, width, height)

    monkeypatch.setattr(cuda.Stream, "copy_2d", copy)


BUGS = [
    wrong_profile,
    swapped_caches,
    write_off_by_one,
    missing_alias,
    no_wait_before_the_copy_is_read,
    staging_reused_too_early,
    separate_present_buffer,
    length_counts_padding,
    capture_without_a_first_run,
    sync_inside_the_loop,
    unzeroed_cache,
    copy_of_the_wrong_slot,
]


@pytest.mark.parametrize("bug", one_by_default(BUGS), ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(load: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    wanted = [
        Pipeline.load(tiny, device="cpu", selftest=False).generate([0, 3, 5], seed=s, **SETTINGS).tokens for s in (1, 2)
    ]

    def differs() -> bool:
        gpu = load()
        got = [gpu.generate([0, 3, 5], seed=s, **SETTINGS).tokens for s in (1, 2)]
        captured_whole = gpu.backend.capturing == "image"  # type: ignore[attr-defined]
        return not captured_whole or any((a != b).any() for a, b in zip(got, wanted, strict=True))

    assert not differs(), "the code as it is must pass"
    bug(monkeypatch)
    try:
        caught = differs()
    except (ViolationError, EngineError) as error:
        print(f"caught: {error}")
        caught = True
    assert caught, f"{bug.__name__} went unnoticed"
