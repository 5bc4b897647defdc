"""Running sums that ``torch.compile`` leaves alone: an operator of its own, which computes what ``cumsum`` does.

PyTorch 2.11's compiler for CUDA fails on the sum over the codes of more than one position, or of more than one image
("list indices must be integers or slices, not NoneType": pytorch/pytorch#180221). Whatever compiles the step then fails
as a whole. What the operator costs is that probabilities are written once and read again.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("par_model::running_sum", mutates_args=())
def running_sum(x: Tensor) -> Tensor:
    """The sums of ``x`` [...,V] along its last dimension up to each place: [...,V]."""
    return x.cumsum(-1)


@running_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
