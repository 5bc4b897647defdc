"""Which tiles the decoder's kernels run in, by a model of the card that was not fitted to any yet.

The model knows a target's processors, registers, shared memory and matrix rate, and how long a step of a block takes
that waits for its copies. What it weighs: large tiles read less from the L2 cache for each product; small ones give all
processors work; two blocks on a processor hide each other's beginning and end.

Tiles do not depend on the batch: sums of norms are added up by tile, so an image that is decoded alone is the same, to
the last bit, as in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from par_export.errors import BuildError
from par_export.kernels.spec import power
from par_export.kernels.targets import Target

#: Bytes of one number of a feature map.
NUMBER_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
#: Bytes that each processor reads from the L2 cache in a second where all do, and where it is alone: H100, A100 and
#: RTX 4090 differ little here.
L2_RATE, L2_RATE_ALONE = 40e9, 100e9
SHARED_RATE = 200e9  #: and from its shared memory
COPY_SECONDS = 0.7e-6  #: from the issue of a copy to its arrival, in a busy card
STEP_SECONDS = 0.08e-6  #: of the shortest step of a block: barriers and addresses
BLOCK_SECONDS = 2e-6  #: first copies and last stores of a block, where no other block hides them
#: Share of the matrix rate on the data sheet that products of Triton reach with operands at hand.
MATRIX_SHARE = 0.75
#: (BM, BN, warps) by the numbers of a tile that each thread sums up: 32, 64, and 128 where products read shared memory.
TILES = (
    (64, 16, 4),
    (64, 32, 4),
    (128, 16, 4),
    (128, 32, 4),
    (64, 64, 4),
    (64, 128, 4),
    (128, 64, 4),
    (128, 128, 8),
    (256, 64, 8),
)
WIDE_TILES = ((256, 128, 8),)  #: a step takes so long that two copies ahead suffice; a third costs registers


Shape = tuple[object, object, int]  #: pixels, channels and warps of a tile


@dataclass(frozen=True)
class Tile:
    """BM pixels x BN channels of a product, summed up in steps of some channels, ``stages`` of them copied ahead."""

    pixels: int
    channels: int
    warps: int
    stages: int


def divisor(number: int, most: int) -> int:
    """The largest power of two that divides ``number``, at most ``most``."""
    return min(number & -number, most)


def step_channels(channels: int, precision: str) -> int:
    """BK, the channels of a step: 128 bytes of a pixel where its channels divide so."""
    widest = 128 // NUMBER_BYTES[precision]
    if channels < 16:
        return 16
    even = divisor(channels, widest)
    return even if even >= 16 else min(power(channels), 32)


def conv_tile(
    target: Target,
    precision: str,
    pixels: int,
    maps: int,
    channels: int,
    steps: int,
    step: int,
    side: int,
    gone: Collection[Shape] = (),
) -> Tile:
    """The tile for ``maps`` products of ``pixels`` and ``channels`` an image, in ``steps`` steps of ``step`` channels.

    ``side``: columns of the filter. As many steps in a row read nearly the same pixels, from the L1 cache. ``gone``:
    tiles that the compiler found no registers for. Raises BuildError where no other is left.
    """

    def seconds(tile: Tile) -> float:
        """Of one image that is decoded alone, and of one of four."""
        alone, four = (
            _seconds(target, precision, tile, pixels, images * maps, channels, steps, step, side) for images in (1, 4)
        )
        return alone + four / 4

    tiles = [t for t in _tiles(target, channels, precision) if (t.pixels, t.channels, t.warps) not in gone]
    if not tiles:
        raise BuildError(
            f"no tile of a convolution to {channels} channels in {precision} fits {target.name}; "
            "build with --engine tensorrt"
        )
    return min(tiles, key=seconds)


def _tiles(target: Target, channels: int, precision: str) -> Iterator[Tile]:
    """All tiles that could be right for as many channels, narrow ones last."""
    wide = WIDE_TILES if target.capability == 90 and precision != "fp32" else ()
    for pixels, width, warps in (*wide, *reversed(TILES)):
        if width <= max(power(channels), 16):
            for stages in (3,) if (pixels, width, warps) in WIDE_TILES else (3, 4, 6, 8):
                yield Tile(pixels, width, warps, stages)


def _seconds(
    target: Target, precision: str, tile: Tile, pixels: int, maps: int, channels: int, steps: int, step: int, side: int
) -> float:
    """How long the product takes with ``tile``; infinite where it does not fit."""
    size = NUMBER_BYTES[precision]
    shared = shared_bytes(tile, step, size)
    sums = tile.pixels * tile.channels // (32 * tile.warps)
    registers = min(255, 48 + sums * 3 // 2 if target.capability >= 90 else 80 + sums * 3 // 2)
    together = min(
        target.shared_processor // (shared + 1024),
        target.registers // (-(-registers // 8) * 8 * 32 * tile.warps),
        2048 // (32 * tile.warps) if target.capability in (80, 90, 100) else 1536 // (32 * tile.warps),
    )
    if shared > target.shared_block or not together:
        return math.inf
    blocks = -(-pixels // tile.pixels) * -(-channels // tile.channels) * maps
    rate = target.sheet.tflop_s * 1e12 / 2 / target.processors * MATRIX_SHARE / (2 if precision == "fp32" else 1)
    product = tile.pixels * tile.channels * step / rate
    l2_rate = min(L2_RATE_ALONE, L2_RATE * target.processors / min(blocks, target.processors))
    copied = (tile.pixels / side + tile.channels) * step * size / l2_rate
    # A warp group reads 64 pixels and all channels from shared memory for a product of them; before SM90 a warp reads
    # for its share of the tile, about a square.
    groups, square = tile.pixels // 64, math.isqrt(tile.pixels * tile.channels // tile.warps)
    read = groups * (64 + tile.channels) if target.capability in (90, 100) else tile.warps * 2 * square
    operands = read * step * size / SHARED_RATE
    # The busiest processor does its blocks one after another, or as many at once as there is room for.
    load = -(-blocks // target.processors)
    rounds = -(-load // together)
    waiting = max(COPY_SECONDS / (tile.stages - 1), STEP_SECONDS)
    stored = 2 * tile.pixels * tile.channels * size / L2_RATE
    ends = load * stored + BLOCK_SECONDS * (rounds if together == 1 else (rounds + 1) / 2)
    return steps * max(load * max(product, copied, operands), rounds * waiting) + ends


def shared_bytes(tile: Tile, step: int, size: int) -> int:
    """Shared memory of a block, at least: its copies, and the tile on its way from products to stores."""
    return max(tile.stages * (tile.pixels + tile.channels) * step * size, tile.pixels * tile.channels * size)


def attention_tile(target: Target, precision: str, pixels: int, channels: int, gone: Collection[Shape] = ()) -> Tile:
    """BM queries and BN keys of attention with ``channels`` numbers each, not one that is ``gone``.

    Raises BuildError where none fits.
    """
    size, width = NUMBER_BYTES[precision], power(max(channels, 16))
    best, least = None, math.inf
    for queries, keys, warps, stages in (
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 32, 8, 2),
        (32, 32, 8, 2),
        (32, 32, 4, 2),
        (16, 32, 8, 2),
        (16, 32, 4, 2),
        (16, 16, 8, 1),
        (16, 16, 4, 1),
    ):
        shared = (queries + 2 * stages * keys) * width * size + (8192 if stages > 1 else 0)
        sums = queries * width // (32 * warps)
        if shared > target.shared_block or sums > 128 or (precision == "fp32" and queries > 16):
            continue
        if (queries, keys, warps) in gone:
            continue
        blocks = -(-pixels // queries)
        rate = target.sheet.tflop_s * 1e12 / 2 / target.processors / (2 if queries >= 64 else 4)
        each = max(2 * queries * keys * width / rate, 2 * keys * width * size / L2_RATE, COPY_SECONDS / stages)
        seconds = -(-blocks // target.processors) * -(-pixels // keys) * each
        if seconds < least:
            best, least = Tile(queries, keys, warps, stages), seconds
    if best is None:
        half = "--decoder-precision fp16, or with " if precision == "fp32" else ""
        raise BuildError(
            f"decoder: attention over {channels} channels in {precision} does not fit the shared memory of "
            f"{target.name}; build with {half}--engine tensorrt"
        )
    return best


def pass_tile(target: Target, pixels: int, channels: int) -> tuple[int, int]:
    """Pixels and channels of a block that reads and writes a map once: many bytes a block, but work for all."""
    width = divisor(channels, 256)
    if width < 32:
        width = min(power(channels), 256)
    numbers = pixels * channels // (8 * target.processors)
    numbers = max(1024, min(8192, power(numbers + 1) // 2))
    return max(1, numbers // width), width
