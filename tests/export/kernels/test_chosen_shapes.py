"""The shapes that builds of the published sizes choose, one by one: what ``tile_model.py`` has said so far.

A change of the model or of what may be chosen changes lines here. Look then whether each of them is meant: of fp16 and
attention on SM90 the trials of one H200 say how good a shape is (``tests/export/card/test_trials.py``), of codes and of
SM80 nothing was measured.
"""

from __future__ import annotations

import pytest

from par_export.kernels import tiles
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_shapes import NUMBERS, Storage
from par_model.config import named

KINDS = ("qkv", "wo", "gates", "w2", "head")
STORAGES = {"fp16": NUMBERS, "int8": Storage(8, 64), "int4": Storage(4, 64)}
#: Of one image in engines for 1, 2, 4 and 8: model, n, target and weights; of each product BNxBK/parts of K*stages; of
#: attention keys of a span/of a chunk.
CHOSEN = """
L   4 SM90 fp16  32x256/1*4    16x256/1*4    64x128/1*6    16x256/1*6    128x128/1*6   128/128
L   4 SM90 int8  32x256/1*4    32x256/1*4    32x256/1*4    128x64/8*5    128x128/1*6   128/128
L   4 SM90 int4  32x256/1*4    32x256/1*4    32x256/1*4    64x128/4*5    128x128/1*6   128/128
L   4 SM80 fp16  32x256/1*4    16x256/1*4    64x128/1*6    16x256/1*6    64x128/1*6    64/64
L   4 SM80 int8  32x256/1*4    32x256/1*4    32x256/1*4    128x64/8*5    32x256/1*4    64/64
L   4 SM80 int4  32x256/1*4    32x256/1*4    32x256/1*4    64x128/4*5    32x256/1*4    64/64
L  16 SM90 fp16  32x256/1*4    16x256/1*4    64x128/1*6    64x64/8*5     128x128/1*5   128/128
L  16 SM90 int8  32x256/1*4    32x256/1*4    32x256/1*4    128x64/8*5    128x128/1*6   128/128
L  16 SM90 int4  32x256/1*4    32x256/1*4    32x256/1*4    64x128/4*5    128x128/1*6   128/128
L  16 SM80 fp16  32x256/1*4    32x256/1*4    64x128/1*6    64x64/4*6     64x128/1*6    64/64
L  16 SM80 int8  32x256/1*4    64x64/4*4     64x128/1*6    32x64/8*5     32x256/1*4    64/64
L  16 SM80 int4  32x256/1*4    64x64/4*4     64x128/1*6    64x128/4*5    32x256/1*4    64/64
XL  4 SM90 fp16  32x256/1*5    16x256/1*5    64x128/1*6    16x256/1*6    128x128/1*6   128/128
XL  4 SM90 int8  32x256/1*5    32x256/1*5    32x256/1*5    128x128/8*3   32x256/1*4    128/128
XL  4 SM90 int4  32x256/1*5    32x256/1*5    32x256/1*5    128x128/8*3   32x256/1*5    128/128
XL  4 SM80 fp16  64x128/1*6    16x256/1*5    32x256/1*5    16x256/1*6    64x128/1*6    128/128
XL  4 SM80 int8  32x256/1*5    32x256/1*5    32x256/1*4    128x128/8*3   32x256/1*5    128/128
XL  4 SM80 int4  32x256/1*5    32x256/1*5    32x256/1*5    128x128/8*3   32x256/1*5    128/128
XL 16 SM90 fp16  32x256/1*5    16x256/1*5    64x128/1*6    64x64/8*6     128x128/1*5   128/128
XL 16 SM90 int8  32x256/1*5    32x256/1*5    32x256/1*4    128x128/8*3   128x128/1*6   128/128
XL 16 SM90 int4  32x256/1*5    32x256/1*5    32x256/1*5    128x128/8*3   128x128/1*6   128/128
XL 16 SM80 fp16  64x128/1*6    64x64/4*5     32x256/1*4    64x128/4*6    64x128/1*6    128/128
XL 16 SM80 int8  64x128/1*6    64x64/4*5     32x256/1*5    32x64/8*6     32x256/1*5    128/128
XL 16 SM80 int4  64x128/1*6    64x64/4*5     32x256/1*5    64x128/4*6    32x256/1*5    128/128
3B  4 SM90 fp16  32x128/1*6    32x128/1*6    32x128/1*6    32x256/1*6    128x128/1*6   64/64
3B  4 SM90 int8  32x256/1*6    128x128/8*3   32x256/1*3    128x128/8*6   32x256/1*4    64/64
3B  4 SM90 int4  32x256/1*6    128x128/8*3   32x256/1*5    128x128/8*6   32x256/1*6    64/64
3B  4 SM80 fp16  32x128/1*6    32x128/1*6    64x128/1*6    64x128/2*6    64x128/1*6    128/64
3B  4 SM80 int8  32x256/1*4    128x128/4*6   64x128/1*5    128x128/4*6   32x256/1*6    128/64
3B  4 SM80 int4  32x256/1*6    128x128/4*6   64x128/1*6    128x128/4*6   32x256/1*6    128/64
3B 16 SM90 fp16  32x128/1*6    32x128/1*6    64x128/1*6    128x128/4*5   128x128/1*5   64/64
3B 16 SM90 int8  32x256/1*4    128x64/8*6    32x256/1*4    128x64/8*6    128x128/1*6   64/64
3B 16 SM90 int4  32x256/1*5    128x128/4*6   32x256/1*5    128x128/4*6   128x128/1*6   64/64
3B 16 SM80 fp16  64x128/1*6    128x128/4*3   64x128/1*6    128x128/4*3   64x128/1*6    128/64
3B 16 SM80 int8  32x256/1*6    128x64/4*6    64x128/1*6    128x128/4*6   32x256/1*6    128/64
3B 16 SM80 int4  32x256/1*6    64x128/2*6    64x128/1*6    128x128/4*6   32x256/1*6    128/64
"""
#: Of eight images in the same engines, fp16: columns and rows of a block of many rows and its stages; -: of few.
OF_EIGHT = """
L   4 SM90  -           -           -           -           128x64*4
L   4 SM80  64x64*4     -           64x64*4     -           64x64*4
L  16 SM90  64x128*4    64x64*3     128x128*4   128x128*4   256x128*4
L  16 SM80  128x64*3    64x64*4     128x128*4   -           64x128*4
XL  4 SM90  64x64*4     -           64x64*4     -           128x64*4
XL  4 SM80  -           -           128x64*3    -           64x64*4
XL 16 SM90  64x128*4    64x64*3     128x128*4   64x128*4    256x128*4
XL 16 SM80  -           128x128*4   64x64*4     128x128*4   64x128*4
3B  4 SM90  128x64*4    -           64x64*4     -           128x64*4
3B  4 SM80  128x64*3    64x64*4     64x64*4     64x64*4     64x64*4
3B 16 SM90  64x128*4    64x128*4    64x128*4    128x128*4   256x128*4
3B 16 SM80  128x64*4    128x128*4   128x128*4   128x128*4   64x128*4
"""
LINES = [line.split() for line in CHOSEN.strip().splitlines()]


