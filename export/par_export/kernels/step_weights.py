"""The weights of a step as its kernels read them: sizes, gains of norms, and how each matrix is packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_export.graphs.step import padded_head_dim
from par_export.kernels.spec import STORED_KINDS, Constant, Planned, Spec, power, round_up
from par_export.kernels.tile_shapes import NUMBERS, ProductTile, Storage, Tiles, panel_bytes
from par_model.config import PARConfig
from par_runtime.backends.program import Pointer, Weight
from par_runtime.bundle import Stored
from par_runtime.manifest import NORMS, STORED_BYTES, matrices_of
from par_runtime.quantised import SCALE

#: precision -> type of a pointer. fp32 is for tests, which compare a whole engine's tokens with those of a CPU.
KINDS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
BITS = {"int8": 8, "int4": 4}  #: dtype of a quantised matrix -> of a code
PRODUCTS = {"wqkv": "qkv", "wo": "wo", "w13": "gates", "w2": "w2", "output": "head"}  #: matrix -> its kind of product


@dataclass(frozen=True)
class StepSizes:
    """The sizes of a step network: see the letters of ``sources/step.py``. ``rows`` of the embedding table, ``angles``
    of the rotary tables. ``joined``: numbers of a head in the rows that ``wo`` is multiplied with.
    """

    d: int
    layers: int
    heads: int
    head: int
    padded: int
    ffn: int
    vocab: int
    slots: int
    query: int
    rows: int
    angles: int
    joined: int

    @staticmethod
    def of(config: PARConfig, stored: Mapping[str, Stored]) -> StepSizes:
        """The sizes of ``config``, with tables as in ``stored``."""
        return StepSizes(
            d=config.dim,
            layers=config.n_layers,
            heads=config.n_heads,
            head=config.head_dim,
            padded=padded_head_dim(config),
            ffn=config.ffn_dim,
            vocab=config.vocab_size,
            slots=config.n_tokens,
            query=config.group_size,
            rows=stored["embed"].shape[0],
            angles=stored["cos"].shape[0],
            # A group of codes is so many rows as they are stored, so none can be left out: the rows of padding stay,
            # and attention leaves zeros for them.
            joined=padded_head_dim(config) if storages(stored)["wo"] != (NUMBERS,) else config.head_dim,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """name -> rows and columns of each product, without the padding of heads where it can be left out."""
        d, ffn = self.d, self.ffn
        wo = (self.heads * self.joined, d)
        return {"wqkv": (d, 3 * d), "wo": wo, "w13": (d, 2 * ffn), "w2": (ffn, d), "output": (d, self.vocab)}


def storage_of(stored: Mapping[str, Stored], name: str) -> Storage:
    """How the matrix ``name`` lies in device memory."""
    at = stored[name]
    if at.dtype not in BITS:
        return NUMBERS
    return Storage(BITS[at.dtype], at.shape[0] // stored[name + SCALE].shape[0])


def storages(stored: Mapping[str, Stored]) -> dict[str, Sequence[Storage]]:
    """kind of product -> how its matrices lie in device memory, quantised ones first."""
    found: dict[str, set[Storage]] = {kind: set() for kind in PRODUCTS.values()}
    for name in stored:
        kind = PRODUCTS.get(name.rpartition(".")[2])
        if kind is not None:
            found[kind].add(storage_of(stored, name))
    return {kind: tuple(sorted(each, key=lambda one: -one.bits)) for kind, each in found.items()}


def gains(sizes: StepSizes, stored: Mapping[str, Stored], read: Callable[[Stored], NDArray[np.float32]]) -> NDArray:
    """The gains of all norms in the order of their use, each row with its power of two: [2 * layers + 1, row]."""
    names = [f"layers.{i}.{norm}" for i in range(sizes.layers) for norm in NORMS] + ["norm"]
    out = np.zeros((len(names), gain_row(sizes)), np.float32)
    for row, name in zip(out, names, strict=True):
        gain = read(stored[name])
        largest = float(np.abs(gain).max())
        exponent = math.ceil(math.log2(largest)) if largest > 0 else 0
        row[: sizes.d] = gain * np.float32(2.0**-exponent)
        row[power_at(sizes)] = 2.0**exponent
    return out


def power_at(sizes: StepSizes) -> int:
    """Where in a row of gains its power of two is."""
    return round_up(sizes.d, 4)


def gain_row(sizes: StepSizes) -> int:
    """Numbers of a row of gains."""
    return power_at(sizes) + 4  # so that every row begins at a multiple of 16 bytes


def add_weights(planned: Planned, sizes: StepSizes, stored: Mapping[str, Stored], tiles: Tiles, precision: str) -> None:
    """The entries of all weights, and the kernels that pack them."""
    for name in ("embed", "cos", "sin"):
        planned.weights[name] = Weight(stored[name].length, stored[name], 0, None)
    for name in matrices_of(sizes.layers):
        matrix = name.rpartition(".")[2]
        tile = tiles.of(PRODUCTS[matrix], storage_of(stored, name))
        k, n = sizes.matrices[matrix]
        common: dict[str, Constant] = {
            "K": k,
            "N": n,
            "WIDTH": stored[name].shape[1],
            "ORDER": {"wqkv": "pairs", "w13": "halves"}.get(matrix, "plain"),
            "HEAD": sizes.head,
            "PADDED": sizes.padded,
        }
        if tile.bits:
            _add_codes(planned, name, stored, tile, common)
            continue
        columns, blocks = -(-n // tile.BN), -(-k // tile.BK)
        drops = matrix == "wo" and sizes.joined != sizes.padded
        constants = common | {"DROP_ROWS": drops, "BN": tile.BN, "BK": tile.BK, "PART": tile.BK // tile.parts}
        kinds = (("raw", STORED_KINDS[stored[name].dtype]), ("packed", KINDS[precision]))
        size = columns * blocks * tile.BN * tile.BK * NUMBER_BYTES[precision]
        _add(planned, name, stored[name], size, "pack.panels", constants, kinds, (columns, blocks, 1))


def _add_codes(
    planned: Planned, name: str, stored: Mapping[str, Stored], tile: ProductTile, common: Mapping[str, Constant]
) -> None:
    """The codes of a quantised matrix, and its scales."""
    k, n = int(common["K"]), int(common["N"])
    columns, blocks = -(-n // tile.BN), -(-k // tile.BK)
    pieces = blocks * panel_bytes(tile) // (tile.BN * tile.sub)
    constants = dict(common) | {"BN": tile.BN, "SUB": tile.sub, "PIECES": pieces, "BITS": tile.bits}
    kinds: tuple[tuple[str, str], ...] = (("raw", "*u8"), ("packed", "*u8"))
    size = columns * blocks * panel_bytes(tile)
    _add(planned, name, stored[name], size, "pack.codes", constants, kinds, (columns, pieces, 1))
    groups = -(-blocks * tile.BK // tile.group)
    together = min(16, power(groups))
    constants = dict(common) | {"BN": tile.BN, "GROUP": tile.group, "GROUPS": groups, "TOGETHER": together}
    scales = stored[name + SCALE]
    kinds = (("raw", STORED_KINDS[scales.dtype]), ("packed", STORED_KINDS[scales.dtype]))
    size, grid = columns * groups * tile.BN * int(STORED_BYTES[scales.dtype]), (columns, -(-groups // together), 1)
    _add(planned, name + SCALE, scales, size, "pack.scales", constants, kinds, grid)


def _add(
    planned: Planned,
    name: str,
    stored: Stored,
    size: int,
    source: str,
    constants: Mapping[str, Constant],
    kinds: tuple[tuple[str, str], ...],
    grid: tuple[int, int, int],
) -> None:
    """The weight ``name`` of ``size`` bytes, and the kernel that packs it."""
    spec = Spec(source, tuple(constants.items()), kinds, warps=4, stages=1)
    launch = planned.launch(spec, grid, {"raw": Pointer("raw"), "packed": Pointer("packed")})
    planned.weights[name] = Weight(size, stored, 0, launch)
