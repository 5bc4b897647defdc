"""The engines of a GPU's report, built on a machine that may have no GPU: ``--build-for SM90 --engines FOLDER``.

A report builds its engines itself, with the compiler that is on its machine. Built ahead they take none of its time,
and they may come from a newer Triton: 3.6, which PyTorch 2.11 brings, does not use SM90's widest matrix units for tiles
of 8 rows (n = 4, guided, one image), and keeps registers of a kernel with int4 in memory.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from par_export.card.lines import words
from par_export.card.plan import BATCHES, CODES_N, Model
from par_export.card.prepare import CHECKED_IMAGES, Builder, copies, family_of, ready_engine
from par_export.card.samples import Sample
from par_export.engines.cache import locked_file
from par_export.errors import BuildError
from par_export.kernels import build as kernels_build
from par_export.quantised import Codes
from par_runtime.backends.engines import ENGINES
from par_runtime.errors import RequestError

LOCK = ".lock"
SOURCES = "sources"  #: the file that says which sources the engines of a folder were built by
#: Of one bundle: its name, what writes it and returns its path, and the batches of its engine.
Wanted = tuple[str, Callable[[], Path], Sequence[int]]


def build_ahead(
    folder: Path,
    target: str,
    *,
    checked: Sequence[Path],
    samples: Sequence[Sample],
    codes: Sequence[Codes],
    models: Sequence[Model],
    work: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Build the engines of a report for ``target`` ("SM90") into ``folder``; returns what failed, a line each.

    The engine of the bundle NAME lies in ``folder/NAME/engines``. One that is there already, whole and of the same
    bundle, is kept, so that a build that was ended goes on where it was. ``work``: where bundles are written meanwhile.
    Raises OSError.
    """
    kernels_build.target(target)  # before anything is written
    _check_folder(folder)
    failed = []
    with (
        _alone(folder),
        tempfile.TemporaryDirectory(dir=work, prefix="parvis-gpu-") as temporary,
        Builder(target) as build,
    ):
        _begin(folder)
        for name, write, images in wanted(Path(temporary), checked, samples, codes, models):
            began = time.monotonic()
            try:
                path = write()
                if ready_engine(folder, path, images) is None:
                    build(path, images, folder / name / ENGINES)
            except OSError as error:  # a disk that is full stays full
                error.filename = error.filename or str(folder / name)
                raise
            except Exception as error:
                failed.append(f"{name}: {words(error)}")
                say(failed[-1])
                continue
            say(f"{name}: there after {time.monotonic() - began:.0f} s")
    return failed


def is_of_these_sources(folder: Path) -> bool:
    """Whether the engines in ``folder`` were built ahead by this version of the sources that decide what they are."""
    try:
        return (folder / SOURCES).read_text().strip() == kernels_build.sources()
    except (OSError, UnicodeDecodeError):
        return False


def check_sources(folder: Path) -> None:
    """Raise RequestError where engines in ``folder`` were built ahead by other sources than these.

    Compiling them again on the machine that is measured takes its time; so it is said before anything begins. A folder
    that does not say what built it was made by hand.
    """
    if (folder / SOURCES).exists() and not is_of_these_sources(folder):
        raise RequestError(
            f"--engines {folder}: built by other sources than this checkout's; build them again: "
            "parvis bench --suite gpu --build-for TARGET --engines FOLDER"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep ``folder`` from other builds. Raises BuildError where one is at work there. A killed process releases it."""
    try:
        with locked_file(folder / LOCK, wait=False):
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    except BlockingIOError as error:
        raise BuildError(
            f"{folder}: another build is at work there; wait for its end, or give another folder"
        ) from error


def _check_folder(folder: Path) -> None:
    """Make ``folder``, if it is not there. Raises BuildError where it holds something else, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [path for path in folder.iterdir() if path.name != LOCK]
    if others and not (folder / SOURCES).is_file():
        raise BuildError(f"{folder} holds other things than engines that were built ahead; give a new or empty folder")


def _begin(folder: Path) -> None:
    """Have no engines of other sources in ``folder``. Raises OSError."""
    if is_of_these_sources(folder):
        return
    for engines in folder.glob(f"*/{ENGINES}"):
        shutil.rmtree(engines)
    (folder / SOURCES).write_text(f"{kernels_build.sources()}\n")


def wanted(
    work: Path, checked: Sequence[Path], samples: Sequence[Sample], codes: Sequence[Codes], models: Sequence[Model]
) -> Iterator[Wanted]:
    """Every bundle that a report builds an engine of, the most valuable first; bundles are written in ``work``."""
    written: dict[tuple[str, Codes | None], Mapping[int, Path]] = {}

    def of(model: Model, n: int, kind: Codes | None) -> Path:
        key = (model.name, kind)
        if key not in written:
            written[key] = family_of(model, kind, work / "models")
        return written[key][n]

    for path, make in copies(checked, codes, work).items():
        yield path.name, partial(_made, path, make), CHECKED_IMAGES
    for kind in (None, *dict.fromkeys(codes for model in models for codes in model.codes)):
        for model in models:
            if kind is not None and kind not in model.codes:
                continue
            for n in model.group_sizes if kind is None else (CODES_N,):
                name = f"{model.family(kind)}-n{n}"
                yield name, partial(of, model, n, kind), BATCHES
    for sample in samples:
        yield f"{sample.name}-n{sample.n}", partial(sample.write, work / "samples" / sample.name), sample.images


def _made(path: Path, make: Callable[[], object]) -> Path:
    make()
    return path
