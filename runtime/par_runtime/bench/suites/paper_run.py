"""Running the paper's models within so many minutes: what fits, how much of each image, and what is left out.

Models are tried from the smallest up. One that would not fit into the time that is left, into memory or onto the disk is
left out with that reason. The time of a model is shared among its subjects, n = 1, 4 and 16 on our engine and in eager
PyTorch: short images are made whole, of long ones (n = 1 in PyTorch takes minutes) so many calls as the share allows.
Where memory holds all subjects at once they run in turns, else one after the other, and their rows say so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from par_runtime import system
from par_runtime.backends.choose import CPUS
from par_runtime.bench import machine
from par_runtime.bench.limits import Limits
from par_runtime.bench.measure import Say, Setting, image_ms, rows_of, turns
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Facts
from par_runtime.bench.subjects.eager import found
from par_runtime.bench.subjects.process import Apart, open_bundle, open_eager
from par_runtime.bench.suites.paper import PUBLISHED, VIDEO, shape_of
from par_runtime.cost import bound
from par_runtime.cost.decoder import decoder_work
from par_runtime.errors import RequestError

GROUP_SIZES = (1, 4, 16)
FEWEST_CALLS = 8  #: of an image that is estimated
LEAST_REPETITIONS = 3
#: Guesses of what a new model costs, on the careful side; the first model corrects them.
WRITE_S_PER_GB, LOAD_S_PER_GB = 8.0, 2.5
OURS_OF_BOUND, EAGER_OF_BOUND, DECODER_OF_BOUND = 0.5, 0.2, 0.4
UNKNOWN_TFLOP_S = 20.0  #: of a GPU that no data sheet here describes; decides only what fits the time
#: Memory of a process besides its weights.
OVERHEAD_BYTES = 700 * 10**6
MEMORY_SHARE = 0.85
VQ16 = {
    "channels": 128,
    "channel_multipliers": (1, 1, 2, 2, 4),
    "codebook_dim": 8,
    "z_channels": 256,
    "res_blocks": 2,
}  #: the decoder of the image models, as a manifest describes it


@dataclass(frozen=True)
class Options:
    """``minutes`` for all; ``sizes``: models in order; ``given``: (model, n) -> a bundle to take instead of a random one."""

    minutes: float
    sizes: Sequence[str]
    work: Path
    eager: bool = True
    device: str = "cpu"
    threads: int | None = None
    given: Mapping[tuple[str, int], Path] | None = None


def run(
    setting: Setting, limits: Limits, options: Options, say: Say
) -> tuple[list[Row], dict[str, Facts], dict[str, str]]:
    """Rows of everything that fitted, facts by label, and model -> reason for what did not.

    Raises RequestError without 'export'.
    """
    publish: Callable[..., dict[int, Path]] = found("par_export.random_bundle", "the paper suite", "published")
    until = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    facts: dict[str, Facts] = {}
    left_out: dict[str, str] = {}
    for place, model in enumerate(options.sizes):
        left = until - time.monotonic()
        why = too_much(model, left, limits, options)
        if why is not None:
            say(f"{model}: left out, {why}")
            left_out[model] = why
            continue
        # Half for this model while others may follow: they are twice as large each.
        share = left if place == len(options.sizes) - 1 else left / 2
        say(f"{model}: {share / 60:.1f} minutes")
        folder = options.work / model
        try:
            rows += one_model(model, publish, folder, setting, replace(options, minutes=share / 60), facts, say)
        except MemoryError as error:
            left_out[model] = f"memory: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return rows, facts, left_out


def one_model(
    model: str,
    publish: Callable[..., dict[int, Path]],
    folder: Path,
    setting: Setting,
    options: Options,
    facts: dict[str, Facts],
    say: Say,
) -> list[Row]:
    """The rows of one model at every n, ours and eager; what they are of goes into ``facts``."""
    until = time.monotonic() + 60 * options.minutes
    given = options.given or {}
    missing = [n for n in GROUP_SIZES if (model, n) not in given]
    say(f"{model}: writing random weights")
    on_cpu = options.device in CPUS
    made = publish(model, missing, folder, precision="fp32" if on_cpu else "fp16") if missing else {}
    if not on_cpu:
        build: Callable[[list[str]], int] = found("par_export.cli.build", "engines for the paper suite", "main")
        for path in made.values():
            if build([str(path), "--target", "local", "--max-images", "1", "--quiet"]):
                raise RequestError(f"no engine could be built for {model}; --device cpu runs the suite without")
    paths = made | {n: path for (name, n), path in given.items() if name == model}

    def opened(n: int, eager: bool) -> Apart:
        label = f"{model.removeprefix('PAR-')} n={n}" + (" eager" if eager else "")
        say(f"{label}: loading")
        if eager:
            return open_eager(paths[n], label, threads=options.threads, device="cpu" if on_cpu else "cuda")
        return open_bundle(
            paths[n], label, device=options.device, threads=options.threads, selftest=(model, n) in given
        )

    whose = [(n, eager) for eager in ((False, True) if options.eager else (False,)) for n in GROUP_SIZES]
    rows: list[Row] = []
    groups = grouped(whose, process_bytes(model), system.available_bytes())
    done = 0
    for group in groups:
        with ExitStack() as held:
            subjects = []
            for n, eager in group:
                subjects.append(opened(n, eager))
                held.callback(subjects[-1].close)
                facts[subjects[-1].facts.label] = subjects[-1].facts
            left = (until - time.monotonic()) * len(group) / (len(whose) - done)
            found_rows = measured(subjects, setting, left, say)
        done += len(group)
        if len(groups) > 1:
            note = f"not in turns: memory holds {len(group)} of the model's {len(whose)} subjects at a time"
            found_rows = [replace(row, flags=(*row.flags, note)) for row in found_rows]
        rows += found_rows
    return rows


def grouped(
    whose: Sequence[tuple[int, bool]], each_bytes: float, free_bytes: int | None
) -> list[list[tuple[int, bool]]]:
    """Subjects, (n, in PyTorch), that are measured in turns: all, or ours and PyTorch's apart, or each alone, as memory allows."""

    def fit(count: int) -> bool:
        return free_bytes is None or count * each_bytes < MEMORY_SHARE * free_bytes

    if fit(len(whose)):
        return [list(whose)]
    if fit(len(GROUP_SIZES)):
        apart = [[one for one in whose if one[1] is eager] for eager in (False, True)]
        return [group for group in apart if group]
    return [[one] for one in whose]


