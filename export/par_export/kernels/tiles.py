"""The shapes of tiles in which the step's kernels work, chosen by a model of the GPU until ``parvis tune`` measures.

A step is a stream of weights, so a good shape keeps enough of them on their way to every processor, and ends on all
processors at about the same time. What a batch must not change is the result of a row: the order of the weights, the
parts of a sum and the spans of keys are therefore the same for all batch sizes of an engine. Stages may differ.

The model is a roofline with a few limits for each kernel; only the order of candidates matters. Its constants of
products of numbers were fitted to products of PAR-3B, XL and L that one H200 timed, each alone; those of attention were
set by its trials there (``docs/kernels.md``); those of codes are guesses. Times in microseconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from par_export.errors import BuildError
from par_export.kernels.spec import Refused, power
from par_export.kernels.targets import Target
from par_model.config import PARConfig

BYTES = 2  #: of a weight, an activation and a key: fp16 and bf16
SCALE_BYTES = 2  #: of a scale: it is read as it is stored, in fp16 or bf16
#: From asking for a line of memory until it is there, on a busy GPU.
LATENCY_US = 0.73
#: What one turn of the loop over K costs a processor beside copying or multiplying, whichever of its blocks it is of:
#: it waits for what was copied, and for all threads, before the matrix units may read it.
TURN_US = 0.1
#: Bytes that a processor copies to shared memory in a microsecond.
COPY = 120e3
#: Of the rate of the data sheet, what products of few rows cost more.
NARROW = 1.5
#: What a stream of weights reaches of the bandwidth of the data sheet.
REACHED = 0.89
#: A processor can draw more than its share of the bandwidth while others have nothing to do, but not much more.
MOST_SHARE = 1.11
#: Bandwidth of the L2 cache, in bandwidths of the memory.
L2 = 1.3
#: What every kernel costs: its start, the first way to memory and the last.
START_US = 1.4
#: Of shapes that the model finds equal, panels of this size were the fastest: what a factor of 2 adds to the time.
BEST_PANEL, OTHER_PANEL = 16 * 1024, 0.01
#: What each further block of a processor adds to that.
BLOCK_US = 0.3
#: What it costs to leave partial sums, count the blocks and add.
JOIN_US = 2.0
#: What each span of keys adds to that.
SPAN_US = 0.1
PIECE = 2048  #: bytes that are fetched ahead at a time
MOST_SHARED = 0.9  #: of a block's limit: the compiler adds to what the stages take
MOST_SUMS = 8192  #: of squares that a consumer of x adds up in registers: tiles (a power of 2) times rows
MOST_ROWS = 64  #: of one block
MOST_PARTS = 4  #: of the rows of a panel
MOST_STAGES = 6
MOST_BK = 256  #: rows of a panel of numbers
MOST_INPUTS = 16384  #: numbers of activations that a block loads at a time
#: Of the activations that a block of 8 rows loads at a time, numbers for each thread: with fewer than 8 bytes a thread
#: some are not copied in the background.
FEWEST_INPUTS = 4
#: What a processor makes numbers of in a microsecond: codes. Each takes some 2.5 of the instructions of a thread, of
#: which a processor starts 128 a cycle. Not fitted: in the rows of the H200 products of codes waited for their scales.
CODES_US = 60_000
#: Rows from which Triton has two warps multiply the same weights with other rows: both make numbers of them.
SHARED_ROWS = 32
#: Of the rate of the data sheet, what the older matrix instructions cost more, which products of codes take.
OLDER = 4.0
MOST_HELD = 160  #: registers of a thread for these; more do not suffice for the rest
#: Of the loop over K, for codes: with three stages two panels are in shared memory, and one comes in the background.
LEAST_TURNS = 3
MOST_STEPS = 4  #: pieces of a block of K one after the other: each is a copy of the same instructions
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
class ProductTile:
    """A product in blocks of threads: each reads panels of ``BN`` columns by ``BK`` rows of weights, K in ``split``
    parts. ``stages`` panels are in shared memory at a time, ``ahead`` bytes of weights are fetched before the kernel
    ahead has ended. ``bits`` and ``group`` as in :class:`Storage`.
    """

    BN: int
    BK: int
    split: int
    warps: int
    stages: int
    ahead: int
    bits: int = 0
    group: int = 0

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
    """Attention in blocks of threads: each reads ``span`` keys, ``chunk`` at a time."""

    span: int
    chunk: int
    warps: int
    stages: int


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


def rows_of(positions: int) -> int:
    """How many of ``positions`` rows a block takes: a power of 2 from 8, what the matrix units take at least."""
    return min(MOST_ROWS, max(8, power(positions)))


def choose(
    config: PARConfig,
    images: Sequence[int],
    target: Target,
    refused: Refused = frozenset(),
    given: Mapping[str, ProductTile | AttentionTile] = MappingProxyType({}),
    storages: Mapping[str, Sequence[Storage]] = MappingProxyType({}),
) -> dict[int, Tiles]:
    """The shapes that the model finds fastest for ``config``, for guided batches of each of the sizes ``images``.

    ``given``: shapes of some kinds ("qkv", "attention"), as measured at one batch size; for the others they keep their
    panels and take as many of their stages as fit. ``storages``: how the matrices of a kind lie, quantised ones first;
    of a kind that is not named, as numbers. Raises BuildError where ``refused`` leaves no shape.
    """
    out: dict[int, dict[str, Any]] = {batch: {"kept": {}} for batch in images}
    gone = shapes_of(refused, SOURCES["attention"], ("SPAN", "CHUNK"))
    keys = [tile for tile in attentions(config, images, target) if (tile.span, tile.chunk) not in gone]
    for kind in SOURCES:
        tile = given.get(kind)
        if kind == "attention":
            if tile is None and not keys:
                raise BuildError(
                    f"no shape of attention with heads of {config.head_dim} fits {target.name}; build with "
                    "--engine tensorrt"
                )
            for batch in images:
                out[batch][kind] = tile or keys[0]
            continue
        for storage in storages.get(kind, (NUMBERS,)):
            gone = shapes_of(refused, SOURCES[kind], ("BITS", "BN", "BK", "BM"))
            of_storage = {one[1:] for one in gone if one[0] == storage.bits}
            measured = tile if isinstance(tile, ProductTile) and tile.storage == storage else None
            shapes = products(config, kind, images, target, of_storage, measured, storage)
            if not shapes:
                raise BuildError(
                    f"no shape of the product {kind} of {config.dim} wide models fits {target.name} at {max(images)} "
                    "images; give fewer with --max-images"
                )
            for batch in images:
                where = out[batch]["kept"] if kind in out[batch] else out[batch]
                where[kind] = shapes[0][batch]
    return {batch: Tiles(**tiles) for batch, tiles in out.items()}


def products(
    config: PARConfig,
    kind: str,
    images: Sequence[int],
    target: Target,
    gone: Collection[tuple[object, ...]] = (),
    given: ProductTile | None = None,
    storage: Storage = NUMBERS,
) -> list[dict[int, ProductTile]]:
    """Shapes of a kind of product for each batch size; what the model finds fastest comes first.

    ``gone``: BN, BK and rows that are not to be among them. ``given``: with these panels, parts and warps alone, and
    with at most its stages. ``storage``: of the matrices.
    """
    columns, depth = matrix_of(config, kind)
    most = 2 * config.group_size * max(images)
    layouts = (
        _layouts(columns, depth, most, kind in ("wo", "w2"), storage)
        if given is None
        else [(given.BN, given.BK, given.split, given.warps)]
    )
    ranked: list[tuple[float, dict[int, ProductTile]]] = []
    for layout in layouts:
        tiles, cost = {}, 0.0
        for batch in images:
            positions = 2 * config.group_size * batch
            if (*layout[:2], rows_of(positions)) in gone:
                break
            tile = ProductTile(*layout, given.stages if given else MOST_STAGES, 0, storage.bits, storage.group)
            staged = staged_of(tile, columns, depth, rows_of(positions), target)
            times = [(product_us(each, columns, depth, positions, target), each) for each in staged]
            if not times:
                break
            time, tiles[batch] = min(times, key=lambda pair: pair[0])  # of equals the first, with most stages
            cost += time / batch  # per image: what counts most is how long one waits for a single one
        if len(tiles) == len(images):
            ranked.append((cost, tiles))
    return [tiles for _, tiles in sorted(ranked, key=lambda pair: pair[0])]  # of equals the one with larger panels


def model_us(config: PARConfig, kind: str, tile: ProductTile | AttentionTile, images: int, target: Target) -> float:
    """What the model thinks that a kernel of that kind takes for ``images`` guided images; attention, over all keys."""
    if isinstance(tile, AttentionTile):
        return attention_us(tile, 2 * images * config.n_heads, config.n_tokens, _line(config), target)
    columns, depth = matrix_of(config, kind)
    return product_us(tile, columns, depth, 2 * config.group_size * images, target)


def matrix_of(config: PARConfig, kind: str) -> tuple[int, int]:
    """Columns and depth of the matrix of a product."""
    d, F = config.dim, config.ffn_dim
    return {
        "qkv": (3 * d, d),
        "wo": (d, d),
        "gates": (2 * F, d),
        "w2": (d, F),
        "head": (config.vocab_size, d),
    }[kind]


def _line(config: PARConfig) -> int:
    """Bytes of a key and its value."""
    return 2 * -(-config.head_dim // 8) * 8 * BYTES


def _layouts(
    columns: int, depth: int, positions: int, residual: bool, storage: Storage
) -> Iterator[tuple[int, int, int, int]]:
    """BN, BK, parts of K, and warps that can be chosen, the same for every batch. ``positions``: the most.

    ``residual``: K may be split, and the tiles leave sums of squares for the kernels that follow.
    """
    for BN in (128, 64, 32, 16):
        if max(16, power(columns)) < BN:
            continue
        if storage.bits and BN == 16 and power(columns) > BN:
            continue  # one warp's columns: all four would make numbers of the same codes
        if residual and BN < 128 and power(-(-columns // BN)) * rows_of(positions) > MOST_SUMS:
            continue
        for BK in (512, 256, 128, 64, 32, 16):
            warps = 8 if BN == 128 else 4
            tile = ProductTile(BN, BK, 1, warps, 2, 0, storage.bits, storage.group)
            if not (_codes_fit if storage.bits else _numbers_fit)(tile, columns, depth, rows_of(positions)):
                continue
            turns = -(-depth // BK)
            for split in (1, 2, 4, 8) if residual else (1,):
                if split <= (turns // LEAST_TURNS if storage.bits and split > 1 else turns):
                    yield BN, BK, split, warps


def _numbers_fit(tile: ProductTile, _: int, depth: int, rows: int) -> bool:
    """Whether panels of numbers are worth a try, for so many rows at most."""
    most = min(MOST_BK, max(16, power(depth)), MOST_INPUTS // rows)
    if most < tile.BK:
        return False
    return FEWEST_INPUTS * 32 * tile.warps <= 8 * tile.BK or power(depth) <= tile.BK


def _codes_fit(tile: ProductTile, columns: int, depth: int, rows: int) -> bool:
    """Whether panels of codes are worth a try, for so many rows at most: whole pieces, of which threads copy 16 bytes
    where K is deep enough and the matrix has more columns than the tile.
    """
    least = SUB_LEAST * 8 // tile.bits
    # Of four blocks of K or more some come in the background; small models have not as many.
    if not least <= tile.BK <= max(2 * least, power(depth) // 4) or tile.BK * tile.bits // 8 > MOST_STEPS * tile.sub:
        return False
    if least < tile.BK and 2 * (-depth % tile.BK) > depth:  # padding is read as well
        return False
    # Sums of a block of K and of all so far, and some of the activations that a warp multiplies, two in a register.
    sums, inputs = tile.BN * rows // (32 * tile.warps), tile.BK * rows // 64
    if 2 * sums + inputs // 2 > MOST_HELD:
        return False
    wide = 16 * 32 * tile.warps <= tile.BN * tile.sub and FEWEST_INPUTS * 16 * tile.warps <= 8 * tile.sub
    return wide or power(depth) <= 2 * tile.BK or power(columns) <= tile.BN


def staged_of(tile: ProductTile, columns: int, depth: int, rows: int, target: Target) -> Iterator[ProductTile]:
    """``tile`` with every number of stages up to its own that makes sense and fits."""
    turns = -(-depth // tile.BK) // tile.split
    for stages in range(tile.stages, 1, -1):
        staged = replace(tile, stages=stages)
        fits = shared_bytes(staged, rows) <= MOST_SHARED * target.shared_block
        if fits and stages <= max(2, turns):
            yield _with_ahead(staged, columns, depth, target)


def panel_bytes(tile: ProductTile) -> int:
    """Bytes of one panel in memory, without scales."""
    return tile.BN * tile.BK * tile.bits // 8 if tile.bits else tile.BN * tile.BK * BYTES


def shared_bytes(tile: ProductTile, rows: int) -> int:
    """Shared memory of a product: panels of weights and the rows that they are multiplied with, of each stage."""
    return tile.stages * (panel_bytes(tile) + rows * tile.BK * BYTES)


def product_us(tile: ProductTile, columns: int, depth: int, positions: int, target: Target) -> float:
    """What the model thinks that a product of ``positions`` rows takes."""
    rows = rows_of(positions)
    groups = -(-positions // rows)
    turns = -(-depth // tile.BK)
    of_part = -(-turns // tile.split)  # of K: turns of one block
    blocks = -(-columns // tile.BN) * tile.split
    panel = tile.storage.bytes(tile.BN * tile.BK)
    weights = -(-columns // tile.BN) * turns * panel
    # How many blocks a processor has at a time: shared memory, threads (64 warps; 48 on RTX cards), and about 96
    # registers a thread.
    shared = shared_bytes(tile, rows) + 1024
    room = min(
        target.shared_processor // shared,
        (64 if target.shared_processor > 128 * 1024 else 48) // tile.warps,
        target.registers // (96 * 32 * tile.warps),
    )
    busiest = -(-blocks * groups // target.processors)
    at_once = max(1, min(room, busiest))
    # One processor: what it has on its way, its share of the bandwidth, and what the turns of all its blocks take.
    inputs = tile.BK * rows * BYTES
    flops = 2 * tile.BN * tile.BK * rows * (OLDER if tile.bits else tile.parts)
    multiply = NARROW * flops * target.processors / (target.sheet.tflop_s * 1e6)
    turn = max((panel + inputs) / COPY, multiply) + TURN_US
    if tile.bits:
        makers = max(1, 16 * tile.warps // tile.BN) * (2 if rows >= SHARED_ROWS else 1)
        turn = max(turn, tile.BN * tile.BK * makers / CODES_US)
    share = MOST_SHARE * _per_us(target) / target.processors
    turn = max(turn, panel / min(share, at_once * (tile.stages - 1) * panel / LATENCY_US))
    own = busiest * of_part * turn
    if tile.bits:  # scales are asked for a turn ahead
        own = max(own, -(-busiest // at_once) * of_part * LATENCY_US)
    # All of them: weights from memory once, activations and weights for further rows from L2, matrix units.
    activations = blocks * groups * of_part * inputs
    partial = 2 * tile.split * positions * columns * 4 if tile.split > 1 else 0
    memory = weights / (REACHED * _per_us(target))
    cache = (weights * groups + activations + partial) / (L2 * _per_us(target))
    matrix = 2 * columns * depth * groups * rows / (target.sheet.tflop_s * 1e6)
    time = max(own, memory, cache, matrix) * (1 + OTHER_PANEL * abs(math.log2(panel_bytes(tile) / BEST_PANEL)))
    return time + START_US + BLOCK_US * (busiest - 1) + (JOIN_US if tile.split > 1 else 0)


def _with_ahead(tile: ProductTile, columns: int, depth: int, target: Target) -> ProductTile:
    """``tile`` with what each of its blocks fetches ahead: of a small matrix all that it reads, else nothing.

    Of a large one it is no help: the kernel before keeps the memory busy by itself.
    """
    slab = -(-depth // tile.BK) // tile.split * panel_bytes(tile)
    small = -(-columns // tile.BN) * -(-depth // tile.BK) * panel_bytes(tile) <= target.ahead_bytes
    return replace(tile, ahead=slab // PIECE * PIECE if target.dependent and small else 0)


def attentions(config: PARConfig, images: Sequence[int], target: Target) -> list[AttentionTile]:
    """Shapes of attention, for all batches and all slots of the cache; what the model finds fastest comes first."""
    line = _line(config)

    def cost(tile: AttentionTile) -> float:
        heads = {batch: 2 * batch * config.n_heads for batch in images}
        return sum(attention_us(tile, n, config.n_tokens, line, target) / batch for batch, n in heads.items())

    spans = [span for span in (512, 256, 128, 64, 32) if span <= max(32, power(config.n_tokens))]
    # Few stages: spans are short.
    tiles = [AttentionTile(s, c, 4, 2) for s in spans for c in (128, 64, 32) if c <= s and c * line * 2 <= 64 * 1024]
    return sorted(tiles or [AttentionTile(32, 32, 4, 2)], key=cost)


def attention_us(tile: AttentionTile, heads: int, keys: int, line: int, target: Target) -> float:
    """What the model thinks that attention over ``keys`` keys of ``heads`` heads (of all rows) takes."""
    spans = -(-keys // tile.span)
    busiest = -(-heads * spans // target.processors)
    share = MOST_SHARE * _per_us(target) / target.processors
    # A turn reads keys and values, has two products and a maximum between them, and waits for each: two ways to memory.
    turns = -(-min(tile.span, keys) // tile.chunk)
    own = max(busiest * min(tile.span, keys) * line / share, -(-busiest // 4) * turns * 2 * LATENCY_US)
    memory = heads * keys * line / _per_us(target)
    return max(own, memory) + 3 * LATENCY_US + (JOIN_US + SPAN_US * spans if spans > 1 else 0)


def _per_us(target: Target) -> float:
    """Bytes of memory in a microsecond."""
    return target.sheet.gb_s * 1e3
