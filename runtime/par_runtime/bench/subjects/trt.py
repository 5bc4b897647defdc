"""The phases of an image on TensorRT, timed apart on the device.

Production makes an image in one graph launch, which cannot be looked into. Here every part of it is a graph of its own;
they are launched one after the other without waiting, with an event between any two. The host runs ahead of the GPU, so an
interval is what the GPU took for the part; where launching is slower than the part, it is what launching took.

This reaches into ``TrtBackend``: what an image consists of is known there and is nobody else's business.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from par_runtime.errors import CudaError, EngineError
from par_runtime.pipeline import Pipeline
from par_runtime.request import settings, uniforms

if TYPE_CHECKING:
    from par_runtime.backends.trt.backend import TrtBackend


def phases_ms(pipeline: Pipeline, labels: list[int], guidance: float) -> dict[str, list[float]]:
    """Milliseconds of each call of one batch, by phase; the pipeline's backend is a ``TrtBackend``.

    "copy" is the upload of the tables, the collection of the tokens, and the way back of tokens and pixels.
    Raises CudaError, EngineError, MemoryError.
    """
    backend: TrtBackend = pipeline.backend  # type: ignore[assignment]
    bundle, stream = pipeline.bundle, backend._stream
    batch, _, class_ids = pipeline._rows(labels, settings(bundle, len(labels), guidance=guidance))
    noise = np.stack([uniforms(seed, bundle.n_tokens) for seed in range(len(labels))])
    backend.start(batch)
    shape = backend._memory.shape(batch.images)
    shape.tables.fill_image(shape.staging.array, batch, class_ids, noise)
    backend._warm(shape)
    decode = backend.engine.decoder is not None
    parts = backend._parts(shape, decode)
    names = ["copy", *(call.phase.name for call in backend._calls), "copy", *(["decoder"] if decode else []), "copy"]
    out: dict[str, list[float]] = {}
    with ExitStack() as held:
        launches = list(parts)
        if backend.capturing != "none":
            with suppress(CudaError, EngineError):  # refused: launched plainly, as the backend would
                graphs = []
                for part in parts:
                    with stream.capture() as captured:
                        part()
                    graphs.append(held.enter_context(captured.graph))
                launches = [lambda graph=graph: graph.launch(stream) for graph in graphs]
        events = [held.enter_context(backend.device.event()) for _ in range(len(parts) + 1)]
        stream.record(events[0])
        for launch, event in zip(launches, events[1:], strict=True):
            launch()
            stream.record(event)
        stream.synchronize()
        for name, (before, after) in zip(names, pairwise(events), strict=True):
            out.setdefault(name, []).append(after.elapsed_ms(before))
    return out
