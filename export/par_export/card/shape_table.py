"""What the report's page says of shapes of tiles: that which a build chooses beside the fastest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from par_export.card.findings import Findings
from par_export.card.lines import CALL
from par_export.card.markdown import table
from par_export.kernels.shape_sets import AS_BUILT
from par_runtime.bench.report.words import number, share
from par_runtime.bench.rows import median

Line = Mapping[str, Any]
#: A kernel that reads fewer bytes of weights is not held to the bandwidth: its time is that of its launch.
LEAST_BYTES = 2**20
ALL = "sum of these in a call"
#: What tells shapes apart, of products and of attention.
SHOWN = ("BN", "BK", "split", "columns", "block_rows", "depth", "span", "chunk", "warps", "stages", "held")


def shapes_table(runs: Sequence[Findings]) -> str:
    """A line for each kind of kernel of each model: what it takes as a build makes it, and in the shape that is the
    fastest of those that were tried for the smallest batch; and how that shape does in the largest.

    Of several runs the last counts.
    """
    lines = [cells for label, own, bandwidth in _subjects(runs) for cells in _of_subject(label, own, bandwidth)]
    columns = ("model", "kernel", "shapes tried", "us as built", "us in the fastest", "times as fast")
    return table((*columns, "in the largest batch", "the fastest, of its bound", "the fastest"), lines)


def calls_table(runs: Sequence[Findings]) -> str:
    """A line for each model and batch: what a whole call takes beside all of its kernels alone, what it takes in the
    best of the sets of other shapes, and where kernels follow each other differently.
    """
    lines, changed = list[list[str]](), list[str]()
    for label, own, _ in _subjects(runs):
        for images in dict.fromkeys(line["images"] for line in own):
            of_batch = [line for line in own if line["images"] == images]
            calls = [line for line in of_batch if line["kernel"] == CALL]
            by_words = {line["words"]: _us(line) for line in calls if line["words"]}
            built = by_words.pop(AS_BUILT, None)
            if built is None:
                continue
            changed += [words for words in by_words if words not in changed]
            alone = sum(_all_us(line) for line in of_batch if line["words"] == AS_BUILT and line["kernel"] != CALL)
            others = [min((_us(line) for line in calls if not line["words"]), default=None)]
            others += [by_words.get(words) for words in changed]
            lines.append([label, str(images), number(built), number(alone), *(_beside(us, built) for us in others)])
    columns = ("model", "batch", "us of a call", "of its kernels alone", "in the best set of other shapes", *changed)
    return table(columns, [line + [""] * (len(columns) - len(line)) for line in lines])


def _subjects(runs: Sequence[Findings]) -> list[tuple[str, list[Line], float | None]]:
    """Label, lines, and the bandwidth of their run, of each model; those of the last run that has it."""
    subjects: dict[str, tuple[list[Line], float | None]] = {}
    for run in runs:
        for label in dict.fromkeys(line["label"] for line in run.of("shape")):
            subjects[label] = [line for line in run.of("shape") if line["label"] == label], run.bandwidth
    return [(label, *found) for label, found in subjects.items()]


def _of_subject(label: str, own: Sequence[Line], bandwidth: float | None) -> list[tuple[str, ...]]:
    """The lines of one model, the last of which is about all of its kernels with shapes together."""
    small, large = min(line["images"] for line in own), max(line["images"] for line in own)
    shapes = [line for line in own if line["words"] in ("", AS_BUILT) and line["tile"]]
    kinds = dict.fromkeys(line["kernel"] for line in shapes)
    out, sums = list[tuple[str, ...]](), {small: [0.0, 0.0], large: [0.0, 0.0]}
    for kind in kinds:
        at = {(line["set"], line["images"]): line for line in shapes if line["kernel"] == kind}
        built, tried = at.get((0, small)), [line for (_, images), line in at.items() if images == small]
        if built is None:
            continue
        best = min(tried, key=_us)
        for images, total in sums.items():
            for i, one in enumerate((at.get((0, images)), at.get((best["set"], images)))):
                total[i] += _all_us(one) if one is not None else float("nan")
        bound = best["bytes"] / bandwidth / 1e3 if bandwidth and best["bytes"] >= LEAST_BYTES else None
        in_large = [at.get((one["set"], large)) for one in (built, best)]
        out.append(
            (
                label,
                kind,
                str(len(tried)),
                number(_us(built)),
                number(_us(best)),
                _times(_us(built), _us(best)),
                "" if large == small or None in in_large else _times(*(_us(one) for one in in_large if one)),
                "" if bound is None else share(bound / _us(best)),
                _words(best["tile"]),
            )
        )
    if len(out) == len(kinds) > 0:
        small_sum, large_sum = (_times(*sums[images]) for images in (small, large))
        us = (number(total) for total in sums[small])
        out.append((label, ALL, "", *us, small_sum, "" if large == small else large_sum, "", ""))
    return out


def _us(line: Line) -> float:
    return median(line["samples_us"])


def _all_us(line: Line) -> float:
    """Microseconds of all launches of a kernel in a call."""
    return float(line["count"] * _us(line))


def _times(slow: float, fast: float) -> str:
    """ "1.12 x"; "" where one was not measured."""
    return f"{slow / fast:.2f} x" if slow == slow and fast == fast else ""


def _beside(us: float | None, built: float) -> str:
    """ "225 (1.50 x)": microseconds, and how many times those as built; "" for None."""
    return "" if us is None else f"{number(us)} ({us / built:.2f} x)"


def _words(tile: Mapping[str, int]) -> str:
    """ "BN 64, BK 128, split 2, warps 4, stages 6, held 4"; nothing of what it does not hold."""
    return ", ".join(f"{name} {tile[name]}" for name in SHOWN if tile.get(name, 0))
