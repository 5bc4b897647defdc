"""Small kernels: one that is right, and one that is not."""

# ruff: noqa: N803
import triton
import triton.language as tl


@triton.jit
def product(w, x, y, rows, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    total = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        a = tl.load(w + n[:, None] * K + (start + k)[None, :])
        b = tl.load(x + m[None, :] * K + (start + k)[:, None])
        total = tl.dot(a, b, total)
    tl.store(y + m[None, :] * N + n[:, None], total, mask=(m < rows)[None, :])


@triton.jit
def wrong_name(x, N: tl.constexpr):
    tl.store(x, not_there)  # noqa: F821
