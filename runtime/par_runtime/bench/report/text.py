"""Rows for people and for spreadsheets: the table on a terminal, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from par_runtime.bench.report.advice import advice
from par_runtime.bench.report.words import counted, ms, number, percent, size, speed
from par_runtime.bench.rows import Row, columns, percent_in, ratio_interval
from par_runtime.cost.data_sheets import Prediction

HEAD = (
    "",
    "phase",
    "images",
    "calls",
    "median",
    "spread",
    "p95",
    "median call",
    "images/s",
    "GB/s",
    "TFLOP/s",
    "of bound",
    "marks",
)


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table; ``HEAD`` names the columns."""
    return (
        row.label,
        measured(row),
        str(row.images),
        "" if row.calls is None else str(row.calls),
        ms(row.median_ms),
        ms(row.spread_ms) if len(row.samples_ms) > 1 else "",
        ms(row.p95_ms) if row.phase in ("serve", "http") else "",
        ms(row.call_ms),
        number(row.images_per_s),
        number(row.gb_s),
        number(row.tflop_s),
        percent(row.percent_of_bound),
        ", ".join(row.marks),
    )


def measured(row: Row) -> str:
    """The phase of a row, with what was asked of it: "http, 8 clients", "serve at 12/s"."""
    if row.clients is not None:
        return f"{row.phase}, {counted(row.clients)}"
    return row.phase if row.offered_per_s is None else f"{row.phase} at {number(row.offered_per_s)}/s"


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first two and the last to the left, numbers to the right; empty columns left out."""
    used = [i for i in range(len(head)) if any(line[i] for line in body)]
    widths = {i: max(len(line[i]) for line in [head, *body]) for i in used}
    left = {0, 1, len(head) - 1}
    return [
        "  ".join(line[i].ljust(widths[i]) if i in left else line[i].rjust(widths[i]) for i in used).rstrip()
        for line in [head, *body]
    ]


def about(rows: Sequence[Row]) -> list[str]:
    """The machine, the commit, the subjects, the limits and the kind of images of the rows, a line each."""
    first = rows[0]
    machine = first.machine
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GB"
    out = [f"machine   {machine.cpu}, {machine.cores} cores{memory}, {machine.os}"]
    if machine.gpu:
        clock = "" if machine.gpu_mhz is None else f", {machine.gpu_mhz:.0f} MHz"
        memory_clock = "" if machine.gpu_memory_mhz is None else f", memory {machine.gpu_memory_mhz:.0f} MHz"
        out.append(f"gpu       {machine.gpu}, {machine.gpu_driver}{clock}{memory_clock}")
    known_as = "version" if first.commit.startswith("parvis ") else "commit"
    out.append(f"{known_as:9} {first.commit}, Python {first.python}, {first.date}")
    for label in dict.fromkeys(row.label for row in rows):
        row = next(r for r in rows if r.label == label)
        threads = "" if row.threads is None else f", {row.threads} threads"
        decoded = "" if row.decoder_computes == "fp32" else f", decoded in {row.decoder_computes}"
        peak = max((r.peak_bytes or 0 for r in rows if r.label == label), default=0)
        out.append(
            f"{label:9} {row.bundle} ({row.hash[:8]}): {row.model}, {row.parameters / 1e6:.1f} M parameters, "
            f"n = {row.n}, {row.stored} computed in {row.computes} by {row.backend} {row.version}{decoded}{threads}"
            + (f", peak memory {size(peak)}" if peak else "")
        )
    bounded = [row for row in rows if row.read_gb_s is not None]
    whole = [row for row in bounded if row.phase in ("image", "throughput")]
    limits: dict[tuple[float | None, str], dict[str, list[str]]] = {}
    for row in whole or bounded:  # what a call reads may fit a cache for one subject, and not for another
        labels = limits.setdefault((row.matrix_tflop_s, row.limits_from), {}).setdefault(
            f"{number(row.read_gb_s)} GB/s", []
        )
        name = own_name(row, whole or bounded)
        labels += [name] if name not in labels else []
    for (tflop_s, how), rates in limits.items():
        read = ", ".join(r if len(rates) == 1 else f"{r} ({', '.join(labels)})" for r, labels in rates.items())
        out.append(f"limits    {read}, {number(tflop_s) or 'unknown'} TFLOP/s ({how})")
    guided = "guided, two rows an image" if first.guided else "unguided"
    if first.grid[0] > 1:
        guided = f"each a clip of {first.grid[0]} latent frames; {guided}"
    excluded = sorted({text for row in rows for text in row.excluded})
    out.append(f"images    {guided}; {first.sampling}; not included: {', '.join(excluded)}")
    return out


def own_name(row: Row, others: Sequence[Row]) -> str:
    """A row's label, with what tells it from rows of this label whose bandwidth is another: images, phase."""
    mine = [other for other in others if other.label == row.label]
    if len({other.read_gb_s for other in mine}) == 1:
        return row.label
    images = f" {row.images} image{'s' if row.images > 1 else ''}" if len({r.images for r in mine}) > 1 else ""
    return row.label + images + (f" {row.phase}" if len({r.phase for r in mine}) > 1 else "")


