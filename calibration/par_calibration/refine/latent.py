"""A quantised matrix in training: a real number behind each code, and the logarithm of each scale.

A code is its number rounded. Rounding has no gradient, so the number gets that of its code (straight-through); beyond
the ends of the codes it gets none. The gradients are written out here: the matrix itself is the leaf that PyTorch
knows, so that no graph of the rounding is kept in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from par_export.quantised import stored_scales
from par_runtime.dtypes import Float
from par_runtime.quantised import LEAST_CODE, MOST_CODE, Quantised

#: How far the numbers begin from GPTQ's codes, of the way to the original's: at 0 none of them is near to another code,
#: at 1 those that GPTQ had moved on purpose fall back at once. And at most so far, where a code is half a step away.
TOWARDS, NEAREST_EDGE = 0.5, 0.49


class Latent:
    """One matrix [K,N]. :attr:`numbers` [K/group,group,N] and :attr:`log_scales` [K/group,1,N] are trained."""

    def __init__(self, dtype: str, numbers: Tensor, log_scales: Tensor) -> None:
        self.dtype, self.numbers, self.log_scales = dtype, numbers, log_scales
        self.ends = (LEAST_CODE[dtype], MOST_CODE[dtype])

    @staticmethod
    def of(start: Quantised, matrix: Tensor) -> Latent:
        """Begin at the codes ``start`` of ``matrix`` [K,N] fp32."""
        blocks, columns = start.scales.shape
        scales = torch.from_numpy(start.scales.copy()).to(matrix.device)[:, None]
        codes = torch.from_numpy(start.codes).to(matrix.device).float().view(blocks, -1, columns)
        away = matrix.reshape(codes.shape) / scales - codes
        return Latent(start.dtype, codes + TOWARDS * away.clamp_(-NEAREST_EDGE, NEAREST_EDGE), scales.log())

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """What an optimiser changes, in place."""
        return self.numbers, self.log_scales

    def codes(self) -> Tensor:
        """[K/group,group,N] fp32."""
        return self.numbers.clamp(*self.ends).round_()

    def matrix(self) -> Tensor:
        """Codes times scales: [K,N] fp32."""
        return self.codes().mul_(self.log_scales.exp()).flatten(0, 1)

    def gradients(self, of_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Those of :attr:`trained`, for the gradient ``of_matrix`` [K,N]."""
        scaled = of_matrix.view(self.numbers.shape) * self.log_scales.exp()
        inside = (self.numbers >= self.ends[0]) & (self.numbers <= self.ends[1])
        return scaled * inside, (scaled * self.codes()).sum(1, keepdim=True)

    def quantised(self, stored: str) -> Quantised:
        """The result, with scales as numbers of the dtype ``stored``."""
        scales: Float = stored_scales(self.log_scales.exp()[:, 0].cpu().numpy(), stored)
        codes = self.codes().flatten(0, 1).to(torch.int8).cpu().numpy()
        return Quantised(self.dtype, np.ascontiguousarray(codes), scales)
