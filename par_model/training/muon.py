"""Muon for CPUs that have no instructions for bf16: the optimizer of PyTorch, with its products in fp32.

PyTorch's makes each update orthogonal in bf16, whatever the weights are. A CPU without AVX-512 takes 100 times as long
for that as in fp32. State and options are PyTorch's, so a run goes on with either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with Nesterov momentum and its "original" rates, whose products are computed in fp32."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the weights once; ``closure`` is not supported.

        Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
        """
        if closure is not None:
            raise ValueError("closure: not supported; compute gradients before")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                wanted = p.grad.lerp(buffer, group["momentum"])
                update = orthogonal(wanted, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """``matrix`` [m,k] with singular values near 1: ``steps`` of x' = a x + (b g + c g g) x, where g = x x^T.

    The polynomial goes to 1 from any value in (0, 1], so the matrix is divided by its norm first, of ``eps`` or more.
    """
    a, b, c = coefficients
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
