"""The report of a GPU as a page of Markdown: what was right, what the card allows, how fast everything was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from par_export.card.figure import NOT_RUN, any_place, seconds_table
from par_export.card.findings import OTHER_COMMIT, OTHER_DRIVER, Findings, Known, by_card, difference, noted
from par_export.card.markdown import bullets, table
from par_export.card.plan import COMPILED, EAGER, FIGURES, Figure, label_of, parts_of
from par_export.card.product_table import products_table
from par_export.card.shape_table import LEAST_BYTES, calls_table, shapes_table
from par_runtime.bench.report.words import ms, number, percent, size
from par_runtime.bench.rows import Row, median

OF_BOUND = "a call, of its bound"
DOUBT = "in doubt"
JUDGED = "H100"  #: the card that the figures to reach are of
MOST_WRONG = 5  #: failed checks of one subject that are shown; a kernel that is wrong fails hundreds
MOST_KERNELS = 9  #: of a program that the table shows
NOT_IN_TURNS = (
    "over eager, over compiled: the two sides took no turns with each other. PyTorch's rows are measured some minutes "
    "after ours, or in another run; the marks of a row say where the card's clock was held down."
)


def markdown(runs: Sequence[Findings]) -> str:
    """The whole page of ``runs``, the earliest first. What matters most comes last, where a terminal shows it."""
    sections = [
        ("Runs", runs_table(runs)),
        ("Left out", bullets(text for run in runs for text in _of_run(run, runs, run.left_out)) or "Nothing."),
        ("Right?", checks_table(runs)),
        ("What the card allows", limits_table(runs)),
    ]
    cards = by_card(runs)
    for card, own in cards.items():
        known = Known(own)
        of_card = [
            ("Kernels, each alone", kernels_table(own), any(run.of("kernel") for run in own)),
            ("Kernels in other shapes", shapes_table(own), any(run.of("shape") for run in own)),
            ("Kernels one after the other", calls_table(own), any(run.of("shape") for run in own)),
            ("Products, each alone", products_table(own), any(run.of("product") for run in own)),
            ("Rows", rows_table(known, own), True),
            ("int8 and int4 beside fp16", codes_table(known), any(of_codes(row.label) for row in known.rows)),
            ("Seconds per image", seconds_table(known), any_place(known)),
            (
                "Figures to reach (of an H100; batch 1, guided, fp16)",
                figures_table(known, judged=JUDGED in card),
                any(not parts_of(row.label)[2] for row in known.rows),
            ),
        ]
        title = "" if len(cards) == 1 else f": {card}"
        sections += [(name + title, text) for name, text, wanted in of_card if wanted]
    return "\n\n".join(["## GPU report", *(f"### {title}\n\n{text}" for title, text in sections)])


def runs_table(runs: Sequence[Findings]) -> str:
    """What ran on which card, when, at which commit; below it each machine, and what is wrong with a file."""
    lines = []
    for run in runs:
        m, checks = run.machine, run.of("check")
        cells = (run.file, m.gpu or "no GPU", m.gpu_driver or "unknown", run.date, run.commit, ", ".join(run.parts))
        passed = f"{len(checks) - len(run.wrong)} of {len(checks)}" if checks else "none ran"
        left_out = f"{len(run.left_out)}, see below" if run.left_out else "nothing"
        lines.append((*cells, passed, str(len(run.rows)), left_out))
    columns = ("file", "card", "driver", "date", "commit", "parts", "checks passed", "rows", "left out")
    said = bullets(text for run in runs for text in (f"{run.file}: {host(run)}", *run.said))
    return "\n\n".join([table(columns, lines), said])


def host(run: Findings) -> str:
    """The card's memory and clock, the processor, the time."""
    m = run.machine
    clocks = "" if m.gpu_mhz is None else f", {m.gpu_mhz:.0f} MHz at the start"
    card = f"{m.gpu or 'no GPU'} ({size(m.gpu_memory_bytes) or 'memory unknown'}{clocks})"
    processor = f"; {m.cpu}, {m.cores} cores" if m.cpu else ""
    return f"{card}{processor}{f'; {run.minutes:.1f} minutes' if run.minutes else ''}."


def _of_run(run: Findings, runs: Sequence[Findings], texts: Sequence[str]) -> list[str]:
    """``texts`` of a run, each with the file's name where there are several."""
    return [f"{run.file}: {text}" if len(runs) > 1 else text for text in texts]


