"""The images that a model learns from: drawn by the original with the runtime, with and without guidance in turn.

They are made some at a time, and each part has a file of its own that appears when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from par_calibration.record.recording import UNREADABLE
from par_calibration.refine.plan import Plan
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.pipeline import Pipeline
from par_runtime.system import write_beside

AT_ONCE = 24  #: images of a file
#: From ``--seed`` to the first of these images: far from those that are recorded, and from those of a report.
FIRST_SEED = 2_000_000
MOST_SEED = 2**62


def images(bundle: Bundle, plan: Plan, folder: Path, on_image: Callable[[int, int], object] | None = None) -> Int:
    """Tokens [M,N] of the images of ``plan``, in sequence order; what ``folder`` lacks of them is made.

    Raises BundleError, MemoryError, OSError.
    """
    parts = [slice(i, min(i + AT_ONCE, plan.images)) for i in range(0, plan.images, AT_ONCE)]
    found = [_read(folder, part, bundle) for part in parts]
    missing = [i for i, tokens in enumerate(found) if tokens is None]
    if missing:
        with Pipeline.load(bundle.path, "cpu", threads=plan.threads, selftest=False) as pipeline:
            for done, i in enumerate(missing, len(parts) - len(missing)):
                if on_image is not None:
                    on_image(done * AT_ONCE, plan.images)
                found[i] = tokens = _make(pipeline, plan, parts[i], i)
                _write(folder, parts[i], tokens)
        if on_image is not None:
            on_image(plan.images, plan.images)
    return np.concatenate([tokens for tokens in found if tokens is not None])


def _make(pipeline: Pipeline, plan: Plan, part: slice, index: int) -> Int:
    return pipeline.generate(
        list(plan.labels[part]),
        seed=(plan.seed + FIRST_SEED + part.start) % MOST_SEED,
        guidance=plan.guidance if index % 2 else 1.0,
        decode=False,
    ).tokens


def _file(folder: Path, part: slice) -> Path:
    return folder / f"tokens-{part.start:06}.npy"


def _read(folder: Path, part: slice, bundle: Bundle) -> Int | None:
    """The tokens of ``part``; None where they are not there, or cannot be these."""
    try:
        tokens = np.load(_file(folder, part))
    except UNREADABLE:
        return None
    shape = (part.stop - part.start, bundle.n_tokens)
    fits = tokens.shape == shape and tokens.dtype == np.int64
    return tokens if fits and tokens.min() >= 0 and tokens.max() < bundle.vocab_size else None


def _write(folder: Path, part: slice, tokens: Int) -> None:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, tokens)

    write_beside(_file(folder, part), save)
