"""The weights of a step as its kernels read them: sizes, gains of norms, and how each matrix is packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_export.graphs.step import padded_head_dim
from par_export.kernels.spec import STORED_KINDS, Constant, Planned, Spec, round_up
from par_export.kernels.tiles import Tiles
from par_model.config import PARConfig
from par_runtime.backends.program import Pointer, Weight
from par_runtime.bundle import Stored
from par_runtime.manifest import MATRICES, NORMS

#: precision -> type of a pointer. fp32 is for tests, which compare a whole engine's tokens with those of a CPU.
KINDS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class StepSizes:
    """The sizes of a step network: see the letters of ``sources/step.py``. ``rows`` of the embedding table, ``angles``
    of the rotary tables.
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
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """name -> rows and columns of each product, without the padding of heads."""
        d, ffn = self.d, self.ffn
        return {"wqkv": (d, 3 * d), "wo": (d, d), "w13": (d, 2 * ffn), "w2": (ffn, d), "output": (d, self.vocab)}


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
    shapes = {"wqkv": tiles.qkv, "wo": tiles.wo, "w13": tiles.gates, "w2": tiles.w2, "output": tiles.head}
    names = [f"layers.{i}.{matrix}" for i in range(sizes.layers) for matrix in MATRICES] + ["output"]
    for name in names:
        matrix = name.rpartition(".")[2]
        (k, n), tile = sizes.matrices[matrix], shapes[matrix]
        columns, blocks = -(-n // tile.BN), -(-k // tile.BK)
        constants: dict[str, Constant] = {
            "K": k,
            "N": n,
            "WIDTH": stored[name].shape[1],
            "ORDER": {"wqkv": "pairs", "w13": "halves"}.get(matrix, "plain"),
            "HEAD": sizes.head,
            "PADDED": sizes.padded,
            "DROP_ROWS": matrix == "wo" and sizes.head != sizes.padded,
            "BN": tile.BN,
            "BK": tile.BK,
        }
        kinds = (("raw", STORED_KINDS[stored[name].dtype]), ("packed", KINDS[precision]))
        spec = Spec("pack.panels", tuple(constants.items()), kinds, warps=4, stages=1)
        arguments = {"raw": Pointer("raw"), "packed": Pointer("packed")}
        size = columns * blocks * tile.BN * tile.BK * NUMBER_BYTES[precision]
        planned.weights[name] = Weight(size, stored[name], 0, planned.launch(spec, (columns, blocks, 1), arguments))
