"""The report of a GPU as a page of Markdown: what was right, what the card allows, how fast everything was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from par_export.card.plan import COMPILED, EAGER, FIGURES, Figure, label_of
from par_runtime.bench.machine import Machine
from par_runtime.bench.report.words import ms, number, percent, size
from par_runtime.bench.rows import Row, median

NOT_RUN = "not run"
OF_BOUND = "a call, of its bound"
MOST_KERNELS = 9  #: of a program that the table shows
LONGEST = 160  #: characters of a text in a table
#: A kernel that reads fewer bytes of weights is not held to the bandwidth: its time is that of its launch.
LEAST_BYTES = 2**20


@dataclass
class Findings:
    """Everything that a report found. ``lines``: checks, limits, kernels and notes; ``left_out``: with the reason."""

    machine: Machine
    commit: str
    date: str
    minutes: float = 0.0
    rows: Sequence[Row] = ()
    lines: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """The checks that failed."""
        return [line for line in self.of("check") if not line["passed"]]


def markdown(found: Findings) -> str:
    """The whole page. What matters most comes last, where a terminal shows it."""
    ours = any(not parts_of(row.label)[2] for row in found.rows)
    sections = [
        ("Left out", "\n".join(f"- {text}" for text in found.left_out) or "Nothing.", True),
        ("Right?", checks_table(found), True),
        ("What the card allows", limits_table(found), True),
        ("Kernels, each alone", kernels_table(found), bool(found.of("kernel"))),
        ("Rows", rows_table(found.rows), True),
        ("int8 and int4 beside fp16", codes_table(found.rows), any(of_codes(row.label) for row in found.rows)),
        ("Figures to reach (H100, batch 1, guided, fp16)", figures_table(found.rows), ours),
    ]
    shown = [f"### {title}\n\n{text}" for title, text, wanted in sections if wanted]
    return "\n\n".join(["## GPU report", head(found), *shown])


def head(found: Findings) -> str:
    """The card, the driver, the commit, the time."""
    m = found.machine
    clocks = "" if m.gpu_mhz is None else f", {m.gpu_mhz:.0f} MHz at the start"
    return (
        f"{m.gpu or 'no GPU'} ({size(m.gpu_memory_bytes)}{clocks}), driver {m.gpu_driver or 'unknown'}; {m.cpu}, "
        f"{m.cores} cores; {found.date}, commit {found.commit}; {found.minutes:.1f} minutes."
    )


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; "Nothing was measured." without lines."""
    if not lines:
        return "Nothing was measured."
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells)


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."


def checks_table(found: Findings) -> str:
    """How many checks passed, and all that did not."""
    checks = found.of("check")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for check in checks:
        groups[check["name"].partition(":")[0]].append(check)
    lines = []
    for name, own in groups.items():
        passed = sum(bool(check["passed"]) for check in own)
        lines.append((name, f"{passed} of {len(own)}", _largest_error(own)))
    lines += [(check["name"], "WRONG", check["text"]) for check in found.wrong]
    notes = [f"- {line['text']}" for line in found.of("note")]
    return "\n\n".join([table(("what", "passed", "largest error"), lines), *(["\n".join(notes)] if notes else [])])


def _largest_error(checks: Sequence[Mapping[str, Any]]) -> str:
    """The largest of the errors that have a limit, as a part of it."""
    measured = [check for check in checks if check.get("allowed")]
    if any(check["error"] is None for check in measured):  # what is no number is null in JSON
        return "not finite"
    worst = max((check["error"] / check["allowed"] for check in measured), default=None)
    return "" if worst is None else f"{100 * worst:.0f} % of the allowed"


def limits_table(found: Findings) -> str:
    """The limits, with the spread of their samples."""
    lines = [
        (line["name"], f"{number(line['value'])} {line['unit']}", f"{number(line['spread'])}", line["how"])
        for line in found.of("limit")
    ]
    return table(("limit", "median", "spread", "how"), lines)


