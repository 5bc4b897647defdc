"""Two runs of the benchmark against each other: rows paired, ratios with intervals.

A pair is the same measurement on the same kind of machine; commit, versions and dates may differ. The ratio is new
over old of the medians. Its interval is the middle 95 % of what resampling both sets of samples gives (bootstrap),
which is wide for five samples. A change is reported only if the interval does not contain 1. There is no verdict where
either side was measured on a busy or throttled machine: samples of one run that agree were then disturbed alike, and
identical code came out 9 times as fast. With few repetitions there is one only where the samples of the two sides do
not overlap. If either row is marked (busy, throttled, debug, few repetitions, estimated), the pair carries the mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from par_runtime.bench.report.text import aligned
from par_runtime.bench.report.words import counted, ms
from par_runtime.bench.rows import Row, ratio_interval

DISTURBED = ("busy", "throttled")  #: marks of rows that say nothing about the code


@dataclass(frozen=True)
class Pair:
    """``ratio``: new over old, below 1 is faster; ``low`` .. ``high`` its interval."""

    old: Row
    new: Row
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "faster", "slower", "same" where the interval holds 1, "too few samples" for one, or "no verdict"."""
        if not self.low and self.high == float("inf"):
            return "too few samples"
        if self.why_none:
            return "no verdict"
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"

    @property
    def why_none(self) -> str:
        """Why the samples carry no verdict: the mark that forbids one, or "" where they do."""
        marks = (*self.old.marks, *self.new.marks)
        disturbed = next((mark for mark in DISTURBED if mark in marks), "")
        few = "few repetitions" in marks and ranges_overlap(self.old.samples_ms, self.new.samples_ms)
        return disturbed or ("few repetitions" if few else "")

    @property
    def change(self) -> str:
        """The verdict in words, its ratio never below one: "takes 1.20 times as long", "busy: no verdict", "same"."""
        if self.verdict == "no verdict":
            return f"{self.why_none}: no verdict"
        if self.verdict == "slower":
            return f"takes {self.ratio:.2f} times as long"
        return f"{1 / self.ratio:.2f} times as fast" if self.verdict == "faster" else self.verdict

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks of either row, "other machine" if these differ, and "other bundle" if its content differs."""
        marks = [] if same_machine(self.old, self.new) else ["other machine"]
        marks += [] if self.old.hash == self.new.hash else ["other bundle"]
        return tuple(dict.fromkeys([*marks, *self.old.marks, *self.new.marks]))


@dataclass(frozen=True)
class Comparison:
    """Pairs in the order of the new rows; rows that only one side has, as text."""

    pairs: tuple[Pair, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]


def ranges_overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether some sample of one side lies within the range of the other."""
    return min(a) <= max(b) and min(b) <= max(a)


def same_machine(old: Row, new: Row) -> bool:
    """Whether two rows were measured on machines of the same CPU, cores and GPU."""
    a, b = old.machine, new.machine
    return (a.cpu, a.cores, a.gpu) == (b.cpu, b.cores, b.gpu)


#: Phases with the decoding of an image or a clip in them.
DECODING = ("decoder", "image", "throughput", "first_preview", "serve", "http", "first_image", "start")


