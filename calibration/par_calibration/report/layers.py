"""The error of each matrix on recorded activations: made by whoever recorded them, shown and judged here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class LayerError:
    """How far the product of one matrix is off in one phase.

    ``relative_error``: the length of the error of its outputs over the length of the outputs, |xW' - xW| / |xW|, over
    all recorded rows x of the phase; a position class may stand in the place of a phase.
    """

    name: str  #: of the matrix, for instance "layers.0.wqkv" or "output"
    phase: str
    relative_error: float


def worst(layers: Sequence[LayerError]) -> LayerError | None:
    """The layer and phase with the largest error; None without any. A NaN counts as the largest."""
    if not layers:
        return None
    return max(layers, key=lambda one: one.relative_error if one.relative_error == one.relative_error else float("inf"))


#: A matrix whose error is so many times the median of all matrices stands out.
OUTLIER = 3.0
MOST_OUTLIERS = 3


def outliers(layers: Sequence[LayerError]) -> list[str]:
    """The matrices whose largest error stands out from those of all others, the worst first; at most three."""
    largest: dict[str, float] = {}
    for one in layers:
        largest[one.name] = max(largest.get(one.name, 0.0), one.relative_error)
    if not largest:
        return []
    usual = median(largest.values())
    found = sorted((name for name in largest if largest[name] > OUTLIER * usual), key=lambda name: -largest[name])
    return found[:MOST_OUTLIERS]


def worst_kind(layers: Sequence[LayerError]) -> list[str]:
    """The kind of matrix ("w2") with the largest mean error, in a list; empty without any."""
    kinds: dict[str, list[float]] = {}
    for one in layers:
        if one.name.startswith("layers."):
            kinds.setdefault(one.name.rpartition(".")[2], []).append(one.relative_error)
    return sorted(kinds, key=lambda kind: -fmean(kinds[kind]))[:1]