class _Rows:
    """Rows by label, phase and batch."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.label, row.phase, row.images): row for row in rows}

    def get(self, label: str, phase: str, images: int = 1) -> Row | None:
        return self._rows.get((label, phase, images))

    def ms(self, label: str, phase: str, images: int = 1) -> float | None:
        row = self.get(label, phase, images)
        return None if row is None else row.median_ms

    def times(self, slow: str, fast: str, images: int = 1) -> float | None:
        """How many times as fast an image of ``fast`` is as one of ``slow``."""
        a, b = self.ms(slow, "image", images), self.ms(fast, "image", images)
        return None if a is None or b is None else a / b


def figures_table(rows: Sequence[Row]) -> str:
    """Every figure to reach, with what was measured, or "not run"."""
    known = _Rows(rows)
    lines = []
    for figure in FIGURES:
        words, wanted, got, reached = _figure(figure, known)
        lines.append((label_of(figure.model, figure.n), words, wanted, got, reached))
    return table(("model", "figure", "to reach", "measured", ""), lines)


def _figure(figure: Figure, rows: _Rows) -> tuple[str, str, str, str]:
    """Its words, the wanted value, the measured one, and whether it is reached."""
    label = label_of(figure.model, figure.n)
    if figure.what == "step":
        row = rows.get(label, "group")
        value = None if row is None or row.percent_of_bound is None else row.percent_of_bound / 100
        shown = "" if value is None else f"{100 * value:.0f} %"
        return _judged(OF_BOUND, f"at least {100 * figure.wanted:.0f} %", value, figure.wanted, shown)
    if figure.what == "image":
        took = rows.ms(label, "image")
        value = None if took is None else -took / 1e3  # at most: the negative is at least
        shown = "" if took is None else ms(took)
        return _judged("a whole image", f"at most {figure.wanted:g} s", value, -figure.wanted, shown)
    other = label_of(figure.model, 1) if figure.what == "n=1" else label_of(figure.model, figure.n, figure.what)
    words = "times as fast as n = 1" if figure.what == "n=1" else f"times as fast as {figure.what} PyTorch"
    value = rows.times(other, label)
    return _judged(words, f"at least {figure.wanted:g}", value, figure.wanted, "" if value is None else f"{value:.2f}")


def _judged(words: str, wanted: str, value: float | None, least: float, shown: str) -> tuple[str, str, str, str]:
    if value is None:
        return words, wanted, NOT_RUN, ""
    if words == OF_BOUND and value > 1:
        return words, wanted, shown, "in doubt: above the bound, which was measured too low"
    return words, wanted, shown, "reached" if value >= least else "missed"


def rows_table(rows: Sequence[Row]) -> str:
    """A line for each subject and batch."""
    known = _Rows(rows)
    lines = []
    for row in rows:
        if row.phase != "image":
            continue
        base, n, twin = parts_of(row.label)
        against = partial(_against, known, row)
        step = known.get(row.label, "group", row.images)
        lines.append(
            (
                row.label,
                str(row.images),
                ms(row.median_ms),
                ms(row.spread_ms),
                number(row.images_per_s),
                "" if step is None else ms(step.call_ms),
                "" if step is None else percent(step.percent_of_bound),
                ms(known.ms(row.label, "decoder", row.images)),
                against(label_of(base, 1, twin)) if n != "1" else "",
                "" if twin else against(label_of(base, int(n), EAGER)),
                "" if twin else against(label_of(base, int(n), COMPILED)),
                ms(known.ms(row.label, "load", row.images)),
                ", ".join(row.marks),
            )
        )
    columns = ("", "batch", "image", "spread", "images/s", "call", "of bound", "decoder")
    return table((*columns, "over n = 1", "over eager", "over compiled", "load", "marks"), lines)


def parts_of(label: str) -> tuple[str, str, str]:
    """Model, n, and kind ("" for ours in fp16) of a label: what :func:`label_of` was given."""
    model, _, rest = label.partition(" n=")
    n, _, kind = rest.partition(" ")
    return model, n, kind


def of_codes(label: str) -> bool:
    """Whether a label is of ours with quantised weights: "PAR-L n=4 int8 group 64"."""
    return parts_of(label)[2].startswith("int")


def codes_table(rows: Sequence[Row]) -> str:
    """A line for each subject with quantised weights: its bytes and times as parts of those in fp16."""
    known = _Rows(rows)
    lines = []
    for row in rows:
        model, n, _ = parts_of(row.label)
        if row.phase != "group" or not of_codes(row.label):
            continue
        plain = known.get(label_of(model, int(n)), "group", row.images)
        read = "" if row.bytes is None or not row.calls else size(row.bytes / row.calls)
        image = known.ms(row.label, "image", row.images)
        lines.append(
            (
                row.label,
                str(row.images),
                read,
                "" if plain is None else _part(row.bytes, plain.bytes),
                ms(row.call_ms),
                "" if plain is None else _part(row.call_ms, plain.call_ms),
                percent(row.percent_of_bound),
                ms(image),
                _part(image, known.ms(label_of(model, int(n)), "image", row.images)),
            )
        )
    columns = ("", "batch", "a call reads", "of fp16's", "call", "of fp16's", "of bound", "image", "of fp16's")
    return table(columns, lines)


def _part(value: float | None, whole: float | None) -> str:
    """ "52 %"; "" where one of both is missing."""
    return "" if value is None or not whole else f"{100 * value / whole:.0f} %"


def _against(known: _Rows, row: Row, other: str) -> str:
    """How many times as fast ``row`` is as the subject ``other``, as text."""
    return times(known.times(other, row.label, row.images))


def times(value: float | None) -> str:
    """ "2.31 x"; "" for None."""
    return "" if value is None else f"{value:.2f} x"


def kernels_table(found: Findings) -> str:
    """What the slowest kernels of a call take, each alone, and which part of its own bound each reaches.

    Batch 1 of those models of which figures are to be reached, where there are any, and of quantised ones, and one
    decoder; the rest is in the lines.
    """
    bandwidth = next((line["value"] for line in found.of("limit") if line["name"] == "copy bandwidth"), None)
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in found.of("kernel"):
        groups[line["label"], line["images"], line["program"]].append(line)
    wanted = {(label_of(figure.model, figure.n), 1) for figure in FIGURES}
    wanted |= {key[:2] for key in groups if key[1] == 1 and of_codes(key[0])}
    shown = [key for key in groups if key[:2] in wanted and key[2] == "step"] or list(groups)[:1]
    shown += [key for key in groups if key[2] != "step" and key not in shown][:1]
    lines = []
    for label, images, program in shown:
        own = sorted(groups[label, images, program], key=_of_program, reverse=True)
        total = sum(map(_of_program, own))
        for one in own[:MOST_KERNELS]:
            took, read = median(one["samples_us"]), one["bytes"]
            of = "" if bandwidth is None or read < LEAST_BYTES else f"{read / bandwidth / took / 10:.0f} %"
            part = f"{100 * _of_program(one) / total:.0f} %"
            lines.append(
                (f"{label}, batch {images}", f"{one['source']} {one['of']}", str(one["count"]), number(took), part, of)
            )
    columns = ("model", "kernel, and its first matrix", "launches", "us each", "of the program", "of its bound")
    return table(columns, lines)


def _of_program(line: Mapping[str, Any]) -> float:
    """Microseconds of all launches of a kernel."""
    return float(line["count"] * median(line["samples_us"]))
