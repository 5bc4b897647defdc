"""An evaluation as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from par_calibration.evaluate.result import Comparison, Evaluation, Kept, Likelihood, Set
from par_runtime.bench.report.text import aligned

PHASES = ("prefill", "sequential", "transition", "group")


def lines(found: Evaluation) -> list[str]:
    """Every table that there is, with what its columns mean."""
    out: list[str] = []
    if found.likelihoods:
        out += [*_likelihoods(found.likelihoods), ""]
    if found.kept:
        out += [*_kept(found.kept), ""]
    if found.comparison is not None:
        out += [*_comparison(found.comparison), ""]
    return [*out, *(f"note: {note}" for note in found.notes)] if found.notes else out[:-1]


def _likelihoods(each: Sequence[Likelihood]) -> list[str]:
    head = ["bundle", "n", "calls", "images", "nats", "95 %", *PHASES, "from the first", "95 %", "hardest class"]
    body = []
    for one in each:
        worst = max(one.classes, key=lambda name: one.classes[name])
        body.append(
            [
                one.bundle,
                str(one.n),
                str(one.calls),
                str(one.images),
                f"{one.nats:.3f}",
                _between(one.low, one.high, ""),
                *(f"{one.phases[name]:.3f}" if name in one.phases else "" for name in PHASES),
                "" if one.change is None else f"{one.change:+.3f}",
                _between(one.change_low, one.change_high, "+"),
                f"{worst} {one.classes[worst]:.3f}" if len(one.classes) > 1 else "",
            ]
        )
    sources = dict.fromkeys(one.images_from for one in each)
    guess = ", ".join(f"{math.log(codes):.3f}" for codes in dict.fromkeys(one.codes for one in each))
    return [
        f"Likelihood of held-out images ({'; '.join(sources)}), in nats per token: less is better, guessing has "
        f"{guess}.",
        *aligned(head, body),
    ]


def _kept(each: Sequence[Kept]) -> list[str]:
    body = [
        [
            one.bundle,
            str(one.images),
            "equal" if one.psnr is None else f"{one.psnr:.2f} dB",
            f"{100 * one.codes_used:.0f} %",
        ]
        for one in each
    ]
    return ["What the tokenizer keeps of the pictures.", *aligned(["bundle", "images", "PSNR", "codes used"], body)]


def _comparison(c: Comparison) -> list[str]:
    head = ["images of", "", "guidance", "temperature", "top-k", "top-p", "images", "distance", "", "spread"]
    return [
        f"Images beside the held-out ones: Frechet distance in features of {c.features_of} (no FID; compare it within "
        "this table only).",
        f"Means of {c.draws} draws of {c.compared} images of both sides, without what few images add; the first row is "
        f"of held-out images and others of them. The held-out ones are {c.pixels}. +- holds at least 95 % of sets with "
        "other seeds.",
        *aligned(head, [_set(one) for one in (c.chance, *c.sets)]),
    ]


def _set(one: Set) -> list[str]:
    s = one.settings
    settings = ["", "", "", ""]
    if s is not None:
        drawn = ["greedy", "", ""] if s.greedy else [f"{s.temperature:g}", str(s.top_k), f"{s.top_p:g}"]
        until = "" if s.guidance_interval < 0 else f" to call {s.guidance_interval}"
        settings = [f"{s.guidance:g}{until}", *drawn]
    return [
        one.name,
        "",
        *settings,
        str(one.images),
        f"{one.distance:.4f}",
        f"+- {one.margin:.4f}",
        "" if one.spread is None else f"{one.spread:.2f}",
    ]


def _between(low: float | None, high: float | None, sign: str) -> str:
    return "" if low is None or high is None else f"{low:{sign}.3f} .. {high:{sign}.3f}"
