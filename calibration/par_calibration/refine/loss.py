"""How far a model's distributions are from the original's, as a training wants it: all positions, guided and not."""

from __future__ import annotations

import torch
from torch import Tensor

GUIDED_SHARE = 1.0  #: of the guided divergence, added to the mean of those with and without class


def divergence(original: Tensor, other: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence, in nats, of the softmax of ``other`` [...,V] from that of ``original``."""
    first, second = original.float().log_softmax(-1), other.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean()


def distance(original: Tensor, other: Tensor, guidance: float) -> Tensor:
    """Of logits [2*B,N,V]: the first half with class, the second without. A number."""
    return divergence(original, other) + GUIDED_SHARE * divergence(guided(original, guidance), guided(other, guidance))


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Guided logits [B,N,V] of ``logits`` [2*B,N,V]; the formula of the graphs."""
    with_class, without = logits.float().chunk(2)
    return torch.lerp(without, with_class, guidance)
