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
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from par_export.card.lines import words
from par_export.card.plan import BATCHES, CODES_N, Model, shaped
from par_export.card.prepare import CHECKED_IMAGES, Builder, among, copies, family_of, ready_engine, tokens_family
from par_export.card.product_files import compiled
from par_export.card.products import trials_for
from par_export.card.samples import Sample
from par_export.engines.cache import locked_file
from par_export.errors import BuildError
from par_export.kernels import build as kernels_build
from par_export.kernels.plan import Planner, plan
from par_export.kernels.shape_sets import CHANGES, SETS, contents_of, sets_of
from par_export.quantised import Codes
from par_runtime.backends.engines import ENGINES
from par_runtime.bench.suites.gpu import KERNELS, PRODUCTS, SHAPES
from par_runtime.checked import read_regular
from par_runtime.errors import RequestError

#: Writes the bundles of a model, with quantised weights or not; n -> path.
Families = Callable[[Model, Codes | None], Mapping[int, Path]]
LOCK = ".lock"
SOURCES = "sources"  #: the file that says which sources the engines of a folder were built by


@dataclass(frozen=True)
class Wanted:
    """The engine of the bundle ``name``, which ``write`` writes and returns the path of, for batches of ``images``.

    It lies in the folder ``among`` of all of them. ``planner`` of that path: None where there is nothing to build.
    """

    name: str
    write: Callable[[], Path]
    images: Sequence[int]
    among: Path = Path()
    planner: Callable[[Path], Planner | None] = lambda _: plan

    def __str__(self) -> str:
        """As the report calls it: "PAR-L-n4", "PAR-L-n4 shapes/3"."""
        return f"{self.name} {self.among}" if self.among.parts else self.name


def build_ahead(
    folder: Path,
    target: str,
    *,
    checked: Sequence[Path],
    samples: Sequence[Sample],
    codes: Sequence[Codes],
    models: Sequence[Model],
    parts: Sequence[str] = (KERNELS,),
    images: Sequence[int] = BATCHES,
    work: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Build the engines of a report of ``parts``, with rows of batches of ``images``, for ``target`` ("SM90") into
    ``folder``; returns what failed, a line each.

    The engine of the bundle NAME lies in ``folder/NAME/engines``, that with set 3 of shapes of tiles in
    ``folder/shapes/3/NAME/engines``; single products lie in ``folder/products``. What is there already, whole and of
    the same bundle, is kept, so that a build that was ended goes on where it was. ``work``: where bundles are written
    meanwhile. Raises OSError.
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
        work = Path(temporary)
        engines = [*wanted(work, checked, samples, codes, models, images)] if KERNELS in parts else []
        engines += wanted_sets(work, models, target, images) if SHAPES in parts else []
        for one in engines:
            began, into = time.monotonic(), folder / one.among
            try:
                path = one.write()
                planner = one.planner(path)
                if planner is None:
                    continue
                if ready_engine(into, path, one.images) is None:
                    build(path, one.images, into / one.name / ENGINES, planner=planner)
            except OSError as error:  # a disk that is full stays full
                error.filename = error.filename or str(into / one.name)
                raise
            except Exception as error:
                failed.append(f"{one}: {words(error)}")
                say(failed[-1])
                continue
            say(f"{one}: there after {time.monotonic() - began:.0f} s")
        if PRODUCTS in parts:
            failed += _products(folder / PRODUCTS, models, target, images, say)
    return failed


def _products(
    folder: Path, models: Sequence[Model], target: str, images: Sequence[int], say: Callable[[str], None]
) -> list[str]:
    """The kernels of the part about single products; what failed, a line. Raises OSError."""
    began, card = time.monotonic(), kernels_build.target(target)
    try:
        found = compiled(folder, trials_for(models, images, card), card, say=say)
    except BuildError as error:
        say(text := f"{PRODUCTS}: {words(error)}")
        return [text]
    left_out = f", without {len(found.refused)} that cannot run well" if found.refused else ""
    say(f"{PRODUCTS}: {len(found.kernels)} kernels{left_out}, there after {time.monotonic() - began:.0f} s")
    return []


def is_of_these_sources(folder: Path) -> bool:
    """Whether the engines in ``folder`` were built ahead by this version of the sources that decide what they are."""
    try:
        return read_regular(folder / SOURCES, 1000, OSError).decode().strip() == kernels_build.sources()
    except (OSError, UnicodeDecodeError):
        return False


def check_sources(folder: Path) -> None:
    """Raise RequestError where engines in ``folder`` were built ahead by other sources than these.

    Compiling them again on the machine that is measured takes its time; so it is said before anything begins. A folder
    that does not say what built it was made by hand.
    """
    if (folder / SOURCES).exists() and not is_of_these_sources(folder):
        more = [part for part in (SHAPES, PRODUCTS) if (folder / part).is_dir()]
        parts = f" --parts {' '.join((KERNELS, *more))}" if more else ""
        raise RequestError(
            f"--engines {folder}: built by other sources than this checkout's; build them again: "
            f"parvis bench --suite gpu --build-for TARGET --engines FOLDER{parts}"
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
    for engines in [*folder.glob(f"*/{ENGINES}"), *folder.glob(f"{among(0).parent}/*/*/{ENGINES}")]:
        shutil.rmtree(engines)
    shutil.rmtree(folder / PRODUCTS, ignore_errors=True)
    (folder / SOURCES).write_text(f"{kernels_build.sources()}\n")


def wanted(
    work: Path,
    checked: Sequence[Path],
    samples: Sequence[Sample],
    codes: Sequence[Codes],
    models: Sequence[Model],
    images: Sequence[int] = BATCHES,
) -> Iterator[Wanted]:
    """Every engine of the part about kernels, the most valuable first; bundles are written in ``work``.

    ``images``: of those that rows are made of; checks have batches of their own.
    """
    families = cache(partial(family_of, folder=work / "models"))
    for path, make in copies(checked, codes, work).items():
        yield Wanted(path.name, partial(_made, path, make), CHECKED_IMAGES)
    for kind in (None, *dict.fromkeys(codes for model in models for codes in model.codes)):
        for model in models:
            if kind is not None and kind not in model.codes:
                continue
            for n in model.group_sizes if kind is None else (CODES_N,):
                name = f"{model.family(kind)}-n{n}"
                yield Wanted(name, partial(_member, families, model, kind, n), images)
    for sample in samples:
        write = partial(sample.write, work / "samples" / sample.name)
        yield Wanted(f"{sample.name}-n{sample.n}", write, sample.images)


def wanted_sets(work: Path, models: Sequence[Model], target: str, images: Sequence[int] = BATCHES) -> Iterator[Wanted]:
    """Every engine of the part about shapes of tiles: those of the models that matter most first, set by set."""
    card = kernels_build.target(target)
    families = cache(partial(tokens_family, folder=work / SHAPES))
    sets = cache(lambda path: sets_of(contents_of(path), images, card))

    def planner(number: int, path: Path) -> Planner | None:
        return next((one for one in sets(path) if one.number == one.engine == number), None)

    for model, n, kind in shaped(models):
        name, write = f"{model.family(kind)}-n{n}", partial(_member, families, model, kind, n)
        for number in range(SETS + len(CHANGES)):
            yield Wanted(name, write, images, among(number), partial(planner, number))


def _member(families: Families, model: Model, kind: Codes | None, n: int) -> Path:
    return families(model, kind)[n]


def _made(path: Path, make: Callable[[], object]) -> Path:
    make()
    return path
