"""The sampling tail of the graphs in numpy: temperature, top-k, top-p, and the draw by inverse CDF.

``draw`` is for checks, one position at a time. ``draw_all`` gives the same tokens for many positions at once; the
backend without a graph (``native/backend.py``) draws with it. ``distance_of`` measures how close a draw was to another
token.
Letters: P positions, V codes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from par_runtime.dtypes import Float

Double = NDArray[np.float64]
Mask = NDArray[np.bool_]

MIN_TEMPERATURE = np.float32(1e-5)  # as in the graphs
#: Cumulative sums of V codes in fp32 that are added in different orders differ by about this times sqrt(V), unless they
#: are added one by one: then many small masses can be lost in a large sum (``_rounding`` measures how much).
SUM_ROUNDING = 2.0**-22
#: Logits that ``draw_all`` works on at a time: larger arrays do not fit into caches, and are allocated anew each time.
BLOCK_NUMBERS = 2**15


def scaled(logits: Float, temperature: float) -> Float:
    """``logits`` divided by the temperature, as in the graphs."""
    quotient: Float = logits / max(np.float32(temperature), MIN_TEMPERATURE)
    return quotient


def kept(logits: Float, top_k: int, top_p: float) -> Mask:
    """Mask [V] of the scaled ``logits`` [V] that can be drawn: fp32 and ties as in ``sorted_keep`` of the graphs."""
    vocab = len(logits)
    keep = np.ones(vocab, bool)
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    kth = ranked[top_k - 1] if 0 < top_k < vocab else np.float32(-np.inf)
    keep &= logits >= kth
    if top_p < 1:
        mass = np.where(ranked >= kth, np.exp(ranked - ranked[0]), np.float32(0))
        cumulative = np.cumsum(mass, dtype=np.float32)
        # A code is removed where the mass before it is over the threshold; the first is never removed.
        last = max(int((cumulative - mass <= np.float32(top_p) * cumulative[-1]).sum()) - 1, 0)
        in_top_p = np.zeros(vocab, bool)
        in_top_p[order[: last + 1]] = True
        keep &= in_top_p
    return keep


def draw(logits: Float, uniform: float, temperature: float, top_k: int, top_p: float) -> int:
    """The token that ``uniform`` in [0,1) draws from ``logits`` [V]: the graphs' inverse CDF, in fp32 as there."""
    y = scaled(logits, temperature)
    mass = np.where(kept(y, top_k, top_p), np.exp(y - y.max()), np.float32(0))
    cdf = np.cumsum(mass, dtype=np.float32)
    return min(int((cdf <= np.float32(uniform) * cdf[-1]).sum()), len(logits) - 1)


