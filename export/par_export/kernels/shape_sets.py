"""Sets of shapes of tiles for a model: engines of all of them say how good the model of ``kernels/tile_model.py`` is.

Each set has another shape of every kernel, so that a few engines show many shapes: kernels are timed one by one. Set 0
is the engine that a build makes. The last sets have its shapes: they change how kernels follow each other, and the very
last is set 0 once more, which shows what two measurements of the same differ by.

It lies beside what it plans with, so that engines of other sets are engines of other sources.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from par_export.kernels.build import precisions
from par_export.kernels.contents import Contents
from par_export.kernels.plan import plan
from par_export.kernels.request import KernelsRequest
from par_export.kernels.spec import Planned, Refused
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import NUMBERS, SOURCES, ProductTile, Tiles, shapes_of
from par_export.kernels.tiles import MOST_HELD_BYTES, choose
from par_export.kernels.tune import ORDER, Tile, candidates
from par_runtime.backends.program import Kernel
from par_runtime.bundle import Bundle

SETS = 8  #: of shapes, at most
#: What a set changes of the target, by the words for it.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "no kernel is launched early": {"early": False},
    "nothing is fetched ahead": {"ahead_bytes": 0},
    "matrices of up to 24 MiB are fetched ahead": {"ahead_bytes": 24 * 2**20},
    "weights are held": {"held_bytes": MOST_HELD_BYTES},
    "weights are held, and the next kernel comes at once": {"held_bytes": MOST_HELD_BYTES, "at_once": True},
    "weights and keys are held, and the next kernel comes at once": {
        "held_bytes": MOST_HELD_BYTES,
        "held_keys": True,
        "at_once": True,
    },
}
AS_BUILT, AGAIN = "as built", "as built, again"


@dataclass(frozen=True)
class ShapeSet:
    """Set ``number`` of a bundle: its shape of each kind of kernel ("qkv", "attention"), by which an engine is planned.

    A kind that has no more shapes is not among them, and is as the model chooses it. ``words``: what the set is, where
    it is no set of other shapes; ``change``: of the target.
    """

    number: int
    shapes: Mapping[str, Tile]
    words: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> int:
        """The number of the set whose engine it has: its own, or for set 0 once more 0."""
        return 0 if self.words == AGAIN else self.number

    def card(self, target: Target) -> Target:
        """What is planned for, in place of ``target``."""
        return replace(target, **self.change)

    def __call__(
        self, contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()
    ) -> Planned:
        """A ``Planner``: without the shapes that the compiler refused, whose kinds are as the model chooses them."""
        return plan(contents, images, self.card(target), refused, self.left(refused), images[0])

    def left(self, refused: Refused) -> Mapping[str, Tile]:
        """Its shapes that are not ``refused``."""
        return {kind: tile for kind, tile in self.shapes.items() if not _is_refused(kind, tile, refused)}


def contents_of(path: Path) -> Contents:
    """What the bundle at ``path``, which was written or copied just now, is planned from.

    Raises BundleError, BuildError.
    """
    bundle = Bundle.open(path, verify="none")
    return Contents(bundle, *precisions(bundle, KernelsRequest(path, ())))


def sets_of(contents: Contents, images: Sequence[int], card: Target, most: int = SETS) -> list[ShapeSet]:
    """Sets for batches of ``images``: with shapes that are worth timing at the first of these, at most ``most``; then
    those that change how kernels follow each other, where the card can launch them early; then set 0 once more.
    """
    stored = storages(contents.step)
    of_kind = {
        # Of quantised bundles some matrices of a kind may be numbers: these stay as the model chooses them.
        kind: candidates(contents.config, kind, images, card, most, images[0], stored.get(kind, (NUMBERS,))[0])
        for kind in ORDER
    }
    count = max(len(tiles) for tiles in of_kind.values())
    shapes = [{kind: tiles[i] for kind, tiles in of_kind.items() if i < len(tiles)} for i in range(1, count)]
    sets = [ShapeSet(0, {}, AS_BUILT), *(ShapeSet(i, each) for i, each in enumerate(shapes, 1))]
    for words, change in CHANGES.items() if card.dependent else ():
        sets.append(ShapeSet(len(sets), {}, words, change))
    return [*sets, ShapeSet(len(sets), {}, AGAIN)]


def tiles_of(
    contents: Contents, images: Sequence[int], card: Target, one: ShapeSet, kernels: Collection[str]
) -> Mapping[int, Tiles]:
    """The shapes of an engine of a set by batch, which holds the ``kernels`` of these names. Raises BuildError.

    What is planned and not among them was refused by the compiler, and something else planned in its place.
    """
    refused: Refused = frozenset()
    while True:
        planned = one(contents, images, card, refused)
        missing = frozenset(spec for name, spec in planned.specs.items() if name not in kernels)
        if missing <= refused:
            break
        refused |= missing
    stored, given = storages(contents.step), one.left(refused)
    return choose(contents.config, images, one.card(card), refused, given, stored, images[0])


def is_of(tile: Tile, kernel: Kernel) -> bool:
    """Whether ``kernel`` was compiled in this shape. Its stages are not in an engine; what they take is."""
    constants = kernel.constants
    if isinstance(tile, ProductTile):
        wanted = {"BN": tile.columns, "BK": tile.BK, "BITS": tile.bits, "GROUP": tile.group}
        wanted |= {"AHEAD": tile.ahead, "HELD": tile.held, "PANELS": tile.many_panels}
        wanted |= {"BM": tile.many.rows, "DEEP": tile.many.depth} if tile.many else {}
        wanted |= {"SPLIT": tile.split} if "SPLIT" in constants else {}
    else:
        wanted = {"SPAN": tile.span, "CHUNK": tile.chunk, "HELD": tile.held}
    warps = tile.block_warps if isinstance(tile, ProductTile) else tile.warps
    return kernel.warps == warps and all(constants[name] == value for name, value in wanted.items())


def _is_refused(kind: str, tile: Tile, refused: Refused) -> bool:
    of = partial(shapes_of, refused, SOURCES[kind])
    if isinstance(tile, ProductTile):
        return (tile.bits, tile.columns, tile.BK, tile.many_panels) in of(("BITS", "BN", "BK", "PANELS"))
    return (tile.span, tile.chunk, tile.held) in of(("SPAN", "CHUNK", "HELD"))
