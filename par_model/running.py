"""What a compiled and timed model needs of PyTorch: a running sum, the reason why a compilation failed, a clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("par_model::running_sum", mutates_args=())
def running_sum(x: Tensor) -> Tensor:
    """The sums of ``x`` [...,V] along its last dimension up to each place: [...,V].

    It is an operator of its own, which ``torch.compile`` leaves alone, and computes what ``cumsum`` does. PyTorch
    2.11's compiler for CUDA fails on the sum over the codes of more than one position, or of more than one image ("list
    indices must be integers or slices, not NoneType": pytorch/pytorch#180221). Whatever compiles the step then fails as
    a whole. What the operator costs is that probabilities are written once and read again.
    """
    return x.cumsum(-1)


@running_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def reason_of(error: Exception) -> str:
    """The line of a compiler's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # The first line may only name the part of the compiler that raised.
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


class Clock:
    """Marks in time and the milliseconds between them: on the device's stream for CUDA, else on the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Set a mark after the work that was issued so far."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        """The milliseconds between neighbouring marks. Waits for the last mark."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            self._marks[-1].synchronize()
            return [float(a.elapsed_time(b)) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]
