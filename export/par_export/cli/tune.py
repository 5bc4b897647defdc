"""``parvis tune``: which form of attention and which way of launching is the fastest on this GPU.

Builds each candidate, makes whole images with it in every capture mode, and keeps the fastest engine with what was
measured. A GPU is needed: kernels can be counted without one, but not timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from par_export.cli.build import count, counts, sizes_up_to
from par_export.engines.build import Request, build
from par_export.engines.network import BuildCancelledError, BuildError
from par_export.graphs.step import Form
from par_export.staging import TargetError
from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINE_JSON, Engine
from par_runtime.backends.trt import module as trt_module
from par_runtime.backends.trt.backend import Capture, TrtBackend
from par_runtime.bundle import Bundle, seal
from par_runtime.cli.common import Parser
from par_runtime.dtypes import PRECISIONS
from par_runtime.errors import BundleError, CudaError, TensorRTMissingError
from par_runtime.pipeline import Pipeline

CAPTURES: tuple[Capture, ...] = ("image", "call", "none")


@dataclass(frozen=True)
class Row:
    """One candidate at one batch size: milliseconds per batch, raw."""

    form: Form
    capture: str
    images: int
    samples_ms: tuple[float, ...]

    @property
    def ms_per_image(self) -> float:
        return statistics.median(self.samples_ms) / self.images


def tune(
    request: Request,
    *,
    images: int = 1,
    repeats: int = 5,
    rounds: int = 2,
    index: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Build and time every candidate; keep the fastest for batches of ``images``. Returns its folder.

    Candidates are timed in turn, ``rounds`` times over, so that a clock that drifts does not favour one.
    Raises BuildError, BundleError, CudaError.
    """
    if cuda.device_count() <= index:
        raise BuildError(f"tuning needs a GPU: {cuda.why_no_device() or f'there is no GPU {index}'}")
    if images not in request.images:
        raise BuildError(f"images {images}: the engine is built for {request.images}; give one of these")
    bundle = Bundle.open(request.bundle)
    folders: dict[Form, Path] = {}
    rows: list[Row] = []
    try:
        for form in candidates(bundle.group_size):
            candidate = replace(
                request,
                grouped=form.grouped,
                lengths=form.lengths,
                norm_after=form.norm_after,
                label=f"tune-{'-'.join(words(form))}",
            )
            try:
                folders[form] = build(candidate, lambda _: None)
            except BuildError as error:  # this TensorRT or GPU has no kernel for it
                say(f"{' '.join(words(form))}: left out: {error}")
        if not folders:
            raise BuildError("no candidate could be built; the lines above say why")
        for turn in range(rounds):
            for form, folder in folders.items():
                found = _time(bundle, folder, index, repeats)
                rows += [Row(form, capture, size, samples) for (capture, size), samples in found.items()]
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


#: A mask with the norm after the product is left out: lengths are better wherever both exist, or no worse.
_VISIBLE_AND_NORM = ((True, False), (True, True), (False, False))


def words(form: Form) -> tuple[str, str, str]:
    """The form in the words of ``parvis build``'s options."""
    return (
        "grouped" if form.grouped else "plain",
        "lengths" if form.lengths else "mask",
        "after" if form.norm_after else "before",
    )


def table(rows: Sequence[Row], best: Row) -> list[str]:
    """The measurements as lines of text, the chosen one marked."""
    lines = [
        f"{'attention':10} {'visible':8} {'norm':7} {'capture':8} {'images':>6} {'ms per image':>13} {'min':>9} {'max':>9}"
    ]
    for row in rows:
        attention, visible, norm = words(row.form)
        low, high = min(row.samples_ms) / row.images, max(row.samples_ms) / row.images
        lines.append(
            f"{attention:10} {visible:8} {norm:7} {row.capture:8} {row.images:6} {row.ms_per_image:13.2f} {low:9.2f} "
            f"{high:9.2f}{'  <- chosen' if row is best else ''}"
        )
    return lines


