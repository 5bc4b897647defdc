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
``exact``    threshold search by bisection; no sort, so no limit. Exact for every value up to the rounding of
             ``logit - max`` in fp32, which is what a softmax sees.

Ties are as in the oracle: all that tie with the k-th are kept; in the top-p order equal logits count by id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from par_export.graphs.writer import ONNX_DTYPE, Graph

SamplingVariant = Literal["dynamic", "plain", "topk", "exact"]
TOPK_LIMIT = 3840  # TensorRT's limit for TopK
MIN_TEMPERATURE = 1e-5
#: exp(-110) is 0 in fp32: a code whose logit lies further below the maximum can never be drawn.
LOWEST = -110.0
COUNT_PARTS = 16  # static graphs count in so many parts of the codebook, then sum the counts
BISECTIONS = 44  #: halvings of the range of ``logit - max``, until its width is below the spacing of fp32
EXACT_STEPS = 2  #: steps from value to value after them


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
    if variant == "topk":
        keep, peak = sorted_keep(g, scaled, top_k, top_p, vocab, g.const([min(vocab, TOPK_LIMIT)]))
        return draw(g, scaled, peak, keep, vocab, rows, name)
    if variant == "exact":
        keep = searched_keep(g, scaled, top_k, top_p, vocab)
        return draw(g, scaled, g.op("ReduceMax", scaled, g.const([-1]), keepdims=1), keep, vocab, rows, name)
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
    cdf = g.op("CumSum", mass, g.const(-1))
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


def searched_keep(g: Graph, logits: str, top_k: str, top_p: str, vocab: int) -> str:
    """Mask [B,q,V] of the kept codes by bisection on y = logit - max: counts for top-k, masses for top-p."""
    axis = g.const([-1])
    y = g.op("Sub", logits, g.op("ReduceMax", logits, axis, keepdims=1))
    y = g.op("Max", y, g.const(LOWEST, "float32"))  # [B,q,V], LOWEST .. 0
    lowest = g.op("ReduceMin", y, axis, keepdims=1)
    by_k = _restricts(g, top_k, vocab)
    k = g.op("Cast", g.op("Where", by_k, top_k, g.const(vocab)), to=ONNX_DTYPE["float32"])

    def count_from(threshold: str) -> str:
        inside = g.op("Cast", g.op("GreaterOrEqual", y, threshold), to=ONNX_DTYPE["float32"])
        return g.op("ReduceSum", inside, axis, keepdims=1)

    kth = _search(g, y, lowest, lambda t: g.op("GreaterOrEqual", count_from(t), k))
    keep_k = g.op("GreaterOrEqual", y, kth)
    zero = g.const(0.0, "float32")
    mass = g.op("Where", keep_k, g.op("Exp", y), zero)
    limit = g.op("Mul", top_p, g.op("ReduceSum", mass, axis, keepdims=1))

    def mass_above(threshold: str) -> str:
        above = g.op("Where", g.op("Greater", y, threshold), mass, zero)
        return g.op("ReduceSum", above, axis, keepdims=1)

    # The largest value t whose codes and all above them weigh more than the limit, counting t's own: its mass
    # strictly above is within the limit, so t is the last value with a kept code.
    def reaches(threshold: str) -> str:
        inside = g.op("Where", g.op("GreaterOrEqual", y, threshold), mass, zero)
        return g.op("Greater", g.op("ReduceSum", inside, axis, keepdims=1), limit)

    cut = _search(g, y, lowest, reaches)
    tie = g.op("Equal", y, cut)
    tie_mass = g.op("Where", tie, mass, zero)
    before = g.op("Add", mass_above(cut), g.op("CumSum", tie_mass, g.const(-1), exclusive=1))
    keep_tie = g.op("And", tie, g.op("LessOrEqual", before, limit))
    first = g.op(
        "Equal", g.op("CumSum", g.op("Cast", tie, to=ONNX_DTYPE["float32"]), g.const(-1)), g.const(1.0, "float32")
    )
    at_top = g.op("And", g.op("And", tie, first), g.op("Equal", y, zero))  # the most probable code always stays
    keep_p = g.op("Or", g.op("Greater", y, cut), g.op("Or", keep_tie, at_top))
    all_p = g.op("GreaterOrEqual", top_p, g.const(1.0, "float32"))
    return g.op("And", keep_k, g.op("Or", all_p, keep_p))


def _search(g: Graph, y: str, lowest: str, holds: Callable[[str], str]) -> str:
    """The largest value of ``y`` [B,q,V] at which ``holds`` (true at ``lowest``, false above 0) is true: [B,q,1]."""
    axis, half, floor = g.const([-1]), g.const(0.5, "float32"), g.const(-np.inf, "float32")
    # Just above 0, the largest value; in proportion to the range, so that a narrow one is searched as finely.
    span = g.op("Max", g.op("Neg", lowest), g.const(1e-30, "float32"))
    low, high = lowest, g.op("Mul", span, g.const(2.0**-20, "float32"))
    for _ in range(BISECTIONS):
        middle = g.op("Mul", g.op("Add", low, high), half)
        yes = holds(middle)
        low, high = g.op("Where", yes, middle, low), g.op("Where", yes, high, middle)
    # The answer is the largest value below ``high``: step down through values until the condition is met.
    value = high
    reached = g.op("Less", high, lowest)  # false everywhere
    for _ in range(EXACT_STEPS):
        below = g.op("ReduceMax", g.op("Where", g.op("Less", y, value), y, floor), axis, keepdims=1)
        value = g.op("Where", reached, value, below)
        reached = g.op("Or", reached, holds(value))
    return g.op("Where", reached, value, low)


def _restricts(g: Graph, top_k: str, vocab: int) -> str:
    """Whether an image's top-k removes anything: [B,1,1] bool."""
    return g.op("And", g.op("Greater", top_k, g.const(0)), g.op("Less", top_k, g.const(vocab)))
