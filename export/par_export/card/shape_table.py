"""What the report's page says of shapes of tiles: that which a build chooses beside the fastest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from par_export.card.findings import Findings
from par_export.card.limits import COPY, READ
from par_export.card.markdown import table
from par_export.card.shape_sets import AS_BUILT, CALL
from par_runtime.bench.report.words import number, share
from par_runtime.bench.rows import median

Line = Mapping[str, Any]
#: A kernel that reads fewer bytes of weights is not held to the bandwidth: its time is that of its launch.
LEAST_BYTES = 2**20
ALL = "all of these in a call"
#: What tells shapes apart, of products and of attention.
SHOWN = ("BN", "BK", "split", "span", "chunk", "warps", "stages")


def shapes_table(runs: Sequence[Findings]) -> str:
    """A line for each kind of kernel of each model: what it takes as a build makes it, and in the shape that is the
    fastest of those that were tried for the smallest batch; and how that shape does in the largest.

    Of several runs the last counts.
    """
    lines = [cells for label, own, bandwidth in _subjects(runs) for cells in _of_subject(label, own, bandwidth)]
    columns = ("model", "kernel", "shapes tried", "us as built", "us in the fastest", "of its bound", "times as fast")
    return table((*columns, "in the largest batch", "the fastest"), lines)


def calls_table(runs: Sequence[Findings]) -> str:
    """A line for each model and batch: what a whole call takes beside all of its kernels alone, and what it takes where
    kernels follow each other differently.
    """
    lines, changed = list[tuple[str, ...]](), list[str]()
    for label, own, _ in _subjects(runs):
        for images in dict.fromkeys(line["images"] for line in own):
            calls = {line["words"]: _us(line) for line in own if (line["images"], line["kernel"]) == (images, CALL)}
            built = calls.pop(AS_BUILT, None)
            if built is None:
                continue
            changed += [words for words in calls if words and words not in changed]
            alone = [
                line["count"] * _us(line)
                for line in own
                if line["images"] == images and line["words"] == AS_BUILT and line["kernel"] != CALL
            ]
            others = [
                f"{number(calls[words])} ({_times(calls[words], built)})" if words in calls else "" for words in changed
            ]
            lines.append((label, str(images), number(built), number(sum(alone)), *others))
    columns = ("model", "batch", "us of a call", "of its kernels alone", *changed)
    return table(columns, [(*line, *[""] * (len(columns) - len(line))) for line in lines])


def _subjects(runs: Sequence[Findings]) -> list[tuple[str, list[Line], float | None]]:
    """Label, lines, and the bandwidth of their run, of each model; those of the last run that has it."""
    subjects: dict[str, tuple[list[Line], float | None]] = {}
    for run in runs:
        bandwidth = max((line["value"] for line in run.of("limit") if line["name"] in (COPY, READ)), default=None)
        for label in dict.fromkeys(line["label"] for line in run.of("shape")):
            subjects[label] = [line for line in run.of("shape") if line["label"] == label], bandwidth
    return [(label, *found) for label, found in subjects.items()]


def _of_subject(label: str, own: Sequence[Line], bandwidth: float | None) -> list[tuple[str, ...]]:
    """The lines of one model, the last of which is about all of its kernels together."""
    small, large = min(line["images"] for line in own), max(line["images"] for line in own)
    out, sums = list[tuple[str, ...]](), {small: [0.0, 0.0], large: [0.0, 0.0]}
    shapes = [line for line in own if line["words"] in ("", AS_BUILT) and line["kernel"] != CALL]
    kinds = dict.fromkeys(line["kernel"] for line in shapes)
    for kind in kinds:
        at = {(line["set"], line["images"]): line for line in shapes if line["kernel"] == kind}
        built, tried = at.get((0, small)), [line for (_, images), line in at.items() if images == small]
        if built is None:
            continue
        best = min(tried, key=_us)
        for images, total in sums.items():
            total[0] += at[0, images]["count"] * _us(at[0, images]) if (0, images) in at else float("nan")
            one = at.get((best["set"], images))
            total[1] += one["count"] * _us(one) if one is not None else float("nan")
        bound = best["bytes"] / bandwidth / 1e3 if bandwidth and best["bytes"] >= LEAST_BYTES else None
        in_large = [at.get((one["set"], large)) for one in (built, best)]
        out.append(
            (
                label,
                kind,
                str(len(tried)),
                number(_us(built)),
                number(_us(best)),
                "" if bound is None else share(bound / _us(best)),
                _times(_us(built), _us(best)),
                "" if large == small or None in in_large else _times(*(_us(one) for one in in_large if one)),
                _words(best["tile"]),
            )
        )
    if len(out) == len(kinds):
        times = [_times(*sums[images]) for images in (small, large)]
        calls = (number(total) for total in sums[small])
        out.append((label, ALL, "", *calls, "", times[0], "" if large == small else times[1], ""))
    return out


def _us(line: Line) -> float:
    return median(line["samples_us"])


def _times(slow: float, fast: float) -> str:
    """ "1.12 x"; "" where one was not measured."""
    return f"{slow / fast:.2f} x" if slow == slow and fast == fast else ""


def _words(tile: Mapping[str, int]) -> str:
    """ "BN 64, BK 128, split 2, warps 4, stages 6"."""
    return ", ".join(f"{name} {tile[name]}" for name in SHOWN if name in tile)
