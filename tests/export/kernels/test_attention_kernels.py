"""Attention in the interpreter against numpy in float64: every length, splits, padded heads, unwritten caches."""

from __future__ import annotations

import numpy as np
import pytest
from double import language
from kernel_arrays import KIND, ROUNDING, empty, launch, stored, wide

from par_export.kernels.sources import attention

SIZES = [
    # H, D, D', q, slots, SPAN, CHUNK, keys are held
    (2, 8, 8, 4, 64, 16, 16, False),
    (1, 20, 24, 1, 40, 32, 16, False),
    (2, 64, 64, 9, 50, 64, 32, False),
    (1, 100, 104, 16, 70, 16, 16, False),
    (1, 8, 8, 4, 90, 48, 16, False),  # a span that is no power of 2
    (2, 8, 8, 4, 64, 16, 16, True),
    (1, 20, 24, 1, 70, 96, 96, True),  # one span of two operands
    (2, 64, 64, 9, 50, 48, 48, True),
    (1, 100, 104, 16, 70, 16, 16, True),  # as many keys of a call as a span has
    (1, 8, 8, 70, 90, 96, 96, True),  # more of them than the wide instruction takes at once
]


class Case:
    """Queries, keys and values of rows of every length of interest: one key, ends of chunks and of spans and one beside
    them, all slots. What lies behind a length is NaN.
    """

    def __init__(self, size: tuple[int, ...], precision: str) -> None:
        self.heads, self.head, self.padded, self.query, self.slots, self.span, self.chunk, held = size
        self.precision, rng = precision, np.random.default_rng(0)
        ends = [1, self.chunk - 1, self.chunk, self.chunk + 1, self.span, self.span + 1, self.slots - 1, self.slots]
        self.lengths = np.unique(np.clip(ends, 1, self.slots))
        self.rows, self.inner = len(self.lengths), self.heads * self.head
        self.stride = -(-self.inner // 64) * 64
        self.splits = -(-self.slots // self.span)
        self.width = max(16, 1 << (self.padded - 1).bit_length())
        self.queries = max(8, 1 << (self.query - 1).bit_length())
        self.q = empty((self.rows * self.query, self.heads, self.padded), precision)
        normal = rng.normal(size=(self.rows * self.query, self.heads, self.head))
        self.q[..., : self.head] = stored(normal * self.head**-0.5 * np.log2(np.e), precision)
        self.past = []
        for _ in range(2):
            values = np.zeros((self.rows, self.heads, self.slots, self.padded), np.float32)
            values[..., : self.head] = rng.normal(size=(self.rows, self.heads, self.slots, self.head))
            for row, length in enumerate(self.lengths):
                values[row, :, length:] = np.nan
            self.past.append(stored(values, precision))
        self.counters = np.zeros(self.rows * self.heads, np.int32)
        self.grid = (self.splits, self.rows * self.heads)
        self.constants = {
            "QUERY": self.query, "HEADS": self.heads, "HEAD": self.head, "PADDED": self.padded, "JOINED": self.head,
            "STRIDE": self.stride, "SLOTS": self.slots, "SPLITS": self.splits, "SPAN": self.span, "CHUNK": self.chunk,
            "WIDE": self.width, "BQ": self.queries, "HELD": held * self.span, "EARLY": False, "DEPENDENT": True,
        }  # fmt: skip

    def arguments(self) -> dict[str, tuple[str, np.ndarray]]:
        """New memory for what is written; ``y`` is among them."""
        kind, n = KIND[self.precision], self.rows * self.heads
        return {
            "q": (kind, self.q), "past_k": (kind, self.past[0]), "past_v": (kind, self.past[1]),
            "length": ("*i32", self.lengths.astype(np.int32)),
            "y": (kind, empty((self.rows * self.query, self.stride), self.precision)),
            "partial": ("*fp32", np.full((n, self.splits, self.queries, self.width), np.nan, np.float32)),
            "peaks": ("*fp32", np.full((n, self.splits, 2, self.queries), np.nan, np.float32)),
            "counters": ("*i32", self.counters),
        }  # fmt: skip

    def check(self, y: np.ndarray) -> None:
        """``y`` is attention in float64, and NaN where nothing was to be written."""
        assert (self.counters == 0).all()
        got = wide(y)
        assert np.isnan(got[:, self.inner :]).all()
        by_head = got[:, : self.inner].reshape(self.rows, self.query, self.heads, self.head)
        queries_of = wide(self.q)[..., : self.head].reshape(by_head.shape)
        for row, length in enumerate(self.lengths):
            k, v = (wide(p)[row, :, :length, : self.head] for p in self.past)
            scores = np.einsum("qhd,hkd->qhk", queries_of[row], k)
            weights = np.exp2(scores - scores.max(-1, keepdims=True))
            wanted = np.einsum("qhk,hkd->qhd", weights / weights.sum(-1, keepdims=True), v)
            # Weights are rounded to the precision before they are multiplied with values.
            assert np.abs(by_head[row] - wanted).max() < 4 * ROUNDING[self.precision], length


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(size: tuple[int, ...], precision: str) -> None:
    case = Case(size, precision)
    results = []
    for shuffle in (None, 1, 2):
        arguments = case.arguments()
        launch("attention.attend", case.constants, case.grid, arguments, shuffle=shuffle)
        results.append(arguments["y"][1])
    assert all(other.tobytes() == results[0].tobytes() for other in results)
    case.check(results[0])


@pytest.mark.parametrize("size", [size for size in SIZES if size[-1]], ids=str)
def test_before_the_wait_only_keys_of_earlier_calls_are_read(
    size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call's own keys and its queries are NaN until a block waits: the kernel ahead is writing them."""
    case = Case(size, "fp16")
    arguments = case.arguments()
    complete = [array.copy() for array in (*case.past, case.q)]
    waits = []

    def wait(_: bool) -> None:
        for array, values in zip((*case.past, case.q), complete, strict=True):
            array[...] = values
        waits.append(1)

    monkeypatch.setitem(language._names(attention.__name__), "begin", wait)
    for block in np.ndindex(*case.grid):
        for row, length in enumerate(case.lengths):
            for past in case.past:
                past[row, :, max(0, length - case.query) :] = np.nan
        case.q[...] = np.nan
        launch("attention.attend", case.constants, case.grid, arguments, quick=True, blocks=[(*block, 0)])
    assert len(waits) == case.grid[0] * case.grid[1]
    case.check(arguments["y"][1])
