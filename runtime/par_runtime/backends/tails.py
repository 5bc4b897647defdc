"""The sampling tails that a plan can be built with, and which settings each of them draws exactly.

A tail is part of a plan, so a request can ask for more than its plan can do. ``docs/engines.md``, "Sampling in the
plan".
"""

from __future__ import annotations

from typing import Literal

TOPK_LIMIT = 3840  #: entries that TensorRT's ``TopK`` gives at most

#: Without a filter; a filter within the sorted entries; any filter. Each next one draws all that those before it do.
Tail = Literal["plain", "topk", "exact"]
TAILS: tuple[Tail, ...] = ("plain", "topk", "exact")


def why_not_drawn(tail: str, vocab: int, top_k: int, top_p: float) -> str | None:
    """What ``tail`` of a codebook of ``vocab`` codes can draw, where that does not include these settings; else None.

    ``top_k`` 0, or as many codes as there are, keeps all; 1 alone is greedy. A tail of another name draws everything.
    """
    whole = top_k <= 0 or top_k >= vocab
    if tail == "plain" and not (top_p >= 1 and (whole or top_k == 1)):
        return "draws from the whole codebook, or greedily"
    if tail == "topk" and vocab > TOPK_LIMIT and not (top_p >= 1 if whole else top_k <= TOPK_LIMIT):
        return f"draws top-k up to {TOPK_LIMIT}, and top-p together with such a top-k"
    return None


def least_tail(vocab: int, top_k: int, top_p: float) -> Tail:
    """``topk``, or ``exact`` where ``topk`` does not draw these settings from ``vocab`` codes."""
    return "topk" if why_not_drawn("topk", vocab, top_k, top_p) is None else "exact"
