"""The sampling tail in numpy: what a graph should have drawn from its logits, and by how little it was decided.

Not for generation: the graphs draw there. One position at a time, for checks. Letters: V codes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from par_runtime.backend import Float

Double = NDArray[np.float64]
Mask = NDArray[np.bool_]

MIN_TEMPERATURE = np.float32(1e-5)  # as in the graphs
#: Cumulative sums of V codes in fp32, in whatever order, differ by about this times sqrt(V).
SUM_ROUNDING = 2.0**-22


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
