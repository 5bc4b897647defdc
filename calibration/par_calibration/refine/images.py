"""The images that a model learns from: drawn by the original with the runtime, with and without guidance in turn.

They are made some at a time, and each part has a file of its own that appears when it is complete. It says what it is
of: those of another training, with other classes, are made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_calibration.record.arrays import Form, read_arrays
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
    found = [_read(folder, part, plan, bundle) for part in parts]
    missing = [i for i, tokens in enumerate(found) if tokens is None]
    if missing:
        with Pipeline.load(bundle.path, "cpu", threads=plan.threads, selftest=False) as pipeline:
            for done, i in enumerate(missing, len(parts) - len(missing)):
                if on_image is not None:
                    on_image(done * AT_ONCE, plan.images)
                found[i] = tokens = _make(pipeline, plan, parts[i], i)
                _write(folder, parts[i], plan, tokens)
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
    return folder / f"tokens-{part.start:06}.npz"


def _made_from(plan: Plan, part: slice) -> NDArray[np.uint8]:
    """All that decides the tokens of ``part``."""
    text = json.dumps([plan.bundle, plan.seed, plan.guidance, plan.labels[part]])
    return np.frombuffer(text.encode(), np.uint8)


def _read(folder: Path, part: slice, plan: Plan, bundle: Bundle) -> Int | None:
    """The tokens of ``part``; None where they are not there, or are not these."""
    of = _made_from(plan, part)
    forms: dict[str, Form] = {
        "made_from": ("uint8", of.shape),
        "tokens": ("int64", (part.stop - part.start, bundle.n_tokens)),
    }
    try:
        arrays = read_arrays(_file(folder, part), forms)
    except (ValueError, OSError):
        return None
    tokens: Int = arrays["tokens"]
    fits = np.array_equal(arrays["made_from"], of) and tokens.min() >= 0 and tokens.max() < bundle.vocab_size
    return tokens if fits else None


def _write(folder: Path, part: slice, plan: Plan, tokens: Int) -> None:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, made_from=_made_from(plan, part), tokens=tokens)

    write_beside(_file(folder, part), save)
