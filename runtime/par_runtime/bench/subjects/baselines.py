"""The baselines: the model's own PyTorch generation, eager or compiled, and the same engine without parallel decoding.

Both need packages that the runtime does not import. They are looked up by name when they are asked for, as
``cli/dispatch.py`` looks up verbs.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from par_runtime.bench.subjects.base import Sample, SubjectInfo, spread_calls
from par_runtime.bench.subjects.pipeline import NOT_TIMED, bundle_info, guidance_scale
from par_runtime.bundle import Bundle
from par_runtime.cost.architecture import Architecture
from par_runtime.dtypes import BYTES
from par_runtime.errors import RequestError, how_to_install
from par_runtime.system import available_cores, peak_bytes


class EagerSubject:
    """``par_model.baseline.Baseline``: a model of a bundle's architecture, in this process.

    Raises RequestError where the 'export' extra is missing, BundleError.
    """

    def __init__(self, path: Path, label: str, *, threads: int | None, compiled: bool, device: str = "cpu") -> None:
        eager = optional("par_model.baseline", "the eager baseline", "Baseline")
        bundle = Bundle.open(path)
        began = time.perf_counter()
        self._eager: Any = eager(path, threads=threads, compiled=compiled, device=device)
        self.load_ms = 1e3 * (time.perf_counter() - began)
        self.selftest_ms, self.note = None, ""
        self._guidance = guidance_scale(bundle)
        architecture = Architecture.of(bundle)
        on_cpu = device == "cpu"
        computes = "fp32" if on_cpu else bundle.precision if bundle.precision in ("fp32", "bf16") else "fp16"
        self.info = SubjectInfo(
            **bundle_info(bundle, architecture),
            label=label,
            computes=computes,
            weight_bytes=BYTES[computes],
            cache_bytes=BYTES[computes],
            backend=str(self._eager.name),
            version=str(self._eager.version),
            device=device,
            clock="perf_counter" if on_cpu else "CUDA events",
            threads=threads or available_cores() if on_cpu else None,
            architecture=replace(architecture, head_dim=self._eager.head_width),
            excluded=(*NOT_TIMED, *_not_compiled(on_cpu)) if compiled else NOT_TIMED,
            pytorch=True,
        )

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Make one batch, or some of its calls; see ``Subject.run``."""
        chosen = spread_calls(self.info.architecture.phases, most_calls)
        calls_ms, image_ms = self._eager.run(images, self._guidance if guided else 1.0, calls=chosen)
        return Sample(calls_ms, image_ms, peak_bytes(), chosen is not None, self._eager.doubts)

    def forget(self) -> None:
        """Free the memory of the last batch."""
        self._eager.forget()

    def close(self) -> None:
        """Free the model."""
        self._eager = None


def _not_compiled(on_cpu: bool) -> tuple[str, ...]:
    """What the times of a compiled model leave out, beside what all leave out."""
    return ("compilation", "compilation of the decoder (it runs eagerly)") if on_cpu else ("compilation",)


def write_n1_bundle(path: Path, folder: Path) -> Path:
    """Write a bundle with n = 1 and random weights into ``folder``; everything else is as in the bundle at ``path``.

    Random weights take as long as trained ones. The bundle has no self-test. Returns the bundle's path. Raises
    RequestError where the 'export' extra is missing.
    """
    write_like = optional("par_export.random_bundle", "the n1 baseline", "write_like")
    return Path(write_like(path, group_size=1, out=folder))


def optional(module: str, what: str, name: str) -> Any:
    """Import ``name`` from ``module`` of an optional package, which ``what`` needs.

    Raises RequestError, which names the extra to install.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{what} needs {error.name}, which is not installed; {how_to_install('cpu,export')}"
        ) from error
