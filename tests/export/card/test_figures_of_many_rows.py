"""What the documents say of products of many rows: from the rows of the H200, and from the model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_model import matrix_of, model_us
from par_export.kernels.tiles import choose
from par_model.config import named

DOCS = Path(__file__).parents[3] / "docs"
MATRICES = {"wqkv": "qkv", "wo": "wo", "w13": "gates", "w2": "w2", "output": "head"}


def rows() -> list[dict[str, Any]]:
    lines = (DOCS / "gpu" / "h200-2026-11-29-kernels.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "kernel" and row["images"] == 8]


def test_products_of_256_rows_and_the_largest_convolutions() -> None:
    """TFLOP/s: two operations for each weight and row, and for each pixel, channel and number of a filter."""
    config, reached = named("3B", group_size=16), {}
    for row in rows():
        kind = MATRICES.get(row["of"].rpartition(".")[2])
        if row["label"] == "PAR-3B n=16" and kind is not None:
            columns, depth = matrix_of(config, kind)
            reached[kind] = 2 * 256 * columns * depth / median(row["samples_us"]) / 1e6
    assert sorted(reached) == ["gates", "head", "qkv", "w2", "wo"]
    least, most = (round(of(reached.values())) for of in (min, max))
    convolutions = {
        round(2 * 4 * 384**2 * 128 * 128 * 9 / median(row["samples_us"]) / 1e6)
        for row in rows()
        if row["label"] == "PAR-L n=4" and row["of"].startswith("decoder.decoder.conv_blocks.4.res.0.conv")
    }
    slow, fast = sorted(convolutions)
    text = " ".join((DOCS / "kernels.md").read_text().split())
    assert f"reached {least} to {most} TFLOP/s for PAR-3B" in text
    assert f"largest convolutions reached {slow} to {fast} and" in text


def test_one_engine_for_all_batches_beside_one_for_each() -> None:
    card, sizes, slower = TARGETS["SM90"], (1, 2, 4, 8, 16, 32), []
    for size in ("L", "XL", "3B"):
        for n in (4, 16):
            config = named(size, group_size=n)
            every = choose(config, sizes, card)
            for batch in sizes:
                both = [
                    sum(
                        model_us(config, kind, getattr(tiles, kind), batch, card)
                        * (1 if kind == "head" else config.n_layers)
                        for kind in (*MATRICES.values(), "attention")
                    )
                    for tiles in (every[batch], choose(config, (batch,), card)[batch])
                ]
                slower.append(both[0] / both[1] - 1)
    text = " ".join((DOCS / "design.md").read_text().split())
    assert f"it is at most {100 * max(slower):.0f} % slower than an engine for one batch alone" in text
    assert f"alone, {100 * mean(slower):.0f} % on average" in text
