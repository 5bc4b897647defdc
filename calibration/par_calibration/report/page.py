"""One HTML page that needs no other file: the verdict, the measures, plots, pairs of images, all figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from itertools import pairwise

import numpy as np
from PIL import Image

from par_calibration.report.budget import LIMITS
from par_calibration.report.forced import CLASS
from par_calibration.report.intervals import Interval, intervals
from par_calibration.report.measures import Likelihood
from par_calibration.report.result import BOTH, COSTS, Report
from par_calibration.report.sheet import pair_sheet
from par_calibration.report.text import side_text
from par_runtime.bench.report.page import STYLE
from par_runtime.bench.report.plot import Bar, Part, Series, bars, lines

MORE_STYLE = """
.good{color:#1d7a4f}.bad{color:#b3261e;font-weight:600}.verdict{font-size:1.15rem;margin:.6rem 0}
@media (prefers-color-scheme:dark){.good{color:#5fd39b}.bad{color:#ff8a80}}
td.what{white-space:normal;max-width:44ch;text-align:left;color:var(--soft)}img{max-width:100%;height:auto;
image-rendering:pixelated}.zero{stroke:var(--soft)}.limit{stroke:var(--bound);stroke-dasharray:4 3}
"""
PREFILL = "prefill"  #: the phase whose only input is the class
TITLE = "Calibration of "  #: how the titles of these pages begin
POINTS = 64  #: of a curve over positions
NAMES = {"all": "all positions", "class": "class input", "learnable": "learnable inputs", "code": "code inputs"}


def page(report: Report) -> str:
    """The page of ``report``."""
    side = report.candidate
    rounded = [
        what
        for precision, what in (
            (side.arithmetic, f"{side.arithmetic} arithmetic"),
            (side.cache, f"{side.cache} cache"),
            (side.decoder_precision, f"decoder in {side.decoder_precision}"),
        )
        if precision != "fp32"
    ]
    title = f"{TITLE}{report.original.name}: {', '.join([side.weights, *rounded])}"
    parts = [f"<h1>{escape(title)}</h1>", *_verdict(report), *_sides(report), *_measures(report), *_pairs(report)]
    parts += [*_where(report), *_along(report), *_likelihood(report), *_layers(report)]
    parts += [*_drawn(report), *_frechet(report), *_figures(report)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{MORE_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _verdict(report: Report) -> list[str]:
    exceeded = report.exceeded()
    if not exceeded:
        return ['<p class="verdict good">Within the budget: this bundle may be published.</p>']
    items = "".join(f"<li>{escape(line)}</li>" for line in exceeded)
    count = f"{len(exceeded)} measure{'s' if len(exceeded) > 1 else ''}"
    return [f'<p class="verdict bad">Refused: {count} beyond the budget.</p>', f"<ul>{items}</ul>"]


def _sides(report: Report) -> list[str]:
    kind = "real images that no training has seen" if report.real else "images, none of them real"
    about = [
        f"original   {side_text(report.original)}",
        f"candidate  {side_text(report.candidate)}",
        f"images     {report.images} {kind}: {report.images_from}",
        f"guidance   {report.guidance:g} where logits are guided, and of generated images",
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return [f"<pre>{escape(chr(10).join(about))}</pre>", f"<ul>{notes}</ul>" if notes else ""]


def _measures(report: Report) -> list[str]:
    rows = []
    for key, value in report.measures().items():
        limit, allowed = LIMITS[key], report.budget.limits.get(key)
        verdict, kind = "no limit", ""
        if allowed is not None:
            within = limit.within(value, allowed)
            verdict, kind = ("ok", "good") if within else ("beyond the budget", "bad")
        bound = "" if allowed is None else f"{'at least' if limit.least else 'at most'} {limit.text(allowed)}"
        rows.append(
            f"<tr><td>{escape(limit.name)}</td><td>{limit.text(value)}</td><td>{bound}</td>"
            f'<td class="left {kind}">{verdict}</td>'
            f'<td class="what">{escape(limit.what)} (<code>{key}</code>)</td></tr>'
        )
    head = (
        "<tr><th>measure</th><th>value</th><th>budget</th><th class=left>verdict</th><th class=left>meaning</th></tr>"
    )
    return [
        "<h2>The measures that decide</h2>",
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>',
    ]


def _pairs(report: Report) -> list[str]:
    if report.pairs is None or not len(report.pairs):
        return []
    content = io.BytesIO()
    Image.fromarray(pair_sheet(report.pairs)).save(content, format="PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    names = escape("; ".join(report.pair_names))
    return [
        "<h2>Images of both models, same seeds</h2>",
        '<p class="soft">In each pair the original is on the left, the candidate on the right. A pair may differ '
        "entirely and both be good: one token that differs changes all that follow.</p>",
        f'<img alt="pairs of images: {names}" src="data:image/png;base64,{data}">',
        f'<p class="soft">Row by row: {names}.</p>',
    ]


def _where(report: Report) -> list[str]:
    groups = list(dict.fromkeys(a.where for a in report.agreements))
    different, divergence = [], []
    for where in groups:
        if where == CLASS and PREFILL in groups:
            continue  # the same positions
        for guided in (False, True):
            one = report.agreement(where, guided)
            if one is None:
                continue
            name = NAMES.get(where, where) + (", guided" if guided else "")
            kind = "p4" if guided else "p1"
            tip = f"{name}: {one.positions} positions, the same code at {100 * one.top1:.2f} %"
            part = Part(100 * (1 - one.top1), kind, tip)
            different.append(Bar(name, (part,), f"{100 * (1 - one.top1):.2f} %"))
            at = f"worst {one.kl_worst:.3g} at position {one.worst_position} of image {one.worst_image}"
            text = f"{one.kl:.3g}, 95 % below {one.kl_p95:.3g}"
            drawn = one.kl if np.isfinite(one.kl) else 0.0
            divergence.append(Bar(name, (Part(drawn, kind, f"{name}: {text}, {at}"),), text))
    return [
        "<h2>Where the distributions differ</h2>",
        '<p class="soft">Both models get the same tokens (teacher forcing). Phases are kinds of calls; class, '
        "learnable and code are what the input position holds. Class and learnable inputs attract attention of all "
        "later positions, so errors there spread.</p>",
        "<p>Positions at which the most probable code is another one</p>",
        bars(different, "%"),
        "<p>Mean KL divergence</p>",
        bars(divergence, "nats"),
    ]


def _along(report: Report) -> list[str]:
    series = []
    for i, (cost, profile) in enumerate(report.profiles.items()):
        values = np.array(profile)
        edges = np.unique(np.linspace(0, len(values), min(POINTS, len(values)) + 1).astype(int))
        points = []
        for start, stop in pairwise(edges.tolist()):
            mean = float(values[start:stop].mean())
            points.append((float(start), mean, f"{COSTS[cost]}, positions {start}..{stop - 1}: {mean:.3g} nats"))
        series.append(Series(cost, f"s{i}", tuple(points)))
    if not all(np.isfinite(y) for each in series for _, y, _ in each.points):
        return []
    costs = "; ".join(f"{cost}: {COSTS[cost]}" for cost in report.profiles)
    return [
        "<h2>Along the sequence</h2>",
        f'<p class="soft">Mean KL divergence at each position, unguided ({escape(costs)}).</p>',
        lines(series, "position", "nats"),
    ]


def _likelihood(report: Report) -> list[str]:
    def row(cost: str, one: Likelihood) -> str:
        ends = "" if one.low is None or one.high is None else f"{one.low:+.5f} .. {one.high:+.5f}"
        cells = (f"{one.original:.4f}", f"{one.candidate:.4f}", f"{one.change:+.5f}", ends, f"{one.per_image:+.3f}")
        return f"<tr><td>{escape(COSTS[cost])}</td>{''.join(f'<td>{text}</td>' for text in cells)}</tr>"

    head = (
        "<tr><th></th><th>first model, nats per token</th><th>second</th><th>change per token</th>"
        "<th>95 % interval</th><th>change per image</th></tr>"
    )
    body = "".join(row(cost, one) for cost, one in report.likelihoods.items())
    shown = [
        Interval(cost, one.change, one.low, one.high, f"{COSTS[cost]}: {one.change:+.5f} nats per token")
        for cost, one in report.likelihoods.items()
        if np.isfinite(one.change) and one.low is not None and one.high is not None
    ]
    limit = report.budget.limits.get("likelihood")
    limit = None if limit is None else limit * abs(report.likelihoods[BOTH].original)
    what = "real images" if report.real else "tokens that the original drew: no real images"
    return [
        f"<h2>Log-likelihood of {what}</h2>",
        '<p class="soft">The same images under both models, without guidance; the interval is of the mean difference, '
        "from resampled images. Dashed: the budget.</p>",
        intervals(shown, "nats per token", limit) if shown else "",
        f'<div class="scroll"><table>{head}{body}</table></div>',
    ]


def _layers(report: Report) -> list[str]:
    if not report.layers:
        return []
    names = list(dict.fromkeys(one.name for one in report.layers))
    series = []
    for i, phase in enumerate(dict.fromkeys(one.phase for one in report.layers)):
        points = tuple(
            (
                float(names.index(one.name)),
                100 * one.relative_error,
                f"{one.name}, {phase}: {100 * one.relative_error:.2f} %",
            )
            for one in report.layers
            if one.phase == phase and np.isfinite(one.relative_error)
        )
        if points:
            series.append(Series(phase, f"s{i % 6}", points))
    worst = sorted(report.layers, key=lambda one: -one.relative_error)[:8]
    items = "".join(
        f"<li>{escape(one.name)}, {escape(one.phase)}: {100 * one.relative_error:.2f} %</li>" for one in worst
    )
    return [
        "<h2>Error of each layer</h2>",
        '<p class="soft">The length of the error of a matrix\'s outputs over the length of the outputs, on recorded '
        "activations; matrices in the order of the network.</p>",
        lines(series, "matrix", "%") if series else "",
        f"<details><summary>The largest</summary><ul>{items}</ul></details>",
    ]


def _drawn(report: Report) -> list[str]:
    drawn = report.drawn
    if drawn is None:
        return []
    points = tuple(
        (float(t), 100 * s, f"first {t} tokens equal: {100 * s:.0f} % of images") for t, s in drawn.survival()
    )
    return [
        "<h2>Tokens until the first that differs</h2>",
        f'<p class="soft">{drawn.images} images drawn by both models with the same noise: the share whose first t '
        f"tokens are all equal. Median {drawn.median:g} of {drawn.n_tokens}; {drawn.identical} are identical. Rounding "
        "alone ends this curve sooner or later, so it has no limit.</p>",
        lines([Series("images", "s1", points)], "tokens", "% of images"),
    ]


def _frechet(report: Report) -> list[str]:
    found = report.frechet
    if found is None:
        return []
    pairs = (
        ("original, other seeds", found.other_seeds, "p1", "the original's images from its own with other seeds"),
        ("candidate, other seeds", found.distance, "p4", "the original's images from the candidate's with other seeds"),
        ("candidate, same seeds", found.same_seeds, "p5", "the original's images from the candidate's, same seeds"),
    )
    tip = f"95 % of random halves of the original's images are less than {found.floor_p95:.3g} apart"
    charted = [
        Bar(name, (Part(value, kind, tip_of),), f"{value:.3g}", found.floor_p95, tip)
        for name, value, kind, tip_of in pairs
        if np.isfinite(value)
    ]
    return [
        "<h2>Distance of generated sets</h2>",
        f'<p class="soft">Frechet distance of the original\'s images to other sets, {found.images} images each. '
        f"Features: {escape(found.features)}. They are not those of the published FID, and see colour, layout and "
        "roughness, hardly what an object is. The line: what chance alone makes of the original's own images.</p>",
        bars(charted, "distance"),
    ]


def _figures(report: Report) -> list[str]:
    head = ("what differs", "logits", "positions", "number", "same code", "mean KL", "95 %", "worst")
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(text)}</td>"
            for text in (
                COSTS[a.cost],
                "guided" if a.guided else "unguided",
                NAMES.get(a.where, a.where),
                f"{a.positions}",
                f"{100 * a.top1:.2f} %",
                f"{a.kl:.3g}",
                f"{a.kl_p95:.3g}",
                f"{a.kl_worst:.3g}",
            )
        )
        + "</tr>"
        for a in report.agreements
    )
    titles = "".join(f"<th>{text}</th>" for text in head)
    data = json.dumps(report.as_json(), allow_nan=False).replace("<", "\\u003c")
    return [
        f'<details><summary>All figures of given tokens ({len(report.agreements)})</summary><div class="scroll">'
        f"<table><tr>{titles}</tr>{body}</table></div></details>",
        f'<script type="application/json" id="report">{data}</script>',
    ]