def measured(subjects: Sequence[Apart], setting: Setting, seconds: float, say: Say) -> list[Row]:
    """Rows of ``subjects`` in turns within about ``seconds``."""
    began = time.monotonic()
    first = {}
    for subject in subjects:
        say(f"{subject.facts.label}: warming up")
        subject.run(setting.images, setting.guided, FEWEST_CALLS)  # the very first calls are several times as slow
        first[subject.facts.label] = subject.run(setting.images, setting.guided, FEWEST_CALLS)
    left = seconds - (time.monotonic() - began)
    whole = {s.facts.label: image_ms(first[s.facts.label], s.facts) / 1e3 for s in subjects}
    least = {label: sample.image_ms / 1e3 for label, sample in first.items()}
    repetitions = max(LEAST_REPETITIONS, min(setting.repetitions, int(left / max(sum(least.values()), 1e-3))))
    shares = poured(whole, left / repetitions)
    calls = {}
    for subject in subjects:
        label = subject.facts.label
        if shares[label] < whole[label]:
            others = sum(sum(v) for name, v in first[label].calls_ms.items() if name in ("decoder", "copy")) / 1e3
            each = max(whole[label] - others, 1e-6) / subject.facts.shape.calls
            calls[label] = max(FEWEST_CALLS, int((shares[label] - others) / each))
    here = replace(setting, repetitions=repetitions, most_calls=calls)
    taken = turns(subjects, here, say)
    where = machine.facts(setting.gpu)
    return [row for subject, got in zip(subjects, taken, strict=True) for row in rows_of(subject, got, here, where)]


def poured(wanted: Mapping[str, float], total: float) -> dict[str, float]:
    """``total`` shared out so that nobody gets more than wanted, and what small ones leave goes to the others."""
    out: dict[str, float] = {}
    for i, (name, want) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        out[name] = min(want, max(0.0, total - sum(out.values())) / (len(wanted) - i))
    return out


def process_bytes(model: str) -> float:
    """Memory of one subject: its weights in fp32, and the rest."""
    return weight_bytes(model) * 1.1 + OVERHEAD_BYTES


def weight_bytes(model: str) -> float:
    """All weights of a model of the paper in fp32, the embedding and the decoder included."""
    shape = shape_of(next(p for p in PUBLISHED if p.model == model))
    decoder = 0 if model == VIDEO else decoder_work(VQ16, (1, 24, 24))[0]
    return 4.0 * (bound.step_parameters(shape) + shape.dim * (shape.vocab_size + 1001) + decoder)


def too_much(model: str, seconds: float, limits: Limits, options: Options) -> str | None:
    """Why ``model`` does not fit into ``seconds``, memory or the disk; None where it does."""
    size = weight_bytes(model)
    free = system.available_bytes()
    if free is not None and process_bytes(model) > MEMORY_SHARE * free:
        return f"memory: one process takes about {process_bytes(model) / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    disk = shutil.disk_usage(options.work).free
    if size * 1.1 > disk:
        return f"disk: its weights take {size / 1e9:.0f} GB, {disk / 1e9:.0f} GB are free in the work folder"
    needed = least_seconds(model, limits, options.eager)
    if needed > seconds:
        return f"time: needs about {needed / 60:.0f} minutes, {max(0.0, seconds) / 60:.1f} were left"
    return None


def least_seconds(model: str, limits: Limits, eager: bool) -> float:
    """About what the shortest useful run of a model takes: writing, loading, three estimates of every subject."""
    size_gb = weight_bytes(model) / 1e9
    subjects = len(GROUP_SIZES) * (2 if eager else 1)
    total = size_gb * (WRITE_S_PER_GB + subjects * LOAD_S_PER_GB)
    decoder_s = 0.0
    if model != VIDEO:
        decoder_s = (
            decoder_work(VQ16, (1, 24, 24))[1] / ((limits.matrix_tflop_s or UNKNOWN_TFLOP_S) * DECODER_OF_BOUND) / 1e12
        )
    for n in GROUP_SIZES:
        shape = shape_of(next(p for p in PUBLISHED if p.model == model and p.n in (n, 1)))
        shape = replace(shape, phases=bound.phases_of(n, shape.n_tokens))
        calls = bound.all_calls(shape, 1, True, 4.0, 4.0)
        call_s = bound.bound(calls, limits.read_gb_s(calls[-1].bytes), limits.matrix_tflop_s).ms / 1e3 / len(calls)
        for share in (OURS_OF_BOUND, *((EAGER_OF_BOUND,) if eager else ())):
            total += (LEAST_REPETITIONS + 1) * (FEWEST_CALLS * call_s / share + decoder_s)
    return total
