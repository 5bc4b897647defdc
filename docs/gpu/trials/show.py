"""What the trials in this folder say: ``PYTHONPATH=.:export:runtime python3 docs/gpu/trials/show.py`` in the checkout.

Tables for people: of whole layers by how kernels follow each other, and of single products by how far the shape that
the planner prefers is from the fastest of those that were tried.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from par_export.kernels.targets import TARGETS
from par_export.kernels.tiles import ProductTile, product_us

HERE = Path(__file__).parent
CARD = TARGETS["SM90"]


def read(name: str) -> list[dict[str, Any]]:
    """The lines of a file of this folder."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def layers() -> None:
    """Microseconds of a layer of five kernels, by when the next kernel may start and what is fetched ahead."""
    rows: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for line in read("layers.jsonl"):
        if line["run"] == 3:
            how = f"{line['start']}, {line['ahead'].partition(' ')[0]}"
            rows[line["model"], line["rows"], json.dumps(line["shapes"])][how] = median(line["samples_us"])
    columns = ["none, none", "early, none", "early, matrices", "late, none", "late, matrices", "late, all"]
    print("| model | rows | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    for (model, count, _), of in rows.items():
        print(f"| {model} | {count} | " + " | ".join(f"{of[column]:.1f}" for column in columns) + " |")
    for other in ("none, none", "early, none"):
        gained = [1 - of["late, none"] / of[other] for of in rows.values()]
        print(f"late against {other}: {100 * min(gained):.0f} to {100 * max(gained):.0f} % less")


def chosen() -> None:
    """Of the shapes of each product that were tried with what a build fetches ahead: the fastest, and the model's."""
    of: dict[tuple[str, str, int], dict[tuple[int, int, int], list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line in read("products.jsonl"):
        slab = -(-line["depth"] // line["BK"]) // line["split"] * line["BN"] * line["BK"] * 2
        small = line["columns"] * line["depth"] * 2 < CARD.ahead_bytes
        if line["ahead"] >= 0.8 * slab if small else line["ahead"] == 0:
            line["us"] = median(line["samples_us"])
            of[line["model"], line["kind"], line["rows"]][line["BN"], line["BK"], line["split"]].append(line)
    print("| model | product | rows | fastest | us | model's choice | us | slower |\n|---|---|---|---|---|---|---|---|")
    slower = []
    for key, shapes in of.items():
        fastest = {shape: min(line["us"] for line in lines) for shape, lines in shapes.items()}
        expected = {shape: min(map(expected_us, lines)) for shape, lines in shapes.items()}
        best, choice = min(fastest, key=fastest.__getitem__), min(expected, key=expected.__getitem__)
        slower.append(fastest[choice] / fastest[best] - 1)
        cells = (*key, best, f"{fastest[best]:.2f}", choice, f"{fastest[choice]:.2f}", f"{100 * slower[-1]:.0f} %")
        print("| " + " | ".join(map(str, cells)) + " |")
    count = sum(len(lines) for shapes in of.values() for lines in shapes.values())
    print(
        f"{count} trials, {len(of)} products: {100 * mean(slower):.1f} % slower on average, {100 * max(slower):.0f} % at most"
    )


def expected_us(line: dict[str, Any]) -> float:
    """What the planner's model thinks of it."""
    tile = ProductTile(line["BN"], line["BK"], line["split"], line["warps"], line["stages"], line["ahead"])
    return product_us(tile, line["columns"], line["depth"], line["rows"], CARD)


if __name__ == "__main__":
    layers()
    print()
    chosen()
