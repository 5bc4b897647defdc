"""How far two results differ: images in dB, distributions in nats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.dtypes import Float, Int


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 images (or two batches, taken as one) of one shape, in dB.

    Infinite where they are equal. JSON cannot hold that; :func:`finite` turns it into null.
    """
    return decibels(float(((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()))


def decibels(squared: float) -> float:
    """The PSNR in dB of uint8 images whose mean squared difference is ``squared``; infinite where it is 0."""
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities, float64 [...,V], of ``logits`` [...,V]. NaN and infinity stay what they are."""
    with np.errstate(invalid="ignore", over="ignore"):
        wide = logits.astype(np.float64)
        shifted = wide - wide.max(-1, keepdims=True)
        log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return log


def log_likelihood(logits: Float, tokens: Int) -> Float:
    """Natural log-probability [B,q] fp32 of ``tokens`` [B,q] under ``logits`` [B,q,V]."""
    chosen: Float = np.take_along_axis(log_softmax(logits), tokens[..., None], -1)[..., 0].astype(np.float32)
    return chosen


def finite(value: Any) -> Any:
    """``value``, a tree of dicts and lists, with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
