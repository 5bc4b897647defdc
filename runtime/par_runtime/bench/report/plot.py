"""Plots of rows as SVG text: horizontal bars, and lines over two logarithmic or linear axes. No library, no script.

Colours are CSS variables of the page (``page.STYLE``), so that a dark page changes them too. Every mark has a
``<title>``, which a browser shows as a tooltip. Every series has its name beside it, so nothing depends on colour
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
LEFT, RIGHT = 190, 195  #: room for names on the left, for values on the right
BAR, GAP = 22, 12


@dataclass(frozen=True)
class Part:
    """A piece of a bar: ``kind`` is its CSS class, ``tip`` the text of its tooltip."""

    value: float
    kind: str
    tip: str


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart: parts end to end, a tick at ``mark`` where there is one, and text at its end."""

    name: str
    parts: tuple[Part, ...]
    text: str
    mark: float | None = None
    mark_tip: str = ""


@dataclass(frozen=True)
class Series:
    """Points of a line chart, in order: x, y and the tooltip of each; ``kind`` is the CSS class."""

    name: str
    kind: str
    points: tuple[tuple[float, float, str], ...]


def bars(items: Sequence[Bar], unit: str) -> str:
    """A horizontal bar chart with an axis from zero in ``unit``."""
    most = max(max(sum(part.value for part in bar.parts), bar.mark or 0.0) for bar in items) or 1.0
    room = WIDTH - LEFT - RIGHT
    height = len(items) * (BAR + GAP) + 34
    out = [_open(height)]
    for value in ticks(0, most):
        x = LEFT + room * value / most
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>')
        out.append(f'<text class="axis" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{value:g}</text>')
    out.append(f'<text class="axis" x="{WIDTH - 4}" y="{height - 10}" text-anchor="end">{escape(unit)}</text>')
    for i, bar in enumerate(items):
        y = 6 + i * (BAR + GAP)
        out.append(
            f'<text class="name" x="{LEFT - 10}" y="{y + BAR / 2 + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>'
        )
        x = float(LEFT)
        for part in bar.parts:
            wide = room * part.value / most
            # A surface-coloured gap between the parts; parts thinner than it would vanish, so they keep their width.
            drawn = max(wide - 1.5, min(wide, 1.0))
            out.append(
                f'<rect class="{part.kind}" x="{x:.1f}" y="{y}" width="{drawn:.2f}" height="{BAR}" rx="2">'
                f"<title>{escape(part.tip)}</title></rect>"
            )
            x += wide
        end = x
        if bar.mark is not None:
            at = LEFT + room * bar.mark / most
            out.append(
                f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 3}" y2="{y + BAR + 3}">'
                f"<title>{escape(bar.mark_tip)}</title></line>"
            )
            end = max(end, at)
        out.append(f'<text class="value" x="{end + 8:.1f}" y="{y + BAR / 2 + 4:.1f}">{escape(bar.text)}</text>')
    return "".join([*out, "</svg>"])


def lines(series: Sequence[Series], x_name: str, y_name: str, *, log: bool = False) -> str:
    """A line chart of ``series``; axes from zero, or both logarithmic."""
    height, left, right, top, bottom = 340, 70, 150, 14, 46
    xs = [x for each in series for x, _, _ in each.points]
    ys = [y for each in series for _, y, _ in each.points]
    x_low, x_high = _range(xs, log)
    y_low, y_high = _range(ys, log)
    scale = math.log10 if log else float

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low))
        up = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return left + across * (WIDTH - left - right), height - bottom - up * (height - top - bottom)

    out = [_open(height)]
    for value in _log_ticks(y_low, y_high) if log else ticks(y_low, y_high):
        _, y = at(x_low, value)
        out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _log_ticks(x_low, x_high) if log else ticks(x_low, x_high):
        x, _ = at(value, y_low)
        out.append(f'<text class="axis" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{value:g}</text>')
    out.append(
        f'<text class="axis" x="{(left + WIDTH - right) / 2:.1f}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )
    out.append(
        f'<text class="axis" transform="translate(14 {(height - bottom + top) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_name)}</text>'
    )
    taken: list[float] = []
    for each in series:
        places = [at(x, y) for x, y, _ in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline class="line {each.kind}" points="{path}"/>')
        for (x, y), (_, _, tip) in zip(places, each.points, strict=True):
            out.append(
                f'<circle class="{each.kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(tip)}</title></circle>'
            )
        x, y = places[-1]
        while any(abs(y - other) < 14 for other in taken):  # names do not cover each other
            y += 14
        taken.append(y)
        out.append(f'<text class="value" x="{x + 10:.1f}" y="{y + 4:.1f}">{escape(each.name)}</text>')
    return "".join([*out, "</svg>"])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * times for times in (1, 2, 5, 10) if span / (step * times) <= most)
    first = math.ceil(low / step)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    values = [
        times * 10**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for times in (1, 2, 5)
        if low <= times * 10**power <= high
    ]
    return [float(f"{value:.6g}") for value in values]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.25, high * 1.25
    return 0.0, high * 1.08 or 1.0


def _open(height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
