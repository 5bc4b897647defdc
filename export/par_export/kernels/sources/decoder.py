"""The decoder's kernels: tokens to pixels. ``plan_decoder`` decides with which sizes they run, and on what.

Feature maps are NHWC in the compute dtype T (fp16, bf16, or fp32 with TF32 products); all sums are fp32. Letters: H x W
rows and columns of a map, C channels of what is read, O of what is written, M = H*W, M2 a sum of squared differences
from the mean, U the channels of a unit (the largest power of two that divides the channels of a norm's group).

DEPENDENT (from SM90 on): a kernel may start before the one before it has ended, and waits for it itself before it reads
or writes anything. Rows and columns behind a ragged end are clamped to the last one: what they compute is not written,
and a load without a mask is one instruction.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.step import begin, let_next


@triton.jit
def lookup(
    tokens,  # [B,M] int64, sequence order
    place,  # [M] int32: where in the sequence the token of a pixel is
    codebook,  # [V,D]
    w,  # [C,D], fp32
    bias,  # [C], fp32
    out,  # [B,H+2,W+2,C], a border of zeros around it
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Tokens in raster order, their codes, and the 1x1 convolution behind them."""
    begin(DEPENDENT)
    PITCH: tl.constexpr = W + 2
    PADDED: tl.constexpr = (H + 2) * PITCH
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image = tl.program_id(2).to(tl.int64)
    y = p // PITCH - 1
    x = p % PITCH - 1
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = tl.load(place + y * W + x, mask=inside, other=0)
    token = tl.load(tokens + image * (H * W) + at, mask=inside, other=0)
    token = tl.minimum(tl.maximum(token, 0), V - 1)
    value = tl.zeros((BP, BC), tl.float32) + tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    for d in range(D):
        code = tl.load(codebook + token * D + d).to(tl.float32)
        value += code[:, None] * tl.load(w + c * D + d, mask=c < C, other=0.0)[None, :]
    let_next(DEPENDENT)
    value = tl.where(inside[:, None], value, 0.0)
    kept = (p < PADDED)[:, None] & (c < C)[None, :]
    tl.store(out + image * (PADDED * C) + p[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=kept)


@triton.jit
def conv(
    x,  # [B,H,W,C], or [B,H+2,W+2,C] with a border of zeros where SIDE is 3
    w,  # packed by decoder_pack.pack_conv
    bias,  # [O], fp32
    residual,  # [B,M,O], added where RESIDUAL
    other_x,  # [B,M,OTHER]: a 1x1 convolution of it is added where OTHER is not 0
    other_w,
    other_bias,
    out,  # [B,M,O] (UP: of 2H x 2W pixels)
    steps,  # SIDE * SIDE * blocks of BK channels; no constant, so that the compiler leaves the loop as it is
    partial,  # [B,2,tiles,O/UNIT], fp32: sum and M2 of every tile and unit, where UNIT is not 0
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    SIDE: tl.constexpr,
    UP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OTHER: tl.constexpr,
    UNIT: tl.constexpr,
    PIXELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OTHER_BK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A convolution as a matrix product of BM pixels and BN channels a program, with all that can be done on the spot.

    Channels are the inner part of K, and the columns of the filter come before the next block of channels: three steps
    read nearly the same pixels, from the L1 cache. UP: ``x`` is read as if every pixel were there twice in both
    directions; H and W are its own, SIDE is 2 (see ``decoder_pack.pack_conv``), and program 1 is the place among four.
    PIXELS: ``out`` is uint8, ``trunc(clamp(127.5 x + 128, 0, 255))``.
    """
    M: tl.constexpr = H * W
    TN: tl.constexpr = (O + BN - 1) // BN
    TM: tl.constexpr = (M + BM - 1) // BM
    KB: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = SIDE * SIDE * KB
    BORDER: tl.constexpr = 2 if SIDE == 3 else 0
    PITCH: tl.constexpr = W + BORDER
    begin(DEPENDENT)
    m_tile = tl.program_id(0) // TN
    n_tile = tl.program_id(0) % TN
    parity = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    rows = m_tile * BM + tl.arange(0, BM)
    m = tl.minimum(rows, M - 1)
    columns = n_tile * BN + tl.arange(0, BN)
    n = columns if O % BN == 0 else tl.minimum(columns, O - 1)
    k = tl.arange(0, BK)
    row = m // W
    column = m % W
    if UP:
        # The upper and left pixels of four see the rows and columns -1 and 0 around their own, the others 0 and 1.
        row += parity // 2 - 1
        column += parity % 2 - 1
    a = x + image * ((H + BORDER) * PITCH * C) + ((row * PITCH + column) * C)[:, None] + k[None, :]
    b = w + ((parity * O + n) * (STEPS * BK))[None, :] + k[:, None]
    kept = (rows < M)[:, None] & (columns < O)[None, :]
    if UP:
        pixel = (2 * (m // W) + parity // 2) * (2 * W) + 2 * (m % W) + parity % 2
        target = image * (4 * M * O) + (pixel * O)[:, None] + columns[None, :]
    else:
        target = image * (M * O) + (m * O)[:, None] + columns[None, :]
    if RESIDUAL:
        # First, not last: behind the loop both it and the sums would need registers.
        value = tl.load(residual + target, mask=kept, other=0.0).to(tl.float32)
    else:
        value = tl.zeros((BM, BN), tl.float32)
    for i in range(steps):
        dx = i % SIDE
        dy = i // (SIDE * KB)
        first = i // SIDE % KB * BK
        at = a + ((dy * PITCH + dx) * C + first)
        if UP:
            seen = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
            if C % BK == 0:
                pixels = tl.load(at, mask=seen[:, None], other=0.0, cache_modifier=".ca")
            else:
                pixels = tl.load(at, mask=seen[:, None] & (k < C - first)[None, :], other=0.0, cache_modifier=".ca")
        elif C % BK == 0:
            pixels = tl.load(at, cache_modifier=".ca")
        else:
            pixels = tl.load(at, mask=(k < C - first)[None, :], other=0.0, cache_modifier=".ca")
        value = tl.dot(pixels, tl.load(b + i * BK), value, input_precision="tf32")
    if OTHER:
        OTHER_KB: tl.constexpr = (OTHER + OTHER_BK - 1) // OTHER_BK
        other_k = tl.arange(0, OTHER_BK)
        other_a = other_x + image * (M * OTHER) + (m * OTHER)[:, None] + other_k[None, :]
        other_b = other_w + (n * (OTHER_KB * OTHER_BK))[None, :] + other_k[:, None]
        for i in range(OTHER_KB):
            if OTHER % OTHER_BK == 0:
                pixels = tl.load(other_a + i * OTHER_BK)
            else:
                pixels = tl.load(other_a + i * OTHER_BK, mask=(other_k < OTHER - i * OTHER_BK)[None, :], other=0.0)
            value = tl.dot(pixels, tl.load(other_b + i * OTHER_BK), value, input_precision="tf32")
        value += tl.load(other_bias + n)[None, :]
    let_next(DEPENDENT)
    value += tl.load(bias + n)[None, :]
    if UNIT:
        # Never read. With it the sums below are laid out as the store is, which needs a tenth of the exchange
        # between threads that the layout of the product needs.
        value += tl.load(out + target, mask=tl.program_id(2) < tl.zeros((BM, 1), tl.int32), other=0.0).to(tl.float32)
    if PIXELS:
        grey = tl.minimum(tl.maximum(value * 127.5 + 128.0, 0.0), 255.0)
        tl.store(out + target, grey.to(tl.int32).to(tl.uint8), mask=kept)
    else:
        value = value.to(out.dtype.element_ty)
        tl.store(out + target, value, mask=kept)
    if UNIT:
        _statistics(value, rows, partial, image, m_tile, n_tile, parity, M, O, UNIT, TM, UP, BM, BN)


@triton.jit
def _statistics(
    value,
    rows,
    partial,
    image,
    m_tile,
    n_tile,
    parity,
    M: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    UNIT: tl.constexpr,
    TM: tl.constexpr,
    UP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum and M2 of each unit of ``value`` [BM,BN], M2 around the tile's own mean: that of a map can be large.

    Of the stored, rounded numbers: they are what is normalised, and take half the registers.
    """
    UNITS: tl.constexpr = O // UNIT
    TILES: tl.constexpr = 4 * TM if UP else TM
    units = n_tile * (BN // UNIT) + tl.arange(0, BN // UNIT)
    value = tl.reshape(value, (BM, BN // UNIT, UNIT)).to(tl.float32)
    real = (rows < M)[:, None, None]
    total = tl.sum(tl.sum(tl.where(real, value, 0.0), 2), 0)
    count = tl.minimum(M - m_tile * BM, BM) * UNIT
    apart = tl.where(real, value - (total / count)[None, :, None], 0.0)
    squares = tl.sum(tl.sum(apart * apart, 2), 0)
    at = partial + image * (2 * TILES * UNITS) + (parity * TM + m_tile) * UNITS + units
    tl.store(at, total, mask=units < UNITS)
    tl.store(at + TILES * UNITS, squares, mask=units < UNITS)


@triton.jit
def moments(
    partial,  # [B,2,PARITIES*TM,C/UNIT], written by conv
    gain,  # [C], fp32
    bias,  # [C], fp32
    norm,  # [B,2,C], fp32: what to multiply a channel by, and what to add
    M: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    PARITIES: tl.constexpr,
    BM: tl.constexpr,
    EPSILON: tl.constexpr,
    BT: tl.constexpr,
    BU: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Group norm of one group of one image as a scale and a shift, out of the sums of tiles of BM pixels of M."""
    begin(DEPENDENT)
    TM: tl.constexpr = (M + BM - 1) // BM
    TILES: tl.constexpr = PARITIES * TM
    WIDTH: tl.constexpr = C // GROUPS
    PER: tl.constexpr = WIDTH // UNIT
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BT)
    unit = tl.arange(0, BU)
    sums = partial + image * (2 * TILES * (C // UNIT)) + (group * PER + unit)[None, :] + (tile * (C // UNIT))[:, None]
    total = tl.zeros((BT, BU), tl.float32)
    for first in range(0, TILES, BT):
        real = (tile < TILES - first)[:, None] & (unit < PER)[None, :]
        total += tl.load(sums + first * (C // UNIT), mask=real, other=0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / (PARITIES * M * WIDTH)
    squares = tl.zeros((BT, BU), tl.float32)
    for first in range(0, TILES, BT):
        real = (tile < TILES - first)[:, None] & (unit < PER)[None, :]
        count = (tl.minimum(M - (tile + first) % TM * BM, BM) * UNIT).to(tl.float32)[:, None]
        apart = tl.load(sums + first * (C // UNIT), mask=real, other=0.0) / count - mean
        inner = tl.load(sums + (TILES + first) * (C // UNIT), mask=real, other=0.0)
        squares += tl.where(real, inner + apart * apart * count, 0.0)
    let_next(DEPENDENT)
    variance = tl.sum(tl.sum(squares, 1), 0) / (PARITIES * M * WIDTH)
    c = group * WIDTH + tl.arange(0, BC)
    real = tl.arange(0, BC) < WIDTH
    scale = tl.load(gain + c, mask=real, other=0.0) / tl.sqrt(variance + EPSILON)
    shift = tl.load(bias + c, mask=real, other=0.0) - mean * scale
    tl.store(norm + image * (2 * C) + c, scale, mask=real)
    tl.store(norm + image * (2 * C) + C + c, shift, mask=real)


@triton.jit
def normalise(
    x,  # [B,H,W,C]
    norm,  # [B,2,C], written by moments
    out,  # [B,H+BORDER,W+BORDER,C]
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    SWISH: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The norm of each channel, then swish. BORDER 2: with one row or column of zeros on each side.

    A pass of its own, which reads and writes each number once. In the load of the convolution behind it the same work
    would be done nine times for each tile of its output's channels: two special functions (of which a processor does 16
    a cycle) for each number of a tile of 256 x 64 take twice as long as the tile's product; and numbers that pass
    through registers could not be copied ahead of their use. The border spares the convolution all its masks.
    """
    begin(DEPENDENT)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.minimum(tl.program_id(1) * BC + tl.arange(0, BC), C - 1)
    scale = tl.load(norm + image * (2 * C) + channel)
    shift = tl.load(norm + image * (2 * C) + C + channel)
    _normalised(x, scale, shift, out, image, H, W, C, BORDER, SWISH, BP, BC, DEPENDENT)


@triton.jit
def _normalised(
    x,
    scale,
    shift,
    out,
    image,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    SWISH: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BP pixels of ``out`` and BC channels, ``scale`` and ``shift`` [BC]."""
    PITCH: tl.constexpr = W + BORDER
    PADDED: tl.constexpr = (H + BORDER) * PITCH
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    y = p // PITCH - BORDER // 2
    column = p % PITCH - BORDER // 2
    inside = ((y >= 0) & (y < H) & (column >= 0) & (column < W))[:, None]
    kept = (p < PADDED)[:, None]
    if C % BC:
        inside = inside & (c < C)[None, :]
        kept = kept & (c < C)[None, :]
    value = tl.load(x + image * (H * W * C) + ((y * W + column) * C)[:, None] + c[None, :], mask=inside, other=0.0)
    let_next(DEPENDENT)
    value = value.to(tl.float32) * scale[None, :] + shift[None, :]
    if SWISH:
        value = value * tl.sigmoid(value)
    value = tl.where(inside, value, 0.0).to(out.dtype.element_ty)
    tl.store(out + image * (PADDED * C) + (p * C)[:, None] + c[None, :], value, mask=kept)


@triton.jit
def norm(
    x,  # [B,H,W,C]
    partial,  # [B,2,PARITIES*TM,C/UNIT], written by conv
    gain,  # [C], fp32
    bias,  # [C], fp32
    out,  # [B,H+BORDER,W+BORDER,C]
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    SWISH: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    PARITIES: tl.constexpr,
    BM: tl.constexpr,
    EPSILON: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``moments`` and ``normalise`` in one, for maps of few tiles: each block adds up the sums of its channels again.

    BC channels are whole groups of a power of two.
    """
    begin(DEPENDENT)
    M: tl.constexpr = H * W // PARITIES
    TM: tl.constexpr = (M + BM - 1) // BM
    TILES: tl.constexpr = PARITIES * TM
    WIDTH: tl.constexpr = C // GROUPS
    U: tl.constexpr = BC // UNIT
    G: tl.constexpr = BC // WIDTH
    image = tl.program_id(2).to(tl.int64)
    tile = tl.arange(0, BT)
    unit = tl.program_id(1) * U + tl.arange(0, U)
    at = partial + image * (2 * TILES * (C // UNIT)) + (tile * (C // UNIT))[:, None] + unit[None, :]
    real = (tile < TILES)[:, None]
    total = tl.load(at, mask=real, other=0.0)
    mean = tl.sum(tl.reshape(tl.sum(total, 0), (G, WIDTH // UNIT)), 1) / (H * W * WIDTH)
    count = (tl.minimum(M - tile % TM * BM, BM) * UNIT).to(tl.float32)[:, None]
    apart = total / count - tl.reshape(tl.broadcast_to(mean[:, None], (G, WIDTH // UNIT)), (U,))[None, :]
    squares = tl.where(real, tl.load(at + TILES * (C // UNIT), mask=real, other=0.0) + apart * apart * count, 0.0)
    variance = tl.sum(tl.reshape(tl.sum(squares, 0), (G, WIDTH // UNIT)), 1) / (H * W * WIDTH)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    scale = tl.reshape(tl.broadcast_to((1 / tl.sqrt(variance + EPSILON))[:, None], (G, WIDTH)), (BC,))
    scale = scale * tl.load(gain + c)
    shift = tl.load(bias + c) - tl.reshape(tl.broadcast_to(mean[:, None], (G, WIDTH)), (BC,)) * scale
    _normalised(x, scale, shift, out, image, H, W, C, BORDER, SWISH, BP, BC, DEPENDENT)
