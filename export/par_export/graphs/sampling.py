"""The sampling tail: guided logits become tokens inside the graph, in four variants.

Every variant divides by the temperature, filters, and draws by inverse CDF with the caller's uniform number:
token = how many entries of the cumulative sum lie at or below ``uniform * total``. The order of operations is that of
``par_model.generate.sample``, the oracle's sampler.

``dynamic``  ONNX Runtime only. ``If`` skips the filter when no image asks for one; else a sort of just as many
             entries as are needed. Exact for every top-k and top-p.
``plain``    no filter but top_k = 1 (greedy).
``topk``     sorts the ``TOPK_LIMIT`` (or V, if fewer) most probable codes. Exact for top_k up to that limit, with
             or without top-p; where V is larger, top-p needs a top-k, and top_k = 0 alone means all. (Codes that tie
             with the k-th and lie beyond the sorted ones stay, but do not count towards top-p's mass.)
``exact``    exact for every value. Where V is larger than the limit, the edges are searched for in sorted parts of the
             codebook (``searched.py``); else it is ``topk``.

Ties are as in the oracle: all that tie with the k-th are kept; in the top-p order equal logits count by id.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from par_export.graphs.searched import Split, largest_codebook, searched_sums
from par_export.graphs.writer import ONNX_DTYPE, Graph
from par_runtime.backends.tails import TOPK_LIMIT, Tail

SamplingVariant = Tail | Literal["dynamic"]
MIN_TEMPERATURE = 1e-5
COUNT_PARTS = 16  # static graphs count in so many parts of the codebook, then sum the counts


def sample(
    g: Graph, logits: str, vocab: int, variant: SamplingVariant, *, rows: str | None = None, name: str | None = None
) -> str:
    """Add the tail to ``g``: ``logits`` [B,q,V] fp32 and the inputs uniform [B,q], temperature, top_k, top_p [B]
    give tokens [B,q] int64. With ``rows`` [R] (the image of each row) tokens are [R,q]; ``name`` names them."""
    column = g.const([1, 2])
    per_image = {key: g.op("Unsqueeze", key, column) for key in ("temperature", "top_k", "top_p")}  # [B,1,1]
    temperature = g.op("Max", per_image["temperature"], g.const(MIN_TEMPERATURE, "float32"))
    scaled = g.op("Div", logits, temperature)
    top_k, top_p = per_image["top_k"], per_image["top_p"]
    if variant == "plain":
        peak = g.op("ReduceMax", scaled, g.const([-1]), keepdims=1)
        greedy = g.op("Equal", top_k, g.const(1))
        keep = g.op("Or", g.op("Not", greedy), g.op("GreaterOrEqual", scaled, peak))
        return draw(g, scaled, peak, keep, vocab, rows, name)
    split = Split.of(vocab, TOPK_LIMIT) if variant == "exact" and vocab > TOPK_LIMIT else None
    if split is not None:
        return _drawn(g, searched_sums(g, scaled, top_k, top_p, vocab, split), vocab, rows, name)
    if why := why_not_searched(variant, vocab):
        raise ValueError(why)
    if variant in ("topk", "exact"):
        keep, peak = sorted_keep(g, scaled, top_k, top_p, vocab, g.const([min(vocab, TOPK_LIMIT)]))
        return draw(g, scaled, peak, keep, vocab, rows, name)
    by_p = g.op("Less", top_p, g.const(1.0, "float32"))
    by_k = _restricts(g, top_k, vocab)
    # How many entries a sort must deliver: all for top-p, k for top-k.
    need = g.op("Where", by_p, g.const(vocab), g.op("Where", by_k, top_k, g.const(0)))
    most = g.op("ReduceMax", need, keepdims=0)
    filtered, whole = g.subgraph("filtered"), g.subgraph("whole")
    count = filtered.op("Reshape", filtered.op("Max", most, filtered.const(1)), filtered.const([1]))
    kept, top = sorted_keep(filtered, scaled, top_k, top_p, vocab, count)
    peak = whole.op("ReduceMax", scaled, whole.const([-1]), keepdims=1)
    for branch, keep_in, largest in ((filtered, kept, top), (whole, None, peak)):
        tokens = draw(branch, scaled, largest, keep_in, vocab)
        branch.output(tokens, "int64", ["B", "q"])
    return g.op("If", g.op("Greater", most, g.const(0)), then_branch=filtered.proto(), else_branch=whole.proto())


def draw(
    g: Graph, logits: str, peak: str, keep: str | None, vocab: int, rows: str | None = None, name: str | None = None
) -> str:
    """Tokens [B,q] (or by ``rows`` [R,q]) from ``logits`` [B,q,V] with the maximum ``peak`` [B,q,1], of which only
    ``keep`` (bool, or None for all) can be drawn."""
    mass = g.op("Exp", g.op("Sub", logits, peak))
    if keep is not None:
        mass = g.op("Where", keep, mass, g.const(0.0, "float32"))
    return _drawn(g, g.op("CumSum", mass, g.const(-1)), vocab, rows, name)


def _drawn(g: Graph, cdf: str, vocab: int, rows: str | None = None, name: str | None = None) -> str:
    """The tokens of :func:`draw` from the cumulative sums ``cdf`` [B,q,V] of the masses."""
    # The total is the last sum itself, so a uniform below one always lies below it.
    total = g.op("Slice", cdf, g.const([vocab - 1]), g.const([vocab]), g.const([-1]))  # [B,q,1]
    target = g.op("Mul", g.op("Unsqueeze", "uniform", g.const([-1])), total)
    # Counts up to 64,000 are exact in fp32, and a float reduction is the fast one everywhere.
    passed = g.op("Cast", g.op("LessOrEqual", cdf, target), to=ONNX_DTYPE["float32"])
    if rows is not None:
        if vocab % COUNT_PARTS == 0:
            # An engine reduces long rows with atomics into a buffer that a kernel of its own must clear; short ones
            # it does not. Taking the parts by row before the last sum saves a kernel after it.
            passed = g.op("Reshape", passed, g.const([0, 0, COUNT_PARTS, -1]))
            passed = g.op("ReduceSum", passed, g.const([-1]), keepdims=0)
        passed = g.op("Gather", passed, rows)
    number = g.op("Cast", g.op("ReduceSum", passed, g.const([-1]), keepdims=0), to=ONNX_DTYPE["int64"])
    return g.op("Min", number, g.const(vocab - 1), name=name)


def sorted_keep(g: Graph, logits: str, top_k: str, top_p: str, vocab: int, count: str) -> tuple[str, str]:
    """Mask [B,q,V] of the kept codes, from the ``count`` ([1] int64) largest logits, sorted, ties by id; and the
    largest logit [B,q,1]. Written for few kernels: every value that a row needs comes from its sorted entries.
    """
    axis, lowest = g.const([-1]), g.const(-np.inf, "float32")
    ranked, ids = g.ops("TopK", logits, count, count=2, axis=-1, largest=1, sorted=1)  # [B,q,K]
    peak = g.op("Slice", ranked, g.const([0]), g.const([1]), axis)
    by_k = _restricts(g, top_k, vocab)
    places = g.op("Range", g.const(0), g.op("Squeeze", count), g.const(1))  # [K]
    at_k = g.op("Equal", places, g.op("Sub", top_k, g.const(1)))
    kth = g.op("ReduceMax", g.op("Where", at_k, ranked, lowest), axis, keepdims=1)
    kth = g.op("Where", by_k, kth, lowest)
    # top-p over what top-k left: a code is removed when the mass before it exceeds the threshold; the first never is.
    mass = g.op("Exp", g.op("Sub", ranked, peak))
    mass = g.op("Where", g.op("GreaterOrEqual", ranked, kth), mass, g.const(0.0, "float32"))
    upto = g.op("CumSum", mass, g.const(-1))
    total = g.op("Slice", upto, g.const([-1]), g.const([2**31 - 1]), axis)
    stay = g.op("LessOrEqual", g.op("Sub", upto, mass), g.op("Mul", top_p, total))
    number = g.op("ReduceSum", g.op("Cast", stay, to=ONNX_DTYPE["float32"]), axis, keepdims=1)
    last = g.op("Max", g.op("Sub", g.op("Cast", number, to=ONNX_DTYPE["int64"]), g.const(1)), g.const(0))
    cut = g.op("GatherElements", ranked, last, axis=-1)
    cut_id = g.op("GatherElements", ids, last, axis=-1)
    codes = g.op("Range", g.const(0), g.const(vocab), g.const(1))
    tied = g.op("And", g.op("Equal", logits, cut), g.op("LessOrEqual", codes, cut_id))
    keep_p = g.op("Or", g.op("Greater", logits, cut), tied)
    all_p = g.op("GreaterOrEqual", top_p, g.const(1.0, "float32"))
    return g.op("And", g.op("GreaterOrEqual", logits, kth), g.op("Or", all_p, keep_p)), peak


def why_not_searched(tail: str, vocab: int) -> str | None:
    """Why ``tail`` cannot be written for ``vocab`` codes, and what to give instead; None where it can."""
    if tail != "exact" or vocab <= TOPK_LIMIT or Split.of(vocab, TOPK_LIMIT) is not None:
        return None
    return (
        f"{vocab} codes are too many for --sampling exact (at most {largest_codebook(TOPK_LIMIT)}); give "
        f"--sampling topk, which draws top-k up to {TOPK_LIMIT}"
    )


def _restricts(g: Graph, top_k: str, vocab: int) -> str:
    """Whether an image's top-k removes anything: [B,1,1] bool."""
    return g.op("And", g.op("Greater", top_k, g.const(0)), g.op("Less", top_k, g.const(vocab)))
