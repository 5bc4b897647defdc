"""Milliseconds of work in PyTorch, by events on a GPU and by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def samples_ms(work: Callable[[], Any], repeats: int, device: torch.device, warm_ups: int = 3) -> list[float]:
    """The milliseconds that each of ``repeats`` runs of ``work`` takes on ``device``; ``warm_ups`` are not counted."""
    for _ in range(warm_ups):
        work()
    if device.type == "cpu":
        out = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            out.append(1e3 * (time.perf_counter() - began))
        return out
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return [float(a.elapsed_time(b)) for a, b in pairwise(events)]
