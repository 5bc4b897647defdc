"""The figures of a report: dataclasses of plain numbers, and how they follow from arrays.

Letters: M images, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_calibration.report.forced import Double, Forced
from par_runtime.dtypes import Int

RESAMPLES = 2000  #: of a bootstrap
SURVIVAL_POINTS = 64  #: of the curve


@dataclass(frozen=True)
class Agreement:
    """How far the distributions of two models agree over some positions of all images."""

    cost: str  #: "weights", "rounding" or "both": what makes the two models differ
    guided: bool
    where: str  #: "all", a phase, or a kind of input
    positions: int
    top1: float  #: share with the same most probable code
    kl: float  #: mean, in nats
    kl_p95: float
    kl_worst: float
    worst_image: int
    worst_position: int


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of the same images under both models, in nats, without guidance; ``change`` = second - first.

    ``low`` and ``high``: the 95 % interval of the mean change per token, from resampled images (they are pairs: the
    same image under both models). None where there is one image only.
    """

    images: int
    tokens: int
    original: float  #: mean per token
    candidate: float
    change: float
    low: float | None
    high: float | None

    @property
    def farthest(self) -> float:
        """The end of the interval that is farther from zero, as a share of the original's nats per token."""
        ends = [abs(end) for end in (self.low, self.high, self.change) if end is not None]
        return math.nan if any(math.isnan(end) for end in ends) else max(ends) / abs(self.original)

    @property
    def per_image(self) -> float:
        """The mean change of a whole image, in nats."""
        return self.change * self.tokens / self.images


@dataclass(frozen=True)
class Drawn:
    """Tokens until the first one that differs, where both models draw with the same noise; N where none does."""

    images: int
    n_tokens: int
    first: tuple[int, ...]  #: of each image: how many tokens are equal before the first that is not
    identical: int  #: images in which all tokens are equal
    median: float

    def survival(self) -> list[tuple[int, float]]:
        """(t, share of images whose first t tokens are equal), from t = 0 to N."""
        at = np.unique(np.linspace(0, self.n_tokens, SURVIVAL_POINTS + 1).astype(int))
        first = np.array(self.first)
        return [(int(t), float((first >= t).mean())) for t in at]


@dataclass(frozen=True)
class Frechet:
    """Distances between sets of generated images, in features of the bundle's encoder.

    ``distance``: the original's images from the candidate's, with other seeds. ``other_seeds``: the original's images
    from the original's with other seeds. ``same_seeds``: original and candidate with the same seeds. ``floor`` and
    ``floor_p95``: mean and 95th percentile of what random halves of all of the original's images
    are apart, with the same classes in both.
    """

    features: str
    images: int  #: of each set
    distance: float
    other_seeds: float
    same_seeds: float
    floor: float
    floor_p95: float

    @property
    def ratio(self) -> float:
        """The distance in multiples of ``floor_p95``."""
        return self.distance / self.floor_p95 if self.floor_p95 else math.nan


def agreement(forced: Forced, cost: str, where: dict[str, NDArray[np.int64]]) -> list[Agreement]:
    """The figures over all positions, then over those of each phase and each kind of input."""
    out = []
    everywhere = np.arange(forced.kl.shape[1])
    for guided, kl, same in ((False, forced.kl, forced.same), (True, forced.kl_guided, forced.same_guided)):
        for name, places in {"all": everywhere, **where}.items():
            part = kl[:, places]
            worst = int(np.where(np.isnan(part), np.inf, part).argmax())
            image, place = divmod(worst, len(places))
            out.append(
                Agreement(
                    cost=cost,
                    guided=guided,
                    where=name,
                    positions=part.size,
                    top1=float(same[:, places].mean()),
                    kl=float(part.mean()),
                    kl_p95=float(np.quantile(part, 0.95)),
                    kl_worst=float(part.max()),
                    worst_image=image,
                    worst_position=int(places[place]),
                )
            )
    return out


def likelihood(forced: Forced, seed: int) -> Likelihood:
    """Both likelihoods, and the interval of their difference from a bootstrap over images."""
    change = (forced.likelihood_other - forced.likelihood).mean(1)
    low, high = interval(change, seed) if len(change) > 1 else (None, None)
    return Likelihood(
        images=len(change),
        tokens=forced.likelihood.size,
        original=float(forced.likelihood.mean()),
        candidate=float(forced.likelihood_other.mean()),
        change=float(change.mean()),
        low=low,
        high=high,
    )


def interval(values: Double, seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of ``values`` [M], one of each image: percentiles of means of resampled images."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def drawn(original: Int, candidate: Int) -> Drawn:
    """Where tokens [M,N] of both models, drawn with the same noise, differ first."""
    differs = original != candidate
    count = original.shape[1]
    first = np.where(differs.any(1), differs.argmax(1), count)
    return Drawn(
        images=len(first),
        n_tokens=count,
        first=tuple(int(f) for f in first),
        identical=int((first == count).sum()),
        median=float(np.median(first)),
    )
