"""A plot of intervals around zero as SVG text, in the style of ``par_runtime.bench.report.plot``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from par_runtime.bench.report.plot import BAR, GAP, LEFT, RIGHT, WIDTH, ticks


@dataclass(frozen=True)
class Interval:
    """A line of the plot: a dot at ``middle`` and a bar from ``low`` to ``high``."""

    name: str
    middle: float
    low: float
    high: float
    tip: str


def intervals(items: Sequence[Interval], unit: str, limit: float | None = None) -> str:
    """The plot, with dashed lines at ``limit`` on both sides of zero where they are in sight."""
    ends = [abs(end) for item in items for end in (item.low, item.high, item.middle)]
    most = 1.15 * max([*ends, *([] if limit is None else [limit])]) or 1.0
    height = len(items) * (BAR + GAP) + 34
    room = WIDTH - LEFT - RIGHT

    def at(value: float) -> float:
        return LEFT + room * (value + most) / (2 * most)

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">']
    for value in ticks(-most, most):
        x = at(value)
        out.append(f'<line class="{"grid" if value else "zero"}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>')
        out.append(f'<text class="axis" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{value:g}</text>')
    out.append(f'<text class="axis" x="{WIDTH - 4}" y="{height - 10}" text-anchor="end">{escape(unit)}</text>')
    for value in () if limit is None else (-limit, limit):
        x = at(value)
        out.append(
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}">'
            f"<title>budget: {value:+.4g}</title></line>"
        )
    for i, item in enumerate(items):
        y = 6 + i * (BAR + GAP) + BAR / 2
        low, high = at(item.low), at(item.high)
        out.append(f'<text class="name" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(item.name)}</text>')
        out.append(
            f'<rect class="s{i % 6}" x="{low:.1f}" y="{y - 3:.1f}" width="{max(1.0, high - low):.1f}" height="6" '
            f'rx="2"><title>{escape(item.tip)}</title></rect>'
        )
        out.append(
            f'<circle class="s{i % 6}" cx="{at(item.middle):.1f}" cy="{y:.1f}" r="5"><title>{escape(item.tip)}</title>'
            "</circle>"
        )
        text = f"{item.low:+.3g} .. {item.high:+.3g}"
        out.append(f'<text class="value" x="{WIDTH - RIGHT + 10}" y="{y + 4:.1f}">{text}</text>')
    return "".join([*out, "</svg>"])
