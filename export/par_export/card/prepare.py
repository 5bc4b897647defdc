"""What a report needs before it can measure: bundles of random weights, engines for this GPU, PyTorch's twins compiled.

All of it takes processors and hardly the GPU, so it goes on in threads while the checks run. What is measured then is
measured while it is paused (:meth:`Preparation.quiet`).
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from par_export.card.plan import CODES_N, COMPILED, TWINS, Model, label_of, shaped, valuable_first
from par_export.kernels.build import Build, target
from par_export.kernels.compiler import Compiler
from par_export.kernels.plan import Planner, plan
from par_export.kernels.shape_sets import contents_of
from par_export.quantised import Codes, quantised_with, write_bundle
from par_export.random_bundle import NoTensors, write_family
from par_export.weights import parameters
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.bench.subjects.base import OutOfTimeError
from par_runtime.bench.subjects.process import SubjectProcess, open_eager
from par_runtime.bench.suites.gpu import SHAPES
from par_runtime.bundle import WEIGHTS, Bundle
from par_runtime.dtypes import DTYPE
from par_runtime.errors import EngineError, RequestError
from par_runtime.system import available_cores

TWINS_AT_ONCE = 9  #: that compile, with two processors for each
EAGER_AT_ONCE = 2
PRECISION = "fp16"
CHECKED_IMAGES = (1, 2, 4)  #: batches of the engines whose whole images are checked
QUANTISED = "quantised"  #: the folder of copies with quantised weights
CONTEXT_BYTES = 600_000_000  #: what a process of PyTorch takes of a GPU beside its tensors
CODES_PART = 0.6  #: of the bytes of fp16, at most, that quantised weights have
FILLED = 0.9  #: of a GPU's memory, at most, by weights
KEPT_TWINS = (1, 4)  #: the n of twins that figures to reach are compared with
#: Calls of a twin that are not counted: compilation, and the first ones.
WARM_CALLS = 24
#: How often these are tried where memory is short, and the seconds between two tries.
WARM_TRIES, WARM_AGAIN_S = 6, 8.0
COMPILE_THREADS = 2  #: of each twin; PyTorch would take one for each processor, and all twins compile at once


class MakeEngine(Protocol):
    """Makes an engine of the bundle at ``path``, for batches of ``images``, as ``planner`` plans it."""

    def __call__(self, path: Path, images: Sequence[int], *, planner: Planner = ...) -> None: ...


@dataclass
class Twin:
    """A model in PyTorch that has made calls in every batch, but for those of which it says why not."""

    process: SubjectProcess
    failed: Mapping[int, Exception]


class Preparation:
    """Bundles, engines and twins of ``models``, in their order, in the folder ``work``.

    ``build`` makes the engines, of batches of ``images``; ``device`` is PyTorch's; ``end``: of the whole report, by
    ``time.monotonic``. A twin that is ready holds its weights alone: caches of all at once would not fit into a GPU of
    80 GB. Those that compile leave the processors to others until :meth:`usual_priority`.
    """

    def __init__(
        self, models: Sequence[Model], work: Path, build: MakeEngine, images: Sequence[int], device: str, end: float
    ) -> None:
        self._work, self._build, self._images, self._device, self._end = work, build, images, device, end
        self._closed = threading.Event()
        self._twins: list[SubjectProcess] = []
        self._lock = threading.Lock()
        # With the lock: whether nothing may be at work, the twins that are, and whether these may disturb others.
        self._is_quiet, self._at_work, self._yields = False, set[SubjectProcess](), True
        twins = max(2, min(TWINS_AT_ONCE, available_cores() // 2))
        self._pools = [ThreadPoolExecutor(count) for count in (1, 1, twins, EAGER_AT_ONCE)]
        writer, builder, compilers, openers = self._pools
        #: The engines' bundles by label, and the twins by (model, n, twin).
        self.engines: dict[str, Future[Path]] = {}
        self.twins: dict[tuple[str, int, str], Future[Twin]] = {}
        for model in models:
            written = writer.submit(self._write, model)
            for n in valuable_first(model.group_sizes) if model.ours else ():
                self.engines[label_of(model.name, n)] = builder.submit(self._engine, written, n)
            for twin in TWINS:
                pool = compilers if twin == COMPILED else openers
                for n in valuable_first(model.twins):
                    self.twins[model.name, n, twin] = pool.submit(self._twin, written, model, n, twin)
        for model in models:  # after all others: where there are few processors, these are what there is no time for
            for codes in model.codes:
                written = writer.submit(self._write, model, codes)
                label = label_of(model.name, CODES_N, str(codes))
                self.engines[label] = builder.submit(self._engine, written, CODES_N)

    def _write(self, model: Model, codes: Codes | None = None) -> Mapping[int, Path]:
        self._check()
        return family_of(model, codes, self._work)

    def _engine(self, written: Future[Mapping[int, Path]], n: int) -> Path:
        path = written.result()[n]
        self._check()
        self._build(path, self._images)
        return path

    def _twin(self, written: Future[Mapping[int, Path]], model: Model, n: int, twin: str) -> Twin:
        path = written.result()[n]
        self._check()
        label = label_of(model.name, n, twin)
        compiled = twin == COMPILED
        own: list[SubjectProcess] = []

        def started(process: SubjectProcess) -> None:
            own.append(process)
            self._begins(process, compiled)

        try:
            process = open_eager(
                path,
                label,
                compiled=compiled,
                device=self._device,
                end=self._end,
                compile_threads=COMPILE_THREADS,
                started=started,
            )
            self._check()
            failed: dict[int, Exception] = {}
            for images in (1,) if model.ours else self._images:
                error = self._warm(process, images)
                if error is not None:  # the other batches may do
                    failed[images] = error
            process.forget()
        finally:
            for process in own:
                self._ends(process)
        return Twin(process, failed)

    def _begins(self, process: SubjectProcess, compiled: bool) -> None:
        """A twin's process was started, which is at work from now on."""
        with self._lock:
            self._twins.append(process)
            self._at_work.add(process)
            if self._closed.is_set():
                process.kill()
            if compiled and self._yields:
                process.lower_priority()
            if self._is_quiet:
                process.pause()

    def _ends(self, process: SubjectProcess) -> None:
        """A twin's process waits for requests from now on, so it need not be paused any more."""
        with self._lock:
            self._at_work.discard(process)
            if self._is_quiet:
                process.go_on()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Twins that are not ready are paused in this block: they neither compile nor use the GPU.

        What is ready answers, and may be measured. Nothing waits for a paused process but the thread that prepares it:
        the system stops a process only between its calls, where it holds no lock of the driver's.
        """
        try:
            with self._lock:
                self._is_quiet = True
                for process in self._at_work:
                    process.pause()
            yield
        finally:
            with self._lock:
                self._is_quiet = False
                for process in self._at_work:
                    process.go_on()

    def usual_priority(self) -> None:
        """Twins compile as fast as they can from now on: nothing beside them is at work that has to end soon."""
        with self._lock:
            self._yields = False
            for process in self._twins:
                process.usual_priority()

    def _warm(self, process: SubjectProcess, images: int) -> Exception | None:
        """Make some calls in batches of ``images``; returns what failed.

        Where memory is short, it is tried again: until all twins are compiled, each holds the caches of its batch.
        """
        tries = WARM_TRIES
        while True:
            try:
                process.run(images, True, WARM_CALLS)
                return None
            except (RequestError, MemoryError) as error:
                tries -= 1
                if isinstance(error, RequestError) or not tries:
                    return error
            with suppress(Exception):  # a process that was killed says so in the next try
                process.forget()
            self._closed.wait(WARM_AGAIN_S)
            self._check()

    def _check(self) -> None:
        """Raise OutOfTimeError once the report has ended, so that nothing new is begun."""
        if self._closed.is_set() or time.monotonic() > self._end:
            raise OutOfTimeError("the report had ended")

    def close(self) -> None:
        """End everything that is still going on."""
        self._closed.set()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._twins:
                with suppress(OSError):
                    process.kill()
        for pool in self._pools:
            pool.shutdown(wait=True)
        with self._lock:
            for process in self._twins:
                process.close()


def that_fit(models: Sequence[Model], memory_bytes: int | None) -> list[Model]:
    """``models`` with as many twins as a GPU of ``memory_bytes`` holds beside our engines of one model at a time.

    Of twins, n = 16 of the largest model is given up first, then of the next one; n = 1 and 4 stay.
    """
    out = list(models)
    if memory_bytes is None:
        return out
    sizes = [2 * parameters(model.config) for model in out]
    engines = [len(m.group_sizes) + CODES_PART * len(m.codes) if m.ours else 0 for m in out]
    ours = max(count * size for count, size in zip(engines, sizes, strict=True))
    for i in sorted(range(len(out)), key=lambda i: -sizes[i]):
        twins = [len(TWINS) * len(m.twins) * (size + CONTEXT_BYTES) for m, size in zip(out, sizes, strict=True)]
        if ours + sum(twins) > FILLED * memory_bytes:
            out[i] = replace(out[i], twins=tuple(n for n in out[i].twins if n in KEPT_TWINS))
    return out


def family_of(model: Model, codes: Codes | None, folder: Path) -> Mapping[int, Path]:
    """Write the bundles of ``model``, of one n each, into ``folder``, with quantised weights those of one n; n -> path.

    Their weights files are full of holes. Raises OSError.
    """
    return write_family(
        model.config,
        model.group_sizes if codes is None else [CODES_N],
        folder,
        name=model.family(codes),
        precision=PRECISION,
        vq=model.vq,
        tensors=NoTensors,
        codes=codes,
    )


def tokens_family(model: Model, codes: Codes | None, folder: Path) -> Mapping[int, Path]:
    """The bundles of ``model`` that shapes are tried on, which end at tokens, in ``folder``; n -> path.

    Raises OSError.
    """
    sizes = tuple(n for _, n, kind in shaped([model]) if kind is None)
    return family_of(replace(model, vq=None, group_sizes=sizes), codes, folder)


def among(number: int) -> Path:
    """Where the engines of a set of shapes lie in a folder of ready engines."""
    return Path(SHAPES, str(number))


class Builder:
    """Engines of kernels for ``target``, one after the other, with all processors for each.

    ``target``: a name, or "local": what runs on GPU ``index`` of this machine. Kernels that several engines have in
    common, those of the decoder above all, are compiled once. Nothing goes into the user's cache of engines. ``end``:
    nothing is begun after it, by ``time.monotonic``. Use it in ``with``.
    """

    def __init__(self, target: str = "local", index: int = 0, end: float = math.inf) -> None:
        self._target, self._index, self._end = target, index, end
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    def __call__(
        self, path: Path, images: Sequence[int], engines: Path | None = None, *, planner: Planner = plan
    ) -> None:
        """The engine of the bundle at ``path`` for batches of ``images``, in ``engines`` (None: the bundle's folder).

        Raises BuildError, BundleError, EngineError after ``end``, OSError.
        """
        with self._lock:
            if time.monotonic() > self._end:
                raise EngineError(f"{path.name}: there was no time to build its engine")
            if self._compiler is None:
                self._compiler = Compiler(available_cores())
            contents = contents_of(path)
            build = Build(contents, tuple(images), target(self._target, self._index), self._compiler, planner)
            folder = (path / ENGINES if engines is None else engines) / build.name
            part = folder.with_name(f".{folder.name}.part")
            for each in (part, folder):  # of a build that was ended, or of another bundle
                shutil.rmtree(each, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                build.write(part)
                part.rename(folder)
            except BaseException:  # Ctrl-C too
                shutil.rmtree(part, ignore_errors=True)
                raise


def copies(checked: Sequence[Path], codes: Sequence[Codes], work: Path) -> dict[Path, Callable[[], object]]:
    """The bundles of which whole images are checked, each with what makes it there: copies of ``checked`` without their
    engines, and of the largest one copies in ``codes``. Raises OSError.
    """
    without = shutil.ignore_patterns(ENGINES)
    out: dict[Path, Callable[[], object]] = {}
    for source in checked:
        path = work / "checked" / source.name
        out[path] = partial(shutil.copytree, source, path, ignore=without)
    if checked:
        source = max(checked, key=lambda path: (path / WEIGHTS).stat().st_size)
        for each in codes:
            path = work / QUANTISED / f"{source.name}-{each.dtype}"
            out[path] = partial(_quantise, source, each, path)
    return out


def _quantise(source: Path, codes: Codes, path: Path) -> None:
    """Write the bundle ``path``: that of ``source``, each matrix rounded to its nearest codes. It has no self-test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open(source, verify="none")
    quantise = quantised_with(codes.dtype, codes.group, DTYPE[bundle.precision])
    how = {"weights": codes.dtype, "group": codes.group}
    write_bundle(bundle, path, quantise, how, say=lambda _: None, gate=False)


def ready_engine(source: Path, path: Path, images: Sequence[int]) -> Path | None:
    """The engine that the folder ``source`` has for the bundle at ``path``, by its name; None where there is none that
    is whole, of this very bundle, and for batches of all of ``images``. Raises BundleError, OSError.
    """
    bundle = Bundle.open(path, verify="none")
    for folder in sorted((source / path.name / ENGINES).glob("[!.]*")):
        with suppress(EngineError):
            engine = Engine.open(folder, bundle)
            if set(images) <= set(engine.images):
                return engine.path
    return None