def checks_table(runs: Sequence[Findings]) -> str:
    """How many checks passed, and all that did not."""
    lines, notes = list[tuple[str, ...]](), list[str]()
    for run in runs:
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for check in run.of("check"):
            groups[check["name"].partition(":")[0]].append(check)
        for name, own in groups.items():
            passed = sum(bool(check["passed"]) for check in own)
            lines.append((run.file, name, f"{passed} of {len(own)}", _largest_error(own)))
        for name, own in groups.items():
            failed = [check for check in own if not check["passed"]]
            lines += [(run.file, check["name"], "WRONG", check["text"]) for check in failed[:MOST_WRONG]]
            if len(failed) > MOST_WRONG:
                lines.append((run.file, name, f"{len(failed) - MOST_WRONG} more WRONG", "in the lines of --json"))
        notes += _of_run(run, runs, [line["text"] for line in run.of("note")])
    checks = _table_of_runs(runs, ("file", "what", "passed", "largest error"), lines)
    return "\n\n".join([checks, *([bullets(notes)] if notes else [])])


def _table_of_runs(runs: Sequence[Findings], columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the file, which is left out where there is one run."""
    return table(columns, lines) if len(runs) > 1 else table(columns[1:], [line[1:] for line in lines])


def _largest_error(checks: Sequence[Mapping[str, Any]]) -> str:
    """The largest of the errors that have a limit, as a part of it."""
    measured = [check for check in checks if check.get("allowed")]
    if any(check["error"] is None for check in measured):  # what is no number is null in JSON
        return "not finite"
    worst = max((check["error"] / check["allowed"] for check in measured), default=None)
    return "" if worst is None else f"{100 * worst:.0f} % of the allowed"


def limits_table(runs: Sequence[Findings]) -> str:
    """The limits, with the spread of their samples."""
    lines = [
        (run.file, line["name"], f"{number(line['value'])} {line['unit']}", number(line["spread"]), line["how"])
        for run in runs
        for line in run.of("limit")
    ]
    return _table_of_runs(runs, ("file", "limit", "median", "spread", "how"), lines)


def figures_table(known: Known, judged: bool = True) -> str:
    """Every figure to reach, with what was measured, or "not run"; and, if it is ``judged``, whether it is reached."""
    lines = []
    for figure in FIGURES:
        words, wanted, got, reached = _figure(figure, known)
        lines.append(
            (
                label_of(figure.model, figure.n),
                words,
                wanted,
                got,
                reached if judged or reached.startswith(DOUBT) else "",
            )
        )
    return table(("model", "figure", "to reach", "measured", ""), lines)


def _figure(figure: Figure, known: Known) -> tuple[str, str, str, str]:
    """Its words, the wanted value, the measured one, and whether it is reached."""
    label = label_of(figure.model, figure.n)
    if figure.what == "step":
        row = known.get(label, "group")
        value = None if row is None or row.percent_of_bound is None else row.percent_of_bound / 100
        shown = "" if value is None else f"{100 * value:.1f} %"  # 49.7 % is not 50 %
        return _judged(OF_BOUND, f"at least {100 * figure.wanted:.0f} %", value, figure.wanted, shown)
    if figure.what == "image":
        image = known.get(label, "image")
        took = None if image is None else image.median_ms
        value = None if took is None else -took / 1e3  # at most: the negative is at least
        return _judged("a whole image", f"at most {figure.wanted:g} s", value, -figure.wanted, ms(took))
    other = label_of(figure.model, 1) if figure.what == "n=1" else label_of(figure.model, figure.n, figure.what)
    words = "times as fast as n = 1" if figure.what == "n=1" else f"times as fast as {figure.what} PyTorch"
    wanted, ratio = f"at least {figure.wanted:g}", known.ratio(other, label)
    if ratio is None or ratio.value is None:
        return words, wanted, NOT_RUN if ratio is None else f"not compared: {ratio.note}", ""
    return _judged(words, wanted, ratio.value, figure.wanted, noted(f"{ratio.value:.2f}", ratio.note))


def _judged(words: str, wanted: str, value: float | None, least: float, shown: str) -> tuple[str, str, str, str]:
    if value is None:
        return words, wanted, NOT_RUN, ""
    if words == OF_BOUND and value > 1:
        return words, wanted, shown, f"{DOUBT}: above the bound, which was measured too low"
    return words, wanted, shown, "reached" if value >= least else "missed"


def rows_table(known: Known, runs: Sequence[Findings]) -> str:
    """A line for each subject and batch; below it, which of several rows counts."""
    lines, over_pytorch = [], False
    for row in known.rows:
        if row.phase != "image":
            continue
        base, n, twin = parts_of(row.label)
        against = partial(_against, known, row)
        of_row = partial(_of_row, known, row)
        over = [] if twin else [against(label_of(base, int(n), other)) for other in (EAGER, COMPILED)]
        over_pytorch |= any(over)
        lines.append(
            (
                known.file(row),
                row.label,
                str(row.images),
                ms(row.median_ms),
                ms(row.spread_ms),
                number(row.images_per_s),
                of_row("group", lambda step: ms(step.call_ms)),
                of_row("group", lambda step: percent(step.percent_of_bound)),
                of_row("decoder", lambda decoder: ms(decoder.median_ms)),
                against(label_of(base, 1, twin)) if n != "1" else "",
                *(over or ("", "")),
                of_row("load", lambda load: ms(load.median_ms)),
                ", ".join(row.marks),
            )
        )
    columns = ("file", "", "batch", "image", "spread", "images/s", "call", "of bound", "decoder")
    made = _table_of_runs(runs, (*columns, "over n = 1", "over eager", "over compiled", "load", "marks"), lines)
    said = list(known.replaced)
    if over_pytorch:
        said.append(NOT_IN_TURNS)
    if f"({OTHER_COMMIT})" in made:
        said.append(f"({OTHER_COMMIT}): measured at another commit than the image of the same line.")
    if OTHER_DRIVER in made:
        said.append(f"{OTHER_DRIVER}: the two were measured with different drivers and are not compared.")
    return "\n\n".join([made, *([bullets(said)] if said else [])])


def _of_row(known: Known, image: Row, phase: str, shown: Callable[[Row], str]) -> str:
    """What is ``shown`` of another phase of the subject and batch of ``image``."""
    row = known.get(image.label, phase, image.images)
    return "" if row is None or not shown(row) else noted(shown(row), difference(row, image))


def of_codes(label: str) -> bool:
    """Whether a label is of ours with quantised weights: "PAR-L n=4 int8 group 64"."""
    return parts_of(label)[2].startswith("int")


def codes_table(known: Known) -> str:
    """A line for each subject with quantised weights: its bytes and times as parts of those in fp16."""
    lines = []
    for row in known.rows:
        model, n, _ = parts_of(row.label)
        if row.phase != "group" or not of_codes(row.label):
            continue
        plain = known.get(label_of(model, int(n)), "group", row.images)
        read = "" if row.bytes is None or not row.calls else size(row.bytes / row.calls)
        image = known.get(row.label, "image", row.images)
        lines.append(
            (
                row.label,
                str(row.images),
                read,
                _part(row, plain, lambda one: one.bytes),
                ms(row.call_ms),
                _part(row, plain, lambda one: one.call_ms),
                percent(row.percent_of_bound),
                "" if image is None else ms(image.median_ms),
                _part(image, known.get(label_of(model, int(n)), "image", row.images), lambda one: one.median_ms),
            )
        )
    columns = ("", "batch", "a call reads", "of fp16's", "call", "of fp16's", "of bound", "image", "of fp16's")
    return table(columns, lines)


def _part(row: Row | None, whole: Row | None, what: Callable[[Row], float | None]) -> str:
    """ "52 %" of a value of two rows; "" where one is missing."""
    if row is None or whole is None:
        return ""
    a, b, note = what(row), what(whole), difference(row, whole)
    return "" if a is None or not b else noted("" if note == OTHER_DRIVER else f"{100 * a / b:.0f} %", note)


def _against(known: Known, row: Row, other: str) -> str:
    """How many times as fast ``row`` is as the subject ``other``, as text."""
    ratio = known.ratio(other, row.label, row.images)
    return "" if ratio is None else str(ratio)


def kernels_table(runs: Sequence[Findings]) -> str:
    """What the slowest kernels of a call take, each alone, and which part of its own bound each reaches.

    Batch 1 of those models of which figures are to be reached, where there are any, and of quantised ones, and one
    decoder; the rest is in the lines. Of several runs the last counts.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    bandwidths: dict[tuple[str, int, str], float | None] = {}
    for run in runs:
        of_run: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
        for line in run.of("kernel"):
            of_run[line["label"], line["images"], line["program"]].append(line)
        groups |= of_run
        bandwidths |= dict.fromkeys(of_run, run.bandwidth)
    wanted = {(label_of(figure.model, figure.n), 1) for figure in FIGURES}
    wanted |= {key[:2] for key in groups if key[1] == 1 and of_codes(key[0])}
    shown = [key for key in groups if key[:2] in wanted and key[2] == "step"] or list(groups)[:1]
    shown += [key for key in groups if key[2] != "step" and key not in shown][:1]
    lines = []
    for label, images, program in shown:
        own = sorted(groups[label, images, program], key=_of_program, reverse=True)
        total = sum(map(_of_program, own))
        bandwidth = bandwidths[label, images, program]
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