@pytest.mark.parametrize("line", LINES, ids=[" ".join(line[:4]) for line in LINES])
def test_the_shapes_of_the_published_sizes(line: list[str]) -> None:
    size, n, target, weights, *products, attention = line
    storages = dict.fromkeys(KINDS, (STORAGES[weights],))
    config = named(size, group_size=int(n))
    chosen = tiles.choose(config, (1, 2, 4, 8), TARGETS[target], storages=storages)[1]
    of_kinds = [getattr(chosen, kind) for kind in KINDS]
    assert [f"{tile.BN}x{tile.BK}/{tile.split}*{tile.stages}" for tile in of_kinds] == products
    assert f"{chosen.attention.span}/{chosen.attention.chunk}" == attention


@pytest.mark.parametrize("line", OF_EIGHT.strip().splitlines(), ids=lambda line: " ".join(line.split()[:3]))
def test_eight_images_take_blocks_of_many_rows_of_the_same_panels(line: str) -> None:
    size, n, target, *blocks = line.split()
    chosen = tiles.choose(named(size, group_size=int(n)), (1, 2, 4, 8), TARGETS[target])[8]
    of_kinds = [getattr(chosen, kind) for kind in KINDS]
    found = [f"{tile.columns}x{tile.many.rows}*{tile.many.stages}" if tile.many else "-" for tile in of_kinds]
    assert found == blocks
