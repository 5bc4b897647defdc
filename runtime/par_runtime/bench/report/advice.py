"""A sentence about a subject's rows: which limit it runs into, and what would make it faster.

This is a simple rule, not a model of the machine. If a batch takes more than twice the bound, neither reading nor
calculating explains the time; the launches do, with small kernels that read little. Else the limit is that of the
bound: bandwidth or arithmetic, if one of them takes clearly longer. A subject that is faster than its bound shows that
the limits were measured too low, so nothing is concluded from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from par_runtime.bench.report.words import ms, share, speed
from par_runtime.bench.rows import ABOVE_BOUND, LIMITS_IN_DOUBT, Row, median
from par_runtime.bench.subjects.base import MODEL_PHASES

#: One limit is named where it takes this many times as long as the other; more where they are in doubt.
APART, APART_IN_DOUBT = 1.1, 1.5
#: Below this part of the bound a phase is called launch-bound, on a CPU bound by the cost of each call.
NEAR = 0.5
#: Of an image, the part from which it is worth while to decode faster.
DECODING = 0.1
#: The parts of a start in words, in their order, each after its share.
PARTS_OF_A_START = {
    "python": "are Python and its imports",
    "load": "loading the bundle",
    "selftest": "its self-test",
    "first_image": "the image",
}
#: For a CPU with several threads whose rows are marked busy.
FEWER_THREADS = (
    "Rows are marked busy: fewer threads than the free cores (--threads 1) may be faster then, because threads wait "
    "for each other in every phase."
)


@dataclass(frozen=True)
class Advice:
    """``text``: a sentence or two.

    ``kind``: "bandwidth-bound", "compute-bound", "near both limits", "launch-bound", "decoder-bound", "unknown" for
    a subject that is faster than the limits that were measured, or "start", which says what a start is made of.
    """

    label: str
    kind: str
    text: str


def advice(rows: Sequence[Row]) -> Advice | None:
    """The advice for the rows of one subject at one batch size; None without an image row, or without bounds.

    Of a start, what it is made of.
    """
    found = _of_start(rows) or _by_limit(rows)
    if found is not None:
        found = replace(found, text=f"{found.text}{_decode_in_bf16(rows)}")
    several = any("busy" in row.marks and row.device == "cpu" and (row.threads or 1) > 1 for row in rows)
    return replace(found, text=f"{found.text} {FEWER_THREADS}") if found is not None and several else found


def _decode_in_bf16(rows: Sequence[Row]) -> str:
    """A sentence where the decoder in C could compute in bf16, does not, and takes its time; else nothing."""
    by = {row.phase: row for row in rows}
    image, decoder = by.get("image"), by.get("decoder")
    if image is None or decoder is None or decoder.computes != "fp32" or not decoder.backend.startswith("native"):
        return ""
    part = part_of([decoder], image)
    if not decoder.decoder_bf16 or part < DECODING:
        return ""
    how = "dot products for it" if decoder.decoder_bf16 == "dots" else "AMX for it"
    how += " too" * ("amx" in image.version and decoder.decoder_bf16 == "amx")
    return (
        f" Decoding, {share(part)} of an image's time, is in fp32: --decoder-precision bf16 takes {how}, and "
        "'parvis calibrate' proves that it does no harm."
    )


def _of_start(rows: Sequence[Row]) -> Advice | None:
    """What the parts of a start are, and the share of each; None where the rows are of no start."""
    by = {row.phase: row for row in rows}
    if "start" not in by:
        return None
    start, first, second = by["start"], by["first_image"], by["image"]
    of_all = {part: sum(by[part].samples_ms) / sum(start.samples_ms) for part in PARTS_OF_A_START if part in by}
    parts = [f"{share(part)} {PARTS_OF_A_START[name]}" for name, part in of_all.items()]
    one = "image" if start.images == 1 else f"batch of {start.images} images"
    text = (
        f"{start.label}: of the {ms(start.median_ms)} until the first {one}, {', '.join(parts)}; the first {one} "
        f"{speed(first.median_ms, second.median_ms)} the second ({ms(first.median_ms)} against {ms(second.median_ms)})."
    )
    return Advice(start.label, "start", text)


def _by_limit(rows: Sequence[Row]) -> Advice | None:
    by = {row.phase: row for row in rows}
    image = by.get("image")
    steps = [by[name] for name in MODEL_PHASES if name in by and by[name].bound_ms]
    if image is None or not steps:
        return None
    took = sum(row.median_ms for row in steps)
    main = max(steps, key=lambda row: row.median_ms)
    reached = sum(row.bound_ms or 0.0 for row in steps) / took
    decoder, copy = by.get("decoder"), by.get("copy")
    what = (
        f"{image.label}: {share(part_of(steps, image))} of an image's time is the model's {image.calls} calls, "
        f"most of it {main.phase}"
    )
    if decoder is not None and decoder.median_ms > took:
        return Advice(
            image.label,
            "decoder-bound",
            f"{image.label}: {share(part_of([decoder], image))} of an image's time is its decoding, which a "
            "larger n does not shorten; decode in the background of the next batch, or take a smaller decoder.",
        )
    if copy is not None and copy.median_ms > 0.25 * image.median_ms:
        return Advice(
            image.label,
            "launch-bound",
            f"{image.label}: {share(part_of([copy], image))} of an image's time passes between calls, on the "
            "host; a larger batch or a larger n shares it among more tokens.",
        )
    if ABOVE_BOUND in main.marks or reached > 1:
        return Advice(
            image.label,
            "unknown",
            f"{what}, at {share(reached)} of the bound as measured: above it. The limit was measured too "
            "low, most likely while other processes ran, so no limit is named; run it again on a quiet machine.",
        )
    if reached < NEAR:
        held_up = ", unless other processes held it up" if "busy" in main.marks else ""
        limit = "bound by the cost of each call" if image.device == "cpu" else "launch-bound"  # a CPU launches nothing
        return Advice(
            image.label,
            "launch-bound",
            f"{what}, at {share(reached)} of the bound as measured: {limit}{held_up}; neither reading weights nor "
            f"multiplying explains the time. {_launch_levers(image)}",
        )
    start = f"{what}, at {share(reached)} of the bound as measured: "
    read_ms, multiply_ms = times_by_limit(main)
    if multiply_ms and max(read_ms, multiply_ms) < min(read_ms, multiply_ms) * _apart(main):
        calls = main.calls or 1
        doubt = " The limits are in doubt, so either may be the nearer one." if LIMITS_IN_DOUBT in main.marks else ""
        return Advice(
            image.label,
            "near both limits",
            f"{start}near both limits: a {main.phase} call needs at least {ms(read_ms / calls)} for "
            f"reading and {ms(multiply_ms / calls)} for multiplying.{doubt} Fewer bytes alone, or fewer operations "
            "alone, help little.",
        )
    kind = f"{main.bound_by}-bound"
    lever = _bandwidth_levers(image) if main.bound_by == "bandwidth" else _compute_levers(image)
    return Advice(image.label, kind, f"{start}{kind}. {lever}")


def part_of(rows: Sequence[Row], image: Row) -> float:
    """The part of an image's time that ``rows`` take: the median over repetitions, since medians do not add up."""
    if any(len(row.samples_ms) != len(image.samples_ms) for row in rows):
        return sum(row.median_ms for row in rows) / image.median_ms
    parts = [sum(times) for times in zip(*(row.samples_ms for row in rows), strict=True)]
    return median([part / whole for part, whole in zip(parts, image.samples_ms, strict=True)])


