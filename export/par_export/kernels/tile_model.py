"""What a kernel of a shape takes on a GPU, by a model of it: a roofline with a few limits for each kernel.

Only the order of candidates matters. Its constants of products of numbers were fitted to products of PAR-3B, XL and L
that one H200 timed, each alone, of up to 64 rows; those of attention were set by its trials there
(``docs/kernels.md``); those of codes are guesses. Blocks of many rows have not run on a GPU: what the model says of
them follows from other kernels that have. What holding weights brings (``ProductTile.held``) is not in it: no GPU has
timed that. Times in microseconds, sizes in bytes.
"""

from __future__ import annotations

import math

from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import (
    BYTES,
    AttentionTile,
    ProductTile,
    panel_bytes,
    rows_of,
    shared_bytes,
)
from par_model.config import PARConfig

#: From asking for a line of memory until it is there, on a busy GPU.
LATENCY_US = 0.73
#: What one turn of the loop over K costs a processor beside copying or multiplying, whichever of its blocks it is of:
#: it waits for what was copied, and for all threads, before the matrix units may read it.
TURN_US = 0.1
#: Bytes that a processor copies to shared memory in a microsecond.
COPIED_PER_US = 120e3
#: Of the rate of the data sheet, what products of few rows cost more; and blocks of many rows: the decoder's
#: largest convolutions, whose blocks are as large, reached 430 to 480 TFLOP/s of 989 in the rows of the H200.
NARROW, MANY = 1.5, 1.8
#: What a stream of weights reaches of the bandwidth of the data sheet.
REACHED = 0.89
#: A processor can draw more than its share of the bandwidth while others have nothing to do, but not much more.
MOST_SHARE = 1.11
#: Bandwidth of the L2 cache, in bandwidths of the memory: where all rows are in one block, and where there are several
#: groups of rows. In its rows an H200 read 9.4 TB/s for products of 256 rows in groups of 64.
L2, L2_OF_MANY = 1.3, 2.0
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
#: Codes of which a processor makes numbers in a microsecond. Each takes some 2.5 of the instructions of a thread, of
#: which a processor starts 128 a cycle. Not fitted: in the rows of the H200 products of codes waited for their scales.
CODES_PER_US = 60_000
#: Rows from which Triton has two warps multiply the same weights with other rows: both make numbers of them.
SHARED_ROWS = 32
#: Of the rate of the data sheet, what the older matrix instructions cost more, which products of codes take.
OLDER = 4.0
#: Sums that a processor multiplies with scales in a microsecond, one in each turn of a block of many rows: 128 a cycle.
SCALED_PER_US = 225e3


def model_us(config: PARConfig, kind: str, tile: ProductTile | AttentionTile, images: int, target: Target) -> float:
    """What the model thinks that a kernel of that kind takes for ``images`` guided images; attention, over all keys."""
    if isinstance(tile, AttentionTile):
        return attention_us(tile, 2 * images * config.n_heads, config.n_tokens, line_bytes(config), target)
    columns, depth = matrix_of(config, kind)
    return product_us(tile, columns, depth, 2 * config.group_size * images, target)


def product_us(tile: ProductTile, columns: int, depth: int, positions: int, target: Target) -> float:
    """What the model thinks that a product of ``positions`` rows takes."""
    rows = rows_of(positions, tile)
    groups = -(-positions // rows)
    panels = -(-depth // tile.BK)
    of_part = -(-panels // tile.split) * (tile.BK // tile.depth)  # of K: turns of one block
    blocks = -(-columns // tile.columns) * tile.split
    panel = tile.storage.bytes(tile.columns * tile.depth)
    weights = tile.storage.bytes(-(-columns // tile.BN) * tile.BN * panels * tile.BK)
    # How many blocks a processor has at a time: shared memory, threads (64 warps; 48 on RTX cards), and registers,
    # about 96 a thread beside the sums of many rows.
    shared = shared_bytes(tile, rows) + 1024
    warps = tile.block_warps
    sums = tile.columns * rows * tile.parts // (32 * warps) if tile.many else 0
    room = min(
        target.shared_processor // shared,
        (64 if target.shared_processor > 128 * 1024 else 48) // warps,
        target.registers // ((96 + sums) * 32 * warps),
    )
    busiest = -(-blocks * groups // target.processors)
    at_once = max(1, min(room, busiest))
    # One processor: what it has on its way, its share of the bandwidth, and what the turns of all its blocks take.
    inputs = tile.depth * rows * BYTES
    flops = 2 * tile.columns * tile.depth * rows * (1 if tile.many else OLDER if tile.bits else tile.parts)
    multiply = (MANY if tile.many else NARROW) * flops * target.processors / (target.sheet.tflop_s * 1e6)
    if tile.bits and tile.many:  # one after the other, in the threads that wait for the product
        multiply += tile.columns * (tile.depth / CODES_PER_US + rows / SCALED_PER_US)
    turn = max((panel + inputs) / COPIED_PER_US, multiply) + TURN_US
    if tile.bits and not tile.many:
        makers = max(1, 16 * tile.warps // tile.BN) * (2 if rows >= SHARED_ROWS else 1)
        turn = max(turn, tile.BN * tile.BK * makers / CODES_PER_US)
    share = MOST_SHARE * _per_us(target) / target.processors
    turn = max(turn, panel / min(share, at_once * (tile.block_stages - 1) * panel / LATENCY_US))
    own = busiest * of_part * turn
    if tile.bits:  # scales are asked for a turn ahead
        own = max(own, -(-busiest // at_once) * of_part * LATENCY_US)
    # All of them: weights from memory once, activations and weights for further rows from L2, matrix units.
    activations = blocks * groups * of_part * inputs
    partial = 2 * tile.split * positions * columns * 4 if tile.split > 1 else 0
    memory = weights / (REACHED * _per_us(target))
    l2 = L2_OF_MANY if groups > 1 or tile.many else L2
    cache = (weights * groups + activations + partial) / (l2 * _per_us(target))
    matrix = 2 * columns * depth * groups * rows / (target.sheet.tflop_s * 1e6)
    time = max(own, memory, cache, matrix)
    if not tile.many:
        time *= 1 + OTHER_PANEL * abs(math.log2(panel_bytes(tile) / BEST_PANEL))
    return time + START_US + BLOCK_US * (busiest - 1) + (JOIN_US if tile.split > 1 else 0)


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


def line_bytes(config: PARConfig) -> int:
    """Bytes of a key and its value."""
    return 2 * -(-config.head_dim // 8) * 8 * BYTES


def _per_us(target: Target) -> float:
    """Bytes of memory in a microsecond."""
    return target.sheet.gb_s * 1e3
