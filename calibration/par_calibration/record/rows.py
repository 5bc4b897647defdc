"""Which rows of an image's calls are kept: a row is what one position of one row of the batch gives to every matrix.

The class token and the learnable tokens draw most of the attention of all others (they are attention sinks), and what
they give to a matrix is far from what code tokens give. They are a few rows of hundreds, so a plain sample would miss
them: they are always kept, and so are the phases that have only a few rows. The rest is drawn from a seed.

Letters: R rows of the batch (two for a guided image), N positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_runtime.bundle import Bundle, image_calls
from par_runtime.dtypes import Int

#: Classes of positions, by what they take: the class token, an earlier token, a learnable token.
KINDS = ("class", "code", "learnable")
#: A phase with at most this part of an image's kept rows is kept whole.
SHORT_PHASE = 1 / 4


@dataclass(frozen=True, eq=False)
class Positions:
    """Each position [N] of an image: its phase, an index into ``bundle.phases``, and its kind, of :data:`KINDS`."""

    phase: Int
    kind: Int

    @staticmethod
    def of(bundle: Bundle) -> Positions:
        """The positions of every image of ``bundle``."""
        phase, kind = np.zeros(bundle.n_tokens, np.int64), np.zeros(bundle.n_tokens, np.int64)
        for call in image_calls(bundle.phases):
            phase[call.positions] = bundle.phases.index(call.phase)
            takes = ["class" if e == "class" else "code" if e == "token" else "learnable" for e in call.phase.inputs]
            kind[call.positions] = [KINDS.index(each) for each in takes]
        return Positions(phase, kind)


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows of one image that are kept, each as (row of the batch, position), ordered by position: [n] each."""

    row: Int
    position: Int

    def of_call(self, first: int, query: int) -> tuple[slice, Int]:
        """Those of a call of ``query`` positions from ``first`` on: which entries they are, and their place in the
        call's rows [R*q].
        """
        begin, end = np.searchsorted(self.position, [first, first + query])
        part = slice(int(begin), int(end))
        place: Int = self.row[part] * query + self.position[part] - first
        return part, place


def least_rows(positions: Positions, rows: int) -> int:
    """How many rows of an image must be kept, those of the class and of learnable tokens; ``rows``: R."""
    return rows * int((positions.kind != KINDS.index("code")).sum())


def choose(positions: Positions, rows: int, count: int, seed: tuple[int, ...]) -> Kept:
    """``count`` rows of an image of ``rows`` rows of the batch; all where there are no more. The same seed, the same.

    Raises CalibrationError where ``count`` does not hold those that must be kept.
    """
    n = len(positions.phase)
    must = np.repeat(positions.kind != KINDS.index("code"), rows)  # [N*R], position by position
    if count < must.sum():
        raise CalibrationError(
            f"{count} samples of an image; expected at least {must.sum()}: the rows of its class and learnable tokens "
            "are always kept; give more --samples, or fewer --images"
        )
    for phase in np.unique(positions.phase):
        of_phase = np.repeat(positions.phase == phase, rows)
        if of_phase.sum() <= count * SHORT_PHASE and (must | of_phase).sum() <= count:
            must |= of_phase
    rest = np.flatnonzero(~must)
    drawn = np.random.default_rng(seed).choice(rest, min(count - int(must.sum()), len(rest)), replace=False)
    index = np.sort(np.concatenate([np.flatnonzero(must), drawn]))
    assert len(index) == min(count, n * rows)
    return Kept(index % rows, index // rows)


def compact(rows: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """``rows`` [n,K] as fp16 times a power of two each [n]: the largest numbers of sinks are beyond fp16's range."""
    largest = np.abs(rows).max(1, initial=0)
    _, exponent = np.frexp(np.where(np.isfinite(largest) & (largest > 0), largest, 1))
    scale = np.ldexp(np.float32(1), exponent - 14).astype(np.float32)  # the largest becomes 2**13 .. 2**14
    return (rows / scale[:, None]).astype(np.float16), scale


def widened(rows: NDArray[np.float16], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of :func:`compact`, up to fp16's rounding."""
    out: NDArray[np.float32] = rows.astype(np.float32) * scale[:, None]
    return out
