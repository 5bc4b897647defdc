"""The draw of the paper's video model, top-k 8000 of 64,000 codes: one row of logits, and whether draws from it are
distributed as promised. Every engine's draw is tested with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from par_runtime.dtypes import Float, Int

VOCAB, TOP_K = 64000, 8000


def row() -> Float:
    """Logits [V] as spread as those of a trained model, no two of the largest equal at the edge."""
    logits: Float = np.random.default_rng(64).normal(size=VOCAB).astype(np.float32)
    return logits


def check(draw: Callable[[Float, Float], Int], count: int, at_once: int) -> None:
    """Draw ``count`` tokens, ``at_once`` at a time: none lies outside the 8000 largest, and counts in parts of
    equal probability pass a chi-square test. ``draw`` takes logits [q,V] and uniform numbers [q]."""
    logits, bins = row(), count // 30
    kth = np.sort(logits)[-TOP_K]
    assert (logits == kth).sum() == 1
    random = np.random.default_rng(8000)
    rows = np.tile(logits, (at_once, 1))
    tokens = np.concatenate(
        [np.ravel(draw(rows, random.random(at_once, dtype=np.float32))) for _ in range(count // at_once)]
    )
    assert (logits[tokens] >= kth).all()
    p = np.where(logits >= kth, np.exp(logits.astype(np.float64)), 0)
    p /= p.sum()
    part = np.minimum((np.cumsum(p) * bins).astype(int), bins - 1)  # codes of one part lie beside each other
    wanted = np.bincount(part, p, bins) * len(tokens)
    seen = np.bincount(part[tokens], minlength=bins)
    assert wanted.min() > 5
    assert stats.chisquare(seen, wanted).pvalue > 1e-3
