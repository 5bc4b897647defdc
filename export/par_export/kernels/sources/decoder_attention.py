"""The decoder's attention: one head over all pixels of a map. Types, letters and DEPENDENT are those of ``decoder``."""

import triton
import triton.language as tl

from par_export.kernels.sources.step import begin, let_next


@triton.jit
def qkv(
    x,  # [B,M,C]
    w_q,  # [C,blocks*BK] each, packed by decoder_pack.pack_conv
    w_k,
    w_v,
    bias_q,  # [C] each, fp32
    bias_k,
    bias_v,
    out,  # [B,M,3C]
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Queries, keys and values of all pixels."""
    begin(DEPENDENT)
    TN: tl.constexpr = (C + BN - 1) // BN
    KB: tl.constexpr = (C + BK - 1) // BK
    m_tile = tl.program_id(0) // TN
    n_tile = tl.program_id(0) % TN
    part = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    w = w_q
    bias = bias_q
    if part == 1:
        w = w_k
        bias = bias_k
    if part == 2:
        w = w_v
        bias = bias_v
    w = tl.multiple_of(w, 16)
    rows = m_tile * BM + tl.arange(0, BM)
    m = tl.minimum(rows, M - 1)
    columns = n_tile * BN + tl.arange(0, BN)
    n = tl.minimum(columns, C - 1)
    k = tl.arange(0, BK)
    a = x + image * (M * C) + (m * C)[:, None] + k[None, :]
    b = w + (n * (KB * BK))[None, :] + k[:, None]
    value = tl.zeros((BM, BN), tl.float32)
    for i in range(KB):
        at = a + i * BK
        pixels = tl.load(at) if C % BK == 0 else tl.load(at, mask=(k < C - i * BK)[None, :], other=0.0)
        value = tl.dot(pixels, tl.load(b + i * BK), value, input_precision="tf32")
    let_next(DEPENDENT)
    value += tl.load(bias + n)[None, :]
    kept = (rows < M)[:, None] & (columns < C)[None, :]
    target = out + image * (3 * M * C) + part * C + (m * (3 * C))[:, None] + columns[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=kept)


@triton.jit
def attention(
    x,  # [B,M,3C]: queries, keys, values
    out,  # [B,M,C]
    M: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attention of BM pixels over all M, one head of C channels, with a running maximum. SCALE: C^-0.5 * log2(e)."""
    begin(DEPENDENT)
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tl.minimum(rows, M - 1)
    n = tl.arange(0, BN)
    c = tl.arange(0, BC)
    base = x + image * (3 * M * C)
    if C == BC:
        query = tl.load(base + (m * (3 * C))[:, None] + c[None, :])
    else:
        query = tl.load(base + (m * (3 * C))[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
    best = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(0, M, BN):
        at = tl.minimum(first + n, M - 1) * (3 * C)
        keys = base + C + at[None, :] + c[:, None]
        values = base + 2 * C + at[:, None] + c[None, :]
        if C == BC:
            key = tl.load(keys)
            value = tl.load(values)
        else:
            key = tl.load(keys, mask=(c < C)[:, None], other=0.0)
            value = tl.load(values, mask=(c < C)[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="tf32") * SCALE
        if M % BN:
            score = tl.where((first + n < M)[None, :], score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        share = tl.exp2(score - new[:, None])
        keep = tl.exp2(best - new)
        weight = weight * keep + tl.sum(share, 1)
        total = tl.dot(share.to(value.dtype), value, total * keep[:, None], input_precision="tf32")
        best = new
    let_next(DEPENDENT)
    total = total / weight[:, None]
    kept = (rows < M)[:, None]
    if C != BC:
        kept = kept & (c < C)[None, :]
    tl.store(out + image * (M * C) + (m * C)[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=kept)
