"""What is timed of an engine, whichever kind it is of: the same batches, so that their times can be compared."""

from __future__ import annotations

import time

from par_runtime.pipeline import Pipeline


def batches_ms(pipeline: Pipeline, images: int, repeats: int) -> tuple[float, ...]:
    """Milliseconds of each of ``repeats`` guided batches of ``images``, after one that captures and is not counted."""
    labels = [i % pipeline.bundle.n_classes for i in range(images)]
    samples = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        pipeline.generate(labels, seed=repeat, guidance=1.5, guidance_interval=-1)
        samples.append(1e3 * (time.perf_counter() - started))
    return tuple(samples[1:])
