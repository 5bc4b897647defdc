"""Whether rounding explains that two backends drew different tokens; and the floors of all numbers of a comparison.

Letters: q positions of one call, V codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from par_runtime.backends.draws import distance_of
from par_runtime.dtypes import LOGIT_ROUNDING, Float
from par_runtime.request import Settings


@dataclass(frozen=True)
class Floors:
    """The limits of a comparison. A number beyond its limit means a defect; rounding alone stays far below.

    ``logits``: largest error of a logit, relative to the phase's largest |logit|. ``argmax``: least share of positions
    with the same most probable code, over all phases together (a phase of one call has too few positions). ``kl``:
    largest mean Kullback-Leibler divergence of a phase, in nats. ``tie``: largest distance of a draw, in probability,
    at which another token can count as a near-tie. ``psnr``: least PSNR of an image, in dB; the same for all
    precisions, since it is what a decoder in half precision must reach too.
    """

    logits: float
    argmax: float
    kl: float
    tie: float
    psnr: float


#: precision -> floors; the precision is that of the less exact backend of the two. The floors of the argmax are low,
#: because the best codes of an image model have nearly equal probabilities.
FLOORS = {
    "fp32": Floors(logits=LOGIT_ROUNDING["fp32"], argmax=0.99, kl=1e-5, tie=1e-3, psnr=40.0),
    "fp16": Floors(logits=LOGIT_ROUNDING["fp16"], argmax=0.90, kl=1e-2, tie=5e-2, psnr=40.0),
    "bf16": Floors(logits=LOGIT_ROUNDING["bf16"], argmax=0.60, kl=1e-1, tie=2e-1, psnr=40.0),
    "int8": Floors(logits=LOGIT_ROUNDING["int8"], argmax=0.60, kl=1e-1, tie=2e-1, psnr=40.0),
}


class Judgement(NamedTuple):
    """How two backends differ at one draw, and the verdict. ``Divergence`` explains the fields."""

    logit_gap: float
    logit_error: float
    distance: float | None
    explained: float
    near_tie: bool
    verdict: str


def judge(
    candidate: Float,
    reference: Float,
    slot: int,
    settings: Settings,
    uniform: float,
    candidate_token: int,
    reference_token: int,
    scale: float,
    floors: Floors,
) -> Judgement:
    """Whether rounding explains that the candidate drew another token than the reference.

    ``candidate`` and ``reference``: the logits [q,V] of both at this call, for one image. The draw is that of slot
    ``slot`` of the call, with the number ``uniform``. ``scale``: the largest |logit| of the phase.
    """
    codes = reference.shape[1]
    valid = 0 <= candidate_token < codes
    gap, distance, explained = math.nan, None, 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN needs no warning here, because it fails the checks below
        error = relative_error(float(np.abs(candidate.astype(np.float64) - reference).max()), scale)
        if valid:
            gap = float(reference[slot, reference_token]) - float(reference[slot, candidate_token])
            t, k, p = (1.0, 1, 1.0) if settings.greedy else (settings.temperature, settings.top_k, settings.top_p)
            distance, explained = distance_of(reference[slot], candidate[slot], candidate_token, uniform, t, k, p)
    if not valid:
        reason = f"codes are 0..{codes - 1}"
    elif not error <= floors.logits:
        reason = "the logits of this call differ by more than rounding"
    elif distance is None:
        reason = "the filter of neither backend keeps this token"
    elif not distance <= explained:
        reason = "the logits do not explain this draw"
    elif not distance <= floors.tie:
        reason = "the distance is larger than rounding gives"
    else:
        return Judgement(gap, error, distance, explained, True, "a near-tie, decided by rounding")
    return Judgement(gap, error, distance, explained, False, f"a real disagreement: {reason}")


def relative_error(error: float, scale: float) -> float:
    """``error`` relative to ``scale``; NaN where ``scale`` is NaN."""
    return error / max(scale, 1e-30) if scale == scale else math.nan
