"""The ablations of docs/evaluation.md: the table and the figures below it are those of docs/ablations.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evaluation.md").read_text(encoding="utf-8")
PAGE = PAGE.split("## What each part of the method is worth")[1].split("\n## ")[0]
ROWS = {row["name"]: row for row in map(json.loads, (DOCS / "ablations.jsonl").read_text().splitlines())}


def test_every_cell_is_of_a_row() -> None:
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(ROWS) == 7
    for (_, *cells), row in zip(lines, ROWS.values(), strict=True):
        one = row["compared"]
        assert [cell.strip() for cell in cells] == [
            str(row["calls"]),
            f"{row['nats']:.3f}",
            "" if row["change"] is None else f"{row['change']:+.3f}",
            f"{row['first']:.3f}",
            f"{one['distance']:.4f} \u00b1 {one['margin']:.4f}",
            f"{one['spread']:.2f}",
        ]
        assert (row["images"], one["images"]) == (480, 480)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("n4", {}),
        ("parallel-initial", {"sequential_initial": False}),
        ("causal", {"causal_groups": True}),
        ("raster", {"order": "raster"}),
        ("n1", {"n": 1}),
        ("n16", {"n": 16}),
        ("n4-again", {}),
    ],
)
def test_a_row_differs_from_the_method_in_one_thing(name: str, what: dict[str, object]) -> None:
    method = {"n": 4, "order": "distant", "sequential_initial": True, "causal_groups": False}
    assert {key: ROWS[name][key] for key in method} == method | what


def test_the_figures_of_the_text_are_those_of_the_rows() -> None:
    chance = abs(ROWS["n4-again"]["change"])
    for figure in (
        f"what chance does: {chance:.3f} nats",
        f"do not see each other cost {ROWS['raster']['change']:.2f} nats",
        f"that are far apart ({ROWS['n16']['change']:.2f})",
        f"each of the four has {ROWS['parallel-initial']['first'] - ROWS['n4']['first']:.2f} nats more",
        f"{-ROWS['causal']['change']:.3f} nats less",
        f"{-ROWS['n1']['change']:.2f} nats from 1 to 4",
    ):
        assert figure in PAGE
    assert abs(ROWS["causal"]["change"]) < 1.3 * chance
    assert -ROWS["n1"]["change"] > 2 * chance
