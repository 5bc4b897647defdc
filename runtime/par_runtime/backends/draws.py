"""The sampling tail in numpy: what a graph should have drawn from its logits, and by how little it was decided.

``draw`` is for checks, one position at a time. ``draw_all`` gives the same for many at once, and draws for the backend that
has no graph (``native.py``). Letters: P positions, V codes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from par_runtime.dtypes import Float

Double = NDArray[np.float64]
Mask = NDArray[np.bool_]

MIN_TEMPERATURE = np.float32(1e-5)  # as in the graphs
#: Cumulative sums of V codes in fp32, in whatever order, differ by about this times sqrt(V).
SUM_ROUNDING = 2.0**-22
TOGETHER = (
    2**15
)  #: numbers that are drawn from at a time: what is larger leaves the caches, and is fresh memory each time


def scaled(logits: Float, temperature: float) -> Float:
    """``logits`` divided by the temperature, as in the graphs."""
    quotient: Float = logits / max(np.float32(temperature), MIN_TEMPERATURE)
    return quotient


def kept(logits: Float, top_k: int, top_p: float) -> Mask:
    """Which of the scaled ``logits`` [V] can be drawn; ties as in the graphs' ``sorted_keep``, in fp32 as there."""
    vocab = len(logits)
    keep = np.ones(vocab, bool)
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    kth = ranked[top_k - 1] if 0 < top_k < vocab else np.float32(-np.inf)
    keep &= logits >= kth
    if top_p < 1:
        mass = np.where(ranked >= kth, np.exp(ranked - ranked[0]), np.float32(0))
        upto = np.cumsum(mass, dtype=np.float32)
        # A code goes when the mass before it is over the threshold; the first never does.
        last = max(int((upto - mass <= np.float32(top_p) * upto[-1]).sum()) - 1, 0)
        among = np.zeros(vocab, bool)
        among[order[: last + 1]] = True
        keep &= among
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
    """The tokens [P] that ``uniform`` [P] draws from ``logits`` [P,V], with settings [P] each; as ``draw`` does one by one."""
    count, vocab = logits.shape
    if (top_k == 1).all() and not uniform.any():  # greedy; ties go to the lowest id
        return np.asarray(logits.argmax(-1), np.int64)
    out = np.empty(count, np.int64)
    size = max(1, TOGETHER // vocab)
    for first in range(0, count, size):
        part = slice(first, first + size)
        out[part] = _drawn(logits[part], uniform[part], temperature[part], top_k[part], top_p[part])
    return out


def _drawn(
    logits: Float, uniform: Float, temperature: Float, top_k: NDArray[np.int64], top_p: Float
) -> NDArray[np.int64]:
    vocab = logits.shape[1]
    divisor: Float = np.maximum(temperature, MIN_TEMPERATURE, dtype=np.float32)[:, None]
    y: Float = np.divide(logits, divisor, dtype=np.float32)
    mass = np.subtract(y, y.max(-1, keepdims=True))
    np.exp(mass, out=mass)
    filtered = np.flatnonzero((top_p < 1) | ((top_k > 0) & (top_k < vocab)))
    if len(filtered):
        mass[filtered] *= kept_all(y[filtered], top_k[filtered], top_p[filtered])
    cdf = np.cumsum(mass, axis=-1, dtype=np.float32)
    places = [int(np.searchsorted(row, u * row[-1], "right")) for row, u in zip(cdf, uniform, strict=True)]
    return np.array([min(place, vocab - 1) for place in places], np.int64)


def kept_all(y: Float, top_k: NDArray[np.int64], top_p: Float) -> Mask:
    """``kept`` for scaled logits [P,V] with settings [P]. Values are sorted, not places: that is ten times as fast."""
    rows, vocab = np.arange(len(y)), y.shape[1]
    ranked = -np.sort(-y, axis=-1)
    limits = (top_k > 0) & (top_k < vocab)
    kth = np.where(limits, ranked[rows, np.where(limits, top_k, 1) - 1], np.float32(-np.inf))[:, None]
    keep: Mask = y >= kth
    by_p = np.flatnonzero(top_p < 1)
    if len(by_p):
        ranked, kth = ranked[by_p], kth[by_p]
        mass = np.where(ranked >= kth, np.exp(ranked - ranked[:, :1]), np.float32(0))
        upto = np.cumsum(mass, axis=-1, dtype=np.float32)
        last = np.maximum((upto - mass <= top_p[by_p, None] * upto[:, -1:]).sum(-1) - 1, 0)
        edge = ranked[np.arange(len(by_p)), last][:, None]
        among = y[by_p] >= edge
        for i in np.flatnonzero(among.sum(-1) > last + 1):  # of those that tie at the edge, the lowest ids stay
            tied = np.flatnonzero(y[by_p[i]] == edge[i, 0])
            among[i, tied[len(tied) - (int(among[i].sum()) - int(last[i]) - 1) :]] = False
        keep[by_p] &= among
    return keep


def probabilities(logits: Float, keep: Mask) -> Double:
    """Of the scaled ``logits`` [V], where only ``keep`` can be drawn."""
    y = logits.astype(np.float64)
    mass = np.where(keep, np.exp(y - y.max()), 0.0)
    share: Double = mass / mass.sum()
    return share


def distance_of(
    reference: Float, candidate: Float, token: int, uniform: float, temperature: float, top_k: int, top_p: float
) -> tuple[float | None, float]:
    """How far ``uniform`` lies from ``token`` in the reference's CDF, and how far rounding may move that CDF.

    From both backends' logits [V] of one position. Where rounding moved a code over the edge of top-k or top-p, every
    other code's share jumps; so the reference's shares are also taken over the codes that the candidate's logits keep, and
    the better explanation counts. None where ``token`` is in neither.
    Logits that lie within +-h of each other (up to a constant) have CDFs within tanh(h/2): the worst case, half of the
    mass up by h and half down.
    """
    mine, other = scaled(reference, temperature), scaled(candidate, temperature)
    rounding = SUM_ROUNDING * math.sqrt(len(mine))
    best: tuple[float | None, float] = (None, rounding)
    for logits in (mine, other):
        for p in (top_p,) if top_p >= 1 else (top_p, top_p * (1 - rounding), min(top_p * (1 + rounding), 1.0)):
            keep = kept(logits, top_k, p)
            if not keep[token]:
                continue
            cdf = np.cumsum(probabilities(mine, keep))
            low, high = (cdf[token - 1] if token else 0.0), cdf[token]
            distance = float(np.maximum(0.0, np.maximum(low - uniform, uniform - high)))
            difference = (other[keep].astype(np.float64) - mine[keep]).astype(np.float64)
            explained = rounding + math.tanh(float(np.ptp(difference)) / 4)
            if best[0] is None or distance - explained < best[0] - best[1]:
                best = (distance, explained)
    return best
