"""The baselines: the model's own PyTorch generation, eager or compiled, and the same engine without parallel decoding.

Both come from packages that the runtime does not know; they are found by name when asked for, as ``cli.py`` finds verbs.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from par_runtime.bench.subjects.base import Facts, Sample, Shape, spread_calls
from par_runtime.bench.subjects.pipeline import PIECES, guidance_of, known_of
from par_runtime.bundle import Bundle
from par_runtime.dtypes import BYTES
from par_runtime.errors import RequestError
from par_runtime.system import available_cores, peak_bytes


class EagerSubject:
    """``par_model.baseline.Baseline``, a model of a bundle's architecture, in this process."""

    def __init__(self, path: Path, label: str, *, threads: int | None, compiled: bool, device: str = "cpu") -> None:
        eager = found("par_model.baseline", "the eager baseline", "Baseline")
        bundle = Bundle.open(path)
        began = time.perf_counter()
        self._eager: Any = eager(path, threads=threads, compiled=compiled, device=device)
        self.load_ms = 1e3 * (time.perf_counter() - began)
        self.note = ""
        self._guidance = guidance_of(bundle)
        shape = Shape.of(bundle)
        on_cpu = device == "cpu"
        computes = "fp32" if on_cpu else bundle.precision if bundle.precision in ("fp32", "bf16") else "fp16"
        self.facts = Facts(
            **known_of(bundle, shape),
            label=label,
            computes=computes,
            weight_bytes=BYTES[computes],
            cache_bytes=BYTES[computes],
            backend=str(self._eager.name),
            version=str(self._eager.version),
            device=device,
            clock="perf_counter" if on_cpu else "CUDA events",
            threads=threads or available_cores() if on_cpu else None,
            shape=replace(shape, head_dim=bundle.model["head_dim"]),  # it does not pad
            excluded=(*PIECES, "compilation") if compiled else PIECES,
        )

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        chosen = spread_calls(self.facts.shape.phases, most_calls)
        calls_ms, image_ms = self._eager.run(images, self._guidance if guided else 1.0, calls=chosen)
        return Sample(calls_ms, image_ms, peak_bytes(), chosen is not None)

    def close(self) -> None:
        self._eager = None


def one_at_a_time(path: Path, folder: Path) -> Path:
    """A bundle of the architecture of that at ``path`` with n = 1 and random weights, which cost what any weights do.

    It is written into ``folder``. Its self-test means nothing. Raises RequestError where the 'export' extra is missing.
    """
    like = found("par_export.random_bundle", "the n1 baseline", "like")
    return Path(like(path, group_size=1, out=folder))


def found(module: str, what: str, name: str) -> Any:
    """``name`` of an optional package's ``module``. Raises RequestError that says which extra brings it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{what} needs {error.name}, which is not installed; pip install 'parvis[cpu,export]' (in a clone: "
            "pip install '.[cpu,export]')"
        ) from error
