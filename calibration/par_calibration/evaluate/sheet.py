"""Images of every set as one picture, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from par_calibration.pictures import Pixels
from par_runtime.errors import RequestError
from par_runtime.images.png import check_sheet, sheet, write_pixels


def write_rows(path: Path, rows: Sequence[Pixels]) -> None:
    """Write ``rows``, each images [k,H,W,3], as a PNG; one with fewer ends in white. Raises RequestError, OSError."""
    if not rows:
        raise RequestError(f"--sheet {path}: no images were compared, so there are none to show; see the notes")
    columns = max(map(len, rows))
    height, width = rows[0].shape[1:3]
    try:
        check_sheet(columns * len(rows), columns, (height, width))
    except RequestError:
        raise RequestError(
            f"--sheet {path}: {len(rows)} rows of {columns} images of {width}x{height} pixels are more than "
            f"other programs open; give fewer than --shown {columns}"
        ) from None
    padded = [np.concatenate([row, np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)]) for row in rows]
    write_pixels(path, sheet(np.concatenate(padded), columns))
