"""Sets of images as features of one encoder, and what is shown of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from par_calibration.evaluate.distances import DRAWS, LEAST, Features, distances, drawn_size, spread
from par_calibration.evaluate.result import Comparison, Set
from par_calibration.pictures import Pixels
from par_calibration.report import frechet
from par_calibration.report.frechet import Double
from par_runtime.bundle import Bundle
from par_runtime.checked import shown_path
from par_runtime.errors import RequestError
from par_runtime.request import Settings

Labels = NDArray[np.int64]
Some = Iterable[tuple[Pixels, Labels]]  #: images [m,H,W,3], or clips [m,T,H,W,3], and their classes [m]; some at a time


class Sets:
    """Held-out images and sets of generated ones. Of each the features are kept, and the first ``shown`` images."""

    def __init__(self, encoder: Bundle, shown: int, threads: int | None) -> None:
        self._encoder, self._shown = encoder, shown
        self._features = frechet.Features(encoder, threads)
        self._held_out: Features | None = None
        self._pixels = ""
        self._sets: list[tuple[str, Features, Settings | None]] = []
        self.rows: list[Pixels] = []  #: [k,H,W,3] of each set, held-out ones first; of clips the frames in their middle

    @property
    def held_out(self) -> Labels | None:
        """The classes of the held-out images; None where there are none yet."""
        return None if self._held_out is None else self._held_out.labels

    @property
    def fewest(self) -> int | None:
        """Images of the smallest set; None where there are no sets yet."""
        return min((len(features) for _, features, _ in self._sets), default=None)

    def hold_out(self, images: Some, pixels: str) -> None:
        """Compare everything with these ``images``; ``pixels``: what they are, in words."""
        self._held_out, self._pixels = self._of("held-out", images), pixels

    def add(self, name: str, images: Some, settings: Settings | None) -> None:
        """Compare these ``images``, made with ``settings``, with the held-out ones. Raises RequestError, OSError."""
        self._sets.append((name, self._of(name, images), settings))

    def _of(self, name: str, images: Some) -> Features:
        found: list[Double] = []
        labels: list[Labels] = []
        shown: list[Pixels] = []
        left = self._shown
        for some, classes in images:
            found.append(self._features.of(some))
            labels.append(classes)
            shown.append(_middle(some[:left]).copy())
            left -= len(shown[-1])
        if not found:
            raise RequestError(f"{name}: holds no images of these classes; give others with --label")
        self.rows.append(np.concatenate(shown))
        return Features(np.concatenate(found), np.concatenate(labels))

    def comparison(self, seed: int) -> Comparison | None:
        """All sets against the held-out images; None where there are none, or too few of any."""
        if self._held_out is None:
            return None
        sets = [features for _, features, _ in self._sets]
        if min(map(len, (self._held_out, *sets))) < LEAST:
            return None
        chance, *rest = distances(self._held_out, sets, seed)
        whole = spread(self._held_out)

        def relative(features: Features) -> float | None:
            own = spread(features)
            return own / whole if own is not None and whole else None

        return Comparison(
            features=self._features.name,
            features_of=shown_path(self._encoder.path),
            compared=drawn_size(self._held_out, sets),
            draws=DRAWS,
            held_out=len(self._held_out),
            pixels=self._pixels,
            chance=Set("held-out", len(self._held_out), chance.mean, chance.margin, relative(self._held_out)),
            sets=tuple(
                Set(name, len(features), d.mean, d.margin, relative(features), settings)
                for (name, features, settings), d in zip(self._sets, rest, strict=True)
            ),
        )


def of_classes(images: Some, wanted: frozenset[int]) -> Iterator[tuple[Pixels, Labels]]:
    """Those of ``images`` that are of the ``wanted`` classes; all where none is named."""
    for some, labels in images:
        chosen = np.isin(labels, list(wanted)) if wanted else np.ones(len(labels), bool)
        if chosen.any():
            yield some[chosen], labels[chosen]


def _middle(images: Pixels) -> Pixels:
    """``images`` [m,H,W,3], or the frames in the middle of clips [m,T,H,W,3]."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images
