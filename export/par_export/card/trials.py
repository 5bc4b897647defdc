"""What the trials of single kernels in ``docs/gpu/trials`` say: ``python -m par_export.card.trials docs/gpu/trials``.

Tables for people: of whole layers by how kernels follow each other, and of single products and of attention by how far
the shape that the model of ``kernels/tile_model.py`` prefers is from the fastest of those that were tried. The trials
were made once, by hand; their README says how.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_model import attention_us, line_bytes, product_us
from par_export.kernels.tile_shapes import AttentionTile, ProductTile
from par_export.kernels.tiles import MOST_BK, attentions
from par_model.config import named

CARD = TARGETS["SM90"]
LAST_RUN = 3  #: of layers: with every start
#: When the next kernel may start, and what is fetched ahead, as the lines say it; the columns of a table.
WAYS = (
    "none, none",
    "early, none",
    "early, small and keys",
    "late, none",
    "late, small and keys",
    "late, all and keys",
)
FETCHED = {"matrices under 8 MB, and keys": "small and keys", "all up to 13.4 MB, and keys": "all and keys"}
Shape = tuple[int, int, int, int]  # of a product BN, BK, parts of K, stages; of attention span, chunk, warps, stages
Product = tuple[str, str, int]  # model, kind, rows
ROWS = 2  #: of attention: one guided image


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. Raises OSError, ValueError."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def layers(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int, str], dict[str, float]]:
    """(model, rows, shapes) -> microseconds of a layer of five kernels in each of :data:`WAYS`."""
    out: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for line in lines:
        if line["run"] == LAST_RUN:
            way = f"{line['start']}, {FETCHED.get(line['ahead'], line['ahead'])}"
            out[line["model"], line["rows"], json.dumps(line["shapes"])][way] = median(line["samples_us"])
    return dict(out)


def saved(of: Mapping[Any, Mapping[str, float]], way: str, other: str) -> tuple[float, float]:
    """The least and the largest part of the time of ``other`` that ``way`` saves."""
    parts = [1 - times[way] / times[other] for times in of.values()]
    return min(parts), max(parts)


def products(lines: Iterable[Mapping[str, Any]]) -> dict[Product, dict[Shape, tuple[float, float]]]:
    """product -> shape -> microseconds of its fastest trial, and what the model expects.

    Of trials in shapes that a build may choose, which fetch ahead as a build does: a small matrix whole, of others
    nothing.
    """
    out: dict[Product, dict[Shape, tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        slab = -(-line["depth"] // line["BK"]) // line["split"] * line["BN"] * line["BK"] * 2
        small = line["columns"] * line["depth"] * 2 <= CARD.ahead_bytes
        if line["BK"] > MOST_BK or (line["ahead"] < 0.8 * slab if small else line["ahead"] > 0):
            continue
        tile = ProductTile(line["BN"], line["BK"], line["split"], line["warps"], line["stages"], line["ahead"])
        us, expected = median(line["samples_us"]), product_us(tile, line["columns"], line["depth"], line["rows"], CARD)
        shape = (line["BN"], line["BK"], line["split"], line["stages"])
        of = out[line["model"], line["kind"], line["rows"]]
        of[shape] = min(us, of.get(shape, (us, 0.0))[0]), expected
    return dict(out)


def attention(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[Shape, tuple[float, float]]]:
    """(model, queries) -> shape of attention -> microseconds of its fastest trial, and what the model expects.

    Of trials in shapes that a build may choose.
    """
    out: dict[tuple[str, int], dict[Shape, tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        config = named(line["model"].removeprefix("PAR-"), group_size=line["queries"])
        tile = AttentionTile(line["span"], line["chunk"], line["warps"], line["stages"])
        if tile not in attentions(config, (1,), CARD):
            continue
        us, shape = median(line["samples_us"]), (tile.span, tile.chunk, tile.warps, tile.stages)
        of = out[line["model"], line["queries"]]
        expected = attention_us(tile, ROWS * line["heads"], line["keys"], line_bytes(config), CARD)
        of[shape] = min(us, of.get(shape, (us, 0.0))[0]), expected
    return dict(out)


def faster_in_others(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """(model, queries) -> what the fastest of all trials of attention takes less than the model's choice, as a part."""
    lines = list(lines)
    out = {}
    for (model, queries), of in attention(lines).items():
        all_us = [median(each["samples_us"]) for each in lines if (each["model"], each["queries"]) == (model, queries)]
        out[model, queries] = 1 - min(all_us) / of[choice(of)[1]][0]
    return out


