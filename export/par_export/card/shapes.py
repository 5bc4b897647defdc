"""The part ``shapes``: how fast every kernel is in other shapes of tiles than the one that a build chooses.

Engines of several sets of shapes are loaded one after the other. First each computes a call on the numbers that all of
them get, and its logits are compared with those of set 0, which the part about kernels checks; what is wrong is not
timed. Then every kernel is timed by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from par_export.card.lines import check
from par_export.card.plan import label_of, shaped
from par_export.card.rows import LEAST_S
from par_export.card.session import GRACE_S, Session
from par_export.card.shape_sets import CALL, ShapeSet, among, contents_of, is_of, sets_of, tiles_of, tokens_family
from par_export.kernels.build import target
from par_export.kernels.contents import Contents
from par_export.kernels.plan import Planner
from par_export.kernels.step_weights import PRODUCTS
from par_export.kernels.targets import Target
from par_export.kernels.tiles import SOURCES
from par_export.quantised import Codes
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.process import SubjectProcess, open_random

#: Largest ||logits - logits of set 0|| / ||logits of set 0||. Sums in another order differ by rounding: in fp16 by
#: 5e-4, after 24 layers as after 2.
ALLOWED = 5e-3


class BuildSet(Protocol):
    """Puts the engine of a set, ``among`` those of its number, into the bundle at ``path``."""

    def __call__(self, path: Path, images: Sequence[int], *, planner: Planner, among: Path) -> None: ...


def shapes(session: Session, build: BuildSet) -> list[Row]:
    """Time the shapes of every model; there are no rows of them, but lines."""
    session.limits()
    subjects = shaped(session.options.models)
    families: dict[tuple[str, Codes | None], Future[Mapping[int, Path]]] = {}
    with ThreadPoolExecutor(1) as writer:  # one model is timed while the bundles of the next are written
        for model, _, codes in subjects:
            if (model.name, codes) not in families:
                families[model.name, codes] = writer.submit(tokens_family, model, codes, session.work)
        for model, n, codes in subjects:
            family = families[model.name, codes]
            label = label_of(model.name, n, str(codes) if codes else "")
            try:
                _time_sets(session, build, label, lambda family=family, n=n: family.result()[n])  # type: ignore[misc]
            except Exception as error:
                session.leave_out(f"shapes of {label}", error)
        for future in families.values():
            future.cancel()
    return []


def _time_sets(session: Session, build: BuildSet, label: str, write: Callable[[], Path]) -> None:
    """Every set of one bundle, as long as there is time."""
    if session.left < LEAST_S:
        session.leave_out(f"shapes of {label}", "time")
        return
    session.progress(f"shapes of {label}: the bundle is written")
    path, images = write(), session.options.images
    contents, card = contents_of(path), target("local", session.options.device)
    first: Mapping[int, NDArray[np.float32]] = {}
    for one in sets_of(contents, images, card):
        name = f"shapes of {label}: set {one.number}"
        if session.left < LEAST_S:
            session.leave_out(f"{name} and what follows", "time")
            return
        session.progress(name)
        try:
            shutil.rmtree(path / ENGINES, ignore_errors=True)
            build(path, images, planner=one, among=among(one.number))
            opened = partial(open_random, device=session.device, end=session.end + GRACE_S)
            with closing(opened(path, label)) as subject:
                logits = {batch: _logits(subject, batch, session.work) for batch in images}
                first = first or logits
                if _is_right(session, name, logits, first):
                    session.lines.extend(_lines(label, one, contents, card, images, subject))
        except Exception as error:
            session.leave_out(name, error)
            if not one.number:  # without it nothing says whether the others are right
                return
        session.keep()


def _logits(subject: SubjectProcess, images: int, folder: Path) -> NDArray[np.float32]:
    file = folder / "logits.npy"
    subject.logits(images, file)
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
        wanted = first[images].astype(np.float64)
        size, error = float(np.linalg.norm(wanted)), float(np.linalg.norm(found - wanted))
        relative = error / size if size and np.isfinite(found).all() else float("nan")
        passed = bool(relative <= ALLOWED)  # not where there is no number, or nothing but zeros
        text = f"error {relative:.2g} of the logits, allowed {ALLOWED:g}" if relative == relative else "no numbers"
        line = check(f"{name}, the logits of set 0 (batch {images})", passed, text)
        session.lines.append(line | {"error": relative if relative == relative else None, "allowed": ALLOWED})
        right &= passed
    return right


def _lines(
    label: str, one: ShapeSet, contents: Contents, card: Target, images: Sequence[int], subject: SubjectProcess
) -> Iterator[dict[str, Any]]:
    """A line for each kernel of a set and each batch: its shape, and what it takes."""
    (folder,) = (contents.bundle.path / ENGINES).iterdir()
    kernels = Engine.open(folder, contents.bundle).kernels
    assert kernels is not None
    for batch, tiles in tiles_of(contents, images, card, one).items():
        for timed in subject.kernels(batch, True, image=False):
            kind = kind_of(timed["source"], timed["of"])
            if kind is None or not one.changes(kind):
                continue
            tile, kernel = getattr(tiles, kind), kernels.kernels[timed["kernel"]]
            # Of a kind with two kernels one has matrices that stay numbers; and where the compiler refused a shape,
            # there is another one in its place.
            if is_of(tile, kernel):
                about = {"kind": "shape", "label": label, "images": batch, "set": one.number, "kernel": kind}
                facts = {"registers": kernel.registers, "shared": kernel.shared, "compiler": kernels.compiler}
                times = {name: timed[name] for name in ("count", "bytes", "samples_us")}
                yield about | {"words": one.words, "tile": asdict(tile)} | facts | times
        yield {
            "kind": "shape",
            "label": label,
            "images": batch,
            "set": one.number,
            "kernel": CALL,
            "words": one.words,
            "tile": {},
            "compiler": kernels.compiler,
            "count": 1,
            "bytes": 0,
            "samples_us": subject.call_us(batch),
        }


def kind_of(source: str, matrix: str) -> str | None:
    """The kind of product that a kernel is, by its source and its first matrix; None for other kernels."""
    if source == SOURCES["attention"]:
        return "attention"
    return PRODUCTS.get(matrix.rpartition(".")[2])
