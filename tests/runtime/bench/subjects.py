"""Subjects with a script instead of a model, for what the bench does with what it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from par_runtime.bench.bounds import with_bounds
from par_runtime.bench.limits import Limits
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Repetitions, Setting, make_row, phase_rows
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Sample, SubjectInfo, spread_calls
from par_runtime.cost.architecture import named_architecture

MACHINE = Machine("a CPU", 2, 2**25, 2**34, "an OS", 3000.0, "", "", None, None, None)


def subject_info(label: str = "parvis", n: int = 4, **changes: Any) -> SubjectInfo:
    """PAR-L without a decoder."""
    known: dict[str, Any] = {
        "label": label,
        "bundle": f"L-n{n}",
        "hash": "0123456789abcdef",
        "model": "PAR-L",
        "parameters": 342_914_048,
        "n": n,
        "grid": (1, 24, 24),
        "precision": "fp32",
        "computes": "fp32",
        "weight_bytes": 4.0,
        "cache_bytes": 4.0,
        "backend": "onnxruntime-cpu",
        "version": "1.32.0",
        "device": "cpu",
        "threads": 2,
        "architecture": named_architecture("PAR-L", n),
        "sampling": "guidance 4",
    }
    return SubjectInfo(**(known | changes))


@dataclass
class Scripted:
    """Every call takes ``call_ms`` of its phase; repetition i takes ``drift[i]`` times as long."""

    info: SubjectInfo
    call_ms: Mapping[str, float] = field(
        default_factory=lambda: {"prefill": 1.0, "sequential": 1.0, "transition": 2.0, "group": 2.0}
    )
    drift: Sequence[float] = (1.0,)
    made: list[tuple[int, bool, int | None]] = field(default_factory=list)
    out_of_memory_from: int = 10**6

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        if images >= self.out_of_memory_from:
            raise MemoryError(f"{images} images")
        times = self.drift[len(self.made) % len(self.drift)] * (1 + images) / 2
        self.made.append((images, guided, most_calls))
        chosen = spread_calls(self.info.architecture.phases, most_calls)
        calls_ms: dict[str, list[float]] = {}
        index = 0
        for phase in self.info.architecture.phases:
            for _ in range(phase.repeat):
                if chosen is None or index in chosen:
                    calls_ms.setdefault(phase.name, []).append(times * self.call_ms[phase.name])
                index += 1
        calls_ms["copy"] = [0.5]
        return Sample(calls_ms, sum(map(sum, calls_ms.values())), 10**9, chosen is not None)

    def close(self) -> None:
        self.made.clear()


def rows_from(subject: Scripted, repetitions: int = 5, suite: str = "phases", **setting: Any) -> list[Row]:
    """Rows of a scripted subject."""
    repetitions_ = Repetitions([subject.run(1, True) for _ in range(repetitions)], [()] * repetitions)
    return phase_rows(subject, repetitions_, Setting(suite, repetitions=repetitions, **setting), MACHINE)


def one_row(samples_ms: Sequence[float], label: str = "parvis", phase: str = "image", **changes: Any) -> Row:
    """A row with these samples."""
    return make_row(subject_info(label, **changes), Setting("phases"), MACHINE, phase, samples_ms)


HOW = "measured: by hand"


def against(gb_s: float, tflop_s: float, call_ms: float, doubt: str = "", **changes: object) -> list[Row]:
    """PAR-L's rows where every call takes ``call_ms``, on a device of these limits."""
    its = subject_info(**changes)  # type: ignore[arg-type]
    subject = Scripted(its, dict.fromkeys(("prefill", "sequential", "transition", "group"), call_ms))
    limits = Limits(((2**30, gb_s),), tflop_s, HOW, doubt)
    return with_bounds(rows_from(subject), {its.label: its}, {2: limits})
