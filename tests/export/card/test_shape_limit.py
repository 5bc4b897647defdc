"""Where the limit of the part ``shapes`` lies: above what rounding makes in published models, far below a bug.

The step's arithmetic in PyTorch on a CPU: activations, queries, keys and values in fp16, sums in fp32, at full depth,
on random numbers as those of the part. ``pytest -s -m "slow or not slow"`` of this file prints the errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from par_export.card.shapes import ALLOWED, difference
from par_export.card.subject import STD
from par_model.config import named

ROWS, QUERY, KEYS, GUIDANCE = 2, 4, 300, 4.0
BUILT, OTHER, BUG = "as built", "sums in another order", "a key of 300 that no layer sees"


def half(x: Tensor) -> Tensor:
    return x.half().float()


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def attended(q: Tensor, k: Tensor, v: Tensor, who: str) -> Tensor:
    """Attention over all keys; in another order they are weighed by another maximum."""
    scores = q @ k.transpose(-1, -2)
    if who == BUG:
        scores[..., KEYS // 3] = -math.inf
    most = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - (most + 0.7 if who == OTHER else most))
    return half(half(weights) @ v / weights.sum(-1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["L", "XXL"])
def test_right_engines_stay_below_the_limit_and_a_missing_key_does_not(size: str) -> None:
    config, random = named(size), torch.Generator().manual_seed(0)
    d, heads, head, ffn = config.dim, config.n_heads, config.head_dim, config.ffn_dim

    def numbers(deviation: float, *shape: int) -> Tensor:
        return half(torch.empty(shape).uniform_(-1, 1, generator=random) * (3**0.5 * deviation))

    start = numbers(STD, ROWS * QUERY, d)
    x = {who: start.clone() for who in (BUILT, OTHER, BUG)}
    for _ in range(config.n_layers):
        wqkv, wo = numbers(STD, d, 3 * heads * head), numbers(STD, heads * head, d)
        w13, w2 = numbers(STD, d, 2 * ffn), numbers(STD, ffn, d)
        keys, values = (numbers(1.0, ROWS, heads, KEYS, head) for _ in range(2))
        for who, now in x.items():
            order = torch.arange(d - 1, -1, -1) if who == OTHER else torch.arange(d)
            h = half(normed(now))[:, order]
            q, k, v = (h @ wqkv[order]).view(ROWS, QUERY, 3, heads, head).permute(2, 0, 3, 1, 4)
            own_keys, own_values = (
                torch.cat([of[:, :, :-QUERY], half(new)], 2) for of, new in ((keys, k), (values, v))
            )
            y = attended(half(q * head**-0.5), own_keys, own_values, who)
            now = now + y.permute(0, 2, 1, 3).reshape(ROWS * QUERY, -1) @ wo
            gate, up = (half(normed(now))[:, order] @ w13[order]).chunk(2, -1)
            x[who] = now + half(torch.nn.functional.silu(gate) * up) @ w2
    output = numbers(STD, d, config.vocab_size)
    logits = {}
    for who, last in x.items():
        cond, uncond = (half(normed(last)) @ output).chunk(2)
        logits[who] = (uncond + GUIDANCE * (cond - uncond)).numpy()
    errors = {who: difference(logits[who], logits[BUILT])[0] for who in (OTHER, BUG)}
    print(f"{size}: {errors}")
    assert 1e-4 < errors[OTHER] < ALLOWED / 2
    assert errors[BUG] > 5 * ALLOWED
