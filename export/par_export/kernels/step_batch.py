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
    def bm(self) -> int:
        return rows_of(self.m)

    @property
    def groups(self) -> int:
        """Groups of BM rows."""
        return -(-self.m // self.bm)

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
        return max(self.groups * max(self.most_columns("wo"), self.most_columns("w2")), self.of_heads)

    def columns(self, kind: str, layer: int) -> int:
        """Tiles of columns of a product in that layer."""
        n = {"qkv": 3 * self.sizes.d, "gates": 2 * self.sizes.ffn, "head": self.sizes.vocab}.get(kind, self.sizes.d)
        return -(-n // self.tile(kind, layer).BN)

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
        s, rows, number = self.sizes, self.groups * self.bm, NUMBER_BYTES[self.precision]
        splits = []
        for layer in range(s.layers):
            for kind in ("wo", "w2"):
                tile = self.tile(kind, layer)
                if tile.split > 1:
                    splits.append(self.groups * self.columns(kind, layer) * tile.split * self.bm * tile.BN)
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
