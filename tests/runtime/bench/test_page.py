"""The page and its plots."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from bench.pages import shown_page
from bench.subjects import against, one_row, subject_info

from par_runtime.bench.report import paper as paper_report
from par_runtime.bench.report import text
from par_runtime.bench.report.plot import Bar, Part, Series, bars, lines
from par_runtime.bench.suites import paper
from par_runtime.cost.data_sheets import predictions


def test_a_row_above_its_bound_says_so_wherever_it_is_shown() -> None:
    rows = against(10, 10, 80)
    shown = text.table(rows)
    assert re.search(r"parvis +group .* above \(17\d %\) +above bound$", shown, re.MULTILINE)
    assert shown.count("the limit was measured too low, so the row names no limit") == 1
    out = shown_page(rows)
    assert re.search(r"above \(17\d %\) of the bound as measured", out)
    placed = paper.paper_rows(rows, {}, None, "a CPU")
    assert any("above (17" in cell for line in paper_report.cells(placed) for cell in line)


def test_the_page_has_every_plot_and_needs_nothing_else() -> None:
    rows = [row for n in (1, 4, 16) for row in against(20, 10, 80 + n, n=n, label=f"L n={n}")]
    rows += [
        replace(one_row([100.0 * b] * 5, phase="throughput"), images=b, images_per_s=10 + b / 8) for b in (1, 2, 4)
    ]
    rows += [replace(one_row([10.0, 20.0, 40.0], phase="serve"), offered_per_s=r, images_per_s=r) for r in (1.0, 2.0)]
    out = shown_page(rows, predictions=predictions(subject_info().architecture, "L-n4", 4, 1, True))
    for title in (
        "Where the time of an image goes",
        "One call against the bound",
        "Throughput against latency, by batch size",
        "Latency under load",
        "Speed-up by parallel decoding",
        "All measured rows",
        "Predicted, not measured",
    ):
        assert f"<h2>{title}</h2>" in out
    assert out.count("<svg") == 5
    assert "n = 16: L n=16 is 9.5" in out  # 576 calls of 81 ms against 51 of 96 ms, and half a millisecond of copying
    assert out.index("All measured rows") < out.index("Predicted, not measured")


def test_speed_ups_are_of_one_engine() -> None:
    rows = [
        *against(20, 10, 80, n=1, label="n1", backend="native-cpu"),
        *against(20, 10, 90, label="ours", backend="native-cpu"),
    ]
    rows += against(20, 10, 400, label="ort")
    out = shown_page(rows)
    assert "n = 4: ours is 3.4" in out  # 576 calls of 80 ms against 147 of 90
    assert "ort takes" not in out
    assert "So many times fewer calls: PAR-L: 3.9 at n = 4." in out


def test_the_page_escapes_what_it_is_given() -> None:
    rows = [replace(row, bundle="<script>alert(1)</script>", label="<b>") for row in against(20, 10, 80)]
    out = shown_page(rows)
    assert "<script>alert" not in out
    assert "<b>" not in out


def test_a_page_of_the_paper_alone() -> None:
    placed = paper.paper_rows([], {"PAR-L": "time: needs about 3 minutes, 1.0 were left"}, None, "a CPU")
    out = shown_page([], paper_rows=placed, predictions=paper.predicted())
    assert "The paper&#x27;s tables on this device" in out
    assert out.count("left out") >= len(paper.PUBLISHED)


def test_bars_are_as_long_as_their_values() -> None:
    svg = ElementTree.fromstring(
        bars(
            [
                Bar("a", (Part(3.0, "p0", "x"), Part(1.0, "p1", "y")), "4"),
                Bar("b", (Part(1.0, "p0", "z"),), "1", 2.0, "t"),
            ],
            "ms",
        )
    )
    space = "{http://www.w3.org/2000/svg}"
    wide = [float(rect.get("width", 0)) for rect in svg.iter(f"{space}rect")]
    assert wide[0] + 1.5 == pytest.approx(3 * (wide[1] + 1.5), rel=0.01)
    assert wide[1] == pytest.approx(wide[2])
    assert [title.text for title in svg.iter(f"{space}title")] == ["x", "y", "z", "t"]


@pytest.mark.parametrize("log", [False, True])
def test_lines_stay_inside_their_plot(log: bool) -> None:
    svg = ElementTree.fromstring(lines([Series("a", "s0", ((1.0, 5.0, "p"), (1000.0, 0.1, "q")))], "x", "y", log=log))
    for circle in svg.iter("{http://www.w3.org/2000/svg}circle"):
        assert 70 <= float(circle.get("cx", 0)) <= 710
        assert 14 <= float(circle.get("cy", 0)) <= 294
