"""Pairs of images of both models with the same seeds, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_runtime.images.png import enlarged, sheet, write_pixels

if TYPE_CHECKING:
    from par_calibration.report.result import Report

GAP, THIN = 6, 1  #: pixels between pairs, and between the images of a pair
PAIRS_A_ROW = 4
SMALL = 128  #: smaller images are shown at a multiple of their size


def shown_pairs(original: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [P,H,W,3] of both models as pairs [P,2,H,W,3]; of clips [P,T,H,W,3] the first, middle and last frame,
    side by side with a line between them.
    """
    pairs = np.stack([original, candidate], 1)
    if pairs.ndim == 5:
        return pairs
    frames = pairs.shape[2]
    shown = [pairs[:, :, at] for at in (0, frames // 2, frames - 1)]
    line = np.full((*shown[0].shape[:-2], THIN, 3), 255, np.uint8)
    return np.concatenate([shown[0], line, shown[1], line, shown[2]], axis=-2)


def pair_sheet(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``pairs`` [P,2,H,W,3] as one picture: the original's image left, the candidate's right, pairs in rows."""
    count, _, height, width, _ = pairs.shape
    framed = np.full((count, height + GAP, 2 * width + THIN + GAP, 3), 255, np.uint8)
    framed[:, :height, :width] = pairs[:, 0]
    framed[:, :height, width + THIN : 2 * width + THIN] = pairs[:, 1]
    whole = sheet(framed, min(PAIRS_A_ROW, count))[:-GAP, :-GAP]
    return enlarged(whole, max(1, SMALL // height))


def write_sheet(report: Report, path: Path) -> None:
    """Write the report's pairs to ``path``. Raises CalibrationError where there are none, OSError."""
    if report.pairs is None or not len(report.pairs):
        raise CalibrationError(
            f"--show-images {path}: this report has no images: the bundle ends at tokens, or none were generated "
            "(--generated 0)"
        )
    write_pixels(path, pair_sheet(report.pairs))
