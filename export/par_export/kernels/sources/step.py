"""The kernels of one call of the step network, but for attention (``attention.py``) and the draw (``draw.py``).

Letters: R rows in flight, q positions of each, M = R * q rows of every product; d width, F width of the feed-forward
layer, H heads of D numbers (D' in the caches), V codes. T is fp16 or bf16. Sums are in fp32 always.

**Products.** M is small (2 to 64 mostly), so a product is a stream of weights. They are the large operand, BN packed
columns by BK rows a panel (``pack.py``); the M rows are the narrow one. A block of threads computes BN columns for BM
rows. Blocks of the same weights are neighbours in the grid, so that the weights come from memory once. Each sum runs
over K in the same order for every BM, in steps of 16 in one accumulator for each of PARTS parts, so a row's result does
not depend on how many rows there are, as long as SPLIT and PARTS are the same. With many rows a block takes PANELS
panels side by side (``many.py``; 0: one panel, as described here), and BN is the columns of all of them.

**Norms.** What a product reads is ``h``: x times the gain of the norm before the product, not yet divided by the root
mean square. That division is a factor of the row, so it waits for the end of the product. The kernel that makes x
also leaves the sums of squares of its columns, ``ss``, one for each tile. Gains are stored times 2^-e, at most 1, so
that ``h`` cannot leave fp16 where x does not; 2^e is a factor at the end too. A row of ``gains``: d of them, padding,
then 2^e at ``POWER``.

**Partners** (even and odd columns of a head; gate and up) lie 8 apart in 16 packed columns, in one thread's registers.

**Dependent launches** (DEPENDENT, from SM90 on). A kernel may start while the one before it still runs: it fetches the
first ``AHEAD`` bytes of its weights into the L2 cache, loads the last HELD panels of them into shared memory, and reads
inputs of the call that no kernel writes (past the L1 cache, which is sure to hold nothing of an earlier call only after
the wait). Then it waits for the kernel before it, which has itself waited for the one before that. A kernel allows the
next one to start when its sums are done (``embed`` and the draw, which are short: at once), not when it has waited:
blocks that come while others still work take the places of those, two on one processor and none on another, and keep
them. On an H200 the early start made some layers slower than none at all (``docs/kernels.md``). With EARLY a kernel
allows it as soon as it has waited, which is meant for kernels that hold their weights.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from par_export.kernels.sources.product import hold, product

EPS = tl.constexpr(1e-5)  #: of every norm


@triton.jit
def fetch_ahead(address, size):
    """Ask for ``size`` bytes (a multiple of 16, at most 4 MB) from ``address`` on to be brought into the L2 cache.

    It waits for nothing. The first four threads ask for a piece each: assembly runs in every thread, and all would ask
    for all of it. Not more of them: the threads of a warp do this one after the other, some 40 cycles each.
    """
    piece = (size + 63) // 64 * 16
    tl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        .reg .b32 start, length;
        .reg .b64 place;
        mov.u32 start, %tid.x;
        mul.lo.u32 start, start, $2;
        setp.lt.u32 inside, start, $3;
        sub.u32 length, $3, start;
        min.u32 length, length, $2;
        cvt.u64.u32 place, start;
        add.u64 place, place, $1;
        @inside cp.async.bulk.prefetch.L2.global [place], length;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [address.to(tl.int64), piece, size],
        tl.int32,
        False,
        1,
    )


@triton.jit
def fetch_scales(
    scales,
    tile,
    first,  # block of K
    AHEAD: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Fetch the scales of ``AHEAD`` bytes of codes from that block on: they are needed as early as the codes."""
    groups: tl.constexpr = ((K + BK - 1) // BK * BK + GROUP - 1) // GROUP
    ahead: tl.constexpr = (AHEAD * 8 // BITS // BN + GROUP - 1) // GROUP
    width: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    place = scales + tile.to(tl.int64) * (groups * BN) + first * BK // GROUP * BN
    fetch_ahead(place, ahead * BN * width)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Wait for the kernel before this one."""
    if DEPENDENT:
        cuda.gdc_wait()


@triton.jit
def let_next(DEPENDENT: tl.constexpr):
    """Let the next kernel start, once every block has come here or has ended.

    It stands behind :func:`begin`, so that only two kernels meet. A third could find what the first has read in its L1
    cache, and the second has overwritten.
    """
    if DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def squares(ss, rows, TILES: tl.constexpr):
    """The sums of squares [tiles, BM] of these rows. Loaded before a product and added after it, they cost no time."""
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    return tl.load(ss + rows.to(tl.int64)[None, :] * TILES + tile[:, None], mask=(tile < TILES)[:, None], other=0.0)


@triton.jit
def squares_of_many(ss, rows, TILES: tl.constexpr):
    """The same, eight tiles at a time and added up: [1, BM]. All of them are more numbers than there are registers."""
    at = ss + rows.to(tl.int64)[None, :] * TILES
    sums = tl.zeros((8, rows.shape[0]), tl.float32)
    for first in tl.range(0, TILES, 8):
        tile = first + tl.arange(0, 8)
        sums += tl.load(at + tile[:, None], mask=(tile < TILES)[:, None], other=0.0)
    return tl.sum(sums, 0, keep_dims=True)


@triton.jit
def row_factor(parts, gains, D_MODEL: tl.constexpr, POWER: tl.constexpr):
    """What the product of each row is to be multiplied with: [BM]."""
    mean = tl.sum(parts, 0) / D_MODEL
    return tl.load(gains + POWER) * tl.rsqrt(mean + EPS)


@triton.jit
def partners(acc, BN: tl.constexpr, BM: tl.constexpr):
    """The first and the second partners [BN / 2, BM] of sums [BN, BM]."""
    groups = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    one, other = tl.split(groups)
    return tl.reshape(one, (BN // 2, BM)), tl.reshape(other, (BN // 2, BM))


@triton.jit
def cosines(cos, sin, position, pair, turns, PADDED: tl.constexpr):
    """Cosine and sine of each pair of numbers of a head: [BN / 2, BM]."""
    angle = position[None, :] * (PADDED // 2) + pair[:, None]
    c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def embed(
    ids,  # [R, q] i64
    table,  # [ROWS, d], as it is stored
    gains,  # of the first norm
    x,  # [M, STRIDE] fp32
    h,  # [M, STRIDE] T
    ss,  # [M, TILES] fp32
    ROWS: tl.constexpr,
    D_MODEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,  # in which the other kernels that make x leave their sums of squares
    BN: tl.constexpr,
    TOGETHER: tl.constexpr,  # tiles of a block of threads
    DEPENDENT: tl.constexpr,
):
    """x = the rows of ``table`` for ``ids``. Grid: M, tiles / TOGETHER."""
    m = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = tile[:, None] * BN + tl.arange(0, BN)[None, :]
    inside = column < D_MODEL
    gain = tl.load(gains + column, mask=inside, other=0.0)
    begin(DEPENDENT)
    let_next(DEPENDENT)
    row = tl.load(ids + m)
    row = tl.minimum(tl.maximum(row, 0), ROWS - 1)  # an id that is none must not read foreign memory
    value = tl.load(table + row * D_MODEL + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + m * STRIDE + column, value, mask=inside)
    tl.store(h + m * STRIDE + column, (value * gain).to(h.dtype.element_ty), mask=inside)
    tl.store(ss + m * TILES + tile, tl.sum(value * value, 1), mask=tile < TILES)


@triton.jit
def qkv(
    h,  # [M, STRIDE] T
    ss,  # [M, TILES] fp32
    weights,  # panels, in pairs of each head
    scales,  # of their codes
    gains,  # of the norm before
    cos,  # [ANGLES, D' / 2] fp32
    sin,
    positions,  # [R, q] i64
    write,  # [R] i64
    q,  # [M, H, D'] T
    past_k,  # [R, H, SLOTS, D'] T
    past_v,
    M,
    D_MODEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    POWER: tl.constexpr,
    QUERY: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    ANGLES: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,  # of q: D^-0.5, and log2(e), because attention takes powers of 2
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Queries, and keys and values into the caches, both turned by their positions. Grid: M / BM, 3HD / BN."""
    tile = tl.program_id(1)
    blocks: tl.constexpr = (D_MODEL + BK - 1) // BK
    size: tl.constexpr = BN * BK if BITS == 0 else BN * BK * BITS // 8
    panel = weights + tile.to(tl.int64) * (blocks * size)
    if DEPENDENT and AHEAD > 0:
        fetch_ahead(panel, AHEAD)
        if BITS > 0:
            fetch_scales(scales, tile, 0, AHEAD, D_MODEL, BN, BK, BITS, GROUP)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row = m // QUERY
    unit = tile * (BN // 2) + tl.arange(0, BN // 2)
    head, pair = unit // (HEAD // 2), unit % (HEAD // 2)  # the heads of q, then of k, then of v
    position = tl.load(positions + m, mask=m < M, other=0, cache_modifier=".cg")
    position = tl.minimum(tl.maximum(position, 0), ANGLES - 1)  # a padded position may lie behind the last
    slot = tl.load(write + row, mask=m < M, other=0, cache_modifier=".cg") + m % QUERY
    turns = (head < 2 * HEADS)[:, None] & (m < M)[None, :]
    if PANELS == 0:
        c, s = cosines(cos, sin, position, pair, turns, PADDED)
    many, few = hold(panel, blocks, BN, BK, PARTS, HELD)
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    if PANELS == 0:
        parts = squares(ss, m, TILES)
    acc = product(
        panel, scales, tile, h, m, 0, blocks, D_MODEL, STRIDE, BN, BK, BM, PARTS,
        BITS, GROUP, SUB, HELD, many, few, PANELS, DEEP
    )  # fmt: skip
    let_next(DEPENDENT and not EARLY)
    if PANELS > 0:
        parts = squares_of_many(ss, m, TILES)
        c, s = cosines(cos, sin, position, pair, turns, PADDED)
    acc *= row_factor(parts, gains, D_MODEL, POWER)[None, :]
    even, odd = partners(acc, BN, BM)
    scale = tl.where(head < HEADS, SCALE, 1.0)[:, None]
    both = tl.join((even * c - odd * s) * scale, (odd * c + even * s) * scale).to(q.dtype.element_ty)

    number = 2 * pair[:, None, None] + tl.arange(0, 2)[None, None, :]
    kind = (head // HEADS)[:, None, None]
    of_kind = (head % HEADS)[:, None, None]
    to_q = (m.to(tl.int64)[None, :, None] * HEADS + of_kind) * PADDED + number
    tl.store(q + to_q, both, mask=(kind == 0) & (m < M)[None, :, None])
    line = ((row.to(tl.int64)[None, :, None] * HEADS + of_kind) * SLOTS + slot[None, :, None]) * PADDED
    writes = ((m < M) & (slot >= 0) & (slot < SLOTS))[None, :, None]
    tl.store(past_k + line + number, both, mask=(kind == 1) & writes)
    tl.store(past_v + line + number, both, mask=(kind == 2) & writes)
    if PADDED != HEAD:  # attention reads whole lines of D' numbers, so the last four must be zeros
        rest = HEAD + tl.arange(0, 4)[None, None, :]
        zero = tl.zeros((BN // 2, BM, 4), tl.float32).to(q.dtype.element_ty)
        ends = (pair == HEAD // 2 - 1)[:, None, None] & writes
        tl.store(past_k + line + rest, zero, mask=ends & (kind == 1))
        tl.store(past_v + line + rest, zero, mask=ends & (kind == 2))


@triton.jit
def residual(
    inputs,  # [M, K_STRIDE] T
    weights,  # panels
    scales,  # of their codes
    gains,  # of the norm that follows
    x,  # [M, STRIDE] fp32, read and written
    h,  # [M, STRIDE] T
    ss,  # [M, tiles] fp32
    partial,  # [M / BM, tiles, SPLIT, BM, BN] fp32
    counters,  # [M / BM, tiles] i32, zero before and after
    M,
    K: tl.constexpr,
    K_STRIDE: tl.constexpr,
    D_MODEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x += inputs times weights; h = x times gain. Grid: M / BM, d / BN, SPLIT parts of K.

    There are few columns, so K is split for more blocks of threads to have work. Each leaves its sums; the one that
    arrives last adds all of them, in the order of the parts: which one it is makes no difference to the result.
    """
    tile, split = tl.program_id(1), tl.program_id(2)
    tiles: tl.constexpr = (D_MODEL + BN - 1) // BN
    blocks: tl.constexpr = (K + BK - 1) // BK
    size: tl.constexpr = BN * BK if BITS == 0 else BN * BK * BITS // 8
    panel = weights + tile.to(tl.int64) * (blocks * size)
    first, last = split * blocks // SPLIT, (split + 1) * blocks // SPLIT
    if DEPENDENT and AHEAD > 0:
        fetch_ahead(panel + first * size, AHEAD)
        if BITS > 0:
            fetch_scales(scales, tile, first, AHEAD, K, BN, BK, BITS, GROUP)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    column = tile * BN + n
    inside = (column < D_MODEL)[:, None] & (m < M)[None, :]
    # With many rows 64 bits for each of them are more than there are registers; these buffers are small enough for 32.
    at = (m if PANELS > 0 else m.to(tl.int64))[None, :] * STRIDE + column[:, None]
    gain = tl.load(gains + column, mask=column < D_MODEL, other=0.0)
    many, few = hold(panel, last, BN, BK, PARTS, HELD)
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    # With parts of K most blocks do not need it, and the last one loads it together with the parts.
    LATE: tl.constexpr = SPLIT > 1 or PANELS > 0
    if not LATE:
        old = tl.load(x + at, mask=inside, other=0.0)
    acc = product(
        panel, scales, tile, inputs, m, first, last, K, K_STRIDE, BN, BK, BM, PARTS,
        BITS, GROUP, SUB, HELD, many, few, PANELS, DEEP
    )  # fmt: skip
    let_next(DEPENDENT and not EARLY)
    counter = counters + tl.program_id(0) * tiles + tile
    arrived = 0
    place = partial + ((tl.program_id(0) * tiles + tile) * SPLIT).to(tl.int64) * (BN * BM)
    place = place + n[:, None] + tl.arange(0, BM)[None, :] * BN
    if SPLIT > 1:
        tl.store(place + split * (BN * BM), acc)
        tl.debug_barrier()  # the stores of all threads come before the count, which one thread does
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        if LATE:
            old = tl.load(x + at, mask=inside, other=0.0)
        if SPLIT > 1:
            tl.store(counter, 0)
            acc = tl.load(place, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                acc += tl.load(place + part * (BN * BM), cache_modifier=".cg")
        new = old + acc
        # Where a tile has fewer numbers than threads, the compiler loads it twice, for two layouts. So a thread may
        # load what another one is about to overwrite: all loads come before all stores.
        tl.debug_barrier()
        tl.store(x + at, new, mask=inside)
        tl.store(h + at, (new * gain[:, None]).to(h.dtype.element_ty), mask=inside)
        if PANELS > 0:  # consumers read the squares of single panels, whatever this batch takes at a time
            panel_of = tile * PANELS + tl.arange(0, PANELS)
            of_panels = tl.sum(tl.reshape(new * new, (PANELS, BN // PANELS, BM)), 1)
            to_ss = ss + m.to(tl.int64)[None, :] * (tiles * PANELS) + panel_of[:, None]
            tl.store(to_ss, of_panels, mask=(m < M)[None, :])
        else:
            tl.store(ss + m.to(tl.int64) * tiles + tile, tl.sum(new * new, 0), mask=m < M)


@triton.jit
def gates(
    h,  # [M, STRIDE] T
    ss,  # [M, TILES] fp32
    weights,  # panels, gate and up side by side
    scales,  # of their codes
    gains,  # of the norm before
    g,  # [M, F_STRIDE] T
    M,
    D_MODEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    POWER: tl.constexpr,
    F: tl.constexpr,
    F_STRIDE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """g = silu(gate) * up. Grid: M / BM, 2F / BN."""
    tile = tl.program_id(1)
    blocks: tl.constexpr = (D_MODEL + BK - 1) // BK
    size: tl.constexpr = BN * BK if BITS == 0 else BN * BK * BITS // 8
    panel = weights + tile.to(tl.int64) * (blocks * size)
    if DEPENDENT and AHEAD > 0:
        fetch_ahead(panel, AHEAD)
        if BITS > 0:
            fetch_scales(scales, tile, 0, AHEAD, D_MODEL, BN, BK, BITS, GROUP)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    unit = tile * (BN // 2) + tl.arange(0, BN // 2)
    many, few = hold(panel, blocks, BN, BK, PARTS, HELD)
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    if PANELS == 0:
        parts = squares(ss, m, TILES)
    acc = product(
        panel, scales, tile, h, m, 0, blocks, D_MODEL, STRIDE, BN, BK, BM, PARTS,
        BITS, GROUP, SUB, HELD, many, few, PANELS, DEEP
    )  # fmt: skip
    let_next(DEPENDENT and not EARLY)
    if PANELS > 0:
        parts = squares_of_many(ss, m, TILES)
    acc *= row_factor(parts, gains, D_MODEL, POWER)[None, :]
    gate, up = partners(acc, BN, BM)
    value = gate / (1.0 + tl.exp(-gate)) * up
    at = m.to(tl.int64)[None, :] * F_STRIDE + unit[:, None]
    tl.store(g + at, value.to(g.dtype.element_ty), mask=(unit < F)[:, None] & (m < M)[None, :])


@triton.jit
def head(
    h,  # [M, STRIDE] T
    ss,  # [M, TILES] fp32
    weights,  # panels
    scales,  # of their codes
    gains,  # of the last norm
    cond_row,  # [B] i64
    uncond_row,
    guidance,  # [B] fp32
    logits,  # [B, q, V] fp32
    COUNT,  # B * q
    D_MODEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    POWER: tl.constexpr,
    QUERY: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
    PANELS: tl.constexpr,
    DEEP: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Guided logits. Grid: 2 * COUNT / BM, V / BN.

    Column 2i of a product is the conditional row of the i-th position, 2i + 1 its unconditional one. So a thread has
    both in neighbouring registers, and an image without guidance gets exactly its own logits.
    """
    tile = tl.program_id(1)
    blocks: tl.constexpr = (D_MODEL + BK - 1) // BK
    size: tl.constexpr = BN * BK if BITS == 0 else BN * BK * BITS // 8
    panel = weights + tile.to(tl.int64) * (blocks * size)
    if DEPENDENT and AHEAD > 0:
        fetch_ahead(panel, AHEAD)
        if BITS > 0:
            fetch_scales(scales, tile, 0, AHEAD, D_MODEL, BN, BK, BITS, GROUP)
    column = tl.program_id(0) * BM + tl.arange(0, BM)
    i = column // 2
    image = i // QUERY
    cond = tl.load(cond_row + image, mask=i < COUNT, other=0, cache_modifier=".cg")
    uncond = tl.load(uncond_row + image, mask=i < COUNT, other=0, cache_modifier=".cg")
    rows = tl.where(column % 2 == 0, cond, uncond) * QUERY + i % QUERY
    at = tl.program_id(0) * (BM // 2) + tl.arange(0, BM // 2)
    strength = tl.load(guidance + at // QUERY, mask=at < COUNT, other=0.0, cache_modifier=".cg")
    many, few = hold(panel, blocks, BN, BK, PARTS, HELD)
    begin(DEPENDENT)
    let_next(DEPENDENT and EARLY)
    if PANELS == 0:
        parts = squares(ss, rows, TILES)
    acc = product(
        panel, scales, tile, h, rows, 0, blocks, D_MODEL, STRIDE, BN, BK, BM, PARTS,
        BITS, GROUP, SUB, HELD, many, few, PANELS, DEEP
    )  # fmt: skip
    let_next(DEPENDENT and not EARLY)
    if PANELS > 0:
        parts = squares_of_many(ss, rows, TILES)
    acc *= row_factor(parts, gains, D_MODEL, POWER)[None, :]
    c, u = tl.split(tl.reshape(acc, (BN, BM // 2, 2)))
    code = tile * BN + tl.arange(0, BN)
    place = logits + at.to(tl.int64)[None, :] * V + code[:, None]
    tl.store(place, u + (c - u) * strength[None, :], mask=(code < V)[:, None] & (at < COUNT)[None, :])
