"""The shapes of tiles in which the step's kernels work, chosen by a model of the GPU until ``parvis tune`` measures.

A step is a stream of weights, so a good shape keeps enough of them on their way to every processor, and ends on all
processors at about the same time. What a batch must not change is the result of a row: the order of the weights, the
parts of a sum and the spans of keys are therefore the same for all batch sizes of an engine. Stages may differ, and how
many panels are held.

``tile_shapes.py`` says what a shape is, ``tile_model.py`` what it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

from par_export.errors import BuildError
from par_export.kernels.spec import Refused, power, round_up
from par_export.kernels.targets import Target
from par_export.kernels.tile_model import attention_us, line_bytes, matrix_of, product_us
from par_export.kernels.tile_shapes import (
    BYTES,
    NUMBERS,
    SOURCES,
    SUB_LEAST,
    AttentionTile,
    Many,
    ProductTile,
    Storage,
    Tiles,
    block_of,
    panel_bytes,
    rows_of,
    shapes_of,
    shared_bytes,
)
from par_model.config import PARConfig

PIECE = 2048  #: bytes that are fetched ahead at a time
MOST_SHARED = 0.9  #: of a block's limit: the compiler adds to what the stages take
MOST_SUMS = 8192  #: of squares that a consumer of x adds up in registers: tiles (a power of 2) times rows
MOST_STAGES = 6
MOST_BK = 256  #: rows of a panel of numbers
MOST_INPUTS = 16384  #: numbers of activations that a block loads at a time
#: Of the activations that a block of 8 rows loads at a time, numbers for each thread: with fewer than 8 bytes a thread
#: some are not copied in the background.
FEWEST_INPUTS = 4
MOST_OF_SUMS = 160  #: registers of a thread for the sums of codes; more do not suffice for the rest
#: Of the loop over K, for codes: with three stages two panels are in shared memory, and one comes in the background.
LEAST_TURNS = 3
MOST_STEPS = 4  #: pieces of a block of K one after the other: each is a copy of the same instructions
#: Bytes of weights that a block can hold, and of these (or of keys) the bytes of a thread: 160 of its registers, on
#: their way.
MOST_HELD_BYTES, MOST_LOADED = 80 * 1024, 640
WIDE_ROWS = 64  #: rows that the wide matrix instruction takes at least: keys of a block's own call have so many
MOST_SPANS = 4  #: of keys that are held
#: Of blocks of many rows: what is tried of each, in this order. Of the last two the first that fit are taken: rows of a
#: part in a turn, and turns that are in shared memory.
MANY_ROWS, MANY_COLUMNS, MANY_DEPTH, MANY_STAGES = (256, 128, 64), (256, 128, 64), (64, 32, 16), (4, 3, 2)
#: Registers of a thread that the sums of such a block may take, all parts together.
MANY_SUMS = 128
#: The same where what is multiplied is in registers too (``Target.from_shared``).
SUMS_AND_OPERANDS = 64
#: Registers of a thread for the sums of one part, in the kernels that read and write x at a place of its own for each.
PLACED_SUMS = 64
#: The same of queries, keys and values, which are turned and go into the caches: a part of what may be in all. With two
#: parts, or codes, some of these need more registers than there are: a build then takes others.
TURNED_PART = 0.5
MANY_SUB = 64  #: bytes of codes that a column has in a piece, at most, where blocks of many rows take it


def choose(
    config: PARConfig,
    images: Sequence[int],
    target: Target,
    refused: Refused = frozenset(),
    given: Mapping[str, ProductTile | AttentionTile] = MappingProxyType({}),
    storages: Mapping[str, Sequence[Storage]] = MappingProxyType({}),
    at: int = 1,
) -> dict[int, Tiles]:
    """The shapes that the model finds fastest for ``config``, for guided batches of each of the sizes ``images``.

    ``given``: shapes of some kinds ("qkv", "attention"), as measured with ``at`` images; for other batches they keep
    their panels, and take as many of their stages as fit, or blocks of many rows. ``storages``: how the matrices of a
    kind lie, quantised ones first; of a kind that is not named, as numbers. Raises BuildError where ``refused`` leaves
    no shape.
    """
    out: dict[int, dict[str, Any]] = {batch: {"kept": {}} for batch in images}
    gone = shapes_of(refused, SOURCES["attention"], ("SPAN", "CHUNK", "HELD"))
    keys = [*(holding_keys(config, target) if target.held_keys else ()), *attentions(config, images, target)]
    keys = [tile for tile in keys if (tile.span, tile.chunk, tile.held) not in gone]
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
            measured = tile if isinstance(tile, ProductTile) and tile.storage == storage else None
            shapes = products(config, kind, images, target, gone_of(refused, kind, storage), measured, storage, at)
            if not shapes:
                raise BuildError(
                    f"no shape of the product {kind} of {config.dim} wide models fits {target.name} at {max(images)} "
                    "images; give fewer with --max-images"
                )
            for batch in images:
                where = out[batch]["kept"] if kind in out[batch] else out[batch]
                where[kind] = shapes[0][batch]
    return {batch: Tiles(**tiles) for batch, tiles in out.items()}


def gone_of(refused: Refused, kind: str, storage: Storage) -> set[tuple[object, ...]]:
    """BN, BK, rows and PANELS of the blocks among ``refused`` that products of a kind of such matrices would have."""
    found = shapes_of(refused, SOURCES[kind], ("BITS", "BN", "BK", "BM", "PANELS"))
    return {one[1:] for one in found if one[0] == storage.bits}


def products(
    config: PARConfig,
    kind: str,
    images: Sequence[int],
    target: Target,
    gone: Collection[tuple[object, ...]] = (),
    given: ProductTile | None = None,
    storage: Storage = NUMBERS,
    at: int = 1,
) -> list[dict[int, ProductTile]]:
    """Shapes of a kind of product for each batch size; what the model finds fastest comes first.

    ``gone``: BN, BK, rows and PANELS of blocks that are not to be among them. ``given``: with these panels, parts and
    warps alone, with at most its stages, and at most so many panels held; with ``at`` images in blocks of its own kind.
    ``storage``: of the matrices.
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
            rows = rows_of(positions)
            tile = ProductTile(*layout, given.stages if given else MOST_STAGES, 0, storage.bits, storage.group)
            tried = [
                *staged_of(tile, columns, depth, rows, target),
                *many_of(tile, kind, columns, depth, positions, target),
            ]
            times = [
                (product_us(each, columns, depth, positions, target), each)
                for each in tried
                if block_of(each, positions) not in gone and (given is None or batch != at or each.many == given.many)
            ]
            if not times:
                break
            time, best = min(times, key=lambda pair: pair[0])  # of equals the first, with most stages
            most = given.held if given else target.held_bytes // panel_bytes(best)
            tiles[batch] = holding(best, most, columns, depth, rows, target)
            cost += time / batch  # per image: what counts most is how long one waits for a single one
        if len(tiles) == len(images):
            ranked.append((cost, tiles))
    return [tiles for _, tiles in sorted(ranked, key=lambda pair: pair[0])]  # of equals the one with larger panels