def _time(bundle: Bundle, folder: Path, index: int, repeats: int) -> dict[tuple[str, int], tuple[float, ...]]:
    engine = Engine.open(folder, bundle)
    trt = trt_module.load(engine.runtime)
    out: dict[tuple[str, int], tuple[float, ...]] = {}
    for capture in CAPTURES:
        backend = TrtBackend(bundle, engine, cuda.Device.open(index), trt, capture)
        try:
            pipeline = Pipeline(bundle, backend)
            pipeline.selftest()
            for size in engine.images:
                labels = [i % bundle.n_classes for i in range(size)]
                samples = []
                for repeat in range(repeats + 1):
                    started = time.perf_counter()
                    pipeline.generate(labels, seed=repeat, guidance=1.5)
                    samples.append(1e3 * (time.perf_counter() - started))
                if backend.capturing == capture:  # else the driver refused it, and another mode was measured
                    out[capture, size] = tuple(samples[1:])  # the first one captures
        finally:
            backend.close()
    return out


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row per candidate, with the samples of all rounds."""
    merged: dict[tuple[Form, str, int], tuple[float, ...]] = {}
    for row in rows:
        key = (row.form, row.capture, row.images)
        merged[key] = merged.get(key, ()) + row.samples_ms
    return [Row(*key, samples) for key, samples in merged.items()]


def _keep(folder: Path, best: Row, rows: Sequence[Row]) -> None:
    """Write the choice and the measurements into the engine's description."""
    path = folder / ENGINE_JSON
    entry: dict[str, Any] = json.loads(path.read_text())
    del entry["hash"]
    entry["tuned"] = {
        "chosen": True,
        "capture": best.capture,
        "images": best.images,
        "rows": [asdict(row) | {"ms_per_image": row.ms_per_image} for row in rows],
    }
    part = folder / f".{ENGINE_JSON}.part"  # not in place: the file may be one with the engine cache's
    part.write_text(json.dumps(seal(entry), indent=1))
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    request = Request(
        args.bundle,
        "local",
        precision=args.precision,
        images=args.sizes or sizes_up_to(args.max_images),
        mode=args.engines,
    )
    try:
        folder = tune(
            request,
            images=args.images,
            repeats=args.repeats,
            rounds=args.rounds,
            index=args.gpu,
            say=(lambda _: None) if args.json else lambda line: print(line, flush=True),
        )
    except (BuildError, BundleError, CudaError, TargetError, TensorRTMissingError, OSError) as error:
        print(f"parvis: error: {error}", file=sys.stderr)
        return 2
    except (BuildCancelledError, KeyboardInterrupt):
        print("\nparvis: stopped; the bundle's engines are as they were", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({"engine": str(folder), **json.loads((folder / ENGINE_JSON).read_text())["tuned"]}))
    else:
        print(f"{folder}: kept; 'parvis generate' takes it from now on")
    return 0


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis tune",
        description="Build the engine of a bundle for this machine's GPU in every form, time whole images with each in every "
        "capture mode, and keep the fastest. Needs the GPU.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    p.add_argument("--images", type=count, default=1, help="batch size to be fastest at (default: 1)")
    p.add_argument("--max-images", type=count, default=8, help="largest batch to build for (default: 8)")
    p.add_argument("--sizes", type=counts, help="batch sizes to build for, with commas, instead of --max-images")
    p.add_argument("--precision", choices=PRECISIONS, help="default: the bundle's")
    p.add_argument("--engines", choices=["shared", "per-phase"], default="shared")
    p.add_argument("--repeats", type=count, default=5, help="timed batches per candidate and round (default: 5)")
    p.add_argument("--rounds", type=count, default=2, help="times every candidate comes up (default: 2)")
    p.add_argument("--gpu", type=int, default=0, help="number of the GPU (default: 0)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
