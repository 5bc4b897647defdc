"""What all products of a step share: sums of a block's panels of weights times rows of activations.

Weights lie as ``pack.py`` left them: numbers of T, or the codes of a quantised matrix (``BITS`` 8 or 4; 0 for numbers),
which become numbers in registers, right in front of the matrix units.

**Codes.** A piece is ``BN`` columns by ``SUB`` bytes, in one stream. Codes have no sign: 128 (8 for int4) is added to
each. A byte holds one code, or of int4 two: the low half that of row k, the high half that of row k + SUB. So each half
of a piece is a matrix of its own, and no thread needs a code that another one has loaded. All rows of a half belong to
one group. Its sums are therefore multiplied by the group's scales at their end, in fp32: a code is exact in T, so
nothing is rounded on the way, and there are fewer sums than codes.

**From codes to numbers.** The instructions for it take whole registers: four codes come in one and leave as two pairs.
Put into the low bits of a number of T whose last bit counts as 1 (1024 in fp16, 128 in bf16), a code is that number
plus the code; a subtraction is all that is left. Triton's own conversion takes each code by itself: twice the
instructions in fp16, three times in bf16.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.codes import halves, numbers, scales_of
from par_export.kernels.sources.many import of_many, of_many_codes


@triton.jit
def product(
    panel,  # the first panel of this tile of weights
    scales,  # of codes, [tiles, groups, BN]
    tile,
    h,  # [?, STRIDE] T
    rows,  # [BM] rows of h
    first,  # block of K
    last,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    HELD: tl.constexpr,
    many,  # what :func:`hold` gave
    few,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Sums [BN, BM] of the weights' blocks ``first`` to ``last`` times these rows of ``h``.

    A tile of fewer than 64 columns is narrower than the matrix units of SM90 take. With PARTS > 1 the parts of every
    block of K lie below each other, [PARTS * BN, BK / PARTS], and are multiplied with the parts of the rows side by
    side. Of the PARTS * PARTS products those of a part with itself are the sums; the others cost little, since a step
    waits for its weights. Three dimensions, one for the parts, are no way to it: Triton chooses orders of shared memory
    for them in which eight rows begin in the same bank, and the whole product then waits for shared memory.

    The last HELD blocks are there already. They are multiplied last, so that sums have the same order without them.
    """
    if BITS > 0 and PANELS > 0:
        tl.static_assert(PARTS == 1 and HELD == 0 and DEEP == SUB * 8 // BITS)
        acc = of_many_codes(panel, scales, tile, h, rows, first, last, K, STRIDE, BN, BK, BM, BITS, GROUP, SUB, PANELS)
    elif BITS > 0:
        tl.static_assert(PARTS == 1 and HELD == 0)
        acc = of_codes(panel, scales, tile, h, rows, first, last, K, STRIDE, BN, BK, BM, BITS, GROUP, SUB)
    elif PANELS > 0:
        tl.static_assert(HELD == 0)
        acc = of_many(panel, h, rows, first, last, K, STRIDE, BN, BK, BM, PARTS, PANELS, DEEP)
    else:
        PART: tl.constexpr = BK // PARTS
        k = tl.arange(0, PART)
        behind = tl.arange(0, PARTS * BM) // BM * PART  # where the part of a column begins
        of_part = tl.reshape(tl.broadcast_to(rows[None, :], (PARTS, BM)), (PARTS * BM,))
        # The product with STRIDE stands last: only from it does the compiler know that addresses are aligned.
        of_column = h + (of_part.to(tl.int64) * STRIDE + behind)[None, :]
        end = last - HELD
        MANY: tl.constexpr = triton.next_power_of_2(HELD + 1) // 2
        if HELD > 0:  # the rows for these blocks are asked for before the loop, which does not wait for them
            x_many = rows_of_held(of_column, end, behind, K, BK, PARTS, MANY)
            if HELD > MANY:
                x_few = rows_of_held(of_column, end + MANY, behind, K, BK, PARTS, HELD - MANY)
        weights = panel + first * (BN * BK) + tl.arange(0, PARTS * BN)[:, None] * PART + k[None, :]
        inputs = of_column + (first * BK + k)[:, None]
        sums = tl.zeros((PARTS * BN, PARTS * BM), tl.float32)
        for block in tl.range(first, end):
            w = tl.load(weights)
            if K % BK == 0:
                x = tl.load(inputs)
            else:  # weights behind K are zeros, but what lies behind K in h may be NaN
                x = tl.load(inputs, mask=block * BK + behind[None, :] + k[:, None] < K, other=0.0)
            sums = tl.dot(w, x, sums)
            weights += BN * BK
            inputs += BK
        if HELD > 0:
            sums = tl.dot(many, x_many, sums)
            if HELD > MANY:
                sums = tl.dot(few, x_few, sums)
        if PARTS > 1:
            part = tl.arange(0, PARTS)
            itself = part[:, None, None, None] == part[None, None, :, None]
            sums = tl.where(itself, tl.reshape(sums, (PARTS, BN, PARTS, BM)), 0.0)
            acc = of_parts(tl.sum(sums, 2), PARTS, BN, BM)
        else:
            acc = sums
    return acc


@triton.jit
def hold(panel, last, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr):
    """The HELD blocks of weights before ``last``, which no kernel writes: to be called before the wait.

    HELD is a power of 2, or the sum of two: as many blocks as the larger one are one operand, the others another one.
    Triton puts an operand of the matrix units into shared memory where it is loaded, so they are there when the wait
    ends. It has no copies in the background outside of a loop: all loads are on their way at once because the
    compiler is told that a thread may have the registers for it (``Spec.many_registers``).
    """
    MANY: tl.constexpr = triton.next_power_of_2(HELD + 1) // 2
    many, few = panel, panel
    if HELD > 0:
        many = blocks_of(panel, last - HELD, BN, BK, PARTS, MANY)
        if HELD > MANY:
            few = blocks_of(panel, last - HELD + MANY, BN, BK, PARTS, HELD - MANY)
    return many, few


@triton.jit
def blocks_of(panel, first, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT blocks of weights side by side: [PARTS * BN, COUNT * BK / PARTS]."""
    PART: tl.constexpr = BK // PARTS
    k = tl.arange(0, COUNT * PART)
    at = k // PART * (BN * BK) + k % PART
    return tl.load(panel + first * (BN * BK) + tl.arange(0, PARTS * BN)[:, None] * PART + at[None, :])


@triton.jit
def rows_of_held(
    of_column,
    first,
    behind,
    K: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The rows of h for :func:`blocks_of`: [COUNT * BK / PARTS, PARTS * BM]. As copies in the background do, they come
    past the L1 cache.
    """
    PART: tl.constexpr = BK // PARTS
    k = tl.arange(0, COUNT * PART)
    at = first * BK + k // PART * BK + k % PART
    if K % BK == 0:
        x = tl.load(of_column + at[:, None], cache_modifier=".cg")
    else:
        mask = at[:, None] + behind[None, :] < K
        x = tl.load(of_column + at[:, None], mask=mask, other=0.0, cache_modifier=".cg")
    return x


@triton.jit
def of_parts(sums, PARTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """The sums [PARTS, BN, BM] of the parts added up, two at a time.

    In what order more than two are added is up to the compiler, and to how many rows there are.
    """
    tl.static_assert(PARTS <= 4)
    if PARTS == 4:
        sums = tl.sum(tl.reshape(sums, (2, 2, BN, BM)), 1)
    return tl.sum(sums, 0)


@triton.jit
def of_codes(
    panel,
    scales,
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
):
    """:func:`product` of codes. A block of K is so many pieces, one after the other.

    The products have three dimensions, the first of them 1: from SM90 on, codes of two would go through shared memory
    once more. All warps share a piece, which has columns for two of them at least.
    """
    HALVES: tl.constexpr = 8 // BITS
    ROWS: tl.constexpr = SUB * HALVES  # of K, in a piece
    STEPS: tl.constexpr = BK // ROWS
    tl.static_assert(STEPS <= 4)
    T: tl.constexpr = h.dtype.element_ty
    k = tl.arange(0, SUB)[None, :]
    codes = panel + tl.arange(0, BN)[None, :, None] * SUB + k[:, None, :]
    codes += first * (STEPS * BN * SUB)
    inputs = h + rows.to(tl.int64)[None, None, :] * STRIDE
    groups: tl.constexpr = ((K + BK - 1) // BK * BK + GROUP - 1) // GROUP  # that the blocks of a tile have begun
    columns = scales + tile.to(tl.int64) * (groups * BN) + tl.arange(0, BN)[None, :]
    sums = tl.zeros((1, BN, BM), tl.float32)
    # Scales do not come in the background as panels do. Those of all pieces of a block are asked for a block ahead, and
    # become numbers of fp32 only where they are used: a loop that waited for each in turn would be on its way to memory
    # all the time. Further ahead is not possible, since Triton copies nothing in the background in a loop that carries
    # a value over more than one turn.
    row, end = first * BK, last * BK - ROWS
    a0, b0 = scales_of(columns, row, end, BN, GROUP, ROWS, SUB)
    a1, b1 = scales_of(columns, row + ROWS, end, BN, GROUP, ROWS, SUB)
    a2, b2 = scales_of(columns, row + 2 * ROWS, end, BN, GROUP, ROWS, SUB)
    a3, b3 = scales_of(columns, row + 3 * ROWS, end, BN, GROUP, ROWS, SUB)
    for block in tl.range(first, last):
        ahead = (block + 1) * BK
        c0, d0 = scales_of(columns, ahead, end, BN, GROUP, ROWS, SUB)
        c1, d1 = scales_of(columns, ahead + ROWS, end, BN, GROUP, ROWS, SUB)
        c2, d2 = scales_of(columns, ahead + 2 * ROWS, end, BN, GROUP, ROWS, SUB)
        c3, d3 = scales_of(columns, ahead + 3 * ROWS, end, BN, GROUP, ROWS, SUB)
        for step in tl.static_range(STEPS):
            if step == 0:
                scale, other = a0.to(tl.float32), b0.to(tl.float32)
            elif step == 1:
                scale, other = a1.to(tl.float32), b1.to(tl.float32)
            elif step == 2:
                scale, other = a2.to(tl.float32), b2.to(tl.float32)
            else:
                scale, other = a3.to(tl.float32), b3.to(tl.float32)
            c = tl.load(codes)
            at = (block * STEPS + step) * ROWS + k
            if K % BK == 0:
                x = tl.load(inputs + at[:, :, None])
            else:  # codes behind K are zeros, but what lies behind K in h may be NaN
                x = tl.load(inputs + at[:, :, None], mask=(at < K)[:, :, None], other=0.0)
            if BITS == 8:
                sums += tl.dot(numbers(c, T), x) * scale[:, :, None]
            else:
                if K % BK == 0:
                    y = tl.load(inputs + (at + SUB)[:, :, None])
                else:
                    y = tl.load(inputs + (at + SUB)[:, :, None], mask=(at + SUB < K)[:, :, None], other=0.0)
                low, high = halves(c, T)
                if ROWS <= GROUP:
                    sums += tl.dot(high, y, tl.dot(low, x)) * scale[:, :, None]
                else:
                    sums += tl.dot(low, x) * scale[:, :, None]
                    sums += tl.dot(high, y) * other[:, :, None]
            codes += BN * SUB
        a0, a1, a2, a3, b0, b1, b2, b3 = c0, c1, c2, c3, d0, d1, d2, d3
    return tl.sum(sums, 0)
