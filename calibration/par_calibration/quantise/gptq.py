"""GPTQ (Frantar et al., arXiv:2210.17323) for a matrix [K,N] whose scales belong to blocks of rows.

Rows are rounded one after another, and what a row loses is made up for, as far as the recorded inputs allow, by those
that are still to be rounded: the step that does so best follows from H = X^T X of the recorded rows X. A block's scale
is searched when its first row is reached, on what the earlier rows have left there. Blocks are taken in the order of
their weight, the heaviest first, and so are rows within a block; blocks stay whole, so the layout stays as it is.

All columns of a matrix have the same H. It is decomposed once, and columns are done in parts that stay in a cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from par_calibration.quantise.scales import search
from par_runtime.dtypes import Float, Int
from par_runtime.quantised import LEAST_CODE, MOST_CODE, Quantised

DAMPING = 0.03  #: of the mean of H's diagonal, added to it: the recorded rows are a sample, and H may be singular
LAZY = 128  #: rows whose errors are gathered before the rows behind them are changed; a multiple of every group
COLUMNS = 512

Double = NDArray[np.float64]


def hessian(rows: Float) -> Float:
    """H = X^T X / n of ``rows`` X [n,K]: [K,K]."""
    out: Float = rows.T @ rows
    out /= np.float32(max(1, len(rows)))
    return out


def order(diagonal: Float, group: int) -> Int:
    """The order [K] of rows: blocks by the sum of their ``diagonal`` [K], rows within a block by their own."""
    blocks = diagonal.reshape(-1, group)
    by_weight = np.argsort(-blocks.sum(1), kind="stable")
    within = np.argsort(-blocks[by_weight], axis=1, kind="stable")
    taken: Int = (by_weight[:, None] * group + within).reshape(-1)
    return taken


def factor(h: Float) -> Float:
    """The upper triangular U [K,K] with U^T U = (H + damping)^-1. Row k, over its diagonal, is how rows behind k
    make up for an error of row k.
    """
    damped = h.astype(np.float64)
    diagonal = np.einsum("kk->k", damped)
    diagonal += DAMPING * max(float(diagonal.mean()), 1e-30)
    # With H = L L^T of the reversed order, (H^-1) = U^T U for U = reversed L^-1: no inverse is decomposed again.
    lower: Double = np.linalg.cholesky(damped[::-1, ::-1]).astype(np.float64, copy=False)
    out: Float = _inverse_of_lower(lower)[::-1, ::-1].astype(np.float32)
    return out


def _inverse_of_lower(lower: Double) -> Double:
    """The inverse of a lower triangular matrix, by halves: products do nearly all of the work."""
    k = len(lower)
    if k <= 64:
        return np.tril(np.linalg.inv(lower))
    half = k // 2
    out = np.zeros_like(lower)
    out[:half, :half] = _inverse_of_lower(lower[:half, :half])
    out[half:, half:] = _inverse_of_lower(lower[half:, half:])
    out[half:, :half] = -out[half:, half:] @ (lower[half:, :half] @ out[:half, :half])
    return out


def gptq(matrix: Float, dtype: str, group: int, h: Float, stored: str) -> Quantised:
    """``matrix`` [K,N] in ``dtype``, for inputs with the second moments ``h`` [K,K]. ``stored``: of the scales."""
    k, n = matrix.shape
    diagonal = np.diagonal(h)
    taken = order(diagonal, group)
    upper = factor(h[np.ix_(taken, taken)])
    weight = np.ascontiguousarray(diagonal[taken])
    codes, scales = np.empty((k, n), np.int8), np.empty((k // group, n), np.float32)
    for first in range(0, n, COLUMNS):
        part = slice(first, first + COLUMNS)
        found, own = _columns(np.ascontiguousarray(matrix[taken, part]), dtype, group, upper, weight, stored)
        codes[taken, part] = found
        scales[taken[::group] // group, part] = own
    return Quantised(dtype, codes, scales)


def _columns(
    w: Float, dtype: str, group: int, upper: Float, weight: Float, stored: str
) -> tuple[NDArray[np.int8], Float]:
    """Codes [K,n] and scales [K/group,n] of columns ``w`` [K,n], which is overwritten; all in the order of rounding."""
    k, n = w.shape
    least, most = np.float32(LEAST_CODE[dtype]), np.float32(MOST_CODE[dtype])
    codes, scales = np.empty((k, n), np.int8), np.empty((k // group, n), np.float32)
    for begin in range(0, k, LAZY):
        end = min(begin + LAZY, k)
        errors = np.empty((end - begin, n), np.float32)
        for row in range(begin, end):
            if row % group == 0:
                scales[row // group] = search(w[row : row + group], dtype, weight[row : row + group], stored)
            scale = scales[row // group]
            code = np.clip(np.rint(w[row] / scale), least, most)
            codes[row] = code
            error = errors[row - begin]
            np.subtract(w[row], code * scale, out=error)
            error /= upper[row, row]
            stop = row // group * group + group
            if row + 1 < stop:  # the rest of its block at once, what is behind it when the block is done
                w[row + 1 : stop] -= upper[row, row + 1 : stop, None] * error
            if row + 1 == stop and stop < end:
                done = slice(stop - group - begin, stop - begin)
                w[stop:end] -= upper[stop - group : stop, stop:end].T @ errors[done]
        w[end:] -= upper[begin:end, end:].T @ errors
    return codes, scales
