"""Which shapes of tiles are the fastest on this GPU.

Kinds of products are tried one after the other, the largest first: some shapes of a kind, with what is known of the
others, make whole images in turns, and the fastest stays. The engine that is kept is for this card alone.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from par_export.engines.place import place
from par_export.engines.publish import publish
from par_export.engines.request import check_local_gpu
from par_export.engines.timing import batches_ms
from par_export.errors import BuildError
from par_export.kernels.build import Build, check_request, precisions, target
from par_export.kernels.compiler import Compiler
from par_export.kernels.contents import Contents
from par_export.kernels.plan import plan
from par_export.kernels.request import KernelsRequest
from par_export.kernels.spec import Planned, Refused
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import Target
from par_export.kernels.tile_model import matrix_of, product_us
from par_export.kernels.tile_shapes import (
    NUMBERS,
    AttentionTile,
    ProductTile,
    Storage,
    block_of,
    numbers_of,
    panel_bytes,
    rows_of,
)
from par_export.kernels.tiles import (
    MOST_HELD_BYTES,
    attentions,
    choose,
    few_of,
    few_spans,
    gone_of,
    holding,
    holding_keys,
    many_of,
    products,
)
from par_model.config import PARConfig
from par_runtime.backends import cuda
from par_runtime.backends.engines import CAPTURES, Capture, Engine
from par_runtime.backends.kernels import backend as kernels_backend
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, CudaError
from par_runtime.pipeline import Pipeline

ORDER = ("gates", "w2", "qkv", "wo", "attention", "head")  #: by the bytes that they read in an image
MOST = 6  #: shapes of a kind that are tried

Tile = ProductTile | AttentionTile


@dataclass(frozen=True)
class Timing:
    """One engine in one capture mode: the milliseconds of each timed batch.

    It is what was kept before it, with ``tile`` for the products of ``kind``; without a kind as the model chose it.
    """

    kind: str
    tile: Tile | None
    capture: str
    images: int
    samples_ms: tuple[float, ...] = field(default=())

    @property
    def ms_per_image(self) -> float:
        """The median, per image."""
        return statistics.median(self.samples_ms) / self.images

    def to_json(self) -> dict[str, Any]:
        """It as plain values."""
        tile = None if self.tile is None else numbers_of(self.tile)
        return asdict(self) | {"tile": tile, "ms_per_image": self.ms_per_image}


def tune_kernels(
    request: KernelsRequest,
    *,
    images: int = 1,
    repeats: int = 5,
    rounds: int = 2,
    index: int = 0,
    most: int = MOST,
    say: Callable[[str], None] = print,
) -> Path:
    """Find the fastest shapes for batches of ``images`` on GPU ``index``; returns the folder of the engine with them.

    Each of ``rounds`` times all shapes of a kind one after the other, with ``repeats`` batches, so that a GPU clock
    that drifts favours none; at most ``most`` of a kind. ``say`` receives lines of text for the user. Raises
    BuildError, OutputError, BundleError, CudaError, OSError.
    """
    check_local_gpu(index, "tuning")
    check_request(request)
    if images not in request.images:
        raise BuildError(f"images {images}: the engine is built for {request.images}; give one of these")
    card = target("local", index)
    bundle = Bundle.open(request.bundle, verify="full")
    contents = Contents(bundle, *precisions(bundle, request))
    folder_of_engines = place(bundle, request.out, say)
    with cuda.Device.open(index) as gpu:
        device = gpu.name
    with Compiler(request.workers) as compiler, TemporaryDirectory(prefix="parvis-tune-") as temporary:
        trials = _Trials(contents, card, compiler, Path(temporary), index, images, repeats, rounds, say)
        given, rows = trials.search(request.images, most)
        final = Build(contents, request.images, card, compiler, partial(plan, given=given, at=images))
        kept = trials.built(given, request.images)
        by_capture = trials.timings({"": (given, kept)}, CAPTURES)
        if not by_capture:
            raise BuildError("the engine with the fastest shapes does not run; the lines above give the reasons")
        rows += [replace(row, kind="", tile=None) for row in by_capture]
        best = min(by_capture, key=lambda row: row.ms_per_image)
        tuned = {
            "chosen": True,
            "capture": best.capture,
            "images": images,
            "device": device,
            "tiles": {kind: numbers_of(tile) for kind, tile in given.items()},
            "rows": [row.to_json() for row in rows],
        }
        out = folder_of_engines / f"{final.name}-{_folder_name(device)}"
        publish(out, bundle, None, {}, partial(final.write, device=device, tuned=tuned), say)
    for line in table(rows, best):
        say(line)
    return out


def candidates(
    config: PARConfig,
    kind: str,
    images: Sequence[int],
    card: Target,
    most: int,
    at: int,
    storage: Storage = NUMBERS,
    refused: Refused = frozenset(),
) -> list[Tile]:
    """At most ``most`` shapes of a kind that are worth timing at ``at`` images, the model's choice first.

    ``storage``: of the matrices of a product, which takes no shape among ``refused``.
    """
    if kind == "attention":
        keys = attentions(config, images, card)
        first: Tile = keys[0]
        others: list[Tile] = [
            *holding_keys(config, card)[:2],
            *few_spans(config, card),
            *keys[1:2],
            *(replace(keys[0], warps=warps) for warps in (2, 8)),
        ]
        others += keys[2:]
    else:
        gone = gone_of(refused, kind, storage)
        shapes = [shape[at] for shape in products(config, kind, images, card, gone, storage=storage)]
        first = shapes[0]
        columns, depth = matrix_of(config, kind)
        positions = 2 * config.group_size * at
        every = many_of(first, kind, columns, depth, positions, card)
        many = sorted(
            (each for each in every if each.many != first.many and block_of(each, positions) not in gone),
            key=lambda each: product_us(each, columns, depth, positions, card),
        )
        if first.many is not None:
            few = few_of(first, columns, depth, positions, card)
            others = [*many[:2], *([few] if few else []), *shapes[1:3], *many[2:], *shapes[3:]]
            return [first, *others][:most]
        warps = [replace(first, warps=each) for each in (2, 4, 8) if each != first.warps]
        stages = [replace(first, stages=first.stages - 2)] if first.stages >= 4 else []
        held = holding(first, MOST_HELD_BYTES // panel_bytes(first), columns, depth, rows_of(positions), card)
        others = [*([held] if held.held else []), *shapes[1:3], *many[:2], *warps[-1:], *stages, *shapes[3:]]
        others += warps[:-1]
    return [first, *others][:most]


@dataclass
class _Trials:
    """Engines with shapes that are tried, in a folder that goes with them."""

    contents: Contents
    card: Target
    compiler: Compiler
    folder: Path
    index: int
    images: int
    repeats: int
    rounds: int
    say: Callable[[str], None]
    count: int = 0
    proved: set[Path] = field(default_factory=set)  #: engines that gave the tokens of the bundle's self-test

    def search(self, sizes: Sequence[int], most: int) -> tuple[dict[str, Tile], list[Timing]]:
        """The fastest shape of each kind, and everything that was measured."""
        config, stored = self.contents.config, storages(self.contents.step)
        refused = self.refused(sizes)
        start = choose(config, sizes, self.card, refused, storages=stored)[self.images]
        given: dict[str, Tile] = {kind: getattr(start, kind) for kind in ORDER}
        rows: list[Timing] = []
        for kind in ORDER:
            engines: dict[str, tuple[Mapping[str, Tile], Path]] = {}
            # Where some matrices of a kind are quantised, their shapes are tried; the others keep the model's.
            storage = stored.get(kind, (NUMBERS,))[0]
            for i, tile in enumerate(candidates(config, kind, sizes, self.card, most, self.images, storage, refused)):
                shapes = given | {kind: tile}
                try:
                    engines[str(i)] = (shapes, self.built(shapes, (self.images,)))
                except BuildError as error:  # its registers do not suffice, say
                    self.say(f"{kind} {_words(tile)}: left out: {error}")
            timed = [
                replace(row, kind=kind, tile=engines[row.kind][0][kind]) for row in self.timings(engines, CAPTURES[:1])
            ]
            for best in sorted(timed, key=lambda row: row.ms_per_image):
                assert best.tile is not None
                try:  # the engine that is kept has other batches too, which take the same panels
                    self.built(given | {kind: best.tile}, sizes)
                except BuildError as error:
                    self.say(f"{kind} {_words(best.tile)}: not kept, for the other batches: {error}")
                    continue
                given[kind] = best.tile
                self.say(f"{kind}: {_words(best.tile)}, {best.ms_per_image:.2f} ms per image, of {len(timed)} shapes")
                break
            rows += timed
        return given, rows

    def refused(self, sizes: Sequence[int]) -> Refused:
        """What the compiler has no registers for, of the shapes that a build of all ``sizes`` tries. Raises
        BuildError.
        """
        tried: list[Refused] = []

        def planner(
            contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()
        ) -> Planned:
            tried.append(refused)
            return plan(contents, images, target, refused)

        Build(self.contents, tuple(sizes), self.card, self.compiler, planner).compiled(lambda *_: None)
        return tried[-1]

    def built(self, given: Mapping[str, Tile], sizes: Sequence[int]) -> Path:
        """The folder of a new engine with the shapes ``given``. Raises BuildError."""
        self.count += 1
        out = self.folder / str(self.count)
        out.mkdir()
        Build(self.contents, tuple(sizes), self.card, self.compiler, partial(plan, given=given, at=self.images)).write(
            out
        )
        return out

    def timings(
        self, engines: Mapping[str, tuple[Mapping[str, Tile], Path]], captures: Sequence[Capture]
    ) -> list[Timing]:
        """name in place of a kind -> the samples of each engine that runs, in each capture mode."""
        samples: dict[tuple[str, str], tuple[float, ...]] = {}
        broken: set[str] = set()
        for _ in range(self.rounds):
            for name, (_, folder) in engines.items():
                for capture in captures if name not in broken else ():
                    try:
                        timed = self._timed(folder, capture)
                    except (BundleError, CudaError) as error:  # other tokens than the export's, or a launch was refused
                        self.say(f"left out: {error}")
                        broken.add(name)
                        break
                    if timed is not None:
                        samples[name, capture] = samples.get((name, capture), ()) + timed
        return [
            Timing(name, None, capture, self.images, times)
            for (name, capture), times in samples.items()
            if name not in broken
        ]

    def _timed(self, folder: Path, capture: Capture) -> tuple[float, ...] | None:
        """Milliseconds of batches with the engine in ``folder``; None where the driver refused the capture mode."""
        bundle = self.contents.bundle
        backend = kernels_backend.load(bundle, Engine.open(folder, bundle), cuda.Device.open(self.index), capture)
        try:
            pipeline = Pipeline(bundle, backend)
            if folder not in self.proved:
                pipeline.selftest()
                self.proved.add(folder)
            samples = batches_ms(pipeline, self.images, self.repeats)
            return samples if backend.capturing == capture else None
        finally:
            backend.close()


def table(rows: Sequence[Timing], best: Timing) -> list[str]:
    """The measurements as lines of text; those of the engine that is kept come last, the chosen one marked."""
    wide = max(46, *(len(_words(row.tile)) for row in rows))
    lines = [f"{'kind':10} {'shape':{wide}} {'capture':8} {'images':>6} {'ms per image':>13} {'min':>9} {'max':>9}"]
    for row in rows:
        low, high = min(row.samples_ms) / row.images, max(row.samples_ms) / row.images
        chosen = row.kind == "" and row.capture == best.capture
        lines.append(
            f"{row.kind or 'kept':10} {_words(row.tile):{wide}} {row.capture:8} {row.images:6} "
            f"{row.ms_per_image:13.2f} {low:9.2f} {high:9.2f}{'  <- chosen' if chosen else ''}"
        )
    return lines


def _words(tile: Tile | None) -> str:
    if tile is None:
        return ""
    given = {name: value for name, value in numbers_of(tile).items() if value or name not in ("bits", "group", "held")}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _folder_name(device: str) -> str:
    """A card's name as a part of a folder's."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")[:40]
