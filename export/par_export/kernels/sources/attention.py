"""Attention of the q new positions of each row over the keys that the row sees.

Keys are read once for all q queries of a head: they are the large operand, the queries the narrow one. Only keys
before ``length`` are read, and only those were ever written: what lies behind may be NaN.

A head's keys are cut into SPLITS spans of SPAN keys, so that there are enough blocks of threads for all processors
where heads and rows are few. Spans begin at multiples of SPAN whatever the batch, so a row's result does not depend on
it. Each block leaves its largest score, its sum and its weighted values; the one that arrives last joins them in the
order of the spans.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.step import begin, let_next


@triton.jit
def attend(
    q,  # [M, H, D'] T, times D^-0.5 and log2(e)
    past_k,  # [R, H, SLOTS, D'] T
    past_v,
    length,  # [R] i32
    y,  # [M, STRIDE] T: H heads of JOINED numbers
    partial,  # [R * H, SPLITS, BQ, WIDE] fp32
    peaks,  # [R * H, SPLITS, 2, BQ] fp32: the largest score, the sum
    counters,  # [R * H] i32, zero before and after
    QUERY: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    JOINED: tl.constexpr,  # D; or D', whose last D' - D numbers are zeros, as those of the values are
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,  # keys at a time
    WIDE: tl.constexpr,  # D' rounded up to a power of 2, at least 16
    BQ: tl.constexpr,  # QUERY rounded up to a power of 2, at least 8
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid: SPLITS, R * H."""
    split, of_row = tl.program_id(0), tl.program_id(1)
    row, head = of_row // HEADS, of_row % HEADS
    visible = tl.minimum(tl.load(length + row, cache_modifier=".cg"), SLOTS)
    start = split * SPAN
    end = tl.minimum(start + SPAN, visible)
    lines = of_row.to(tl.int64) * (SLOTS * PADDED)
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    if start < end:
        i, d = tl.arange(0, BQ), tl.arange(0, WIDE)
        of_query = ((row * QUERY + i).to(tl.int64) * HEADS + head) * PADDED
        mask_q = (i < QUERY)[None, :] & (d < HEAD)[:, None]
        peak = tl.full((BQ,), float("-inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        acc = tl.zeros((WIDE, BQ), tl.float32)
        for at in tl.range(start, end, CHUNK):
            key = at + tl.arange(0, CHUNK)
            seen = key < end
            place = lines + key[:, None] * PADDED + d[None, :]
            mask = seen[:, None] & (d < PADDED)[None, :]
            # Queries are loaded with each chunk (an offset that is 0, which the compiler cannot know, keeps them here):
            # outside of the loop they would be waited for before the first key is asked for.
            query = tl.load(q + tl.minimum(at, 0) * 16 + of_query[None, :] + d[:, None], mask=mask_q, other=0.0)
            k = tl.load(past_k + place, mask=mask, other=0.0)
            v = tl.load(past_v + place, mask=mask, other=0.0)
            score = tl.where(seen[:, None], tl.dot(k, query), float("-inf"))
            top = tl.maximum(peak, tl.max(score, 0))
            weight = tl.exp2(score - top[None, :])
            shrink = tl.exp2(peak - top)
            total = total * shrink + tl.sum(weight, 0)
            acc = tl.dot(tl.trans(v), weight.to(v.dtype), acc * shrink[None, :])
            peak = top
        let_next(DEPENDENT and not EARLY)
        to_y = y + (row * QUERY + i).to(tl.int64)[None, :] * STRIDE + head * JOINED + d[:, None]
        mask_y = (i < QUERY)[None, :] & (d < JOINED)[:, None]
        spans = (visible + SPAN - 1) // SPAN
        if spans == 1:
            tl.store(to_y, (acc / total[None, :]).to(y.dtype.element_ty), mask=mask_y)
        else:
            mine = partial + of_row.to(tl.int64) * (SPLITS * WIDE * BQ) + i[None, :] * WIDE + d[:, None]
            line = peaks + of_row.to(tl.int64) * (SPLITS * 2 * BQ) + i
            tl.store(mine + split * (WIDE * BQ), acc)
            tl.store(line + split * (2 * BQ), peak)
            tl.store(line + split * (2 * BQ) + BQ, total)
            tl.debug_barrier()  # the stores of all threads come before the count, which one thread does
            arrived = tl.atomic_add(counters + of_row, 1, sem="acq_rel", scope="gpu")
            if arrived == spans - 1:
                tl.store(counters + of_row, 0)
                # No sum waits for another part's numbers, so all parts are loaded at the same time.
                peak = tl.full((BQ,), float("-inf"), tl.float32)
                total = tl.zeros((BQ,), tl.float32)
                acc = tl.zeros((WIDE, BQ), tl.float32)
                for s in tl.static_range(SPLITS):
                    there = i * 0 + s < spans
                    of_s = line + s * (2 * BQ)
                    peak_s = tl.load(of_s, mask=there, other=float("-inf"), cache_modifier=".cg")
                    total_s = tl.load(of_s + BQ, mask=there, other=0.0, cache_modifier=".cg")
                    values = tl.load(
                        mine + s * (WIDE * BQ), mask=(d * 0 + s < spans)[:, None], other=0.0, cache_modifier=".cg"
                    )
                    top = tl.maximum(peak, peak_s)
                    old, new = tl.exp2(peak - top), tl.exp2(peak_s - top)
                    total = total * old + total_s * new
                    acc = acc * old[None, :] + values * new[None, :]
                    peak = top
                tl.store(to_y, (acc / total[None, :]).to(y.dtype.element_ty), mask=mask_y)
