"""Attention in the interpreter against numpy in float64: every length, splits, padded heads, unwritten caches."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_arrays import KIND, ROUNDING, empty, launch, stored, wide

SIZES = [
    # H, D, D', q, slots, SPAN, CHUNK
    (2, 8, 8, 4, 64, 16, 16),
    (1, 20, 24, 1, 40, 32, 16),
    (2, 64, 64, 9, 50, 64, 32),
    (1, 100, 104, 16, 70, 16, 16),
    (1, 8, 8, 4, 90, 48, 16),  # a span that is no power of 2
]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(size: tuple[int, ...], precision: str) -> None:
    heads, head, padded, query, slots, span, chunk = size
    rng = np.random.default_rng(0)
    # Every length of interest at once: one key, ends of chunks and of spans and one beside them, all slots.
    lengths = np.unique(np.clip([1, chunk - 1, chunk, chunk + 1, span, span + 1, slots - 1, slots], 1, slots))
    rows, inner = len(lengths), heads * head
    stride = -(-inner // 64) * 64
    splits = -(-slots // span)
    width, queries = max(16, 1 << (padded - 1).bit_length()), max(8, 1 << (query - 1).bit_length())
    q = empty((rows * query, heads, padded), precision)
    q[..., :head] = stored(rng.normal(size=(rows * query, heads, head)) * head**-0.5 * np.log2(np.e), precision)
    past = []
    for _ in range(2):
        values = np.zeros((rows, heads, slots, padded), np.float32)
        values[..., :head] = rng.normal(size=(rows, heads, slots, head))
        for row, length in enumerate(lengths):
            values[row, :, length:] = np.nan
        past.append(stored(values, precision))
    counters = np.zeros(rows * heads, np.int32)
    results = []
    for shuffle in (None, 1, 2):
        y = empty((rows * query, stride), precision)
        arguments = {
            "q": (KIND[precision], q), "past_k": (KIND[precision], past[0]), "past_v": (KIND[precision], past[1]),
            "length": ("*i32", lengths.astype(np.int32)), "y": (KIND[precision], y),
            "partial": ("*fp32", np.full((rows * heads, splits, queries, width), np.nan, np.float32)),
            "peaks": ("*fp32", np.full((rows * heads, splits, 2, queries), np.nan, np.float32)),
            "counters": ("*i32", counters),
        }  # fmt: skip
        constants = {
            "QUERY": query, "HEADS": heads, "HEAD": head, "PADDED": padded, "JOINED": head, "STRIDE": stride,
            "SLOTS": slots, "SPLITS": splits, "SPAN": span, "CHUNK": chunk, "WIDE": width, "BQ": queries,
            "EARLY": False, "DEPENDENT": True,
        }  # fmt: skip
        launch("attention.attend", constants, (splits, rows * heads), arguments, shuffle=shuffle)
        assert (counters == 0).all()
        results.append(y)
    assert all(other.tobytes() == results[0].tobytes() for other in results)

    got = wide(results[0])
    assert np.isnan(got[:, inner:]).all()
    by_head = got[:, :inner].reshape(rows, query, heads, head)
    queries_of = wide(q)[..., :head].reshape(rows, query, heads, head)
    for row, length in enumerate(lengths):
        k, v = (wide(p)[row, :, :length, :head] for p in past)
        scores = np.einsum("qhd,hkd->qhk", queries_of[row], k)
        weights = np.exp2(scores - scores.max(-1, keepdims=True))
        wanted = np.einsum("qhk,hkd->qhd", weights / weights.sum(-1, keepdims=True), v)
        # Weights are rounded to the precision before they are multiplied with values.
        assert np.abs(by_head[row] - wanted).max() < 4 * ROUNDING[precision], length
