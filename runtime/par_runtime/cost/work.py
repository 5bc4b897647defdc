"""What each call of a model must read and calculate at least.

A call reads every weight except those of the embedding table once, and for each row in flight the keys and values that
it may see. It multiplies each weight with each position of each row, and each position with those keys and values.
Nothing else is counted: activations stay in caches; norms, sampling and the noise are small. So the work is a true
lower bound. Source: the paper's model of a memory-bound step, extended by arithmetic.

Letters: B images, R rows (two for a guided image), N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

from par_runtime.bundle import Phase
from par_runtime.cost.architecture import Architecture
from par_runtime.dtypes import BYTES


@dataclass(frozen=True)
class Work:
    """What one call must read (bytes) and calculate (operations; a multiplication with its addition counts as two)."""

    bytes: float
    operations: float


def phase_work(
    architecture: Architecture, name: str, images: int, guided: bool, weight_bytes: float, cache_bytes: float
) -> list[Work]:
    """The work of each call of phase ``name`` for a batch; empty for a phase that the model does not have.

    ``weight_bytes``: of one parameter as it is read. ``cache_bytes``: of one number of the cache.
    """
    if name == "decoder":
        return decoder_work(architecture, images, weight_bytes) if architecture.decoder_parameters else []
    rows = images * (2 if guided else 1)
    return [
        _call_work(architecture, phase, phase.start + (i + 1) * phase.query, rows, weight_bytes, cache_bytes)
        for phase in architecture.phases
        if phase.name == name
        for i in range(phase.repeat)
    ]


def image_work(
    architecture: Architecture, images: int, guided: bool, weight_bytes: float, cache_bytes: float
) -> list[Work]:
    """The work of each model call of a batch, in order; the decoder is not among them."""
    return [
        work
        for phase in architecture.phases
        for work in phase_work(architecture, phase.name, images, guided, weight_bytes, cache_bytes)
    ]


def _call_work(
    architecture: Architecture, phase: Phase, visible: int, rows: int, weight_bytes: float, cache_bytes: float
) -> Work:
    """One call of ``rows`` rows that each see ``visible`` tokens."""
    parameters = architecture.step_parameters
    numbers = architecture.cache_numbers * visible  # keys and values of one row
    positions = rows * phase.query
    return Work(
        bytes=parameters * weight_bytes + rows * numbers * cache_bytes,
        operations=2 * parameters * positions + 2 * numbers * positions,
    )


def decoder_work(architecture: Architecture, images: int, weight_bytes: float, calls: int = 1) -> list[Work]:
    """Decoding ``images`` in ``calls`` equal parts: each reads the weights once. Bytes of pixels are not counted.

    ``weight_bytes`` is that of the step network; a decoder's weights are never quantised.
    """
    each = images * architecture.decoder_operations / calls
    return [Work(architecture.decoder_parameters * max(weight_bytes, BYTES["fp16"]), each)] * calls


def largest_read_bytes(
    architecture: Architecture, images: int, guided: bool, weight_bytes: float, cache_bytes: float
) -> int:
    """What the largest call reads: the size of array at which the bandwidth must be measured to be fair."""
    return int(max(work.bytes for work in image_work(architecture, images, guided, weight_bytes, cache_bytes)))
