"""Tokens from logits: temperature, exact top-k and top-p for any codebook, and the draw by inverse CDF.

It computes what ``draws.draw`` of the runtime computes, without a sort: the edges of top-k and of top-p are found by
bisection of the order-preserving integers of fp32 numbers, at most 32 sums over the codebook each; a request without
a filter takes none of them. Where the codebook fits into the registers of one block of threads, ``resident`` keeps it
there; else ``looped`` reads it again for each sum, from the L2 cache.

All that tie with the k-th code stay; of those that tie at the edge of top-p the lowest ids stay. The token is the first
code that can be drawn whose sum is over ``uniform * total``, and if rounding leaves none, the last that can be drawn.
So a code that a filter removed is never drawn, whatever rounding does to the sums.

Letters: B images, q positions, V codes, R rows.
"""

import triton
import triton.language as tl

from par_export.kernels.sources.step import begin

COLDEST = tl.constexpr(1e-5)  #: the least temperature, as in the graphs
LOWEST = tl.constexpr(-(2**31))  #: the key of no number


@triton.jit
def scaled(place, code, inside, temperature):
    """Logits over temperature, by the division that the graphs use; -inf behind the codebook. No zero is negative."""
    y = tl.div_rn(tl.load(place + code, mask=inside, other=float("-inf")), temperature)
    return tl.where(y == 0.0, 0.0, y)