def key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement.

    Open loads of the serve and http suites differ from run to run, so they are not in it.
    """
    return (
        row.suite, row.phase, row.label, row.bundle, row.model, row.n, row.grid, row.stored, row.computes,
        _decoded_in(row), row.images, row.guided, row.backend, row.device, row.threads, row.clients,
    )  # fmt: skip


def by_key(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    """Rows by key and number: of several rows with the same key, the i-th is paired with the i-th of the other file."""
    out: dict[tuple[object, ...], Row] = {}
    for row in rows:
        count = 0
        while (*key(row), count) in out:
            count += 1
        out[(*key(row), count)] = row
    return out


def compare(old: Sequence[Row], new: Sequence[Row], seed: int = 0) -> Comparison:
    """Pair the rows of two runs."""
    olds, news = by_key(old), by_key(new)
    random = np.random.default_rng(seed)
    pairs = tuple(pair(olds[name], row, random) for name, row in news.items() if name in olds)
    return Comparison(
        pairs,
        tuple(describe(row) for name, row in olds.items() if name not in news),
        tuple(describe(row) for name, row in news.items() if name not in olds),
    )


def pair(old: Row, new: Row, random: np.random.Generator) -> Pair:
    """The ratio of two rows and its interval."""
    return Pair(old, new, new.median_ms / old.median_ms, *ratio_interval(old.samples_ms, new.samples_ms, random))


def _decoded_in(row: Row) -> str:
    """What the decoder of a row computes in; "" where the row has no decoding in it."""
    return row.decoder_computes if row.phase in DECODING else ""


def describe(row: Row) -> str:
    """A row in a few words, with all that makes it another measurement than those beside it."""
    threads = "" if row.threads is None else f", {row.threads} thread{'s' if row.threads > 1 else ''}"
    decoded = ", decoded in bf16" if _decoded_in(row) == "bf16" else ""
    clients = "" if row.clients is None else f" of {counted(row.clients)}"
    return (
        f"{row.suite} {row.label} {row.phase}{clients}, {row.images} image{'s' if row.images > 1 else ''}"
        f"{'' if row.guided else ' unguided'}, {row.bundle} {row.stored} n = {row.n}, in {row.computes} by "
        f"{row.backend}{decoded}{threads}"
    )


def slower(comparison: Comparison, limit: float) -> list[str]:
    """The pairs with a verdict whose whole interval is above the ratio ``limit``, as text."""
    return [f"{describe(p.new)}: {p.ratio:.3f}" for p in comparison.pairs if not p.why_none and p.low > limit]


def without_verdict(comparison: Comparison) -> str:
    """How many pairs have no verdict because of how they were measured, and why; "" for none."""
    reasons = [p.why_none for p in comparison.pairs if p.verdict == "no verdict"]
    if not reasons:
        return ""
    why = ", ".join(dict.fromkeys(reasons))
    return (
        f"no verdict on {len(reasons)} of {len(comparison.pairs)} rows ({why}); measure both sides again on a quiet "
        "machine, with --repetitions 5 or more"
    )


def text(comparison: Comparison) -> str:
    """The comparison as a table."""
    head = ("", "phase", "images", "old", "new", "new/old", "95 %", "", "marks")
    body = [
        (
            p.new.label,
            p.new.phase if p.new.clients is None else f"{p.new.phase}, {counted(p.new.clients)}",
            str(p.new.images),
            ms(p.old.median_ms),
            ms(p.new.median_ms),
            f"{p.ratio:.3f}",
            f"{p.low:.3f} .. {p.high:.3f}",
            p.change,
            ", ".join(p.marks),
        )
        for p in comparison.pairs
    ]
    lines = aligned(head, body) if body else ["no row of one file has its pair in the other"]
    if comparison.pairs:
        commits = (comparison.pairs[0].old.commit, comparison.pairs[0].new.commit)
        kinds = ("" if commit.startswith("parvis ") else "commit " for commit in commits)
        old, new = (f"{kind}{commit}" for kind, commit in zip(kinds, commits, strict=True))
        lines = [f"old is of {old}, new of {new}; new/old below 1 is faster", *lines]
        other = next((p for p in comparison.pairs if not same_machine(p.old, p.new)), None)
        if other is not None:
            lines.insert(
                1,
                f"the old rows are of another machine ({other.old.machine.cpu}, {other.old.machine.cores} cores"
                f"{', ' + other.old.machine.gpu if other.old.machine.gpu else ''}): a ratio is of machines, not of "
                "versions",
            )
    withheld = without_verdict(comparison)
    lines += [withheld] if withheld else []
    lines += [f"only old  {name}" for name in comparison.only_old] + [
        f"only new  {name}" for name in comparison.only_new
    ]
    return "\n".join(lines)
