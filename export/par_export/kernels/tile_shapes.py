"""What a shape of tiles is: of a product, of attention, and of all kernels of a step; and how large its parts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from par_export.kernels.spec import Refused, power

BYTES = 2  #: of a weight, an activation and a key: fp16 and bf16
SCALE_BYTES = 2  #: of a scale: it is read as it is stored, in fp16 or bf16
MOST_ROWS = 64  #: of one block, where it is not one of many rows
MOST_PARTS = 4  #: of the rows of a panel
SUB_LEAST, SUB_MOST = 32, 128  #: bytes of codes of a column in a piece: the matrix units take four codes of a thread
#: kind -> the source of its kernel
SOURCES = {
    "qkv": "step.qkv",
    "wo": "step.residual",
    "gates": "step.gates",
    "w2": "step.residual",
    "head": "step.head",
    "attention": "attention.attend",
}


@dataclass(frozen=True)
class Storage:
    """How a matrix lies in device memory: codes of ``bits`` (8 or 4), ``group`` rows of K with a scale for each column;
    or, with 0 and 0, numbers of the precision that the step computes in.
    """

    bits: int = 0
    group: int = 0

    def bytes(self, numbers: int) -> int:
        """Bytes of so many weights, scales included."""
        if not self.bits:
            return numbers * BYTES
        return numbers * self.bits // 8 + -(-numbers // self.group) * SCALE_BYTES


NUMBERS = Storage()


@dataclass(frozen=True)
class Many:
    """A block of many rows (``sources/many.py``): ``columns`` of panels side by side times ``rows`` rows. A turn takes
    ``depth`` rows of weights of each part of a panel, or, of codes, a piece, which has so many; ``stages`` turns are in
    shared memory at a time.
    """

    columns: int
    rows: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ProductTile:
    """A product in blocks of threads: each reads panels of ``BN`` columns by ``BK`` rows of weights, K in ``split``
    parts. ``stages`` panels are in shared memory at a time. Before the kernel ahead has ended, ``ahead`` bytes of
    weights are fetched into the L2 cache, and the last ``held`` panels of a block loaded into shared memory, where they
    stay. ``bits`` and ``group`` as in :class:`Storage`.

    ``many``: in place of all that, how blocks of many rows take the same panels. ``BN``, ``BK``, ``split`` and
    ``warps``, from which the parts of a panel follow, then say how the weights lie.
    """

    BN: int
    BK: int
    split: int
    warps: int
    stages: int
    ahead: int
    bits: int = 0
    group: int = 0
    held: int = 0
    many: Many | None = None

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.many.columns if self.many else self.BN

    @property
    def panels(self) -> int:
        """Panels that a block has side by side."""
        return self.columns // self.BN

    @property
    def many_panels(self) -> int:
        """The same as kernels are told it: 0 where a block is not one of many rows."""
        return self.panels if self.many else 0

    @property
    def depth(self) -> int:
        """Rows of weights that a block takes in a turn."""
        return self.many.depth * self.parts if self.many else self.BK

    @property
    def block_warps(self) -> int:
        return self.many.warps if self.many else self.warps

    @property
    def block_stages(self) -> int:
        return self.many.stages if self.many else self.stages

    @property
    def storage(self) -> Storage:
        """What it multiplies with."""
        return Storage(self.bits, self.group)

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a panel are cut, because its columns are too few for all warps.

        A warp takes 16 columns and 16 rows at a time. Parts lie below each other, as many as make up for the columns.
        Codes have none: what is thrown away of a product of parts would have been made numbers of.
        """
        if self.bits:
            return 1
        parts = max(1, min(MOST_PARTS, 16 * self.warps // self.BN))
        return parts if 16 * parts <= self.BK else 1

    @property
    def sub(self) -> int:
        """Bytes of codes that a column has in a piece (see ``sources/product.py``); 0 where weights are numbers."""
        if not self.bits:
            return 0
        return min(self.group, SUB_MOST, self.BK * self.bits // 8)


@dataclass(frozen=True)
class AttentionTile:
    """Attention in blocks of threads: each reads ``span`` keys, ``chunk`` at a time. ``held``: 0, or all of a span,
    which are then loaded at once, those of earlier calls before the kernel ahead has ended.
    """

    span: int
    chunk: int
    warps: int
    stages: int
    held: int = 0


def numbers_of(tile: ProductTile | AttentionTile) -> dict[str, int]:
    """The numbers of a shape by name; those of a block of many rows in place of what it does without."""
    out = asdict(tile)
    many = out.pop("many", None)
    if many is None:
        return out
    panels = {name: out[name] for name in ("BN", "BK", "split", "bits", "group")}
    return panels | {"columns": many.pop("columns"), "block_rows": many.pop("rows")} | many


@dataclass(frozen=True)
class Tiles:
    """The shapes of a step for one batch size: of its five products, and of attention.

    ``kept``: where a bundle has both, those of the matrices of a kind that are not quantised.
    """

    qkv: ProductTile
    wo: ProductTile
    gates: ProductTile
    w2: ProductTile
    head: ProductTile
    attention: AttentionTile
    kept: Mapping[str, ProductTile] = field(default_factory=dict)

    def of(self, kind: str, storage: Storage) -> ProductTile:
        """The shape of the products of a kind with matrices in ``storage``."""
        tile: ProductTile = getattr(self, kind)
        return tile if tile.storage == storage else self.kept[kind]


def shapes_of(refused: Refused, source: str, names: tuple[str, ...]) -> set[tuple[object, ...]]:
    """The constants ``names`` of the kernels of ``source`` in ``refused``."""
    constants = [dict(spec.constants) for spec in refused if spec.source == source]
    return {tuple(each[name] for name in names) for each in constants}


def rows_of(positions: int, tile: ProductTile | None = None) -> int:
    """How many of ``positions`` rows a block takes, in the shape ``tile`` or one that is not of many rows: a power of 2
    from 8, what the matrix units take at least.
    """
    most = tile.many.rows if tile is not None and tile.many else MOST_ROWS
    return min(most, max(8, power(positions)))


def block_of(tile: ProductTile, positions: int) -> tuple[int, int, int, int]:
    """BN, BK, rows and PANELS of the kernel of ``positions`` rows, on which it depends whether it has the registers."""
    return tile.columns, tile.BK, rows_of(positions, tile), tile.many_panels


def panel_bytes(tile: ProductTile) -> int:
    """Bytes of one panel in memory, without scales."""
    return tile.BN * tile.BK * tile.bits // 8 if tile.bits else tile.BN * tile.BK * BYTES


def shared_bytes(tile: ProductTile, rows: int) -> int:
    """Shared memory of a product: panels of weights and the rows that they are multiplied with, of each stage, and what
    is held.
    """
    if tile.many:
        weights = tile.many.columns * tile.depth * (tile.bits or 8 * BYTES) // 8
        return tile.many.stages * (weights + rows * tile.depth * BYTES)
    return (tile.stages + tile.held) * (panel_bytes(tile) + rows * tile.BK * BYTES)