@triton.jit
def ordered(y, inside):
    """Integers in the order of the fp32 numbers ``y``."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def middle_of(low, high):
    return low + (high - low) // 2


@triton.jit
def put(tokens, image, token, b, j, rows, QUERY: tl.constexpr):
    """Write ``token`` to position ``j`` of every row of image ``b``."""
    for first in tl.range(0, rows, 32):
        row = first + tl.arange(0, 32)
        of = tl.load(image + row, mask=row < rows, other=-1)
        value = tl.zeros((32,), tl.int64) + token
        tl.store(tokens + row * QUERY + j, value, mask=(row < rows) & (of == b))


@triton.jit
def resident(
    logits,  # [B, q, V] fp32
    uniform,  # [B, q] fp32
    temperature,  # [B] fp32
    top_k,  # [B] i64
    top_p,  # [B] fp32
    image,  # [R] i64
    tokens,  # [R, q] i64
    ROWS,
    QUERY: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,  # V rounded up to a power of 2
    DEPENDENT: tl.constexpr,
):
    """One token, in every row of its image. Grid: B * q."""
    at = tl.program_id(0)
    b = at // QUERY
    divisor = tl.maximum(tl.load(temperature + b), COLDEST)
    k, p, u = tl.load(top_k + b), tl.load(top_p + b), tl.load(uniform + at)
    code = tl.arange(0, WIDE)
    inside = code < V
    begin(DEPENDENT)
    y = scaled(logits + at.to(tl.int64) * V, code, inside, divisor)
    key = ordered(y, inside)
    mass = tl.exp(y - tl.max(y, 0))
    highest = tl.max(key, 0).to(tl.int64)
    lowest = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0).to(tl.int64)
    if (k > 0) & (k < V):
        low, high = lowest, highest + 1  # at least k codes are from low on, fewer from high on
        while high - low > 1:
            middle = middle_of(low, high)
            count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
            low = tl.where(count >= k, middle, low)
            # Exactly k: no further step changes which codes they are.
            high = tl.where(count == k, middle + 1, tl.where(count > k, high, middle))
        mass = tl.where(key >= low.to(tl.int32), mass, 0.0)
        key = tl.where(key >= low.to(tl.int32), key, LOWEST)
    if p < 1.0:
        total = tl.sum(mass, 0)
        limit = p * total
        if total > limit:
            low, high = lowest, highest + 1  # the codes from low on weigh more than the limit, those from high on not
            while high - low > 1:
                middle = middle_of(low, high)
                over = tl.sum(tl.where(key >= middle.to(tl.int32), mass, 0.0), 0) > limit
                low = tl.where(over, middle, low)
                high = tl.where(over, high, middle)
            edge = low.to(tl.int32)
            above = tl.sum(tl.where(key > edge, mass, 0.0), 0)
            tie = key == edge
            before = tl.cumsum(tie.to(tl.int32), 0) - 1  # ties of lower id
            stays = above + before.to(tl.float32) * mass <= limit
            key = tl.where((key > edge) | (tie & stays), key, LOWEST)
            mass = tl.where(key > LOWEST, mass, 0.0)
    sums = tl.cumsum(mass, 0)
    target = u * tl.max(sums, 0)
    possible = mass > 0.0
    first = tl.min(tl.where(possible & (sums > target), code, WIDE), 0)
    last = tl.max(tl.where(possible, code, 0), 0)
    put(tokens, image, tl.minimum(first, last).to(tl.int64), b, at % QUERY, ROWS, QUERY)


@triton.jit
def count_from(place, key, divisor, V: tl.constexpr, CHUNK: tl.constexpr):
    """How many codes of the row at ``place`` have at least this key."""
    count = tl.zeros((CHUNK,), tl.int32)
    for first in tl.range(0, V, CHUNK):
        code = first + tl.arange(0, CHUNK)
        inside = code < V
        count += (ordered(scaled(place, code, inside, divisor), inside) >= key).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def mass_from(place, key, kth, peak, divisor, V: tl.constexpr, CHUNK: tl.constexpr):
    """The mass of the codes that have at least this key and the key of the k-th."""
    mass = tl.zeros((CHUNK,), tl.float32)
    for first in tl.range(0, V, CHUNK):
        code = first + tl.arange(0, CHUNK)
        inside = code < V
        y = scaled(place, code, inside, divisor)
        of = ordered(y, inside)
        mass += tl.where((of >= key) & (of >= kth), tl.exp(y - peak), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def looped(
    logits,  # as of resident
    uniform,
    temperature,
    top_k,
    top_p,
    image,
    tokens,
    ROWS,
    QUERY: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,  # codes at a time
    DEPENDENT: tl.constexpr,
):
    """One token, in every row of its image. Grid: B * q."""
    at = tl.program_id(0)
    b = at // QUERY
    divisor = tl.maximum(tl.load(temperature + b), COLDEST)
    k, p, u = tl.load(top_k + b), tl.load(top_p + b), tl.load(uniform + at)
    place = logits + at.to(tl.int64) * V
    begin(DEPENDENT)
    largest = tl.full((CHUNK,), LOWEST, tl.int32)
    smallest = tl.full((CHUNK,), 0x7FFFFFFF, tl.int32)
    for first in tl.range(0, V, CHUNK):
        code = first + tl.arange(0, CHUNK)
        inside = code < V
        key = ordered(scaled(place, code, inside, divisor), inside)
        largest = tl.maximum(largest, key)
        smallest = tl.minimum(smallest, tl.where(inside, key, 0x7FFFFFFF))
    highest = tl.max(largest, 0)
    peak = tl.where(highest < 0, highest ^ 0x7FFFFFFF, highest).to(tl.float32, bitcast=True)
    lowest = tl.min(smallest, 0).to(tl.int64)
    kth = lowest
    if (k > 0) & (k < V):
        low, high = lowest, highest.to(tl.int64) + 1
        while high - low > 1:
            middle = middle_of(low, high)
            count = count_from(place, middle.to(tl.int32), divisor, V, CHUNK)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count == k, middle + 1, tl.where(count > k, high, middle))
        kth = low
    kth = kth.to(tl.int32)
    edge, limit, above = kth - 1, u * 0.0, u * 0.0
    if p < 1.0:
        total = mass_from(place, kth, kth, peak, divisor, V, CHUNK)
        limit = p * total
        if total > limit:
            low, high = lowest, highest.to(tl.int64) + 1
            while high - low > 1:
                middle = middle_of(low, high)
                over = mass_from(place, middle.to(tl.int32), kth, peak, divisor, V, CHUNK) > limit
                low = tl.where(over, middle, low)
                high = tl.where(over, high, middle)
            edge = low.to(tl.int32)
            above = mass_from(place, edge + 1, kth, peak, divisor, V, CHUNK)
    # Twice the same sums: their total, then where they pass the target.
    total = u * 0.0
    token = tl.full((), V, tl.int32)
    last = tl.full((), 0, tl.int32)
    target = u * 0.0
    for again in tl.static_range(2):
        sums = u * 0.0
        ties = tl.full((), 0, tl.int32)
        for first in tl.range(0, V, CHUNK):
            code = first + tl.arange(0, CHUNK)
            inside = code < V
            y = scaled(place, code, inside, divisor)
            key = ordered(y, inside)
            mass = tl.exp(y - peak)
            tie = (key == edge).to(tl.int32)
            before = ties + tl.cumsum(tie, 0) - 1
            ties += tl.sum(tie, 0)
            stays = (key > edge) | ((tie > 0) & (above + before.to(tl.float32) * mass <= limit))
            mass = tl.where(stays & (key >= kth), mass, 0.0)
            if again == 0:
                last = tl.maximum(last, tl.max(tl.where(mass > 0.0, code, 0), 0))
            else:
                passed = (mass > 0.0) & (sums + tl.cumsum(mass, 0) > target)
                token = tl.minimum(token, tl.min(tl.where(passed, code, V), 0))
            sums += tl.sum(mass, 0)
        target = u * sums
    put(tokens, image, tl.minimum(token, last).to(tl.int64), b, at % QUERY, ROWS, QUERY)