def few_of(tile: ProductTile, columns: int, depth: int, positions: int, target: Target) -> ProductTile | None:
    """The panels of ``tile`` in the fastest shape by the model that is not of many rows; None where none fits."""
    few = replace(tile, many=None, stages=MOST_STAGES)
    staged = staged_of(few, columns, depth, rows_of(positions), target)
    return min(staged, key=lambda each: product_us(each, columns, depth, positions, target), default=None)


def many_of(
    tile: ProductTile,
    kind: str,
    columns: int,
    depth: int,
    positions: int,
    target: Target,
) -> Iterator[ProductTile]:
    """The panels of ``tile`` in blocks of many rows, each with the most stages that fit."""
    part = tile.BK // tile.parts
    depths = [each for each in MANY_DEPTH if part % each == 0]
    if tile.bits:  # a piece, which must find room in registers
        depths = [tile.sub * 8 // tile.bits] if tile.sub <= MANY_SUB else []
    if positions < min(MANY_ROWS):
        return
    panels = -(-depth // tile.BK) // tile.split
    for wide in MANY_COLUMNS:
        if wide % tile.BN or -(-columns // tile.BN) * tile.BN % wide:
            continue
        for rows in MANY_ROWS:
            warps = 8 if wide >= 128 else 4
            sums = wide * rows // (32 * warps)
            most = MANY_SUMS if target.from_shared else SUMS_AND_OPERANDS
            of_part = {"qkv": TURNED_PART * most, "wo": PLACED_SUMS, "w2": PLACED_SUMS}.get(kind, most)
            every = sums * (2 if tile.bits else tile.parts)  # of codes: those of a piece, and of all so far
            if rows > power(positions) or every > most or sums > of_part:
                continue
            for deep, stages in product(depths, MANY_STAGES):
                many = replace(tile, ahead=0, held=0, many=Many(wide, rows, deep, warps, stages))
                fits = shared_bytes(many, rows) <= MOST_SHARED * target.shared_block
                if fits and stages <= max(2, panels * (part // deep)):
                    yield many
                    break


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
            rows = rows_of(positions)
            if not (_codes_fit(tile, columns, depth, rows) if storage.bits else _numbers_fit(tile, depth, rows)):
                continue
            turns = -(-depth // BK)
            for split in (1, 2, 4, 8) if residual else (1,):
                if split <= (turns // LEAST_TURNS if storage.bits and split > 1 else turns):
                    yield BN, BK, split, warps


def _numbers_fit(tile: ProductTile, depth: int, rows: int) -> bool:
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
    if 2 * sums + inputs // 2 > MOST_OF_SUMS:
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


def holding(tile: ProductTile, most: int, columns: int, depth: int, rows: int, target: Target) -> ProductTile:
    """``tile`` with as many panels held as fit, at most ``most``, and where that is all of a block, with few stages;
    as it is where none fits, or the GPU starts no kernel before the one ahead has ended.

    What is held is loaded at once, so it must find room in registers too, and the rows that it is multiplied with.
    """
    if tile.bits or tile.many or not target.dependent:
        return tile
    panels = -(-depth // tile.BK)
    turns = panels // tile.split
    for held in range(min(most, turns), 0, -1):
        if held.bit_count() > 2:  # neither a power of 2 nor a sum of two
            continue
        whole = held * tile.split == panels
        if not whole and turns - held < 2:  # a loop of one turn would copy nothing in the background
            continue
        out = replace(tile, held=held, stages=2 if whole else tile.stages)
        loaded = held * panel_bytes(tile) <= MOST_LOADED * 32 * tile.warps and held * tile.BK * rows <= MOST_INPUTS
        if loaded and shared_bytes(out, rows) <= MOST_SHARED * target.shared_block:
            return _with_ahead(out, columns, depth, target)
    return tile


def _with_ahead(tile: ProductTile, columns: int, depth: int, target: Target) -> ProductTile:
    """``tile`` with what each of its blocks fetches ahead: of a small matrix all that it reads
    and does not hold, else nothing.

    Of a large one it is no help: the kernel before keeps the memory busy by itself.
    """
    slab = (-(-depth // tile.BK) // tile.split - tile.held) * panel_bytes(tile)
    small = -(-columns // tile.BN) * -(-depth // tile.BK) * panel_bytes(tile) <= target.ahead_bytes
    return replace(tile, ahead=slab // PIECE * PIECE if target.dependent and small else 0)


def attentions(config: PARConfig, images: Sequence[int], target: Target) -> list[AttentionTile]:
    """Shapes of attention, for all batches and all slots of the cache; what the model finds fastest comes first."""
    line = line_bytes(config)

    def cost(tile: AttentionTile) -> float:
        heads = {batch: 2 * batch * config.n_heads for batch in images}
        return sum(attention_us(tile, n, config.n_tokens, line, target) / batch for batch, n in heads.items())

    spans = [span for span in (512, 256, 128, 64, 32) if span <= max(32, power(config.n_tokens))]
    # Few stages: spans are short.
    tiles = [AttentionTile(s, c, 4, 2) for s in spans for c in (128, 64, 32) if c <= s and c * line * 2 <= 64 * 1024]
    return sorted(tiles or [AttentionTile(32, 32, 4, 2)], key=cost)


def few_spans(config: PARConfig, target: Target) -> list[AttentionTile]:
    """Attention in one span of all keys, which nobody has to join, and in two; with more stages, since spans are long.

    No build chooses them: in trials on an H200 they took up to 19 % less for half of an image's keys, and nothing more
    is known. Tuning tries them.
    """
    for chunk in (128, 64, 32):
        if 3 * chunk * line_bytes(config) <= MOST_SHARED * target.shared_block:
            spans = dict.fromkeys(round_up(-(-config.n_tokens // parts), chunk) for parts in (1, 2))
            return [AttentionTile(span, chunk, 4, 3) for span in spans]
    return []


def holding_keys(config: PARConfig, target: Target) -> list[AttentionTile]:
    """Attention that holds keys, the fewest spans of an image's keys first; none where the GPU starts no kernel before
    the one ahead has ended.

    A span is a power of 2 or the sum of two, since each of them is one operand of the matrix units.
    """
    if not target.dependent:
        return []
    line = 2 * max(16, power(line_bytes(config) // (2 * BYTES))) * BYTES  # in shared memory: a power of 2
    own = max(WIDE_ROWS, power(config.group_size)) * line
    out: dict[int, AttentionTile] = {}
    for parts in range(1, MOST_SPANS + 1):
        keys = -(-config.n_tokens // parts)
        span = max(32, power(keys)) if keys <= WIDE_ROWS else round_up(keys, WIDE_ROWS)
        while span.bit_count() > 2:
            span += WIDE_ROWS
        fits = span * line + own <= MOST_SHARED * target.shared_block
        warps = [each for each in (4, 8, 16) if span * line <= MOST_LOADED * 32 * each]
        if fits and warps:
            out.setdefault(span, AttentionTile(span, span, warps[0], 2, span))
    return list(out.values())