def draw_all(
    logits: Float, uniform: Float, temperature: Float, top_k: NDArray[np.int64], top_p: Float
) -> NDArray[np.int64]:
    """The tokens [P] that ``uniform`` [P] draws from ``logits`` [P,V] with settings [P]; the same as ``draw`` gives."""
    count, vocab = logits.shape
    if (top_k == 1).all() and not uniform.any():  # greedy; ties go to the lowest id
        return np.asarray(logits.argmax(-1), np.int64)
    out = np.empty(count, np.int64)
    size = max(1, BLOCK_NUMBERS // vocab)
    for first in range(0, count, size):
        part = slice(first, first + size)
        out[part] = _draw_block(logits[part], uniform[part], temperature[part], top_k[part], top_p[part])
    return out


def _draw_block(
    logits: Float, uniform: Float, temperature: Float, top_k: NDArray[np.int64], top_p: Float
) -> NDArray[np.int64]:
    """``draw_all`` for one block of positions."""
    vocab = logits.shape[1]
    divisor: Float = np.maximum(temperature, MIN_TEMPERATURE, dtype=np.float32)[:, None]
    y: Float = np.divide(logits, divisor, dtype=np.float32)
    mass = np.subtract(y, y.max(-1, keepdims=True))
    np.exp(mass, out=mass)
    filtered = np.flatnonzero((top_p < 1) | ((top_k > 0) & (top_k < vocab)))
    if len(filtered):
        mass[filtered] *= kept_all(y[filtered], top_k[filtered], top_p[filtered])
    cdf = np.cumsum(mass, axis=-1, dtype=np.float32)
    indices = [int(np.searchsorted(row, u * row[-1], "right")) for row, u in zip(cdf, uniform, strict=True)]
    return np.array([min(index, vocab - 1) for index in indices], np.int64)


def kept_all(y: Float, top_k: NDArray[np.int64], top_p: Float) -> Mask:
    """``kept`` for scaled logits ``y`` [P,V] with settings [P]: mask [P,V].

    It sorts the values; ``kept`` sorts indices, which takes ten times as long.
    """
    rows, vocab = np.arange(len(y)), y.shape[1]
    ranked = -np.sort(-y, axis=-1)
    by_k = (top_k > 0) & (top_k < vocab)
    kth = np.where(by_k, ranked[rows, np.where(by_k, top_k, 1) - 1], np.float32(-np.inf))[:, None]
    keep: Mask = y >= kth
    by_p = np.flatnonzero(top_p < 1)
    if len(by_p):
        ranked, kth = ranked[by_p], kth[by_p]
        mass = np.where(ranked >= kth, np.exp(ranked - ranked[:, :1]), np.float32(0))
        cumulative = np.cumsum(mass, axis=-1, dtype=np.float32)
        last = np.maximum((cumulative - mass <= top_p[by_p, None] * cumulative[:, -1:]).sum(-1) - 1, 0)
        edge = ranked[np.arange(len(by_p)), last][:, None]
        in_top_p = y[by_p] >= edge
        for i in np.flatnonzero(in_top_p.sum(-1) > last + 1):  # of the codes that tie at the edge, the lowest ids stay
            tied = np.flatnonzero(y[by_p[i]] == edge[i, 0])
            in_top_p[i, tied[len(tied) - (int(in_top_p[i].sum()) - int(last[i]) - 1) :]] = False
        keep[by_p] &= in_top_p
    return keep


def probabilities(logits: Float, keep: Mask) -> Double:
    """Probabilities [V] of the scaled ``logits`` [V], where only the codes of the mask ``keep`` [V] can be drawn."""
    y = logits.astype(np.float64)
    mass = np.where(keep, np.exp(y - y.max()), 0.0)
    normalised: Double = mass / mass.sum()
    return normalised


def _rounding(logits: Float, top_k: int) -> float:
    """How far rounding of its sums may move the CDF of the scaled ``logits`` [V] that top-k keeps.

    A backend may add the masses one by one in fp32, by id for the draw and by rank for top-p; what that loses for these
    masses is measured.
    """
    keep, lost = kept(logits, top_k, 1.0), 0.0
    mass = probabilities(logits, keep) if keep.any() else np.zeros(len(logits))  # none: of logits that are no numbers
    for ordered in (mass, -np.sort(-mass)):
        cdf, one_by_one = np.cumsum(ordered), np.cumsum(ordered, dtype=np.float32)
        lost = max(lost, float(np.abs(one_by_one - cdf).max()))
    return float(SUM_ROUNDING * math.sqrt(len(logits)) + lost)


def distance_of(
    reference: Float, candidate: Float, token: int, uniform: float, temperature: float, top_k: int, top_p: float
) -> tuple[float | None, float]:
    """How far ``uniform`` lies from ``token`` in the reference's CDF, and how far rounding may move that CDF.

    ``reference`` and ``candidate`` are both backends' logits [V] of one position. The distance is None where neither
    backend's filters keep ``token``.

    If rounding moves a code over the edge of top-k or top-p, the probabilities of all other codes jump. So the
    reference's probabilities are taken twice: over the codes that its own logits keep, and over those that the
    candidate's logits keep. The one that explains ``token`` better counts.

    Logits that differ by at most h (up to a constant) have CDFs that differ by at most tanh(h/2). The worst case is
    half of the mass up by h, and half of it down.
    """
    expected, actual = scaled(reference, temperature), scaled(candidate, temperature)
    rounding = _rounding(expected, top_k)
    best: tuple[float | None, float] = (None, rounding)
    for logits in (expected, actual):
        for p in (top_p,) if top_p >= 1 else (top_p, top_p * (1 - rounding), min(top_p * (1 + rounding), 1.0)):
            keep = kept(logits, top_k, p)
            if not keep[token]:
                continue
            cdf = np.cumsum(probabilities(expected, keep))
            low, high = (cdf[token - 1] if token else 0.0), cdf[token]
            distance = float(np.maximum(0.0, np.maximum(low - uniform, uniform - high)))
            difference = (actual[keep].astype(np.float64) - expected[keep]).astype(np.float64)
            explained = rounding + math.tanh(float(np.ptp(difference)) / 4)
            if best[0] is None or distance - explained < best[0] - best[1]:
                best = (distance, explained)
    return best