def choice(of: Mapping[Shape, tuple[float, float]]) -> tuple[Shape, Shape]:
    """The fastest shape, and the one that the model prefers: of equals, as a build does, the one with most stages."""
    return min(of, key=lambda shape: of[shape][0]), min(of, key=lambda shape: (of[shape][1], -shape[3]))


def slower(of: Mapping[Shape, tuple[float, float]]) -> float:
    """What the model's choice takes more than the fastest, as a part of that."""
    fastest, chosen = choice(of)
    return of[chosen][0] / of[fastest][0] - 1


def slower_in_any_stages(of: Mapping[Shape, tuple[float, float]]) -> float:
    """The same, where the model's choice had the number of stages that suits it best."""
    fastest, chosen = choice(of)
    return min(us for shape, (us, _) in of.items() if shape[:3] == chosen[:3]) / of[fastest][0] - 1


def tables(folder: Path) -> list[str]:
    """Lines of Markdown about the trials in ``folder``. Raises OSError, ValueError."""
    of_layers, of_products = layers(read(folder / "layers.jsonl")), products(read(folder / "products.jsonl"))
    out = ["| model | rows | " + " | ".join(WAYS) + " |", "|" + "---|" * (2 + len(WAYS))]
    for (model, rows, _), times in of_layers.items():
        out.append(f"| {model} | {rows} | " + " | ".join(f"{times[way]:.1f}" for way in WAYS) + " |")
    for other in WAYS[:2]:
        least, most = saved(of_layers, "late, none", other)
        out.append(f"late, none in place of {other}: {100 * least:.0f} to {100 * most:.0f} % less time")
    out += ["", "| model | product | rows | fastest | us | model's choice | us | slower |", "|" + "---|" * 8]
    for product, shapes in of_products.items():
        fastest, chosen = choice(shapes)
        cells = (*product, fastest, f"{shapes[fastest][0]:.2f}", chosen, f"{shapes[chosen][0]:.2f}")
        out.append("| " + " | ".join(map(str, cells)) + f" | {100 * slower(shapes):.0f} % |")
    for words, part in (("", slower), (" in the best of its stages", slower_in_any_stages)):
        parts = [part(shapes) for shapes in of_products.values()]
        out.append(f"choice{words}: {100 * mean(parts):.1f} % slower on average, {100 * max(parts):.0f} % at most")
    return [*out, "", *_attention_table(read(folder / "attention.jsonl"))]


def _attention_table(lines: list[dict[str, Any]]) -> list[str]:
    out = ["| model | queries | fastest | us | model's choice | us | slower |", "|" + "---|" * 7]
    of = attention(lines)
    for trial, shapes in of.items():
        fastest, chosen = choice(shapes)
        cells = (*trial, fastest, f"{shapes[fastest][0]:.2f}", chosen, f"{shapes[chosen][0]:.2f}")
        out.append("| " + " | ".join(map(str, cells)) + f" | {100 * slower(shapes):.0f} % |")
    most, less = max(map(slower, of.values())), max(faster_in_others(lines).values())
    out.append(f"choice: {100 * most:.0f} % slower at most; in shapes of no build up to {100 * less:.0f} % less time")
    return out


if __name__ == "__main__":
    print("\n".join(tables(Path(sys.argv[1]))))
