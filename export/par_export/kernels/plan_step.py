"""The step as a list of launches: five a layer and three around them (``sources/step.py`` says what each computes).

What the shapes of ``tiles.py`` must keep to:

- BN is a power of 2 from 16, BK from 16; a panel's columns come in 16s, in which partners lie 8 apart.
- BN, BK, parts of K and spans of keys are the same for all batches: weights are packed once, and a row's sums have the
  same order in every batch. Warps and stages may differ.
- A block takes BM = ``tile_shapes.rows_of`` rows, 8 to 64, or up to 256 in a shape of many rows; shared memory is
  ``tile_shapes.shared_bytes``.
- The tiles of ``wo`` and ``w2`` decide how many sums of squares a consumer of x adds up: in registers, or in blocks of
  many rows eight at a time.
- Codes come in whole pieces, whose rows are of one group (``ProductTile.sub``), BK is a number of pieces.
- ``ahead`` is a multiple of 16 bytes.

Where a batch could change a row's result all the same: sums of squares are added in an order that depends on the layout
of a tile in registers, which the compiler chooses for BM and warps, and is another one in blocks of many rows; and
another BM may take other instructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_export.kernels.spec import STORED_KINDS, Constant, Planned, Spec, laid_out, power, round_up
from par_export.kernels.step_batch import Batch
from par_export.kernels.step_weights import (
    KINDS,
    StepSizes,
    add_weights,
    gain_row,
    gains,
    power_at,
    storages,
)
from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import ProductTile, Tiles
from par_model.config import PARConfig
from par_runtime.backends.program import ALIGN, Launch, Pointer, Profile, Program, Weight
from par_runtime.bundle import Stored
from par_runtime.quantised import SCALE

#: Codes that one block of threads keeps in registers. On SM100 the compiler needs a few registers more.
RESIDENT, RESIDENT_SM100 = 16384, 8192
CHUNK = 4096  #: codes at a time where they are not kept
MOST_EMBED = 4096  #: numbers that a block of the embedding copies at a time
LOG2_E = math.log2(math.e)

Arguments = dict[str, tuple[str, object]]  #: name -> type and argument, in the order of the parameters


def plan(
    config: PARConfig,
    stored: Mapping[str, Stored],
    read: Callable[[Stored], NDArray[np.float32]],
    phases: Sequence[str],
    images: Sequence[int],
    precision: str,
    target: Target,
    tiles: Mapping[int, Tiles],
) -> Planned:
    """The program "step" for batches of ``images``, its kernels and its weights.

    ``stored``: where the tensors of the step lie; ``read`` reads one (the gains of norms are). ``phases``: what the
    program is for. ``tiles``: the shapes for each of ``images``.
    """
    sizes = StepSizes.of(config, stored)
    planned = Planned()
    first = tiles[images[0]]
    for kind, of_kind in storages(stored).items():
        for storage in of_kind:
            shapes = {
                (t.BN, t.BK, t.split, t.parts, t.sub) for t in (tiles[count].of(kind, storage) for count in images)
            }
            if len(shapes) > 1:
                raise ValueError(f"panels of {kind} differ between batches: {sorted(shapes)}")
    add_weights(planned, sizes, stored, first, precision)
    of_norms = gains(sizes, stored, read)
    planned.constants["gains"] = of_norms.tobytes()
    planned.weights["gains"] = Weight(of_norms.nbytes, None, 0, None)
    counters = 1
    profiles = {}
    for count in images:
        one = _Profile(sizes, stored, count, precision, target, tiles[count], planned)
        counters = max(counters, one.counters)
        profiles[count] = one.profile()
    size = 4 * counters
    layers = sizes.layers if all(profile.layer for profile in profiles.values()) else 0
    planned.programs["step"] = Program(
        sizes.query, tuple(phases), layers, profiles, {"counters": (0, size)}, round_up(size, ALIGN)
    )
    return planned


# -- launches -----------------------------------------------------------------------------------------------------


@dataclass
class _Profile(Batch):
    """The launches for one batch size, whose kernels are added to what is ``planned``."""

    planned: Planned

    def profile(self) -> Profile:
        """Launches and scratch memory.

        Layers whose matrices lie alike are one list of launches; where some are quantised and others are not, every
        layer has launches of its own, which come before the first.
        """
        layers = [
            (self._qkv(i), self._attention(), self._residual("wo", i), self._gates(i), self._residual("w2", i))
            for i in range(self.sizes.layers)
        ]
        after, places = (self._head(), self._draw()), laid_out(self.scratch())
        if len(set(layers)) == 1:
            return Profile((self._embed(),), layers[0], after, *places)
        alone = [of_layer(launch, i) for i, launches in enumerate(layers) for launch in launches]
        return Profile((self._embed(), *alone), (), after, *places)

    def _launch(
        self,
        source: str,
        grid: tuple[int, int, int],
        arguments: Arguments,
        constants: Mapping[str, Constant],
        warps: int,
        stages: int,
    ) -> Launch:
        dependent = self.target.dependent
        spec = Spec(
            source,
            (*constants.items(), ("DEPENDENT", dependent)),
            tuple((name, kind) for name, (kind, _) in arguments.items()),
            warps,
            stages,
            dependent=dependent,
        )
        return self.planned.launch(spec, grid, {name: value for name, (_, value) in arguments.items()})

    @property
    def _t(self) -> str:
        return KINDS[self.precision]

    def _gain(self, norm: int, per_layer: bool) -> tuple[str, Pointer]:
        """The row of gains of that number, or with ``per_layer`` of that norm of each layer."""
        row = gain_row(self.sizes) * 4
        return "*fp32", Pointer("gains", norm * row, 2 * row if per_layer else 0)

    def _product(
        self, kind: str, layer: int, source: str, arguments: Arguments, constants: Mapping[str, Constant]
    ) -> Launch:
        """The launch of a product, whose own ``constants`` these are."""
        tile = self.tile(kind, layer)
        grid = (self.groups(kind, layer), self.blocks(kind, layer), tile.split if "SPLIT" in constants else 1)
        every = dict(constants) | of_product(tile, self.bm(kind, layer), self.target.at_once)
        return self._launch(source, grid, arguments, every, tile.block_warps, tile.block_stages)

    def _weights(self, kind: str, layer: int) -> Arguments:
        """The arguments for the matrix of a product, by the name that stands for those of all layers alike."""
        one = self.matrix(kind, layer)
        name = one if kind == "head" else one.replace(f".{layer}.", ".{i}.")
        if not self.tile(kind, layer).bits:
            return {"weights": (self._t, Pointer(name))}
        scales = STORED_KINDS[self.stored[one + SCALE].dtype]
        return {"weights": ("*u8", Pointer(name)), "scales": (scales, Pointer(name + SCALE))}

    def _normed(self, tiles: int) -> dict[str, Constant]:
        """Constants of a kernel that reads h with the sums of squares of so many tiles."""
        return {"D_MODEL": self.sizes.d, "STRIDE": self.stride, "TILES": tiles, "POWER": power_at(self.sizes)}

    def _embed(self) -> Launch:
        tile, tiles = self.tile("w2", -1 % self.sizes.layers), self.squares(0)
        together = max(1, min(power(tiles), MOST_EMBED // tile.BN))
        arguments: Arguments = {
            "ids": ("*i64", Pointer("ids")),
            "table": (STORED_KINDS[self.stored["embed"].dtype], Pointer("embed")),
            "gains": self._gain(0, per_layer=False),
            "x": ("*fp32", Pointer("x")),
            "h": (self._t, Pointer("h")),
            "ss": ("*fp32", Pointer("w2_squares")),
        }
        constants: dict[str, Constant] = {
            "ROWS": self.sizes.rows,
            "D_MODEL": self.sizes.d,
            "STRIDE": self.stride,
            "TILES": tiles,
            "BN": tile.BN,
            "TOGETHER": together,
        }
        return self._launch("step.embed", (self.m, -(-tiles // together), 1), arguments, constants, 4, 1)

    def _qkv(self, layer: int) -> Launch:
        s = self.sizes
        arguments: Arguments = {
            "h": (self._t, Pointer("h")),
            "ss": ("*fp32", Pointer("w2_squares")),
            **self._weights("qkv", layer),
            "gains": self._gain(0, per_layer=True),
            "cos": (STORED_KINDS[self.stored["cos"].dtype], Pointer("cos")),
            "sin": (STORED_KINDS[self.stored["sin"].dtype], Pointer("sin")),
            "positions": ("*i64", Pointer("positions")),
            "write": ("*i64", Pointer("write")),
            "q": (self._t, Pointer("q")),
            "past_k": (self._t, Pointer("past_k.{i}")),
            "past_v": (self._t, Pointer("past_v.{i}")),
            "M": ("i32", self.m),
        }
        constants = self._normed(self.squares(layer)) | {
            "QUERY": s.query,
            "HEADS": s.heads,
            "HEAD": s.head,
            "PADDED": s.padded,
            "ANGLES": s.angles,
            "SLOTS": s.slots,
            "SCALE": s.head**-0.5 * LOG2_E,
        }
        return self._product("qkv", layer, "step.qkv", arguments, constants)

    def _attention(self) -> Launch:
        s, tile = self.sizes, self.tiles.attention
        arguments: Arguments = {
            "q": (self._t, Pointer("q")),
            "past_k": (self._t, Pointer("past_k.{i}")),
            "past_v": (self._t, Pointer("past_v.{i}")),
            "length": ("*i32", Pointer("length")),
            "y": (self._t, Pointer("y")),
            "partial": ("*fp32", Pointer("partial")),
            "peaks": ("*fp32", Pointer("peaks")),
            "counters": ("*i32", Pointer("counters")),
        }
        constants: dict[str, Constant] = {
            "QUERY": s.query,
            "HEADS": s.heads,
            "HEAD": s.head,
            "PADDED": s.padded,
            "JOINED": s.joined,
            "STRIDE": self.heads_stride,
            "SLOTS": s.slots,
            "SPLITS": self.spans,
            "SPAN": tile.span,
            "CHUNK": tile.chunk,
            "WIDE": self.wide,
            "BQ": self.queries,
            "HELD": tile.held,
            "EARLY": self.target.at_once,
        }
        grid = (self.spans, self.of_heads, 1)
        return self._launch("attention.attend", grid, arguments, constants, tile.warps, tile.stages)

    def _residual(self, kind: str, layer: int) -> Launch:
        s, tile = self.sizes, self.tile(kind, layer)
        k, stride = (s.heads * s.joined, self.heads_stride) if kind == "wo" else (s.ffn, self.ffn_stride)
        # wo is followed by the second norm of its layer, w2 by the first of the next layer, or by the last norm.
        gain = self._gain(1 if kind == "wo" else 2, per_layer=True)
        arguments: Arguments = {
            "inputs": (self._t, Pointer("y" if kind == "wo" else "g")),
            **self._weights(kind, layer),
            "gains": gain,
            "x": ("*fp32", Pointer("x")),
            "h": (self._t, Pointer("h")),
            "ss": ("*fp32", Pointer(f"{kind}_squares")),
            "partial": ("*fp32", Pointer("partial")),
            "counters": ("*i32", Pointer("counters")),
            "M": ("i32", self.m),
        }
        constants: dict[str, Constant] = {
            "K": k,
            "K_STRIDE": stride,
            "D_MODEL": s.d,
            "STRIDE": self.stride,
            "SPLIT": tile.split,
        }
        return self._product(kind, layer, "step.residual", arguments, constants)

    def _gates(self, layer: int) -> Launch:
        arguments: Arguments = {
            "h": (self._t, Pointer("h")),
            "ss": ("*fp32", Pointer("wo_squares")),
            **self._weights("gates", layer),
            "gains": self._gain(1, per_layer=True),
            "g": (self._t, Pointer("g")),
            "M": ("i32", self.m),
        }
        constants = self._normed(self.columns("wo", layer)) | {"F": self.sizes.ffn, "F_STRIDE": self.ffn_stride}
        return self._product("gates", layer, "step.gates", arguments, constants)

    def _head(self) -> Launch:
        s = self.sizes
        arguments: Arguments = {
            "h": (self._t, Pointer("h")),
            "ss": ("*fp32", Pointer("w2_squares")),
            **self._weights("head", 0),
            "gains": self._gain(2 * s.layers, per_layer=False),
            "cond_row": ("*i64", Pointer("cond_row")),
            "uncond_row": ("*i64", Pointer("uncond_row")),
            "guidance": ("*fp32", Pointer("guidance")),
            "logits": ("*fp32", Pointer("logits")),
            "COUNT": ("i32", self.images * s.query),
        }
        constants = self._normed(self.squares(0)) | {"QUERY": s.query, "V": s.vocab}
        # Two columns for each of an image's positions: M of them.
        return self._product("head", 0, "step.head", arguments, constants)

    def _draw(self) -> Launch:
        s = self.sizes
        arguments: Arguments = {
            "logits": ("*fp32", Pointer("logits")),
            "uniform": ("*fp32", Pointer("uniform")),
            "temperature": ("*fp32", Pointer("temperature")),
            "top_k": ("*i64", Pointer("top_k")),
            "top_p": ("*fp32", Pointer("top_p")),
            "image": ("*i64", Pointer("image")),
            "tokens": ("*i64", Pointer("tokens")),
            "ROWS": ("i32", 2 * self.images),
        }
        wide = max(16, power(s.vocab))
        constants: dict[str, Constant] = {"QUERY": s.query, "V": s.vocab}
        grid = (self.images * s.query, 1, 1)
        if wide <= (RESIDENT_SM100 if self.target.capability == 100 else RESIDENT):
            constants |= {"WIDE": wide, "LINE": 1 << (wide.bit_length() // 2)}
            # Eight codes a thread; the largest codebook has 32, for which a thread of 16 warps has just the registers.
            warps = max(1, wide // 256) if wide <= 8192 else 16
            return self._launch("draw.resident", grid, arguments, constants, warps, 1)
        return self._launch("draw.looped", grid, arguments, constants | {"CHUNK": CHUNK}, 16, 1)


def of_product(tile: ProductTile, bm: int, at_once: bool) -> dict[str, Constant]:
    """Constants of every product of ``bm`` rows a block; of codes the scales are an argument, else they are nothing.

    ``at_once`` as in :class:`Target`.
    """
    of_codes = {"BITS": tile.bits, "GROUP": tile.group, "SUB": tile.sub}
    nothing: dict[str, Constant] = {} if tile.bits else {"scales": 0}
    shape = {"BN": tile.columns, "BK": tile.BK, "BM": bm, "PARTS": tile.parts}
    shape |= {"PANELS": tile.many_panels, "DEEP": tile.many.depth if tile.many else 0}
    follows = {"AHEAD": tile.ahead, "HELD": tile.held, "EARLY": at_once}
    return shape | follows | of_codes | nothing


def of_layer(launch: Launch, layer: int) -> Launch:
    """``launch`` with the addresses that it takes in ``layer``, which it then takes wherever it stands."""
    fixed = (Pointer(*a.of_layer(layer)) if isinstance(a, Pointer) else a for a in launch.arguments)
    return Launch(launch.kernel, launch.grid, tuple(fixed))
