"""Which settings each sampling tail draws exactly."""

from __future__ import annotations

import pytest

from par_runtime.backends.tails import TAILS, least_tail, why_not_drawn


@pytest.mark.parametrize(
    ("vocab", "top_k", "top_p", "by"),
    [
        (16384, 0, 1.0, {"plain", "topk", "exact"}),
        (16384, 16384, 1.0, {"plain", "topk", "exact"}),
        (16384, 20000, 1.0, {"plain", "topk", "exact"}),
        (16384, 1, 1.0, {"plain", "topk", "exact"}),
        (16384, 1, 0.5, {"topk", "exact"}),
        (16384, 2, 1.0, {"topk", "exact"}),
        (16384, 3840, 0.9, {"topk", "exact"}),
        (16384, 3841, 1.0, {"exact"}),
        (64000, 8000, 1.0, {"exact"}),
        (16384, 0, 0.9, {"exact"}),
        (3840, 0, 0.9, {"topk", "exact"}),
        (3840, 3000, 1.0, {"topk", "exact"}),
    ],
)
def test_what_a_tail_draws(vocab: int, top_k: int, top_p: float, by: set[str]) -> None:
    assert {tail for tail in TAILS if why_not_drawn(tail, vocab, top_k, top_p) is None} == by
    assert least_tail(vocab, top_k, top_p) == ("topk" if "topk" in by else "exact")


def test_a_tail_that_is_not_known_is_not_doubted() -> None:
    assert why_not_drawn("later", 64000, 8000, 0.5) is None
