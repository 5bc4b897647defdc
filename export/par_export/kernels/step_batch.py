"""One batch size of a step: its rows, the shapes of its products, and the scratch memory of its launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from par_export.kernels.spec import power, round_up
from par_export.kernels.step_weights import NUMBER_BYTES, PRODUCTS, StepSizes, storage_of
from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import ProductTile, Tiles, rows_of
from par_runtime.bundle import Stored

STRIDE_MULTIPLE = 64  #: numbers: rows of activations begin at multiples of 128 bytes


@dataclass
class Batch:
    """``images`` guided images of a step of ``sizes``, whose weights are ``stored``, in ``tiles``."""

    sizes: StepSizes
    stored: Mapping[str, Stored]
    images: int
    precision: str
    target: Target
    tiles: Tiles

    @property
    def m(self) -> int:
        """Rows of every product but the head's."""
        return 2 * self.images * self.sizes.query

    @cached_property
    def rows(self) -> int:
        """Rows of the buffers: of all blocks of any product, whose last one may have rows that are none."""
        s = self.sizes
        kinds = [(kind, i) for i in range(s.layers) for kind in ("qkv", "wo", "gates", "w2")] + [("head", 0)]
        return max(self.groups(kind, layer) * self.bm(kind, layer) for kind, layer in kinds)

    def bm(self, kind: str, layer: int) -> int:
        """Rows of a block of a product in that layer."""
        return rows_of(self.m, self.tile(kind, layer))

    def groups(self, kind: str, layer: int) -> int:
        """Groups of so many rows."""
        return -(-self.m // self.bm(kind, layer))

    @property
    def stride(self) -> int:
        return round_up(self.sizes.d, STRIDE_MULTIPLE)

    @property
    def ffn_stride(self) -> int:
        return round_up(self.sizes.ffn, STRIDE_MULTIPLE)

    @property
    def heads_stride(self) -> int:
        return round_up(self.sizes.heads * self.sizes.joined, STRIDE_MULTIPLE)

    @property
    def of_heads(self) -> int:
        """Heads of all rows."""
        return 2 * self.images * self.sizes.heads

    @property
    def spans(self) -> int:
        """Parts into which attention cuts the keys of a head."""
        return -(-self.sizes.slots // self.tiles.attention.span)

    @property
    def wide(self) -> int:
        return max(16, power(self.sizes.padded))

    @property
    def queries(self) -> int:
        return max(8, power(self.sizes.query))

    @property
    def counters(self) -> int:
        """Counters that any launch uses."""
        of_sums = [
            self.groups(kind, layer) * self.blocks(kind, layer)
            for kind in ("wo", "w2")
            for layer in range(self.sizes.layers)
        ]
        return max(*of_sums, self.of_heads)

    def columns(self, kind: str, layer: int) -> int:
        """Panels of columns of a product in that layer."""
        n = {"qkv": 3 * self.sizes.d, "gates": 2 * self.sizes.ffn, "head": self.sizes.vocab}.get(kind, self.sizes.d)
        return -(-n // self.tile(kind, layer).BN)

    def blocks(self, kind: str, layer: int) -> int:
        """Blocks in which these panels are."""
        return -(-self.columns(kind, layer) // self.tile(kind, layer).panels)

    def most_columns(self, kind: str) -> int:
        return max(self.columns(kind, layer) for layer in range(self.sizes.layers))

    def tile(self, kind: str, layer: int) -> ProductTile:
        return self.tiles.of(kind, storage_of(self.stored, self.matrix(kind, layer)))

    def matrix(self, kind: str, layer: int) -> str:
        """The name of the matrix of a product."""
        matrix = next(name for name, of in PRODUCTS.items() if of == kind)
        return matrix if kind == "head" else f"layers.{layer}.{matrix}"

    def squares(self, layer: int) -> int:
        """Tiles in which the squares of x are added up when a layer begins: those of the layer before, of its w2.

        The embedding leaves them as the last layer does.
        """
        return self.columns("w2", (layer - 1) % self.sizes.layers)

    def scratch(self) -> dict[str, int]:
        """name -> bytes. Rows are as many as whole blocks of threads take."""
        s, rows, number = self.sizes, self.rows, NUMBER_BYTES[self.precision]
        splits = []
        for layer in range(s.layers):
            for kind in ("wo", "w2"):
                tile = self.tile(kind, layer)
                if tile.split > 1:
                    sums = self.bm(kind, layer) * tile.columns
                    splits.append(self.groups(kind, layer) * self.blocks(kind, layer) * tile.split * sums)
        attention = self.of_heads * self.spans * self.queries * self.wide
        return {
            "x": rows * self.stride * 4,
            "h": rows * self.stride * number,
            "q": rows * s.heads * s.padded * number,
            "y": rows * self.heads_stride * number,
            "g": rows * self.ffn_stride * number,
            "wo_squares": rows * self.most_columns("wo") * 4,
            "w2_squares": rows * self.most_columns("w2") * 4,
            "partial": max([attention, *splits]) * 4,
            "peaks": self.of_heads * self.spans * 2 * self.queries * 4,
        }
