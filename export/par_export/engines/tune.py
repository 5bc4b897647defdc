"""Which form of attention and which way of launching is the fastest on this GPU.

Each candidate is built and makes whole images in every capture mode; the fastest engine is kept, with what was
measured. A GPU is needed: kernels can be counted without one, but not timed.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from par_export.engines.build import build
from par_export.engines.request import BuildRequest, check_local_gpu
from par_export.engines.timing import batches_ms
from par_export.errors import BuildError
from par_export.graphs.step import Form
from par_runtime.backends import cuda
from par_runtime.backends.engines import CAPTURES, ENGINE_JSON, Engine
from par_runtime.backends.trt import backend as trt_backend
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle, seal
from par_runtime.pipeline import Pipeline
from par_runtime.system import naming, write_beside

#: (lengths, norm_after). A mask with the norm after the product is left out: lengths are at least as fast.
_VISIBLE_AND_NORM = ((True, False), (True, True), (False, False))


@dataclass(frozen=True)
class Timing:
    """One form in one capture mode at one batch size: the milliseconds of each timed batch."""

    form: Form
    capture: str
    images: int
    samples_ms: tuple[float, ...]

    @property
    def ms_per_image(self) -> float:
        """The median, per image."""
        return statistics.median(self.samples_ms) / self.images


def tune(
    request: BuildRequest,
    *,
    images: int = 1,
    repeats: int = 5,
    rounds: int = 2,
    index: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Build and time every candidate on GPU ``index``; keep the fastest for batches of ``images``. Returns its folder.

    Each of ``rounds`` times all candidates one after the other, with ``repeats`` batches, so that a GPU clock that
    drifts favours none. ``say`` receives lines of text for the user. Raises BuildError, BuildCancelledError,
    OutputError, BundleError, CudaError, TensorRTMissingError, OSError.
    """
    check_local_gpu(index, "tuning")
    if images not in request.images:
        raise BuildError(f"images {images}: the engine is built for {request.images}; give one of these")
    bundle = Bundle.open(request.bundle)
    folders: dict[Form, Path] = {}
    rows: list[Timing] = []
    try:
        for form in candidates(bundle.group_size):
            candidate = replace(
                request,
                grouped=form.grouped,
                lengths=form.lengths,
                norm_after=form.norm_after,
                label=f"tune-{'-'.join(option_words(form))}",
            )
            try:
                folders[form] = build(candidate, lambda _: None)
            except BuildError as error:  # this TensorRT or GPU has no kernel for it
                say(f"{' '.join(option_words(form))}: left out: {error}")
        if not folders:
            raise BuildError("no candidate could be built; the lines above give the reasons")
        for turn in range(rounds):
            for form, folder in folders.items():
                rows += _timings(bundle, form, folder, index, repeats)
                say(f"round {turn + 1} of {rounds}: {folder.name} done")
        rows = _merged(rows)
        best = min((row for row in rows if row.images == images), key=lambda row: row.ms_per_image)
        out = folders[best.form]
        _keep(out, best, rows)
        final = out.with_name(out.name.rpartition("-tune-")[0])
        shutil.rmtree(final, ignore_errors=True)
        out.rename(final)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    for line in table(rows, best):
        say(line)
    return final


def candidates(n: int) -> list[Form]:
    """The forms worth timing at ``n`` tokens per group."""
    forms = [Form(grouped, lengths, after) for grouped in (True, False) for lengths, after in _VISIBLE_AND_NORM]
    return [form for form in forms if n > 1 or not form.grouped]


def option_words(form: Form) -> tuple[str, str, str]:
    """The form, as the values of ``--attention``, ``--visible`` and ``--norm`` of ``parvis build``."""
    return (
        "grouped" if form.grouped else "plain",
        "lengths" if form.lengths else "mask",
        "after" if form.norm_after else "before",
    )


def table(rows: Sequence[Timing], best: Timing) -> list[str]:
    """The measurements as lines of text, the chosen one marked."""
    lines = [
        f"{'attention':10} {'visible':8} {'norm':7} {'capture':8} {'images':>6} {'ms per image':>13} {'min':>9} "
        f"{'max':>9}"
    ]
    for row in rows:
        attention, visible, norm = option_words(row.form)
        low, high = min(row.samples_ms) / row.images, max(row.samples_ms) / row.images
        lines.append(
            f"{attention:10} {visible:8} {norm:7} {row.capture:8} {row.images:6} {row.ms_per_image:13.2f} {low:9.2f} "
            f"{high:9.2f}{'  <- chosen' if row is best else ''}"
        )
    return lines


def _timings(bundle: Bundle, form: Form, folder: Path, index: int, repeats: int) -> list[Timing]:
    """Time ``repeats`` batches of every size in every capture mode, with the engine in ``folder``."""
    engine = Engine.open(folder, bundle)
    trt = trt_module.load(engine.runtime)
    out: list[Timing] = []
    for capture in CAPTURES:
        backend = trt_backend.load(bundle, engine, cuda.Device.open(index), trt, capture)
        try:
            pipeline = Pipeline(bundle, backend)
            pipeline.selftest()
            for size in engine.images:
                samples = batches_ms(pipeline, size, repeats)
                if backend.capturing == capture:  # otherwise the driver refused this mode, and another was measured
                    out.append(Timing(form, capture, size, samples))
        finally:
            backend.close()
    return out


def _merged(rows: Sequence[Timing]) -> list[Timing]:
    """One row per form, capture mode and batch size, with the samples of all rounds."""
    merged: dict[tuple[Form, str, int], tuple[float, ...]] = {}
    for row in rows:
        key = (row.form, row.capture, row.images)
        merged[key] = merged.get(key, ()) + row.samples_ms
    return [Timing(*key, samples) for key, samples in merged.items()]


def _keep(folder: Path, best: Timing, rows: Sequence[Timing]) -> None:
    """Write the choice and the measurements into the engine's description."""
    path = folder / ENGINE_JSON
    with naming(path):
        entry: dict[str, Any] = json.loads(path.read_text())
    del entry["hash"]
    entry["tuned"] = {
        "chosen": True,
        "capture": best.capture,
        "images": best.images,
        "rows": [asdict(row) | {"ms_per_image": row.ms_per_image} for row in rows],
    }
    text = json.dumps(seal(entry), indent=1)
    write_beside(path, lambda part: part.write_text(text))  # not in place: it may be a hard link to the engine cache's
