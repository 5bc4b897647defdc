"""Drawing many at once is drawing one by one: every filter, ties at the edge, noise at its ends."""

from __future__ import annotations

import numpy as np
import pytest

from par_runtime.backends.draws import distance_of, draw, draw_all, kept, kept_all


def cases(count: int, vocab: int, ties: bool) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(vocab + ties)
    logits = (3 * rng.standard_normal((count, vocab))).astype(np.float32)
    if ties:
        logits = np.round(logits)
    uniform = rng.random(count, np.float32)
    uniform[:3] = (0.0, np.float32(1) - np.float32(2**-24), 0.5)
    temperature = rng.choice([0.0, 0.5, 1.0, 1.7], count).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 5, vocab - 1, vocab, vocab + 7], count)
    top_p = rng.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], count).astype(np.float32)
    return logits, uniform, temperature, top_k, top_p


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [2, 17, 512, 4099])
def test_all_at_once_is_one_by_one(vocab: int, ties: bool) -> None:
    logits, uniform, temperature, top_k, top_p = cases(200, vocab, ties)
    one_by_one = [
        draw(row, float(u), float(t), int(k), float(p))
        for row, u, t, k, p in zip(logits, uniform, temperature, top_k, top_p, strict=True)
    ]
    assert draw_all(logits, uniform, temperature, top_k, top_p).tolist() == one_by_one


@pytest.mark.parametrize("ties", [False, True])
def test_what_is_kept_is_the_same_set(ties: bool) -> None:
    logits, _, _, top_k, top_p = cases(300, 64, ties)
    for row, k, p, mask in zip(logits, top_k, top_p, kept_all(logits, top_k, top_p), strict=True):
        assert (mask == kept(row, int(k), float(p))).all()


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.array([[1, 5, 5, 0], [2, 2, 2, 2]], np.float32)
    ones = np.ones(2, np.float32)
    assert draw_all(logits, 0 * ones, ones, np.array([1, 1]), ones).tolist() == [1, 0]


def test_logits_that_are_no_numbers_explain_nothing() -> None:
    nan = np.full(8, np.nan, np.float32)
    assert distance_of(nan, nan, 3, 0.5, 1.0, 0, 1.0)[0] is None


def test_what_a_sum_made_one_by_one_loses_counts_as_rounding() -> None:
    """One large mass and many that vanish beside it: their sum in fp32 is that of the large one alone."""
    logits = np.full(64000, np.float32(np.log(2.0**-25)))
    logits[0] = 0
    _, allowed = distance_of(logits, logits, 0, 0.5, 1.0, 0, 1.0)
    lost = 63999 * 2.0**-25
    assert allowed > lost / (1 + lost) * 0.99
    even = np.zeros(64, np.float32)
    assert distance_of(even, even, 0, 0.0, 1.0, 0, 1.0)[1] < 1e-5
