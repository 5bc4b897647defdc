"""Detail of low contrast: a part of the tokenizer's loss that keeps it, and a number that says how much is kept.

A dark mouth on dark skin differs from it by a few grey levels, so L1 and L2 lose little when it vanishes. The
structural part of SSIM (Wang et al. 2004) compares an image with its reconstruction window by window, and divides by
the contrast that the window has: a feature that vanishes costs nearly the same at any contrast. SSIM's other factor,
the brightness of a window, is left to L1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7  #: pixels of a side
FLOOR = 0.06**2  #: variance below which contrast is taken for noise: SSIM's usual one, 3 % of the range of [-1,1]
LOW, HIGH = 0.02, 0.16  #: standard deviations in a window between which detail counts as of low contrast


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images ``x`` and ``y`` [B,C,H,W] in [-1,1] around each pixel: [B,C,H,W], at most 1."""
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = (local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2).clamp_min(0)
    covariance = local_mean(x * y) - mean_x * mean_y
    return (2 * covariance + FLOOR) / (variances + FLOOR)


def local_mean(x: Tensor) -> Tensor:
    """Mean of the window around each pixel of ``x`` [B,C,H,W], which is continued by its edge: [B,C,H,W]."""
    side = WINDOW // 2
    return F.avg_pool2d(F.pad(x, (side, side, side, side), mode="replicate"), WINDOW, 1)


def low_contrast(x: Tensor, y: Tensor) -> Tensor:
    """How much of the low-contrast detail of ``x`` [B,C,H,W] in [-1,1] is in ``y``: a sum, and the sum of all: [2].

    Detail is what differs from the mean of the window. The quotient of the two sums, over any number of images, is 1
    where all of it is there, and 0 where it vanished or stands elsewhere.
    """
    mean = local_mean(x)
    contrast = (local_mean(x * x) - mean**2).clamp_min(0).mean(1, keepdim=True).sqrt()
    within = (contrast > LOW) & (contrast < HIGH)
    detail, kept = (x - mean) * within, y - local_mean(y)
    return torch.stack([(detail * kept).sum(), (detail * detail).sum()])
