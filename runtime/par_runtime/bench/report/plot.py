"""Plots of rows as SVG text: horizontal bars, lines over two logarithmic or linear axes, and dots over a logarithmic
one. No library, no script.

Colours are CSS variables of the page (``page.STYLE``), so that a dark page changes them too; dots are a file of their
own, with its own colours (:data:`STYLE`). Every mark has a ``<title>``, which a browser shows as a tooltip. Every
series has its name beside it, so nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import wrap

WIDTH = 860
LEFT, RIGHT = 190, 195  #: room for names on the left, for values on the right
BAR, GAP = 22, 12
#: Of dots: where their axis begins and ends, where the columns at the right end, the height of a line, the room between
#: groups, above and at the edges; the room between texts; how far the axis goes beyond the values.
DOTS_LEFT, DOTS_RIGHT, COLUMNS = 132, 600, (700, 780, 852)
LANE, BETWEEN, TOP, EDGE_PX, APART, EDGE = 46, 12, 78, 8, 11.0, 1.35
NOTE_CHARACTERS = 138
#: GitHub shows an SVG as an image, which has no page to take colours from; it follows the reader's light or dark.
STYLE = """
.ground{fill:#fff}text{fill:#1f2328}.soft,.note{fill:#59636e}.note{font-size:11px}.title{font-size:15px;font-weight:600}
.group{font-weight:600}.grid{stroke:#e4e7eb}.between{stroke:#c9ced4}.join{stroke:#b5bcc4;stroke-width:2}
.bound{stroke:#1f2328;stroke-width:2.5;fill:none}.ours{fill:#1f6feb}.compiled{fill:#fff;stroke:#b35900;stroke-width:2.2}
.eager{fill:#8250a8}[class^=of-]{font-size:11px;stroke:#fff;stroke-width:3px;paint-order:stroke}.of-ours{fill:#0b57c4;font-weight:600}.of-compiled{fill:#8f4700}
.of-eager{fill:#6b3d8f}
@media (prefers-color-scheme:dark){.ground{fill:#0d1117}text{fill:#e6edf3}.soft,.note{fill:#9198a1}.grid{stroke:#21262d}
[class^=of-]{stroke:#0d1117}.between{stroke:#3d444d}.join{stroke:#555d67}.bound{stroke:#e6edf3}.ours{fill:#4c9aff}
.compiled{fill:#0d1117;stroke:#f0a04b}.eager{fill:#c297ea}.of-ours{fill:#79b8ff}.of-compiled{fill:#f0a04b}
.of-eager{fill:#d2b0f0}}
"""


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


@dataclass(frozen=True)
class Mark:
    """A mark of a line of dots: ``kind`` is its CSS class and its shape, ``text`` stands beside it.

    ``above`` the line, or below it.
    """

    value: float
    kind: str
    text: str
    above: bool


@dataclass(frozen=True)
class DotRow:
    """A line of dots: ``group`` is written once for lines that follow each other, ``texts`` stand at the right.

    ``empty``: what is written where there is no mark.
    """

    group: str
    name: str
    marks: tuple[Mark, ...]
    texts: tuple[str, ...]
    empty: str


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


def dots(
    rows: Sequence[DotRow],
    title: str,
    subtitle: str,
    columns: tuple[str, Sequence[str]],
    axis: str,
    notes: Sequence[str],
) -> str:
    """An SVG file: marks of ``rows`` over a logarithmic axis, columns of text at the right, ``notes`` below.

    ``columns``: what stands above all of them, and above each.
    """
    values = [mark.value for row in rows for mark in row.marks] or [0.1, 1.0]
    low, high = min(values) / EDGE, max(values) * EDGE
    x = _Scale(low, high)
    below = [line for note in notes for line in wrap(note, NOTE_CHARACTERS)]
    gaps = sum(a.group != b.group for a, b in pairwise(rows))
    bottom = TOP + len(rows) * LANE + gaps * BETWEEN
    height = bottom + 48 + len(below) * 16
    out = [_open(height).replace(">", ' font-family="system-ui,-apple-system,Segoe UI,sans-serif" font-size="12">')]
    out += [f"<title>{escape(title)}</title><desc>{escape(_described(rows))}</desc>", f"<style>{STYLE}</style>"]
    out.append(f'<rect class="ground" width="{WIDTH}" height="{height}"/>')
    out.append(f'<text class="title" x="{EDGE_PX}" y="22">{escape(title)}</text>')
    out.append(f'<text class="soft" x="{EDGE_PX}" y="41">{escape(subtitle)}</text>')
    of_all = (DOTS_RIGHT + 12 + COLUMNS[-1]) / 2
    out.append(f'<text class="group" x="{of_all:.0f}" y="{TOP - 31}" text-anchor="middle">{escape(columns[0])}</text>')
    out.append(f'<path class="between" d="M{DOTS_RIGHT + 12} {TOP - 24}H{COLUMNS[-1]}"/>')
    for text, at in zip(columns[1], COLUMNS, strict=True):
        out.append(f'<text class="soft" x="{at}" y="{TOP - 8}" text-anchor="end">{escape(text)}</text>')
    for value in _log_ticks(low, high):
        out.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(f'<text class="soft" x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    middle = (DOTS_LEFT + DOTS_RIGHT) / 2
    out.append(f'<text class="soft" x="{middle:.0f}" y="{bottom + 32}" text-anchor="middle">{escape(axis)}</text>')
    top = float(TOP)
    for i, row in enumerate(rows):
        new = i == 0 or rows[i - 1].group != row.group
        if new and i > 0:
            out.append(
                f'<line class="between" x1="{EDGE_PX}" x2="{COLUMNS[-1]}" y1="{top + BETWEEN / 2:.1f}" '
                f'y2="{top + BETWEEN / 2:.1f}"/>'
            )
            top += BETWEEN
        out += _dot_row(row, new, top + LANE / 2, x)
        top += LANE
    for i, note in enumerate(below):
        out.append(f'<text class="note" x="{EDGE_PX}" y="{bottom + 54 + 16 * i}">{escape(note)}</text>')
    return "\n".join([*out, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    """The place of a value on the axis of dots."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return DOTS_LEFT + (DOTS_RIGHT - DOTS_LEFT) * math.log(value / self.low) / math.log(self.high / self.low)


def _dot_row(row: DotRow, new: bool, y: float, x: _Scale) -> list[str]:
    """One line of dots around ``y``; ``new``: it is the first of its group."""
    out = [f'<text class="group" x="{EDGE_PX}" y="{y + 4:.1f}">{escape(row.group)}</text>'] if new else []
    out.append(f'<text x="{DOTS_LEFT - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(row.name)}</text>')
    for text, at in zip(row.texts, COLUMNS, strict=True):
        out.append(f'<text x="{at}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    if not row.marks:
        middle = (DOTS_LEFT + DOTS_RIGHT) / 2
        return [*out, f'<text class="soft" x="{middle:.0f}" y="{y + 4:.1f}" text-anchor="middle">{row.empty}</text>']
    ends = [x(mark.value) for mark in row.marks]
    out.append(f'<line class="join" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    out += [_shape(mark, x(mark.value), y) for mark in row.marks]
    for above, offset in ((True, -9.0), (False, 19.0)):
        lane = sorted((mark for mark in row.marks if mark.above == above), key=lambda mark: mark.value)
        middles = _side_by_side([(x(mark.value), _wide(mark.text)) for mark in lane])
        for mark, middle in zip(lane, middles, strict=True):
            out.append(
                f'<text class="of-{mark.kind}" x="{middle:.1f}" y="{y + offset:.1f}" text-anchor="middle">'
                f"{escape(mark.text)}</text>"
            )
    return out


def _shape(mark: Mark, x: float, y: float) -> str:
    """Each kind has a shape of its own."""
    tip = f"<title>{escape(mark.text)}</title>"
    if mark.kind == "bound":
        return f'<path class="bound" d="M{x:.1f} {y - 6:.1f}v16">{tip}</path>'
    if mark.kind == "eager":
        return f'<path class="eager" d="M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z">{tip}</path>'
    if mark.kind == "compiled":
        return f'<rect class="compiled" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{tip}</rect>'
    return f'<circle class="{mark.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6.5">{tip}</circle>'


def _side_by_side(wanted: Sequence[tuple[float, float]]) -> list[float]:
    """The middles of texts of (wanted middle, width), from left to right, near these and not over each other."""
    middles = [middle for middle, _ in wanted]
    for _ in range(50):  # what is pushed away may be pushed back by the edge
        for i, (middle, (_, wide)) in enumerate(zip(middles, wanted, strict=True)):
            middles[i] = min(max(middle, DOTS_LEFT + wide / 2 - 6), DOTS_RIGHT + 6 - wide / 2)
        for i, (a, b) in enumerate(pairwise(wanted)):
            over = (a[1] + b[1]) / 2 + APART - (middles[i + 1] - middles[i])
            if over > 0:
                middles[i] -= over / 2
                middles[i + 1] += over / 2
    return middles


def _wide(text: str) -> float:
    """About how wide a text of a mark is."""
    return 6.1 * len(text)


def _described(rows: Sequence[DotRow]) -> str:
    """Every line of dots as text."""
    return "; ".join(f"{r.group} {r.name}: {', '.join(mark.text for mark in r.marks) or r.empty}" for r in rows)


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
