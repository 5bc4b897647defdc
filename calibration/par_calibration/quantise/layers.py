"""All matrices of a bundle, one after another: quantised on what was recorded, and what that costs their products."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from par_calibration.quantise.choice import How
from par_calibration.quantise.gptq import gptq, hessian
from par_calibration.record.recording import Recording
from par_calibration.report.layers import LayerError
from par_runtime.bundle import matrix_names
from par_runtime.dtypes import Float, Int
from par_runtime.quantised import Quantised

#: name, matrix [K,N], recorded rows [n,K], how -> codes and scales.
Quantiser = Callable[[str, Float, Float, How], Quantised]


def by_gptq(_: str, matrix: Float, rows: Float, how: How) -> Quantised:
    """What ``parvis calibrate`` makes of a matrix: :func:`par_calibration.quantise.gptq.gptq`, for int8 and int4."""
    return gptq(matrix, how.dtype, how.group, hessian(rows), how.stored)


class Layers:
    """The ``quantise`` of ``par_export.quantised.write_bundle``; :attr:`errors` are those of the matrices so far."""

    def __init__(
        self,
        recording: Recording,
        how: How,
        kept: Collection[str],
        quantiser: Quantiser = by_gptq,
        on_matrix: Callable[[int, int], object] | None = None,
    ) -> None:
        """``on_matrix`` is told how many matrices are done, and how many there are."""
        self._recording, self._how, self._kept, self._quantiser = recording, how, frozenset(kept), quantiser
        self._on_matrix, self._done = on_matrix, 0
        self.errors: list[LayerError] = []

    def __call__(self, name: str, matrix: Float) -> Quantised | None:
        """The codes and scales of ``matrix`` [K,N]; None where it is kept. Raises CalibrationError, OSError."""
        if name in self._kept:
            return None
        rows = self._recording.rows(name)
        quantised = self._quantiser(name, matrix, rows, self._how)
        phases = [phase.name for phase in self._recording.bundle.phases]
        self.errors += errors(name, matrix, quantised, rows, self._recording.about.phase, phases)
        self._done += 1
        if self._on_matrix is not None:
            self._on_matrix(self._done, len(set(matrix_names(self._recording.bundle)) - self._kept))
        return quantised


def errors(
    name: str, matrix: Float, quantised: Quantised, rows: Float, phase: Int, phases: list[str]
) -> list[LayerError]:
    """The relative error of the products of ``matrix`` [K,N] with ``rows`` [n,K], in each phase that has rows.

    ``phase`` [n]: the index of each row's phase in ``phases``.
    """
    wanted = rows @ matrix
    off = np.square(rows @ (quantised.dequantised() - matrix)).sum(1, dtype=np.float64)
    size = np.square(wanted, out=wanted).sum(1, dtype=np.float64)
    out = []
    for index, label in enumerate(phases):
        here = phase == index
        if here.any():
            out.append(LayerError(name, label, float(np.sqrt(off[here].sum() / max(size[here].sum(), 1e-30)))))
    return out
