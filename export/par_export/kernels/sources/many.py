"""Products of many rows: a block of threads multiplies several panels side by side with up to 256 rows at once.

With more rows than weights are worth waiting for, a step is bound by the matrix units, and by what is copied to them:
a block of 64 rows copies as many activations as weights, and each of its turns multiplies too little. Here a block has
``PANELS`` panels of ``product.py`` side by side, and goes over K in steps of its own, so that more rows find room in
shared memory. The panels are those that other batches read, and every sum has the same order as there.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.codes import halves, numbers, scales_of


@triton.jit
def of_many(
    panel,  # the first of PANELS streams of panels
    h,  # [?, STRIDE] T
    rows,  # [BM] rows of h
    first,  # block of K
    last,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BN: tl.constexpr,  # of all panels
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Sums [BN, BM] of the blocks ``first`` to ``last`` of K of PANELS panels side by side, times these rows of ``h``.

    A turn multiplies DEEP rows of each part of a block. Parts have sums of their own, which are added at the end in the
    order of ``product.of_parts``; no product is thrown away, as it is with few rows.
    """
    PANEL: tl.constexpr = BN // PANELS  # columns
    PART: tl.constexpr = BK // PARTS
    TURNS: tl.constexpr = PART // DEEP  # of a block of K
    STREAM: tl.constexpr = (K + BK - 1) // BK * (PANEL * BK)  # from one panel to the one beside it
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    tl.static_assert(TURNS * DEEP == PART)
    n, k = tl.arange(0, BN), tl.arange(0, DEEP)
    weights = panel + (n // PANEL * STREAM + n % PANEL * PART)[:, None] + k[None, :]
    inputs = h + (rows.to(tl.int64) * STRIDE)[None, :] + k[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    second, third, fourth = sums, sums, sums
    for turn in tl.range(first * TURNS, last * TURNS):
        block = turn // TURNS
        within = turn % TURNS * DEEP
        w = weights + (block * (PANEL * BK) + within)
        at = block * BK + within
        sums = more(sums, w, inputs, at, k, K, BK)
        if PARTS > 1:
            second = more(second, w + PANEL * PART, inputs, at + PART, k, K, BK)
        if PARTS > 2:
            third = more(third, w + 2 * PANEL * PART, inputs, at + 2 * PART, k, K, BK)
            fourth = more(fourth, w + 3 * PANEL * PART, inputs, at + 3 * PART, k, K, BK)
    if PARTS > 2:
        third += fourth
    if PARTS > 1:
        sums += second
    if PARTS > 2:
        sums += third
    return sums


@triton.jit
def more(sums, weights, inputs, at, k, K: tl.constexpr, BK: tl.constexpr):
    """``sums`` and the products of the numbers ``at + k`` of K."""
    w = tl.load(weights)
    if K % BK == 0:
        x = tl.load(inputs + at)
    else:  # weights behind K are zeros, but what lies behind K in h may be NaN
        x = tl.load(inputs + at, mask=(at + k < K)[:, None], other=0.0)
    return tl.dot(w, x, sums)


@triton.jit
def of_many_codes(
    panel,  # the first of PANELS streams of pieces
    scales,  # [tiles, groups, columns of a panel]
    tile,
    h,
    rows,
    first,
    last,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    PANELS: tl.constexpr,
):
    """:func:`of_many` of codes: a turn takes a piece of each panel. From SM90 on few rows are the older matrix
    instructions', and many are the wide one's, which takes codes that became numbers from registers too. What it costs
    to make numbers of them is shared by all rows.

    Scales are asked for a turn ahead, as ``product.of_codes`` does and for the same reason.
    """
    PANEL: tl.constexpr = BN // PANELS
    ROWS: tl.constexpr = SUB * 8 // BITS  # of K, in a piece
    PIECES: tl.constexpr = (K + BK - 1) // BK * (BK // ROWS)  # of a panel
    GROUPS: tl.constexpr = (PIECES * ROWS + GROUP - 1) // GROUP
    T: tl.constexpr = h.dtype.element_ty
    n, k = tl.arange(0, BN), tl.arange(0, SUB)
    codes = panel + (n // PANEL * (PIECES * PANEL * SUB) + n % PANEL * SUB)[:, None] + k[None, :]
    columns = scales + tile.to(tl.int64) * (GROUPS * BN) + n // PANEL * (GROUPS * PANEL) + n % PANEL
    inputs = h + (rows.to(tl.int64) * STRIDE)[None, :] + k[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    begin, end = first * (BK // ROWS), last * (BK // ROWS)
    a, b = scales_of(columns, begin * ROWS, end * ROWS - ROWS, PANEL, GROUP, ROWS, SUB)
    for piece in tl.range(begin, end):
        at = piece * ROWS
        c, d = scales_of(columns, at + ROWS, end * ROWS - ROWS, PANEL, GROUP, ROWS, SUB)
        code = tl.load(codes + piece * (PANEL * SUB))
        if K % BK == 0:
            x = tl.load(inputs + at)
        else:  # codes behind K are zeros, but what lies behind K in h may be NaN
            x = tl.load(inputs + at, mask=(at + k < K)[:, None], other=0.0)
        if BITS == 8:
            sums += tl.dot(numbers(code, T), x) * a.to(tl.float32)[:, None]
        else:
            if K % BK == 0:
                y = tl.load(inputs + at + SUB)
            else:
                y = tl.load(inputs + at + SUB, mask=(at + SUB + k < K)[:, None], other=0.0)
            low, high = halves(code, T)
            if ROWS <= GROUP:
                sums += tl.dot(high, y, tl.dot(low, x)) * a.to(tl.float32)[:, None]
            else:
                sums += tl.dot(low, x) * a.to(tl.float32)[:, None]
                sums += tl.dot(high, y) * b.to(tl.float32)[:, None]
        a, b = c, d
    return sums
