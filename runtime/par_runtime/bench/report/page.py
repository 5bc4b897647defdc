"""One HTML page that needs no other file: what was measured, the plots, the tables, every raw sample.

Predictions for other GPUs have a section of their own, with another frame, and are in no plot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from par_runtime.bench.report import compare, paper, text
from par_runtime.bench.report.advice import advice
from par_runtime.bench.report.plot import Bar, Part, Series, bars, lines
from par_runtime.bench.report.text import HEAD, cells
from par_runtime.bench.report.words import counted, ms, number, percent, speed
from par_runtime.bench.rows import Row, to_json
from par_runtime.bench.subjects.base import MODEL_PHASES, PHASES, STARTING
from par_runtime.bench.suites.paper import PaperRow
from par_runtime.cost.data_sheets import Prediction

STYLE = """
:root{--bg:#fcfcfb;--ink:#1f1f1d;--soft:#5d5d58;--grid:#e4e3de;--frame:#d5d4ce;--p0:#8a6bbe;--p1:#3b74c4;--p2:#c2568f;
--p3:#2a9d8f;
--p4:#d98c2b;--p5:#8d8d86;--s0:#3b74c4;--s1:#d9722b;--s2:#2a9d8f;--s3:#c2568f;--s4:#8a6bbe;--s5:#8d8d86;--bound:#1f1f1d}
@media (prefers-color-scheme:dark){:root{--bg:#1a1a19;--ink:#eeede8;--soft:#a9a8a1;--grid:#33332f;--frame:#44443f;
--p0:#a98be0;
--p1:#6a9be8;--p2:#e07fb2;--p3:#4fc3b4;--p4:#e8a552;--p5:#a3a29b;--s0:#6a9be8;--s1:#ee9458;--s2:#4fc3b4;--s3:#e07fb2;
--s4:#a98be0;
--s5:#a3a29b;--bound:#eeede8}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1040px;
padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2.2rem 0 .5rem}p,li{max-width:78ch}
.soft{color:var(--soft)}
svg{display:block;width:100%;height:auto;max-width:860px;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .axis{fill:var(--soft)}svg .grid{stroke:var(--grid)}svg .bound{stroke:var(--bound);
stroke-width:2}
.line{fill:none;stroke-width:2}
.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}.p4{fill:var(--p4)}.p5{fill:var(--p5)}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.s4{fill:var(--s4)}.s5{fill:var(--s5)}
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}.line.s3{stroke:var(--s3)}
.line.s4{stroke:var(--s4)}
.line.s5{stroke:var(--s5)}.line{fill:none!important}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.2rem 0 .6rem;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.35rem;vertical-align:-1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem .28rem 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th{color:var(--soft);font-weight:500}th:first-child,td:first-child,.left{text-align:left}
.predicted{border:1px dashed var(--frame);padding:.2rem 1rem 1rem;margin-top:2.2rem}
pre{white-space:pre-wrap;color:var(--soft);font-size:.85rem}details{margin:1rem 0}
"""
#: The plot of bounds shows only phases that take at least this share of an image; the table shows all.
SHOWN_FROM = 0.02


def page(
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    paper_rows: Sequence[PaperRow],
    compared: compare.Comparison | None,
    stopped: str = "",
) -> str:
    """The page of one command: measured rows, predictions, rows of the paper, the comparison with an earlier run.

    ``stopped``: why rows are missing, or "".
    """
    names = text.bundle_names(rows)
    title = "The paper's tables on this device" if paper_rows else f"parvis bench: {', '.join(names)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if stopped:
        parts.append(f"<p><strong>Not complete: {escape(stopped)}.</strong></p>")
    if rows:
        parts.append(f"<pre>{escape(chr(10).join(text.about(rows)))}</pre>")
    parts += _paper(paper_rows)
    parts += _findings(rows)
    parts += _phases(rows) + _starts(rows) + _bounds(rows) + _throughput(rows) + _speed_up(rows)
    parts += _comparison(compared) + _rows(rows)
    if predictions:
        parts.append(_predicted(predictions, bool(paper_rows)))
    parts += _raw(rows)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _images(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.phase == "image"]


def _of(rows: Sequence[Row], image: Row) -> dict[str, Row]:
    """The rows of one batch by phase."""
    return {
        row.phase: row for row in rows if (row.label, row.images, row.suite) == (image.label, image.images, image.suite)
    }


def _findings(rows: Sequence[Row]) -> list[str]:
    findings = [one.text for group in text.per_subject(rows) if (one := advice(group)) is not None]
    findings += text.ratios(rows)
    marks = text.doubts(rows)
    out = ["<ul>" + "".join(f"<li>{escape(text)}</li>" for text in findings) + "</ul>"] if findings else []
    if marks:
        items = "".join(f"<li>{escape(text)}</li>" for text in marks)
        out.append(
            f"<details open><summary>Reasons to doubt some rows ({len(marks)})</summary><ul>{items}</ul></details>"
        )
    return out


def _phases(rows: Sequence[Row]) -> list[str]:
    images = [image for image in _images(rows) if image.suite != "start"]  # a second image is not taken apart
    return _made_of(rows, images, PHASES, "Where the time of an image goes")


def _starts(rows: Sequence[Row]) -> list[str]:
    starts = [row for row in rows if row.phase == "start"]
    return _made_of(rows, starts, STARTING, "Where the time until the first image goes")


def _made_of(rows: Sequence[Row], wholes: Sequence[Row], phases: Sequence[str], title: str) -> list[str]:
    """A bar for each of ``wholes``, made of the ``phases`` of the same batch; nothing where there is none."""
    if not wholes:
        return []
    charted = []
    unit, name_of_unit = (1e-3, "s") if max(whole.median_ms for whole in wholes) >= 1e4 else (1.0, "ms")
    for whole in wholes:
        by = _of(rows, whole)
        parts = tuple(
            Part(unit * by[p].median_ms, f"p{i}", f"{whole.label}, {p}: {_times(by[p])}")
            for i, p in enumerate(phases)
            if p in by
        )
        name = whole.label + (f", {whole.images} images" if whole.images > 1 else "")
        charted.append(Bar(name, parts, ms(whole.median_ms) + (" est." if "estimated" in whole.marks else "")))
    used = [(i, p) for i, p in enumerate(phases) if any(row.phase == p for row in rows)]
    legend = "".join(f'<span><i style="background:var(--p{i})"></i>{p}</span>' for i, p in used)
    return [
        f"<h2>{title}</h2>",
        f'<div class="legend">{legend}</div>',
        bars(charted, name_of_unit),
    ]


def _times(row: Row) -> str:
    """What a part takes, in how many calls where it has calls, and its spread."""
    calls = "" if row.calls is None else f"{row.calls} call{'' if row.calls == 1 else 's'}, "
    return f"{ms(row.median_ms)}, {calls}spread {ms(row.spread_ms)}"


def _bounds(rows: Sequence[Row]) -> list[str]:
    whole = {(r.label, r.images): r.median_ms for r in _images(rows)}
    wanted = [
        r
        for r in rows
        if r.bound_ms is not None
        and r.phase in (*MODEL_PHASES, "decoder")
        and r.calls
        and r.median_ms > SHOWN_FROM * whole.get((r.label, r.images), 0.0)
    ]
    if not wanted:
        return []
    charted = []
    for row in wanted:
        calls = row.calls or 1
        tip = (
            f"{row.label}, {row.phase}: {ms(row.median_ms / calls)} a call, {number(row.gb_s)} GB/s, "
            f"{number(row.tflop_s)} TFLOP/s"
        )
        least = (row.bound_ms or 0.0) / calls
        mark = f"at least {ms(least)}, by {row.bound_by}"
        text = f"{ms(row.median_ms / calls)}, {percent(row.percent_of_bound)} of the bound as measured"
        part = Part(row.median_ms / calls, f"p{PHASES.index(row.phase)}", tip)
        charted.append(Bar(f"{row.label}, {row.phase}", (part,), text, least, mark))
    # A decoder takes seconds where a step takes milliseconds: one axis would show only one of them.
    steps = [bar for bar, row in zip(charted, wanted, strict=True) if row.phase != "decoder"]
    decoders = [bar for bar, row in zip(charted, wanted, strict=True) if row.phase == "decoder"]
    out = [
        "<h2>One call against the bound</h2>",
        '<p class="soft">The average call of a phase; the line is the least that this device\'s measured limits allow. '
        "Phases of less than 2 % of an image are in the table alone.</p>",
    ]
    return out + [bars(group, "ms a call") for group in (steps, decoders) if group]


def _throughput(rows: Sequence[Row]) -> list[str]:
    """Images a second against latency: of batches and closed loads by their size, of open loads by what is offered."""
    served = [row for row in rows if row.phase == "http"]
    by_batch, by_clients = (
        "Throughput against latency, by batch size",
        "Over HTTP: throughput against latency, by clients",
    )
    out = []
    for title, wanted in (
        (by_batch, [row for row in rows if row.phase == "throughput"]),
        ("Latency under load", [row for row in rows if row.phase == "serve"]),
        (by_clients, [row for row in served if row.clients is not None]),
        ("Over HTTP: latency under load", [row for row in served if row.clients is None]),
    ):
        offered = any(row.offered_per_s is not None for row in wanted)
        series = []
        for i, label in enumerate(dict.fromkeys(row.label for row in wanted)):
            points = []
            for r in (row for row in wanted if row.label == label):
                x = r.p95_ms if offered else r.median_ms
                what = (
                    f"{number(r.offered_per_s)} requests a second offered"
                    if offered
                    else f"{r.images} images"
                    if r.clients is None
                    else counted(r.clients)
                )
                points.append(
                    (x, r.images_per_s or 0.0, f"{label}, {what}: {ms(x)}, {number(r.images_per_s)} a second")
                )
            series.append(Series(label, f"s{i % 6}", tuple(points)))
        if series:
            x_name = (
                "95th percentile of a request's latency in ms"
                if offered
                else f"latency of a {'batch' if title == by_batch else 'request'} in ms"
            )
            out += [f"<h2>{title}</h2>", lines(series, x_name, "images per second", log=not offered)]
    return out


def _speed_up(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in _images(rows) if not row.pytorch]
    series = []
    notes = []
    by_engine: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(ours, key=lambda row: row.n):
        by_engine.setdefault(text.engine(row), []).append(row)
    several = {key: mine for key, mine in by_engine.items() if mine[0].n == 1 < mine[-1].n}
    for i, (engine, mine) in enumerate(several.items()):
        n1 = mine[0]
        like = [other for other in several if other[:2] == engine[:2]]
        differs = [str(v) for place, v in enumerate(engine) if any(other[place] != v for other in like)]
        name = " ".join([f"{n1.model}, video" if n1.grid[0] > 1 else n1.model, *differs])
        points = tuple(
            (
                float(row.n),
                n1.median_ms / row.median_ms,
                f"{name}, n = {row.n}: {row.label} "
                + (ms(row.median_ms) if row is n1 else f"{speed(row.median_ms, n1.median_ms)} {n1.label}"),
            )
            for row in mine
        )
        series.append(Series(name, f"s{i % 6}", points))
        calls = {row.n: (n1.calls or 0) / (row.calls or 1) for row in mine if row.n > 1}
        notes.append(f"{name}: " + ", ".join(f"{ratio:.1f} at n = {n}" for n, ratio in calls.items()))
    if not series:
        return []
    fewer = escape("; ".join(notes))
    note = f'<p class="soft">Whole images, the same engine, one run. So many times fewer calls: {fewer}.</p>'
    return [
        "<h2>Speed-up by parallel decoding</h2>",
        note,
        lines(series, "n, tokens per call", "speed, n = 1 is 1"),
    ]


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    used = [i for i in range(len(head)) if any(line[i] for line in body)]

    def line(tag: str, texts: Sequence[str]) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=left' if i in left else ''}>{escape(texts[i])}</{tag}>" for i in used)
            + "</tr>"
        )

    inside = line("th", head) + "".join(line("td", texts) for texts in body)
    return f'<div class="scroll"><table>{inside}</table></div>'


def _rows(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    return ["<h2>All measured rows</h2>", _table(HEAD, [cells(row) for row in rows], (0, 1, len(HEAD) - 1))]


def _paper(paper_rows: Sequence[PaperRow]) -> list[str]:
    if not paper_rows:
        return []
    text = paper.cells(paper_rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in paper.notes(paper_rows))
    return [f"<ul class=soft>{notes}</ul>", _table(paper.HEAD, text, (0, 1, 6, len(paper.HEAD) - 1))]


def _comparison(compared: compare.Comparison | None) -> list[str]:
    if compared is None:
        return []
    return ["<h2>Against the earlier run</h2>", f"<pre>{escape(compare.text(compared))}</pre>"]


def _predicted(predictions: Sequence[Prediction], of_paper: bool) -> str:
    table = paper.predicted_table(predictions) if of_paper else text.predicted_table(predictions)
    title, *rest = table.split("\n")
    return (
        f'<div class="predicted"><h2>Predicted, not measured</h2><p>{escape(title)} '
        "It is a lower bound, which may be out of reach.</p>"
        f'<pre class="scroll" style="white-space:pre">{escape(chr(10).join(rest))}</pre></div>'
    )


def _raw(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    text = "\n".join(to_json(row) for row in rows)
    data = json.dumps(text).replace("<", "\\u003c")
    return [
        f"<details><summary>Raw rows, as JSON lines ({len(rows)})</summary><pre>{escape(text)}</pre></details>",
        f'<script type="application/json" id="rows">{data}</script>',
    ]
