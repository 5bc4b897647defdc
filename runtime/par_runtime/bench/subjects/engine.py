"""The phases of an image of an engine on a GPU, each timed on the device.

In production an image is one graph launch, whose parts cannot be timed from outside. Here all calls of a phase are a
graph of their own, and so is every other part. They are launched one after the other without waiting, with an event
between any two. The host runs ahead of the GPU, so an interval is the time that the GPU took for the part. If launching
is slower than the part, it is the launching time.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule

if TYPE_CHECKING:
    from par_runtime.backends.gpu.backend import GpuBackend


def phases_ms(pipeline: Pipeline, labels: list[int], guidance: float) -> dict[str, list[float]]:
    """Milliseconds of each call of one batch, by phase; the pipeline's backend is a ``GpuBackend``.

    The calls of a phase follow each other as in production, so each is given an equal part of their time. "copy" is
    the upload of the tables, the collection of the tokens, and the way back of tokens and pixels.
    Raises CudaError, EngineError, MemoryError.
    """
    backend: GpuBackend = pipeline.backend  # type: ignore[assignment]
    bundle, stream = pipeline.bundle, backend.stream
    seeds = list(range(len(labels)))
    each = image_settings(bundle, len(labels), guidance=guidance, guidance_interval=-1)
    schedule = Schedule.of(bundle, labels, each, seeds)
    phases = backend.phases(schedule.batch, schedule.class_ids, schedule.noise)
    out: dict[str, list[float]] = {}
    with ExitStack() as held:
        events = [held.enter_context(backend.device.event()) for _ in range(len(phases) + 1)]
        stream.record(events[0])
        for (_, _, launch), event in zip(phases, events[1:], strict=True):
            launch()
            stream.record(event)
        stream.synchronize()
        for (name, calls, _), (before, after) in zip(phases, pairwise(events), strict=True):
            took = after.elapsed_ms(before)
            out.setdefault(name, []).extend([took / calls] * calls)
    return out
