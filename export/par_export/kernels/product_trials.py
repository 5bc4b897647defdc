"""Single products in several shapes of tiles, to be timed one by one: how good the model of ``tile_model.py`` is.

What a shape is worth depends on the stream of weights, so the products of qkv and of the head are timed through the
source of the gates, with the columns and the depth of their own matrix: what these kernels do with their sums differs,
and takes little. ``wo`` and ``w2`` are timed through their own source. Activations are fp16; weights too, or codes.

It lies beside what it plans with, so that kernels of other shapes are kernels of other sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from par_export.kernels.plan_step import of_product
from par_export.kernels.spec import Constant, Spec, round_up
from par_export.kernels.step_batch import STRIDE_MULTIPLE
from par_export.kernels.targets import Target
from par_export.kernels.tile_model import matrix_of, product_us
from par_export.kernels.tile_shapes import (
    NUMBERS,
    SCALE_BYTES,
    SOURCES,
    Many,
    ProductTile,
    Storage,
    block_of,
    numbers_of,
    panel_bytes,
    rows_of,
)
from par_export.kernels.tiles import (
    MANY_ROWS,
    MOST_HELD_BYTES,
    MOST_STAGES,
    few_of,
    holding,
    many_of,
    products,
    staged_of,
)
from par_model.config import PARConfig
from par_runtime.backends.program import Launch, Pointer

KINDS = ("gates", "w2", "qkv", "wo", "head")  #: of products, by the bytes that they read
RESIDUALS = ("wo", "w2")
OF_FEW = ("warps", "stages", "ahead", "held")  #: of a shape that is not of many rows
LAYOUTS = 12  #: of a product, those that the model finds fastest
LAYOUTS_OF_CODES = 8
LAYOUTS_OF_MANY = 6  #: where blocks of many rows are tried too, each layout in several of them
MOST_ROWS_TRIED = 256  #: larger batches have more blocks of so many rows
#: name -> type of the parameters of each source, where weights are numbers
PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "step.gates": {"h": "*fp16", "ss": "*fp32", "weights": "*fp16", "gains": "*fp32", "g": "*fp16", "M": "i32"},
    "step.residual": {
        "inputs": "*fp16",
        "weights": "*fp16",
        "gains": "*fp32",
        "x": "*fp32",
        "h": "*fp16",
        "ss": "*fp32",
        "partial": "*fp32",
        "counters": "*i32",
        "M": "i32",
    },
}


def shape_words(tile: Mapping[str, Any], at_once: bool) -> str:
    """ "BN 64, BK 128, split 2, warps 4, stages 6, ahead 0, held 4, at once"; of a block of many rows "BN 32, BK 128,
    split 1, columns 128, block_rows 256, depth 64, warps 8, stages 3", from its numbers (``tile_shapes.numbers_of``).
    """
    own = ("columns", "block_rows", "depth", "warps", "stages") if tile.get("columns") else OF_FEW
    names = ("BN", "BK", "split", *own)
    return ", ".join([*(f"{name} {tile[name]}" for name in names), *(["at once"] if at_once else [])])


@dataclass(frozen=True)
class Product:
    """The product of a ``kind`` of a model: ``rows`` of activations (8 to 256, a power of 2) times a matrix
    [depth, columns]. ``squares``: tiles in which the sums of squares of these rows come, as a build makes them.
    ``bits`` and ``group`` of its codes as in :class:`Storage`, 0 and 0 where weights are numbers; ``model`` has them in
    its name.
    """

    model: str
    kind: str
    rows: int
    columns: int
    depth: int
    squares: int
    bits: int = 0
    group: int = 0

    def __str__(self) -> str:
        """ "PAR-L w2, 8 rows", "PAR-L int8 group 64 w2, 8 rows"."""
        return f"{self.model} {self.kind}, {self.rows} rows"

    @property
    def residual(self) -> bool:
        """Whether it adds to x; else its columns are pairs of gate and up."""
        return self.kind in RESIDUALS

    @property
    def stride(self) -> int:
        """Numbers from one row of activations to the next."""
        return round_up(self.depth, STRIDE_MULTIPLE)

    @property
    def out_columns(self) -> int:
        """Numbers of a row that it makes: of a pair one."""
        return self.columns if self.residual else self.columns // 2

    @property
    def out_stride(self) -> int:
        """Numbers from one row that it makes to the next."""
        return round_up(self.out_columns, STRIDE_MULTIPLE)

    @property
    def power_at(self) -> int:
        """Where in the row of gains their power of two is."""
        return round_up(self.depth, 4)


@dataclass(frozen=True)
class Trial:
    """A product in one shape. ``layout``: the place of its panels, parts and warps in the planner's order; ``planned``:
    whether the planner weighs it, with these stages and with what it fetches ahead. ``model_us``: what the model
    expects.

    ``dependent``: the kernel may be launched before the one ahead of it has ended, and with ``at_once`` as soon as that
    one has waited.
    """

    product: Product
    tile: ProductTile
    layout: int
    planned: bool
    model_us: float
    dependent: bool
    at_once: bool = False

    def __str__(self) -> str:
        """ "PAR-L w2, 8 rows: BN 16, BK 256, split 1, warps 4, stages 6, ahead 0, held 0"."""
        return f"{self.product}: {shape_words(numbers_of(self.tile), self.at_once)}"

    @property
    def spec(self) -> Spec:
        """Its kernel."""
        product, tile = self.product, self.tile
        constants: dict[str, Constant]
        if product.residual:
            constants = {
                "K": product.depth,
                "K_STRIDE": product.stride,
                "D_MODEL": product.columns,
                "STRIDE": product.out_stride,
                "SPLIT": tile.split,
            }
        else:
            constants = {
                "D_MODEL": product.depth,
                "STRIDE": product.stride,
                "TILES": product.squares,
                "POWER": product.power_at,
                "F": product.out_columns,
                "F_STRIDE": product.out_stride,
            }
        constants |= of_product(tile, self.block_rows, self.at_once) | {"DEPENDENT": self.dependent}
        parameters, warps = tuple(self.parameters.items()), tile.block_warps
        return Spec(self.source, tuple(constants.items()), parameters, warps, tile.block_stages, self.dependent)

    @property
    def source(self) -> str:
        """The source of its kernel."""
        return SOURCES["wo" if self.product.residual else "gates"]

    @property
    def parameters(self) -> Mapping[str, str]:
        """name -> type, in their order. Codes are bytes, and their scales come behind them."""
        out: dict[str, str] = {}
        for name, kind in PARAMETERS[self.source].items():
            if name == "weights" and self.product.bits:
                out |= {"weights": "*u8", "scales": "*fp16"}
            else:
                out[name] = kind
        return out

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return rows_of(self.product.rows, self.tile)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks: of rows, of columns, and parts of K."""
        return -(-self.product.rows // self.block_rows), -(-self.tile_columns // self.tile.panels), self.tile.split

    @property
    def tile_columns(self) -> int:
        """Tiles of columns: of so many each panel."""
        return -(-self.product.columns // self.tile.BN)

    @property
    def panels(self) -> int:
        """Panels of a tile, one below the other."""
        return -(-self.product.depth // self.tile.BK)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed matrix, without scales."""
        return self.tile_columns * self.panels * panel_bytes(self.tile)

    @property
    def groups(self) -> int:
        """Groups that the panels of a tile have begun; 0 where weights are numbers."""
        return -(-self.panels * self.tile.BK // self.tile.group) if self.tile.bits else 0

    @property
    def scale_bytes(self) -> int:
        """Bytes of the packed scales of codes."""
        return self.tile_columns * self.groups * self.tile.BN * SCALE_BYTES

    def launch(self, kernel: str) -> Launch:
        """A launch of the kernel of that name. Layer i takes the matrix ``i * packed_bytes`` behind "weights", and its
        scales ``i * scale_bytes`` behind "scales".
        """
        arguments: dict[str, Any] = {name: Pointer(name) for name in self.parameters}
        arguments |= {"weights": Pointer("weights", 0, self.packed_bytes), "M": self.product.rows}
        if self.tile.bits:
            arguments["scales"] = Pointer("scales", 0, self.scale_bytes)
        return Launch(kernel, self.grid, tuple(arguments.values()))

    def to_json(self) -> dict[str, Any]:
        """It as plain values."""
        return asdict(self)

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Trial:
        """From what :meth:`to_json` made."""
        tile = dict(entry["tile"])
        many = None if tile["many"] is None else Many(**tile["many"])
        own = {"product": Product(**entry["product"]), "tile": ProductTile(**(tile | {"many": many}))}
        return Trial(**(dict(entry) | own))


def trials_of(model: str, config: PARConfig, rows: int, target: Target, storage: Storage = NUMBERS) -> Iterator[Trial]:
    """All trials of a model for so many rows (8 to 256, a power of 2), what the planner chooses for them first.

    ``storage``: of its matrices; those of which K is not whole groups are left out, since they stay numbers.
    The planner is asked as for an engine of that batch alone. Each layout is tried with up to three numbers of stages,
    from the most that fits to 2, and the planner's choice also without fetching ahead; then with weights held, and with
    the next kernel launched at once beside that. Where there are enough rows, a layout is tried in every block of many
    rows that the planner weighs, and in its best shape for few; of layouts that differ in the rows of a panel alone,
    which these blocks hardly feel, the first only.
    """
    one, images = replace(config, group_size=1), rows // 2  # so many images of one position are so many rows
    stored = {kind: NUMBERS if storage.bits and matrix_of(one, kind)[1] % storage.group else storage for kind in KINDS}
    shapes = {
        kind: _layouts([shape[images] for shape in products(one, kind, (images,), target, storage=stored[kind])], rows)
        for kind in KINDS
    }
    for kind, planned in shapes.items():
        if stored[kind] != storage:
            continue
        columns, depth = matrix_of(one, kind)
        before = shapes["wo" if kind == "gates" else "w2"]  # the kernel that leaves the sums of squares
        squares = -(-config.dim // before[0].BN)
        product = Product(model, kind, rows, columns, depth, squares, storage.bits, storage.group)
        for layout, chosen in enumerate(planned):
            for tile, at_once, weighed in _tried(chosen, kind, columns, depth, rows, target):
                us = product_us(replace(tile, held=0), columns, depth, rows, target)
                yield Trial(product, tile, layout, weighed, us, target.dependent, at_once)


def _layouts(planned: Sequence[ProductTile], rows: int) -> Sequence[ProductTile]:
    """Those of the planner's layouts that are tried, in its order."""
    if rows < min(MANY_ROWS):
        return planned[: LAYOUTS_OF_CODES if planned[0].bits else LAYOUTS]
    first = dict[tuple[int, int], ProductTile]()
    for tile in planned:
        first.setdefault((tile.BN, tile.split), tile)
    return list(first.values())[:LAYOUTS_OF_MANY]


def _tried(
    chosen: ProductTile, kind: str, columns: int, depth: int, rows: int, target: Target
) -> Iterator[tuple[ProductTile, bool, bool]]:
    """What is tried of a layout, each with whether the next kernel is launched at once, and whether the planner weighs
    it: the planner's choice first.
    """
    many = list(many_of(replace(chosen, many=None), kind, columns, depth, rows, target))
    if many:
        few = few_of(chosen, columns, depth, rows, target)
        others = [*many, *([few] if few else [])]
        yield from ((tile, target.at_once, True) for tile in sorted(others, key=lambda each: not _same(each, chosen)))
        return
    fit = {tile.stages: tile for tile in staged_of(replace(chosen, stages=MOST_STAGES), columns, depth, rows, target)}
    most = max(fit)
    stages = [*dict.fromkeys((chosen.stages, most, (most + 3) // 2, 2))][:3]
    first, *more = (fit[count] for count in stages)
    tried = dict.fromkeys((first, replace(first, ahead=0), *more))
    yield from ((tile, target.at_once, tile == chosen) for tile in tried)
    held = holding(chosen, MOST_HELD_BYTES // panel_bytes(chosen), columns, depth, rows, target)
    if held.held:
        yield from ((held, each, False) for each in (False, True) if (held, each) != (chosen, target.at_once))


def _same(tile: ProductTile, chosen: ProductTile) -> bool:
    """Whether it is the choice: of many rows the same block, of few the same stages."""
    return tile.many == chosen.many and (tile.many is not None or tile.stages == chosen.stages)


def as_a_build_chooses(trials: Sequence[Trial], refused: Sequence[Trial]) -> Trial | None:
    """What a build makes of a product, whose ``trials`` these are: what the planner finds the fastest, or, where the
    compiler has ``refused`` that one, the next in other blocks, and so on; None where none is left.
    """
    gone: set[tuple[int, int, int, int]] = set()
    for trial in sorted((each for each in trials if each.planned), key=lambda each: (each.model_us, each.layout)):
        block = block_of(trial.tile, trial.product.rows)
        if block in gone:
            continue
        if trial not in refused:
            return trial
        gone.add(block)
    return None