def table(rows: Sequence[Row]) -> str:
    """The measured rows as text for a terminal: context, table, speed-ups, advice and flags."""
    body = [cells(row) for row in rows]
    notes = doubts(rows)
    advised = [one.text for group in per_subject(rows) if (one := advice(group)) is not None]
    parts = [about(rows), aligned(HEAD, body), ratios(rows), advised, [f"marked    {note}" for note in notes]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def doubts(rows: Sequence[Row]) -> list[str]:
    """Every reason to doubt rows once, after its subjects and, where it is not of all their rows, the phases.

    Of what disturbed a subject's rows to different degrees, the worst.
    """
    out: dict[str, list[str]] = {}
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        flags = list(dict.fromkeys(flag for row in mine for flag in row.flags))
        for kind in dict.fromkeys(flag.split(":")[0] for flag in flags):
            of_kind = [flag for flag in flags if flag.split(":")[0] == kind]
            worst = [max(of_kind, key=percent_in)] if kind in ("busy", "throttled") else of_kind
            for flag in worst:
                same = of_kind if len(worst) < len(of_kind) else [flag]
                marked = list(dict.fromkeys(row.phase for row in mine if set(same) & set(row.flags)))
                of_batches = {row.phase for row in mine} - {"load", "first_preview", "copy"}
                where = "" if of_batches and of_batches <= set(marked) else f" ({', '.join(marked)})"
                out.setdefault(flag, []).append(f"{label}{where}")
    return [f"{', '.join(subjects)}: {flag}" for flag, subjects in out.items()]


def bundle_names(rows: Sequence[Row]) -> list[str]:
    """The name of each bundle once; with its weights' precision and hash where several have the same name."""
    named = dict.fromkeys((row.bundle, row.stored, row.hash[:8]) for row in rows)
    names = [name for name, _, _ in named]
    return [name if names.count(name) == 1 else f"{name} {stored} {digits}" for name, stored, digits in named]


def per_subject(rows: Sequence[Row]) -> list[list[Row]]:
    """Neighbouring rows grouped by label and batch size, in their order."""

    def key(row: Row) -> tuple[str, int]:
        return row.label, row.images

    return [list(group) for _, group in groupby(rows, key)]


def ratios(rows: Sequence[Row]) -> list[str]:
    """How fast an image is against its baselines: the same bundle in PyTorch, the same model, stored alike, at n = 1.

    Bundles without such a pair are compared with the first one. In the start suite whole starts are compared, and none
    that has a self-test with one that has none. A line of text each.
    """
    starts = [row for row in rows if row.phase == "start"]
    tested = {row.label for row in rows if row.phase == "selftest"}
    images = starts or [row for row in rows if row.phase == "image"]
    ours = [row for row in images if not row.pytorch]
    pairs = []
    for row in ours:
        pairs += [(row, other) for other in ours if other.n == 1 < row.n and engine(other) == engine(row)]
        pairs += [(row, other) for other in images if other.hash == row.hash and _is_baseline(other, row)]
    alone = [row for row in ours[1:] if all(row not in pair for pair in pairs)]
    pairs += [(ours[0], row) for row in alone]
    random = np.random.default_rng(0)
    out = []
    for a, b in pairs:
        if (a.label in tested) != (b.label in tested):
            continue
        if (why := _no_ratio(a, b)) is not None:
            out.append(why)
            continue
        low, high = ratio_interval(b.samples_ms, a.samples_ms, random)
        unsure = "; the samples do not tell them apart" if 0 < low <= 1 <= high else ""
        times = f"{ms(a.median_ms)} against {ms(b.median_ms)}"
        what = "start: " if starts else ""
        out.append(f"{what}{a.label} {speed(a.median_ms, b.median_ms)} {b.label} ({times}{unsure})")
    return out


def _no_ratio(*sides: Row) -> str | None:
    """Why there is no ratio of two rows, in words; None where there is one.

    An image that is estimated from disturbed samples is wrong by the disturbance times the calls that were not made.
    """
    for side in sides:
        disturbed = next((mark for mark in ("busy", "throttled") if mark in side.marks), None)
        if disturbed and "estimated" in side.marks:
            names = " and ".join(each.label for each in sides)
            return (
                f"no ratio of {names}: the image of {side.label} is estimated from samples that are marked "
                f"{disturbed}; measure again on a quiet machine"
            )
    return None


def engine(row: Row) -> tuple[object, ...]:
    """What two rows of different n must share for their ratio to be the gain of parallel decoding; first the model."""
    images = f"{row.images} image{'s' if row.images > 1 else ''}"
    guided = "guided" if row.guided else "unguided"
    return row.model, row.grid, images, guided, row.stored, row.backend, row.device, f"{row.threads} threads"


def _is_baseline(other: Row, row: Row) -> bool:
    """Whether ``other``, a row of the same bundle, is a baseline of ``row``: in PyTorch, or on ONNX Runtime."""
    return other.pytorch or (other.backend.startswith("onnxruntime") and row.backend.startswith("native"))


def predicted_table(predictions: Sequence[Prediction]) -> str:
    """Bounds of other GPUs by data sheet, as a table; every line states that it was not measured."""
    head = ("", "predicted", "images", "n", "GB/s", "TFLOP/s", "at least", "")
    body = [
        (
            p.bundle,
            p.gpu,
            str(p.images),
            str(p.n),
            f"{p.gb_s:.0f}",
            f"{p.tflop_s:.0f}",
            ms(p.bound_ms),
            f"{p.by}, not measured",
        )
        for p in predictions
    ]
    title = (
        "By data sheet, weights as they are stored, without decoding: no GPU was here, nothing of this was measured."
    )
    return "\n".join([title, *aligned(head, body)])


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header; see ``rows.columns``. Without rows an empty line."""
    out = io.StringIO()
    flat: list[dict[str, Any]] = columns(rows)
    writer = csv.DictWriter(out, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
