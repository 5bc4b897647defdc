"""The decoder's weights as its kernels read them. It runs on the device when an engine is loaded."""

import triton
import triton.language as tl


@triton.jit
def pack_vector(raw, packed, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT numbers in another dtype."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(raw + i, mask=i < COUNT, other=0.0)
    tl.store(packed + i, value.to(tl.float32).to(packed.dtype.element_ty), mask=i < COUNT)


@triton.jit
def pack_conv(
    raw,  # [O,C,R,R]
    packed,  # [parities,O,SIDE,blocks of channels,SIDE,BK]
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    SIDE: tl.constexpr,
    BK: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A convolution's weights in the order in which ``decoder.conv`` reads them; channels behind C are zeros.

    UP: SIDE is 2, R is 3, and there are four sets, one for each place of a pixel among the four that come from one: of
    the three rows (columns) that a pixel sees, two are copies of the same one, so their weights are added up.
    """
    KB: tl.constexpr = (C + BK - 1) // BK
    R: tl.constexpr = 3 if UP else SIDE
    LENGTH: tl.constexpr = SIDE * SIDE * KB * BK
    COUNT: tl.constexpr = O * LENGTH
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    parity = tl.program_id(1)
    o = i // LENGTH
    k = i % LENGTH
    step = k // BK
    dx = step % SIDE
    dy = step // (SIDE * KB)
    c = step // SIDE % KB * BK + k % BK
    inside = (i < COUNT) & (c < C)
    first = raw + (o * C + c) * (R * R)
    total = tl.zeros((BLOCK,), tl.float32)
    if UP:
        # Rows of weights behind row dy of the two: 0 | 1, 2 where the pixel is the upper one, else 0, 1 | 2.
        upper = parity // 2 == 0
        left = parity % 2 == 0
        for ry in tl.static_range(3):
            row = tl.where(upper, ry > 0, ry > 1).to(tl.int32)
            for rx in tl.static_range(3):
                column = tl.where(left, rx > 0, rx > 1).to(tl.int32)
                wanted = inside & (dy == row) & (dx == column)
                total += tl.load(first + ry * R + rx, mask=wanted, other=0.0).to(tl.float32)
    else:
        total += tl.load(first + dy * R + dx, mask=inside, other=0.0).to(tl.float32)
    tl.store(packed + parity.to(tl.int64) * COUNT + i, total.to(packed.dtype.element_ty), mask=i < COUNT)
