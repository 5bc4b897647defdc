"""What the report's page says of single products: the shape that a build chooses beside the fastest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from par_export.card.findings import Findings
from par_export.card.markdown import plain, table
from par_export.kernels.product_trials import shape_words
from par_runtime.bench.report.words import number
from par_runtime.bench.rows import median

Line = Mapping[str, Any]


def products_table(runs: Sequence[Findings]) -> str:
    """A line for each product that was timed, and below it how much slower the model's choices are than the fastest.

    Of several runs the last that has a product counts.
    """
    found: dict[tuple[str, str, int], list[Line]] = {}
    for run in runs:
        own: dict[tuple[str, str, int], list[Line]] = {}
        for line in run.of("product"):
            own.setdefault((line["model"], line["kernel"], line["rows"]), []).append(line)
        found |= own
    lines, slower = list[list[str]](), dict[str, float]()
    for (model, kernel, rows), tried in found.items():
        best = min(tried, key=_us)
        chosen = next((line for line in tried if line["chosen"]), None)
        of_choice = ["", "", ""]
        if chosen is not None:
            more = _us(chosen) / _us(best) - 1
            slower[f"{model} {kernel}, {rows} rows"] = more
            of_choice = [shape_words(chosen, chosen["at_once"]), number(_us(chosen)), f"{100 * more:.1f} %"]
        words, us, part = of_choice
        lines.append(
            [
                model,
                kernel,
                str(rows),
                str(len(tried)),
                words,
                us,
                shape_words(best, best["at_once"]),
                number(_us(best)),
                part,
            ]
        )
    columns = (
        "model",
        "product",
        "rows",
        "shapes tried",
        "as a build makes it",
        "us",
        "the fastest",
        "us",
        "slower by",
    )
    return "\n\n".join([table(columns, lines), *([_said(slower)] if slower else [])])


def _said(slower: Mapping[str, float]) -> str:
    """The mean and the largest of all products."""
    worst = max(slower, key=lambda name: slower[name])
    mean = 100 * sum(slower.values()) / len(slower)
    return (
        f"As a build makes them they are {mean:.1f} % slower than the fastest on average, and "
        f"{100 * slower[worst]:.1f} % at most ({plain(worst)})."
    )


def _us(line: Line) -> float:
    return median(line["samples_us"])