def times_by_limit(row: Row) -> tuple[float, float]:
    """The least time of a row by each of its limits, in ms: reading, and multiplying (0 where that peak is unknown)."""
    read_ms = (row.bytes or 0) / row.read_gb_s / 1e6 if row.read_gb_s else 0.0
    return read_ms, (row.operations or 0) / row.matrix_tflop_s / 1e9 if row.matrix_tflop_s else 0.0


def _apart(row: Row) -> float:
    """How many times the larger of two times must be the smaller one, for it to be the limit."""
    return APART_IN_DOUBT if LIMITS_IN_DOUBT in row.marks else APART


def _launch_levers(image: Row) -> str:
    if image.device == "cpu":
        return "A larger batch or a larger n does more per call; check that no other process shares the cores."
    return (
        "Capture a whole image as one graph (--capture image), and let 'parvis tune' choose the form with fewer "
        "kernels."
    )


def _bandwidth_levers(image: Row) -> str:
    more = "" if image.n >= 16 else f" a larger n than {image.n} makes fewer calls;"
    store = (
        "half precision or quantised weights are fewer bytes"
        if image.computes == "fp32"
        else "quantised weights are fewer bytes"
    )
    return f"Every call reads all weights:{more} a larger batch shares the reading; {store}."


def _compute_levers(image: Row) -> str:
    unguided = " images without guidance need half of it;" if image.guided else ""
    return (
        f"A larger batch gives hardly more throughput;{unguided} more cores, or arithmetic in fewer bits, would help."
    )
