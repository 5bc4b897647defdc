"""Matrices as they are stored, [K, WIDTH] row by row, into panels in the order in which products read them.

It runs on the device when an engine is loaded, so an engine holds no copy of the weights. A panel is ``BN`` columns by
``BK`` rows, lies in one piece, and holds ``PART`` numbers of a column side by side, those of the first part of the rows
before those of the next: [tile, block of K, BK / PART, BN, PART]. A block of threads then reads one stream from its
first byte to its last, 16 bytes a thread.

The order of columns makes partners meet in one thread. In the accumulator of the matrix units a thread holds rows g and
g + 8 of every 16. So of 16 packed columns the first 8 are the first partners (even columns of a head, which the
rotation needs; or the gate of the feed-forward layer), the last 8 the second ones (odd columns; or up).
"""

import triton
import triton.language as tl


@triton.jit
def stored_columns(
    column,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ORDER: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Where the packed columns ``column`` are in the stored matrix, and which of them there are."""
    if ORDER == "plain":
        return column, column < N
    else:
        partner = (column // 8) % 2
        unit = (column // 16) * 8 + column % 8
        inside = unit < N // 2
        if ORDER == "pairs":
            stored = unit // (HEAD // 2) * PADDED + 2 * (unit % (HEAD // 2)) + partner
        else:
            stored = partner * (WIDTH // 2) + unit
        return stored, inside


@triton.jit
def panels(
    raw,  # [?, WIDTH] fp32, fp16 or bf16
    packed,  # [tiles, blocks, BK / PART, BN, PART]
    K: tl.constexpr,  # rows of the product
    N: tl.constexpr,  # columns of the product
    WIDTH: tl.constexpr,  # columns of the stored matrix
    ORDER: tl.constexpr,  # of columns: "plain", "pairs" of each head, "halves" of the matrix
    HEAD: tl.constexpr,  # D
    PADDED: tl.constexpr,  # D', numbers of a head in the stored matrix; its last D' - D are zeros and are left out
    DROP_ROWS: tl.constexpr,  # whether the rows are numbers of heads too
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,  # rows of a part (see ``product.py``)
):
    """Panels of numbers. Grid: tiles, blocks of K."""
    tile, block = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = (K + BK - 1) // BK
    k = block * BK + tl.arange(0, BK)
    row = k
    if DROP_ROWS:
        row = (k // HEAD) * PADDED + k % HEAD
    column, inside = stored_columns(tile * BN + tl.arange(0, BN), N, WIDTH, ORDER, HEAD, PADDED)
    mask = (k < K)[:, None] & inside[None, :]
    values = tl.load(raw + row[:, None].to(tl.int64) * WIDTH + column[None, :], mask=mask, other=0.0)
    panel = packed + (tile.to(tl.int64) * blocks + block) * (BN * BK)
    of_block = tl.arange(0, BK)
    place = tl.arange(0, BN)[:, None] * PART + (of_block // PART * (BN * PART) + of_block % PART)[None, :]
    tl.store(panel + place, tl.trans(values.to(packed.dtype.element_ty)))


@triton.jit
def codes(
    raw,  # bytes of [K, WIDTH] codes: one of int8; of int4 two, the first in the low half
    packed,  # bytes [tiles, pieces, BN, SUB]
    K: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ORDER: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BN: tl.constexpr,
    SUB: tl.constexpr,
    PIECES: tl.constexpr,
    BITS: tl.constexpr,
):
    """Pieces of codes without a sign, as ``product.py`` reads them. Grid: tiles, PIECES."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    column, inside = stored_columns(tile * BN + tl.arange(0, BN), N, WIDTH, ORDER, HEAD, PADDED)
    row = piece * (SUB * 8 // BITS) + tl.arange(0, SUB)
    code = unsigned(raw, row, column, inside, K, WIDTH, BITS)
    if BITS == 4:
        code = code | (unsigned(raw, row + SUB, column, inside, K, WIDTH, BITS) << 4)
    panel = packed + (tile.to(tl.int64) * PIECES + piece) * (BN * SUB)
    place = tl.arange(0, BN)[:, None] * SUB + tl.arange(0, SUB)[None, :]
    tl.store(panel + place, tl.trans(code).to(tl.uint8))


@triton.jit
def unsigned(raw, row, column, inside, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """The codes at these rows and columns as i32, with half of their range added; those that there are not are zero."""
    mask = (row < K)[:, None] & inside[None, :]
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    if BITS == 8:
        return tl.load(raw + at, mask=mask, other=0).to(tl.int32) ^ 128
    else:
        both = tl.load(raw + at // 2, mask=mask, other=0).to(tl.int32)
        return ((both >> (at % 2 * 4).to(tl.int32)) & 15) ^ 8


@triton.jit
def scales(
    raw,  # [K / GROUP, WIDTH] fp32, fp16 or bf16
    packed,  # [tiles, groups, BN], of the same type
    K: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ORDER: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # that the panels of a tile have begun
    TOGETHER: tl.constexpr,
):
    """Scales in the order of the panels. Grid: tiles, GROUPS / TOGETHER."""
    tile = tl.program_id(0)
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    n = tl.arange(0, BN)
    column, inside = stored_columns(tile * BN + n, N, WIDTH, ORDER, HEAD, PADDED)
    mask = (group < K // GROUP)[:, None] & inside[None, :]
    values = tl.load(raw + group[:, None].to(tl.int64) * WIDTH + column[None, :], mask=mask, other=0.0)
    place = (tile.to(tl.int64) * GROUPS + group)[:, None] * BN + n[None, :]
    tl.store(packed + place, values, mask=(group < GROUPS)[:, None])
