"""What a pipeline gives back: images and tokens, with everything that is needed to make them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.request import Settings


def default_columns(count: int) -> int:
    """Images per row of a sheet that is about square."""
    return max(1, math.ceil(math.sqrt(count)))


@dataclass(frozen=True)
class Result:
    """What ``generate`` returns; the arrays belong to the caller.

    ``images`` uint8 [B,H,W,3], None where the bundle ends at tokens; ``tokens`` int64 [B,N] in sequence order.
    ``timings``: milliseconds of each phase (summed over its calls), "decode" and "total"; "calls" is their number. A
    backend that makes whole images gives "image" in place of the phases.
    """

    bundle: Bundle = field(repr=False)
    images: NDArray[np.uint8] | None
    tokens: Int
    labels: list[int]
    seeds: list[int]
    settings: list[Settings]
    timings: dict[str, float]
    kept: NDArray[np.bool_] | None = (
        None  #: [B,N] in sequence order: which tokens were given; None where all were drawn
    )

    def save(
        self, path: str | Path, columns: int | None = None, indices: Sequence[int] | None = None, pasted: bool = False
    ) -> None:
        """Write the images ``indices`` (default: all) as one PNG, with what makes them again (``parvis redo``).

        ``columns``: images per row (default: about a square). ``pasted``: the kept pixels are those of an original.
        Written beside ``path`` and renamed. Raises RequestError for a bundle without a decoder, OSError.
        """
        if self.images is None:
            raise RequestError(
                f"{self.bundle.path}: this bundle ends at tokens and makes no images; write them with --tokens"
            )
        pick = list(range(len(self.labels)) if indices is None else indices)
        columns = default_columns(len(pick)) if columns is None else columns
        png.check_sheet(len(pick), columns, self.images.shape[1:3])
        names = self.bundle.class_names
        recipe = png.Recipe(
            bundle_name=self.bundle.name,
            bundle_hash=self.bundle.hash,
            columns=int(columns),
            labels=[self.labels[i] for i in pick],
            names=[None if names is None else names[self.labels[i]] for i in pick],
            seeds=[self.seeds[i] for i in pick],
            settings=[self.settings[i] for i in pick],
            tokens=self.tokens[pick],
            kept=None if self.kept is None else self.kept[pick],
            pasted=pasted,
        )
        png.write(Path(path), recipe, self.images[pick])
