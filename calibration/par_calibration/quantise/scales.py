"""A scale for each block of a matrix, searched: the one whose rounding moves the products least.

The largest number of a block decides the scale of plain rounding. A smaller scale cuts that number off and rounds all
others finer. What an error costs depends on the input that it is multiplied with, so errors are weighted by the mean
square of each input over the recorded rows.

Letters: K rows of a matrix (its inputs), N columns, G = K/group blocks of a column.
"""

from __future__ import annotations

import numpy as np

from par_export.quantised import full_scale, rounded, stored_scales
from par_runtime.dtypes import Float
from par_runtime.quantised import LEAST_CODE, MOST_CODE, Quantised

#: How far below the largest number of a block its scale may be, in steps. Measured on models/demo: of int8 the best is
#: never below the last, of int4 in fewer than 1 of 1000 blocks.
FRACTIONS = {"int8": np.linspace(1, 0.86, 8), "int4": np.linspace(1, 0.5, 21)}
COLUMNS = 512  #: of a matrix that are searched at a time: its numbers then stay in a cache


def search(block: Float, dtype: str, importance: Float, stored: str) -> Float:
    """The scales [N] of one block [group,N] whose rows weigh ``importance`` [group], as numbers of dtype ``stored``."""
    full = full_scale(block, dtype, 0)
    best = stored_scales(full, stored)
    least = _loss(block, best, dtype, importance)
    for fraction in FRACTIONS[dtype][1:]:
        scales = stored_scales(full * np.float32(fraction), stored)
        loss = _loss(block, scales, dtype, importance)
        better = loss < least
        best = np.where(better, scales, best)
        least = np.where(better, loss, least)
    return best


def _loss(block: Float, scales: Float, dtype: str, importance: Float) -> Float:
    """The weighted squares of the rounding errors of each column: [N]."""
    error = np.clip(np.rint(block / scales), LEAST_CODE[dtype], MOST_CODE[dtype])
    error *= scales
    error -= block
    error *= error
    loss: Float = importance @ error
    return loss


def searched(matrix: Float, dtype: str, group: int, importance: Float, stored: str) -> Quantised:
    """``matrix`` [K,N] with a searched scale for each block, each number rounded to the nearest code.

    ``importance`` [K]: the mean square of each input. ``stored``: the dtype of the scales.
    """
    k, n = matrix.shape
    codes, scales = np.empty((k, n), np.int8), np.empty((k // group, n), np.float32)
    weight = importance.astype(np.float32)
    for first in range(0, n, COLUMNS):
        part = slice(first, first + COLUMNS)
        for block in range(k // group):
            rows = slice(block * group, (block + 1) * group)
            values = np.ascontiguousarray(matrix[rows, part])
            scales[block, part] = search(values, dtype, weight[rows], stored)
            codes[rows, part] = rounded(values, scales[block, part], dtype)
    return Quantised(dtype, codes, scales)
