"""The figure of the README, and its table: seconds per image of the published sizes, beside PyTorch and the bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from par_export.card.findings import OTHER_COMMIT, Findings, Known, Ratio, by_card
from par_export.card.markdown import table
from par_export.card.plan import COMPILED, EAGER, label_of
from par_runtime.bench.report.plot import DotRow, Mark, dots
from par_runtime.bench.report.words import number, percent
from par_runtime.bench.rows import Row

NOT_RUN = "not run"
MODELS, GROUP_SIZES = ("PAR-3B", "PAR-XL", "PAR-L"), (1, 4, 16)
OURS = "ours"
KINDS = {EAGER: EAGER, COMPILED: COMPILED, OURS: ""}  #: what the figure shows -> the kind in a label
COLUMNS = ("over compiled", "over eager", "of bound")
WHAT = "guided, fp16, batch 1, decoder included"
STAR, STARRED = " *", "* The two were measured at different commits."
HOW = (
    "Medians; eager and compiled are the same model in PyTorch; the bound is what an image must read over the memory "
    "bandwidth, or what it must multiply over the fp16 rate, both measured in the same run."
)


@dataclass(frozen=True)
class Place:
    """One line of the figure: a model at one ``n``, and its rows of whole images by what they show."""

    model: str
    n: int
    rows: dict[str, Row]
    ratios: dict[str, Ratio | None]

    @property
    def bound_ms(self) -> float | None:
        """The least time of an image: of our row, else of another's."""
        return next((row.bound_ms for kind in (OURS, COMPILED, EAGER) if (row := self.rows.get(kind))), None)

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns at the right: times as fast as compiled and eager PyTorch, and the share of the bound."""
        if OURS not in self.rows:
            return (f"{OURS} {NOT_RUN}" if self.rows else "", "", "")
        over = [NOT_RUN if ratio is None else str(ratio) for ratio in (self.ratios[COMPILED], self.ratios[EAGER])]
        return (*over, percent(self.rows[OURS].percent_of_bound) or NOT_RUN)

    @property
    def marks(self) -> list[str]:
        """The reasons to doubt its rows: "compiled: estimated"."""
        return [f"{kind}: {', '.join(row.marks)}" for kind, row in self.rows.items() if row.marks]


def places(known: Known) -> list[Place]:
    """Every line of the figure, with what was measured of it."""
    return [_place(known, model, n) for model in MODELS for n in GROUP_SIZES]


def _place(known: Known, model: str, n: int) -> Place:
    found = {what: known.get(label_of(model, n, kind), "image") for what, kind in KINDS.items()}
    rows = {what: row for what, row in found.items() if row is not None and row.guided and row.stored == "fp16"}
    ratios = {
        twin: known.ratio(label_of(model, n, twin), label_of(model, n)) if {twin, OURS} <= rows.keys() else None
        for twin in (COMPILED, EAGER)
    }
    return Place(model, n, rows, ratios)


def any_place(known: Known) -> bool:
    """Whether anything of the figure was measured."""
    return any(place.rows for place in places(known))


def seconds_table(known: Known) -> str:
    """The figure as a table, for those who do not see it."""
    lines = []
    for place in places(known):
        shown = [_seconds(row.median_ms) if (row := place.rows.get(what)) else NOT_RUN for what in KINDS]
        bound = NOT_RUN if place.bound_ms is None else _seconds(place.bound_ms)
        label = label_of(place.model, place.n)
        lines.append((label, *shown, bound, *place.texts, "; ".join(place.marks)))
    made = table(("", *KINDS, "bound", *(f"{OURS} {column}" for column in COLUMNS[:2]), COLUMNS[2], "marks"), lines)
    return f"{made}\n\nSeconds per image; {WHAT}. {HOW}"


def _seconds(milliseconds: float) -> str:
    return number(milliseconds / 1e3)


def figure(runs: Sequence[Findings]) -> str:
    """The figure as SVG, of the card of which most of it was measured; what was not is said.

    Other cards are named below it.
    """
    cards = {card: Known(own) for card, own in by_card(runs).items()}
    ours = {card: sum(OURS in place.rows for place in places(known)) for card, known in cards.items()}
    every = {card: sum(len(place.rows) for place in places(known)) for card, known in cards.items()}
    card = max(cards, key=lambda card: (ours[card], every[card]))
    shown = places(cards[card])
    lines = [DotRow(p.model, f"n = {p.n}", tuple(_marks(p)), tuple(map(_short, p.texts)), NOT_RUN) for p in shown]
    others = [other for other in cards if other != card and every[other]]
    notes = [f"{what[0].upper()}{what[1:]}." for what in (*_origins(card, shown), *_doubts(shown))]
    starred = any(STAR in text for line in lines for text in line.texts)
    notes += [
        *([STARRED] if starred else []),
        HOW,
        *([f"Measured too, not shown: {', '.join(others)}."] if others else []),
    ]
    return dots(
        lines,
        f"Seconds per image on {card}",
        f"{WHAT}; less is better",
        (OURS, COLUMNS),
        "seconds per image, logarithmic",
        notes,
    )


def _short(text: str) -> str:
    """A text of :attr:`Place.texts` for a narrow column."""
    return "above" if text.startswith("above") else text.replace(f" ({OTHER_COMMIT})", STAR)


def _marks(place: Place) -> Iterator[Mark]:
    for what, row in place.rows.items():
        estimated = " (estimated)" if "estimated" in row.marks else ""
        seconds = row.median_ms / 1e3
        yield Mark(seconds, what, f"{what} {number(seconds)}{estimated}", above=what != OURS)
    if place.bound_ms is not None:
        yield Mark(place.bound_ms / 1e3, "bound", f"bound {number(place.bound_ms / 1e3)}", above=False)


def _origins(card: str, shown: Sequence[Place]) -> list[str]:
    """Card, driver, date, commit and repetitions; for each kind by itself where they differ."""
    origins: dict[str, list[str]] = {}
    for what in KINDS:
        rows = [place.rows[what] for place in shown if what in place.rows]
        drivers = sorted({row.machine.gpu_driver or "unknown" for row in rows})
        days, commits = sorted({row.date[:10] for row in rows}), sorted({row.commit for row in rows})
        counts = sorted({len(row.samples_ms) for row in rows})
        if rows:
            text = f"{card}, driver {', '.join(drivers)}; {', '.join(days)}; commit {', '.join(commits)}; "
            several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            origins.setdefault(text + f"{several} repetition{'' if several == '1' else 's'}", []).append(what)
    if len(origins) == 1:
        return list(origins)
    return [f"{', '.join(kinds)}: {origin}" for origin, kinds in origins.items()]


def _doubts(shown: Sequence[Place]) -> list[str]:
    """Which rows are marked, by their marks."""
    marked: dict[str, list[str]] = {}
    for place in shown:
        for what, row in place.rows.items():
            for mark in row.marks:
                marked.setdefault(mark, []).append(f"{label_of(place.model, place.n)} {what}")
    every = [f"{label_of(place.model, place.n)} {what}" for place in shown for what in place.rows]
    return [f"marked {mark}: {'all' if own == every else ', '.join(own)}" for mark, own in marked.items()]
