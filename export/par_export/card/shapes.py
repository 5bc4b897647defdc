"""The part ``shapes``: how fast every kernel is in other shapes of tiles than the one that a build chooses.

Engines of several sets of shapes are loaded one after the other. First each computes a call on the numbers that all of
them get, and its logits are compared with those of set 0; what is wrong is not timed. Then every kernel is timed by
itself, and the whole call.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from par_export.card.lines import CALL, check
from par_export.card.plan import label_of, shaped
from par_export.card.prepare import among, ready_engine, tokens_family
from par_export.card.rows import LEAST_S
from par_export.card.session import GRACE_S, Session
from par_export.kernels.build import target
from par_export.kernels.contents import Contents
from par_export.kernels.plan import Planner
from par_export.kernels.shape_sets import ShapeSet, contents_of, is_of, sets_of, tiles_of
from par_export.kernels.step_weights import PRODUCTS
from par_export.kernels.targets import Target
from par_export.kernels.tile_model import model_us
from par_export.kernels.tile_shapes import SOURCES, numbers_of
from par_export.quantised import Codes
from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.process import SubjectProcess, open_random
from par_runtime.bundle import Bundle

#: Largest ||logits - logits of set 0|| / ||logits of set 0||. Sums in another order differ by rounding to fp16, layer
#: after layer; ``tests/export/card/test_shape_limit.py`` shows by how much, and what a missing key makes.
ALLOWED = 2e-2
#: Largest difference of one logit, in parts of their root mean square: a column of the head may be wrong alone.
MOST_OFF = 0.15
SET_S = 45.0  #: what a set may take; a kernel that never ends costs no more


class BuildSet(Protocol):
    """Puts the engine of a set, ``among`` those of its number, into the bundle at ``path``."""

    def __call__(self, path: Path, images: Sequence[int], *, planner: Planner, among: Path) -> None: ...


def shapes(session: Session, build: BuildSet) -> list[Row]:
    """Time the shapes of every model; there are no rows of them, but lines."""
    subjects = shaped(session.options.models)
    families: dict[tuple[str, Codes | None], Future[Mapping[int, Path]]] = {}
    # One model is timed while the bundles of the next are written. The card's context is held, so that the driver does
    # not close it down between two processes.
    with ThreadPoolExecutor(1) as writer, cuda.Device.open(session.options.device):
        for model, _, codes in subjects:
            if (model.name, codes) not in families:
                families[model.name, codes] = writer.submit(tokens_family, model, codes, session.work)
        session.limits()
        for model, n, codes in subjects:
            label = label_of(model.name, n, str(codes) if codes else "")
            try:
                _time_sets(session, build, label, families[model.name, codes], n)
            except Exception as error:
                session.leave_out(f"shapes of {label}", error)
        for future in families.values():
            future.cancel()
    return []


def _time_sets(session: Session, build: BuildSet, label: str, family: Future[Mapping[int, Path]], n: int) -> None:
    """Every set of the bundle of ``n`` of a family, as long as there is time."""
    if session.left < LEAST_S:
        session.leave_out(f"shapes of {label}", "time")
        return
    session.progress(f"shapes of {label}: the bundle is written")
    path, images = family.result()[n], session.options.images
    contents, card = contents_of(path), target("local", session.options.device)
    planned = _planned_for(session, contents.bundle)
    first: Mapping[int, NDArray[np.float32]] = {}
    for one in sets_of(contents, planned, card):
        name = f"shapes of {label}: set {one.number}"
        if session.left < LEAST_S:
            session.leave_out(f"{name} and what follows", "time")
            return
        session.progress(name)
        right = False
        try:
            shutil.rmtree(path / ENGINES, ignore_errors=True)
            build(path, planned, planner=one, among=among(one.engine))
            end = min(session.end, time.monotonic() + SET_S) + GRACE_S
            with closing(open_random(path, label, device=session.device, end=end, filled=False)) as subject:
                logits = {batch: _logits(session, name, subject, batch) for batch in images}
                first = first or logits
                right = _is_right(session, name, logits, first)
                if right:
                    session.lines.extend(_lines(session, label, one, contents, card, planned, subject))
        except Exception as error:
            session.leave_out(name, error)
        session.keep()
        if not one.number and not right:  # nothing says whether the others are right
            return


def _planned_for(session: Session, bundle: Bundle) -> Sequence[int]:
    """The batches that the sets of ``bundle`` are planned for: those that are timed, or all of a ready engine.

    The shapes for one batch depend on the others of its engine. So of ready engines for more batches than are timed,
    the sets are still those that were built.
    """
    engines, images = session.options.engines, session.options.images
    ready = None if engines is None else ready_engine(engines / among(0), bundle.path, images)
    return images if ready is None else Engine.open(ready, bundle).images


def _logits(session: Session, name: str, subject: SubjectProcess, images: int) -> NDArray[np.float32]:
    """The logits of a batch; whether they are the same bits in every call is a check."""
    file = session.work / "logits.npy"
    different = subject.logits(images, file)
    text = f"{different} calls more gave other bits"
    session.lines.append(check(f"{name}, the same bits in every call (batch {images})", not different, text))
    out: NDArray[np.float32] = np.load(file, allow_pickle=False)
    return out


def _is_right(
    session: Session,
    name: str,
    logits: Mapping[int, NDArray[np.float32]],
    first: Mapping[int, NDArray[np.float32]],
) -> bool:
    """Write down how far the logits of a set are from those of the first, by batch; whether they are near enough."""
    right = True
    for images, found in logits.items():
        relative, most = difference(found, first[images])
        if relative is None:
            passed, text = False, "not all are numbers, or all are zero"
        else:
            passed = relative <= ALLOWED and most <= MOST_OFF
            text = f"error {relative:.2g}, allowed {ALLOWED:g}; one logit by {most:.2g}, allowed {MOST_OFF:g}"
        line = check(f"{name}, the logits of set 0 (batch {images})", passed, text)
        session.lines.append(line | {"error": relative, "allowed": ALLOWED})
        right &= passed
    return right


def difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> tuple[float | None, float]:
    """The norm of the difference in that of ``wanted``, and the largest difference in its root mean square.

    The first is None where one is no number, or all are zero.
    """
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    off = found.astype(np.float64) - wanted
    if not size or not np.isfinite(off).all():
        return None, 0.0
    return float(np.linalg.norm(off)) / size, float(np.abs(off).max()) * wanted.size**0.5 / size


def _lines(
    session: Session,
    label: str,
    one: ShapeSet,
    contents: Contents,
    card: Target,
    planned: Sequence[int],
    subject: SubjectProcess,
) -> Iterator[dict[str, Any]]:
    """A line for each kernel of a set and each batch: its shape, and what it takes; and one for the whole call.

    ``planned``: the batches of its engine, of which those of the report are timed.
    """
    (folder,) = (contents.bundle.path / ENGINES).iterdir()
    kernels = Engine.open(folder, contents.bundle).kernels
    assert kernels is not None
    shapes_of = tiles_of(contents, planned, card, one, kernels.kernels)
    for batch, tiles in ((batch, shapes_of[batch]) for batch in session.options.images):
        about = {"kind": "shape", "label": label, "images": batch, "set": one.number, "words": one.words}
        about |= {"compiler": kernels.compiler}
        missing = set(one.shapes)
        for timed in subject.kernels(batch, True, image=False):
            kind, kernel = kind_of(timed["source"], timed["of"]), kernels.kernels[timed["kernel"]]
            tile = None if kind is None else getattr(tiles, kind)
            # A kernel without a kind has no other shapes. Of a kind with two kernels one has matrices that stay
            # numbers; and where the compiler refused a shape, there is another one in its place.
            if not one.words and (tile is None or kind not in one.shapes or not is_of(tile, kernel)):
                continue
            missing.discard(str(kind))
            facts = {name: timed[name] for name in ("count", "bytes", "samples_us")}
            facts |= {
                "registers": kernel.registers,
                "shared": kernel.shared,
                "squares": kernel.constants.get("TILES", 0),
            }
            if tile is not None:
                facts["model_us"] = model_us(contents.config, str(kind), tile, batch, one.card(card))
            yield about | {"kernel": kind or timed["source"], "tile": numbers_of(tile) if tile else {}} | facts
        yield about | {"kernel": CALL, "tile": {}, "count": 1, "bytes": 0, "samples_us": subject.call_us(batch)}
        for kind in sorted(missing):
            session.leave_out(f"shapes of {label}: {kind} of set {one.number}", "the compiler refused its shape")


def kind_of(source: str, matrix: str) -> str | None:
    """The kind of product that a kernel is, by its source and its first matrix; None for other kernels."""
    if source == SOURCES["attention"]:
        return "attention"
    return PRODUCTS.get(matrix.rpartition(".")[2])
