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

from par_export.kernels.sources.step import begin, let_next

COLDEST = tl.constexpr(1e-5)  #: the least temperature, as in the graphs
LOWEST = tl.constexpr(-(2**31))  #: the key of no number


@triton.jit
def scaled(place, code, inside, temperature):
    """Logits over temperature, rounded as a division is; 0 behind the codebook. No zero is negative.

    The reciprocal and two steps of Newton's method give the rounded quotient. The instruction for it would be a call
    for each number, with its registers saved.
    """
    logit = tl.load(place + code, mask=inside, other=0.0)
    reciprocal = tl.div_rn(1.0, temperature)
    y = logit * reciprocal
    y = tl.fma(tl.fma(-y, temperature, logit), reciprocal, y)
    y = tl.fma(tl.fma(-y, temperature, logit), reciprocal, y)
    return tl.where(y == 0.0, 0.0, y)


@triton.jit
def ordered(y, inside):
    """Integers in the order of the fp32 numbers ``y``."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def number(key):
    """The fp32 number of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def middle_of(low, high):
    return low + (high - low) // 2


@triton.jit
def settings(temperature, top_k, top_p, uniform, b, at):
    """What image ``b`` and the ``at``-th draw ask for."""
    divisor = tl.maximum(tl.load(temperature + b, cache_modifier=".cg"), COLDEST)
    k = tl.load(top_k + b, cache_modifier=".cg")
    return divisor, k, tl.load(top_p + b, cache_modifier=".cg"), tl.load(uniform + at, cache_modifier=".cg")


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
    WIDE: tl.constexpr,  # V rounded up to a power of 2, at least 16
    LINE: tl.constexpr,  # codes of a line, a power of 2, about the root of WIDE
    DEPENDENT: tl.constexpr,
):
    """One token, in every row of its image. Grid: B * q."""
    at = tl.program_id(0)
    b = at // QUERY
    divisor, k, p, u = settings(temperature, top_k, top_p, uniform, b, at)
    k = tl.minimum(tl.maximum(k, 0), V).to(tl.int32)
    code = tl.arange(0, WIDE)
    inside = code < V
    begin(DEPENDENT)
    let_next(DEPENDENT)
    y = scaled(logits + at.to(tl.int64) * V, code, inside, divisor)
    key = ordered(y, inside)
    peak = tl.max(tl.where(inside, y, float("-inf")), 0)
    mass = tl.where(inside, tl.exp(y - peak), 0.0)
    highest = tl.max(key, 0)
    lowest = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0)
    if (k > 0) & (k < V):
        # At least k codes are from low on, fewer from high on.
        low, high = lowest.to(tl.int64), highest.to(tl.int64) + 1
        while high - low > 1:
            middle = middle_of(low, high)
            # Counts are exact in fp32, and a sum of bits would be compiled into many more instructions.
            count = tl.sum(tl.where(key >= middle.to(tl.int32), 1.0, 0.0), 0).to(tl.int32)
            low = tl.where(count >= k, middle, low)
            # Exactly k: no further step changes which codes they are.
            high = tl.where(count == k, middle + 1, tl.where(count > k, high, middle))
        mass = tl.where(key >= low.to(tl.int32), mass, 0.0)
    if p < 1.0:
        total = tl.sum(mass, 0)
        limit = p * total
        if total > limit:
            # The codes from low on weigh more than the limit, those from high on do not.
            low, high = lowest.to(tl.int64), highest.to(tl.int64) + 1
            while high - low > 1:
                middle = middle_of(low, high)
                over = tl.sum(tl.where(key >= middle.to(tl.int32), mass, 0.0), 0) > limit
                low = tl.where(over, middle, low)
                high = tl.where(over, high, middle)
            edge = low.to(tl.int32)
            above = tl.sum(tl.where(key > edge, mass, 0.0), 0)
            edge = tl.where(above >= 0.0, edge, highest)  # always the first: so that the sums do not overlap
            each = tl.exp(number(edge) - peak)
            final = WIDE  # the last id of a tie that stays
            # By bisection too: sums up to every id would need more registers.
            if tl.sum(tl.where(key == edge, 1.0, 0.0), 0) > 1.0:
                final, behind = 0, WIDE
                while behind - final > 1:
                    center = (final + behind) // 2
                    ties = tl.sum(tl.where((key == edge) & (code < center), 1.0, 0.0), 0)
                    stays = above + ties * each <= limit
                    final = tl.where(stays, center, final)
                    behind = tl.where(stays, behind, center)
            mass = tl.where((key > edge) | ((key == edge) & (code <= final)), mass, 0.0)
    # Which line of codes, then which code of that line: a sum over all codes at once would need twice the registers.
    square = tl.reshape(mass, (WIDE // LINE, LINE))
    line, place = tl.arange(0, WIDE // LINE), tl.arange(0, LINE)
    weights = tl.sum(square, 1)
    sums = tl.cumsum(weights, 0)
    target = u * tl.max(sums, 0)
    there = tl.min(tl.where((weights > 0.0) & (sums > target), line, WIDE // LINE), 0)
    there = tl.minimum(there, tl.max(tl.where(weights > 0.0, line, 0), 0))
    before = tl.sum(tl.where(line == there - 1, sums, 0.0), 0)
    of_line = tl.sum(tl.where((line == there)[:, None], square, 0.0), 0)
    passed = (of_line > 0.0) & (before + tl.cumsum(of_line, 0) > target)
    first = tl.min(tl.where(passed, place, LINE), 0)
    token = there * LINE + tl.minimum(first, tl.max(tl.where(of_line > 0.0, place, 0), 0))
    put(tokens, image, token.to(tl.int64), b, at % QUERY, ROWS, QUERY)


@triton.jit
def count_from(place, key, divisor, V: tl.constexpr, CHUNK: tl.constexpr):
    """How many codes of the row at ``place`` have at least this key."""
    count = tl.zeros((CHUNK,), tl.float32)
    for first in tl.range(0, V, CHUNK):
        code = first + tl.arange(0, CHUNK)
        inside = code < V
        count += tl.where(ordered(scaled(place, code, inside, divisor), inside) >= key, 1.0, 0.0)
    return tl.sum(count, 0).to(tl.int64)


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
    divisor, k, p, u = settings(temperature, top_k, top_p, uniform, b, at)
    place = logits + at.to(tl.int64) * V
    begin(DEPENDENT)
    let_next(DEPENDENT)
    largest = tl.full((CHUNK,), LOWEST, tl.int32)
    smallest = tl.full((CHUNK,), 0x7FFFFFFF, tl.int32)
    for first in tl.range(0, V, CHUNK):
        code = first + tl.arange(0, CHUNK)
        inside = code < V
        key = ordered(scaled(place, code, inside, divisor), inside)
        largest = tl.maximum(largest, key)
        smallest = tl.minimum(smallest, tl.where(inside, key, 0x7FFFFFFF))
    highest = tl.max(largest, 0)
    peak = number(highest)
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
