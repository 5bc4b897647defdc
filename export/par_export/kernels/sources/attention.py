"""Attention of the q new positions of each row over the keys that the row sees.

Keys are read once for all q queries of a head: they are the large operand, the queries the narrow one. Only keys
before ``length`` are read, and only those were ever written: what lies behind may be NaN.

A head's keys are cut into SPLITS spans of SPAN keys, so that there are enough blocks of threads for all processors
where heads and rows are few. Spans begin at multiples of SPAN whatever the batch, so a row's result does not depend on
it. Each block leaves its largest score, its sum and its weighted values; the one that arrives last joins them in the
order of the spans.

With HELD a block loads all keys and values of its span that earlier calls wrote before it waits for the kernel ahead,
which writes those of this call alone. These, and the queries, are what is left to read when the wait ends.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.step import begin, let_next


@triton.jit
def lines_of(past, first, end, PADDED: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT keys or values [COUNT, WIDE] of a head from ``first`` on, zeros from ``end`` on.

    Past the L1 cache: of what is loaded before the wait it may hold an older state, since an earlier kernel has read
    the line of memory that a key shares with the one after it, which was not written yet.
    """
    key, d = first + tl.arange(0, COUNT), tl.arange(0, WIDE)
    mask = (key < end)[:, None] & (d < PADDED)[None, :]
    return tl.load(past + key[:, None] * PADDED + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def scores(k, query, first, end, COUNT: tl.constexpr):
    """Of the keys of :func:`lines_of`: [COUNT, BQ], minus infinity from ``end`` on."""
    seen = first + tl.arange(0, COUNT) < end
    return tl.where(seen[:, None], tl.dot(k, query), float("-inf"))


@triton.jit
def of_held(
    query,  # [WIDE, BQ]
    many_k,  # [MANY, WIDE]: keys from ``start`` on
    many_v,
    few_k,  # [FEW, WIDE]: those that follow
    few_v,
    own_k,  # [OWN, WIDE]: from ``recent`` to ``end``
    own_v,
    start,
    recent,
    end,
    MANY: tl.constexpr,
    FEW: tl.constexpr,
    OWN: tl.constexpr,
):
    """The largest score, the sum and the weighted values over all keys of a span at once."""
    of_many, of_own = scores(many_k, query, start, recent, MANY), scores(own_k, query, recent, end, OWN)
    peak = tl.maximum(tl.max(of_many, 0), tl.max(of_own, 0))  # a span has a key at least, so not both are infinite
    if FEW > 0:
        of_few = scores(few_k, query, start + MANY, recent, FEW)
        peak = tl.maximum(peak, tl.max(of_few, 0))
    of_many, of_own = tl.exp2(of_many - peak[None, :]), tl.exp2(of_own - peak[None, :])
    total = tl.sum(of_many, 0) + tl.sum(of_own, 0)
    acc = tl.dot(many_v, of_many.to(many_v.dtype))
    if FEW > 0:
        of_few = tl.exp2(of_few - peak[None, :])
        total += tl.sum(of_few, 0)
        acc = tl.dot(few_v, of_few.to(few_v.dtype), acc)
    return peak, total, tl.dot(tl.trans(own_v), of_own.to(own_v.dtype), acc)


@triton.jit
def in_chunks(
    of_query,  # [WIDE, BQ] addresses
    mask_q,
    past_k,
    past_v,
    start,
    end,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    BQ: tl.constexpr,
):
    """The largest score, the sum and the weighted values over the keys from ``start`` to ``end``."""
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((WIDE, BQ), tl.float32)
    for at in tl.range(start, end, CHUNK):
        # Queries are loaded with each chunk (an offset that is 0, which the compiler cannot know, keeps them here):
        # outside of the loop they would be waited for before the first key is asked for.
        query = tl.load(of_query + tl.minimum(at, 0) * 16, mask=mask_q, other=0.0)
        k = lines_of(past_k, at, end, PADDED, WIDE, CHUNK)
        v = lines_of(past_v, at, end, PADDED, WIDE, CHUNK)
        score = scores(k, query, at, end, CHUNK)
        top = tl.maximum(peak, tl.max(score, 0))
        weight = tl.exp2(score - top[None, :])
        shrink = tl.exp2(peak - top)
        total = total * shrink + tl.sum(weight, 0)
        acc = tl.dot(tl.trans(v), weight.to(v.dtype), acc * shrink[None, :])
        peak = top
    return peak, total, acc


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
    HELD: tl.constexpr,  # 0, or SPAN
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
    # The last QUERY keys may be of this call (fewer are where it has fewer positions): those before them are of earlier
    # calls, whose kernels have all ended when the kernel ahead has waited, which it does before this one may start.
    recent = tl.minimum(tl.maximum(start, visible - QUERY), tl.maximum(end, start))
    MANY: tl.constexpr = triton.next_power_of_2(SPAN + 1) // 2
    FEW: tl.constexpr = SPAN - MANY
    OWN: tl.constexpr = BQ if BQ > 64 else 64  # the wide instruction takes 64 rows at least
    if HELD > 0:
        many_k = lines_of(past_k + lines, start, recent, PADDED, WIDE, MANY)
        many_v = tl.trans(lines_of(past_v + lines, start, recent, PADDED, WIDE, MANY))
        few_k, few_v = many_k, many_v
        if FEW > 0:
            few_k = lines_of(past_k + lines, start + MANY, recent, PADDED, WIDE, FEW)
            few_v = tl.trans(lines_of(past_v + lines, start + MANY, recent, PADDED, WIDE, FEW))
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    if start < end:
        i, d = tl.arange(0, BQ), tl.arange(0, WIDE)
        of_query = ((row * QUERY + i).to(tl.int64) * HEADS + head) * PADDED
        mask_q = (i < QUERY)[None, :] & (d < HEAD)[:, None]
        if HELD > 0:
            query = tl.load(q + of_query[None, :] + d[:, None], mask=mask_q, other=0.0)
            own_k = lines_of(past_k + lines, recent, end, PADDED, WIDE, OWN)
            own_v = lines_of(past_v + lines, recent, end, PADDED, WIDE, OWN)
            peak, total, acc = of_held(
                query, many_k, many_v, few_k, few_v, own_k, own_v, start, recent, end, MANY, FEW, OWN
            )
        else:
            peak, total, acc = in_chunks(
                q + of_query[None, :] + d[:, None], mask_q, past_k + lines, past_v + lines, start, end,
                PADDED, CHUNK, WIDE, BQ,
            )  # fmt: skip
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
