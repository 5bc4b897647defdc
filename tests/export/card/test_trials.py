"""The trials of single kernels: what docs say of them is what the files say, by today's model of shapes."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from par_export.card.trials import (
    CARD,
    attention,
    choice,
    faster_in_others,
    layers,
    products,
    read,
    saved,
    slower,
    slower_in_any_stages,
    tables,
)
from par_export.kernels.tiles import attentions
from par_model.config import named

DOCS = Path(__file__).parents[3] / "docs"
TRIALS = DOCS / "gpu" / "trials"


def test_kernels_md_says_how_good_the_models_choice_is() -> None:
    """Of 30 products; after a change of the model the sentence there is to be changed too."""
    of = products(read(TRIALS / "products.jsonl")).values()
    (own, most), (best, worst) = (
        (100 * mean(parts), 100 * max(parts))
        for parts in ([slower(shapes) for shapes in of], [slower_in_any_stages(shapes) for shapes in of])
    )
    text = " ".join((DOCS / "kernels.md").read_text(encoding="utf-8").split())
    assert len(of) == 30
    assert f"is {own:.1f} % slower than the fastest on average, {most:.0f} % at most; with" in text
    assert f"the best number of stages for the chosen shape, {best:.1f} % on average and {worst:.0f} % at most" in text


def test_kernels_md_says_what_a_late_start_saves() -> None:
    of = layers(read(TRIALS / "layers.jsonl"))
    text = " ".join((DOCS / "kernels.md").read_text(encoding="utf-8").split())
    assert len(of) == 22
    least, most = saved(of, "late, none", "none, none")
    assert f"a layer takes {100 * least:.0f} to {100 * most:.0f} % less than without dependent launches" in text
    least, most = saved(of, "late, none", "early, none")
    assert least > -0.01
    assert f"and up to {100 * most:.0f} % less than with the early ones" in text
    fastest = min(min(times.values()) for (model, rows, _), times in of.items() if (model, rows) == ("PAR-L", 8))
    assert f"A layer of PAR-L took {fastest:.1f} us" in text


def test_kernels_md_says_that_the_models_choice_of_attention_is_the_fastest() -> None:
    lines = read(TRIALS / "attention.jsonl")
    of = attention(lines)
    assert {trial: len(shapes) for trial, shapes in of.items()} == {
        ("PAR-3B", 4): 5, ("PAR-3B", 16): 5, ("PAR-L", 4): 6, ("PAR-L", 16): 6,
    }  # fmt: skip
    for (model, queries), shapes in of.items():
        fastest, chosen = choice(shapes)
        assert fastest == chosen == ((64, 64, 4, 2) if model == "PAR-3B" else (128, 128, 4, 2))
        first = attentions(named(model.removeprefix("PAR-"), group_size=queries), (1,), CARD)[0]  # what a build takes
        assert (first.span, first.chunk, first.warps, first.stages) == fastest
    text = " ".join((DOCS / "kernels.md").read_text(encoding="utf-8").split())
    assert f"the model's choice was the fastest in each of {len(of)} trials; spans of" in text
    assert f"which no build has, took up to {100 * max(faster_in_others(lines).values()):.0f} % less." in text
    best = [min((one for one in lines if (one["model"], one["queries"]) == trial), key=us_of) for trial in of]
    assert {(one["span"], one["stages"]) for one in best} == {(288, 3), (576, 3)}


def us_of(line: dict[str, Any]) -> float:
    return median(line["samples_us"])


def test_every_trial_was_right() -> None:
    for name in ("products", "attention"):
        assert all(line["error"] < 2e-3 and len(line["samples_us"]) == 5 for line in read(TRIALS / f"{name}.jsonl"))


def line(bn: int, samples: list[float], ahead: int = 0, **changes: object) -> dict[str, object]:
    of = {"model": "M", "kind": "gates", "rows": 8, "columns": 17408, "depth": 3200, "BK": 128, "split": 1}
    return of | {"BN": bn, "warps": 4, "stages": 4, "ahead": ahead, "samples_us": samples} | changes


def test_a_shape_counts_by_its_fastest_trial_that_fetches_as_a_build_does() -> None:
    lines = [
        line(32, [30.0, 31.0, 90.0]), line(32, [28.0, 29.0, 29.5], stages=6), line(32, [1.0], ahead=4096),
        line(32, [1.0], BK=512),
        line(64, [25.0]), line(16, [99.0]),
    ]  # fmt: skip
    (of,) = products(lines).values()
    assert {shape: us for shape, (us, _) in of.items()} == {
        (32, 128, 1, 4): 31.0, (32, 128, 1, 6): 29.0, (64, 128, 1, 4): 25.0, (16, 128, 1, 4): 99.0,
    }  # fmt: skip
    fastest, chosen = choice(of)
    assert fastest == (64, 128, 1, 4)
    assert chosen == (32, 128, 1, 6)
    assert slower(of) == pytest.approx(29.0 / 25.0 - 1)
    shapes = of | {(32, 128, 1, 5): (27.0, of[chosen][1])}
    assert slower_in_any_stages(shapes) == pytest.approx(27.0 / 25.0 - 1)
    small = {"columns": 1024, "depth": 1024}
    assert list(products([line(16, [2.0], **small), line(16, [3.0], ahead=32768, **small)]).values()) == [
        {(16, 128, 1, 4): (3.0, pytest.approx(3, abs=3))}
    ]


def test_the_tables_have_a_line_for_each() -> None:
    lines = tables(TRIALS)
    assert sum(one.startswith("| PAR-") for one in lines) == 22 + 30 + 4
    text = " ".join((DOCS / "kernels.md").read_text(encoding="utf-8").split())

    def said(pattern: str) -> tuple[str, ...]:
        (found,) = re.findall(pattern, text)
        return found if isinstance(found, tuple) else (found,)

    of_choice = r"is ([0-9.]+) % slower than the fastest on average, (\d+) % at most; with"
    of_stages = r"stages for the chosen shape, ([0-9.]+) % on average and (\d+) % at most"
    least, most = said(r"a layer takes (\d+) to (\d+) % less than without dependent launches")
    (of_early,) = said(r"and up to (\d+) % less than with the early ones")
    (of_others,) = said(r"which no build has, took up to (\d+) % less")
    late = [one for one in lines if one.startswith("late, none in place of ")]
    assert late[0] == f"late, none in place of none, none: {least} to {most} % less time"
    assert re.fullmatch(rf"late, none in place of early, none: -?\d to {of_early} % less time", late[1])
    assert [one for one in lines if one.startswith("choice")] == [
        "choice: {} % slower on average, {} % at most".format(*said(of_choice)),
        "choice in the best of its stages: {} % slower on average, {} % at most".format(*said(of_stages)),
        f"choice: 0 % slower at most; in shapes of no build up to {of_others} % less time",
    ]
    # Rows by the files themselves: the first layer, a product of which all shapes count, and attention.
    first = [one for one in read(TRIALS / "layers.jsonl") if one["run"] == 3 and one["model"] == "PAR-L"]
    early = next(one for one in first if (one["start"], one["ahead"]) == ("early", "none"))
    row = next(one for one in lines if one.startswith(f"| PAR-L | {early['rows']} | "))
    assert row.split(" | ")[3] == f"{us_of(early):.1f}"
    wide = [one for one in read(TRIALS / "products.jsonl") if (one["model"], one["kind"]) == ("PAR-3B", "gates")]
    fastest = min((one for one in wide if one["rows"] == 8 and not one["ahead"] and one["BK"] <= 256), key=us_of)
    row = next(one for one in lines if one.startswith("| PAR-3B | gates | 8 | "))
    shape = tuple(fastest[name] for name in ("BN", "BK", "split", "stages"))
    assert row.split(" | ")[3:5] == [str(shape), f"{us_of(fastest):.2f}"]
    assert "| PAR-L | 4 | (128, 128, 4, 2) | 3.93 | (128, 128, 4, 2) | 3.93 | 0 % |" in lines
