"""Sets of images against held-out ones: Frechet distances without what few images add to them.

A Frechet distance of few images is too large, by an amount that depends on how many there are and on how much they
differ, so a set of images that are too much alike would seem near. The amount is nearly inverse to the number of images
(Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023), so it is taken away: twice the distance of a draw of images,
less that of its halves. Each figure is the mean over many random draws, in which classes are in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_calibration.report.frechet import Double, distance

DRAWS = 100
LEAST = 16  #: images of a set: a draw takes half of them, and is halved again
NORMAL_95 = 1.96  #: standard deviations on both sides of a mean that hold 95 % of a normal distribution


@dataclass(frozen=True, eq=False)
class Features:
    """The features [M,F] of a set of images, and their classes [M]."""

    values: Double
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Distance:
    """The mean of the draws, and how far it may be off.

    A draw takes half of the images, or less, so draws differ from each other at least as much as whole sets of images
    that were made with other seeds (the half-sample of a jackknife): about as much where the distance is clear, more
    where there is none. ``tests/calibration/test_evaluate_distances.py`` holds it against other sets.
    """

    mean: float
    margin: float


def drawn_size(held_out: Features, sets: Sequence[Features]) -> int:
    """How many images of each side a draw takes: half of the smallest set, so that draws differ from each other."""
    size = min(len(features) for features in (held_out, *sets)) // 2
    return size - size % 2


def distances(held_out: Features, sets: Sequence[Features], seed: int) -> list[Distance]:
    """The distance of other held-out images, then of each of ``sets``, from held-out ones.

    All are against the same draws of held-out images, so that their differences have less noise than each alone. The
    draws of a set do not depend on the other ones: what is measured twice has the same distance twice, and of sets of
    the same classes the same places are drawn.
    """
    size = drawn_size(held_out, sets)
    found: list[list[float]] = [[] for _ in range(1 + len(sets))]
    for draw in range(DRAWS):
        rng = np.random.default_rng((seed, draw))
        first = share(held_out.labels, size, rng)
        rest = np.setdiff1d(np.arange(len(held_out)), first)
        real = held_out.values[first]
        other = rest[share(held_out.labels[rest], size, rng)]
        found[0].append(corrected(real, held_out.values[other]))
        for one, to in zip(sets, found[1:], strict=True):
            own = np.random.default_rng((seed, draw, 1))
            to.append(corrected(real, one.values[share(one.labels, size, own)]))
    return [Distance(float(np.mean(each)), NORMAL_95 * float(np.std(each, ddof=1))) for each in found]


def corrected(one: Double, other: Double) -> float:
    """The distance of two sets of features [M,F], without the part of it that is inverse to M.

    Rows of a class stand beside each other, so every second one is a half with the same shares of the classes.
    """
    halves = (distance(one[i::2], other[i::2]) for i in (0, 1))
    return 2 * distance(one, other) - sum(halves) / 2


def share(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """``size`` indices of ``labels`` [M] at random, each class in proportion as nearly as whole numbers allow."""
    by_class = np.lexsort((rng.random(len(labels)), labels))
    at = (rng.random() + np.arange(size)) * (len(labels) / size)
    return by_class[at.astype(np.intp)]


def spread(features: Features) -> float | None:
    """The mean, over classes, of the summed variances of the features within a class; None where no class has two.

    Of the variances of M images, with M - 1 in the denominator, so that sets of any size can be compared.
    """
    each = [features.values[features.labels == label] for label in np.unique(features.labels)]
    several = [of_class.var(0, ddof=1).sum() for of_class in each if len(of_class) > 1]
    return float(np.mean(several)) if several else None
