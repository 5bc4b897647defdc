"""Matrices as they are stored, [K, WIDTH] row by row, into panels in the order in which products read them.

It runs on the device when an engine is loaded, so an engine holds no copy of the weights. A panel is ``BN`` columns by
``BK`` rows, lies in one piece, and holds each column's ``BK`` numbers side by side: [tile, block of K, BN, BK]. A block
of threads then reads one stream from its first byte to its last, 16 bytes a thread.

The order of columns makes partners meet in one thread. In the accumulator of the matrix units a thread holds rows g and
g + 8 of every 16. So of 16 packed columns the first 8 are the first partners (even columns of a head, which the
rotation needs; or the gate of the feed-forward layer), the last 8 the second ones (odd columns; or up).
"""

import triton
import triton.language as tl


@triton.jit
def panels(
    raw,  # [?, WIDTH] fp32, fp16 or bf16
    packed,  # [tiles, blocks, BN, BK]
    K: tl.constexpr,  # rows of the product
    N: tl.constexpr,  # columns of the product
    WIDTH: tl.constexpr,  # columns of the stored matrix
    ORDER: tl.constexpr,  # of columns: "plain", "pairs" of each head, "halves" of the matrix
    HEAD: tl.constexpr,  # D
    PADDED: tl.constexpr,  # D', numbers of a head in the stored matrix; its last D' - D are zeros and are left out
    DROP_ROWS: tl.constexpr,  # whether the rows are numbers of heads too
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = (K + BK - 1) // BK
    column = tile * BN + tl.arange(0, BN)
    k = block * BK + tl.arange(0, BK)
    row = k
    if DROP_ROWS:
        row = (k // HEAD) * PADDED + k % HEAD
    if ORDER == "plain":
        inside = column < N
    else:
        partner = (column // 8) % 2
        unit = (column // 16) * 8 + column % 8
        inside = unit < N // 2
        if ORDER == "pairs":
            column = unit // (HEAD // 2) * PADDED + 2 * (unit % (HEAD // 2)) + partner
        else:
            column = partner * (WIDTH // 2) + unit
    mask = (k < K)[:, None] & inside[None, :]
    values = tl.load(raw + row[:, None].to(tl.int64) * WIDTH + column[None, :], mask=mask, other=0.0)
    panel = packed + (tile.to(tl.int64) * blocks + block) * (BN * BK)
    place = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
    tl.store(panel + place, tl.trans(values.to(packed.dtype.element_ty)))
