"""The trials of single kernels: what docs say of them is what the files say, by today's model of shapes."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from par_export.card.trials import choice, layers, products, read, saved, slower, slower_in_any_stages, tables

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
    assert sum(one.startswith("| PAR-") for one in lines) == 22 + 30
    assert [one.startswith("choice") for one in lines[-2:]] == [True, True]
