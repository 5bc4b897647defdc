"""Running the paper's models within a given time: which models fit, how much of each image is made, what is left out.

Models are tried from the smallest up, images before video. A model that does not fit into the time that is left, into
memory or onto the disk is left out with that reason, and no model gets the time that the next ones need at least.
Nothing is begun that would not end in time, judged by guesses first, then by how long the same work has taken in this
run. The time of a model is shared among its subjects: n = 1, 4 and 16 on our backend, then in eager PyTorch. Short
images are made whole; of long ones (n = 1 in PyTorch takes minutes) only as many calls as the share allows. If memory
holds all subjects at once they run in turns, else one group after the other, and their rows are marked.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from par_runtime import system
from par_runtime.backends.choose import CPUS
from par_runtime.bench.bounds import BETWEEN_TIMES
from par_runtime.bench.limits import Limits
from par_runtime.bench.measure import Progress, Setting, attempt, image_ms, rows_in_turns
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import OutOfTimeError, Sample, SubjectInfo
from par_runtime.bench.subjects.baselines import optional
from par_runtime.bench.subjects.process import SubjectProcess, open_bundle, open_eager
from par_runtime.bench.suites.paper import PUBLISHED, SIZES, VIDEO, architecture_of
from par_runtime.bundle import Bundle
from par_runtime.cost.architecture import Architecture, model_name, phases_of
from par_runtime.cost.bound import bound
from par_runtime.cost.decoder import count_decoder
from par_runtime.cost.work import image_work
from par_runtime.errors import RequestError

GROUP_SIZES = (1, 4, 16)
FEWEST_CALLS = 8  #: of an image that is estimated
LEAST_REPETITIONS = 3
WARM_UPS = 2  #: the very first calls are several times as slow; the second time is the one that counts
GRACE_S = 15.0  #: after the end of the run a subject that is still at work is killed
LEAST_PACE = 0.5  #: a model is never expected to need less than this part of the guesses
#: Cautious guesses of the time that a model takes: seconds to write and to load a gigabyte, and the share of the bound
#: that is reached.
WRITE_S_PER_GB, LOAD_S_PER_GB = 8.0, 2.5
OURS_OF_BOUND, EAGER_OF_BOUND, DECODER_OF_BOUND = 0.5, 0.2, 0.4
UNKNOWN_TFLOP_S = 20.0  #: assumed for a GPU without a data sheet; it only decides which models fit into the time
#: Memory of a process besides its weights.
OVERHEAD_BYTES = 700 * 10**6
MEMORY_SHARE = 0.85  #: of free memory, that the subjects of a group may take
VQ16 = {
    "channels": 128,
    "channel_multipliers": (1, 1, 2, 2, 4),
    "codebook_dim": 8,
    "z_channels": 256,
    "res_blocks": 2,
}  #: the decoder of the image models, as a manifest describes it


@dataclass
class Pace:
    """How many times as long as guessed the latest work of each kind took."""

    writing: float = 1.0
    ours: float = 1.0
    eager: float | None = None

    def of(self, eager: bool) -> float:
        """That of a subject."""
        return self.ours if self.eager is None or not eager else self.eager

    def learn(self, eager: bool, seconds: float, guessed: float) -> None:
        """A subject took ``seconds`` to start. PyTorch's are expected to be like ours until there is one."""
        if eager:
            self.eager = max(LEAST_PACE, seconds / guessed)
        else:
            self.ours = max(LEAST_PACE, seconds / guessed)


@dataclass(frozen=True)
class PaperOptions:
    """``minutes`` for all; ``sizes``: models in order; ``work``: a folder for bundles of random weights.

    ``given``: (model, n) -> a bundle to take instead of one of random weights. ``end``: of the whole run, by
    ``time.monotonic``. ``limits`` and ``pace``: what guesses are made of.
    """

    minutes: float
    sizes: Sequence[str]
    work: Path
    eager: bool = True
    device: str = "cpu"
    threads: int | None = None
    given: Mapping[tuple[str, int], Path] | None = None
    end: float = math.inf
    limits: Limits | None = None
    pace: Pace = field(default_factory=Pace)


def given_bundles(paths: Sequence[Path]) -> dict[tuple[str, int], Path]:
    """(model, n) -> the bundle of ``paths`` that has it. Raises RequestError for one that is in no row of the paper."""
    given: dict[tuple[str, int], Path] = {}
    for path in paths:
        bundle = Bundle.open(path, "none")
        architecture = Architecture.of_model(bundle.model, bundle.phases)
        model = VIDEO if bundle.grid[0] > 1 else model_name(architecture)
        if model not in SIZES or bundle.group_size not in GROUP_SIZES:
            raise RequestError(
                f"{path}: {model}, n = {bundle.group_size}, is in no row of the paper's tables; expected one of "
                f"{', '.join(SIZES)} with n = 1, 4 or 16; --suite phases measures any bundle"
            )
        if (model, bundle.group_size) in given:
            raise RequestError(
                f"{path} and {given[model, bundle.group_size]} are both {model}, n = {bundle.group_size}; the paper's "
                "tables have one row for it: give one of them"
            )
        given[model, bundle.group_size] = path
    return given


def run(
    setting: Setting,
    limits: Limits,
    options: PaperOptions,
    progress: Progress,
    infos: dict[str, SubjectInfo],
    left_out: dict[str, str],
) -> list[Row]:
    """The rows of all models that fit.

    ``infos`` gets the info of each subject by label, ``left_out`` the reason of each model, or "model n=N", that was
    not measured. Raises RequestError without the 'export' extra.
    """
    publish: Callable[..., dict[int, Path]] = optional("par_export.random_bundle", "the paper suite", "write_published")
    until = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    left_out |= dict.fromkeys(options.sizes, "the run was stopped before it")
    options = replace(options, sizes=[model for model in SIZES if model in options.sizes], limits=limits)
    for place, model in enumerate(options.sizes):
        left = until - time.monotonic()
        planned, out = plan(options.sizes[place:], left, limits, options)
        if model in out:
            progress(f"{model}: left out, {out[model]}")
            left_out[model] = out[model]
            continue
        share = planned[model] + max(0.0, left - sum(planned.values())) / len(planned)
        progress(f"{model}: {share / 60:.1f} minutes")
        folder = options.work / model
        try:
            rows += measure_model(
                model, publish, folder, setting, replace(options, minutes=share / 60), infos, left_out, progress
            )
            del left_out[model]
        except MemoryError as error:
            left_out[model] = f"memory: {error}"
        except OutOfTimeError as error:
            left_out[model] = f"time: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def plan(
    sizes: Sequence[str], seconds: float, limits: Limits, options: PaperOptions
) -> tuple[dict[str, float], dict[str, str]]:
    """Which of ``sizes`` fit into ``seconds`` together: (model -> its least seconds, model -> why it is left out).

    Video does not take the place of an image model that needs about as much.
    """
    planned: dict[str, float] = {}
    out: dict[str, str] = {}
    for model in sizes:
        why = reason_to_leave_out(model, seconds - sum(planned.values()), limits, options)
        if why is None and model == VIDEO:
            smaller = [
                one for one in out if weight_bytes(one) < 1.25 * weight_bytes(VIDEO) and out[one].startswith("time")
            ]
            why = f"time: {smaller[0]}, whose images come first, did not fit either" if smaller else None
        if why is None:
            left = seconds - sum(planned.values())
            planned[model] = min(left, least_seconds(model, limits, options.eager, options.pace))
        else:
            out[model] = why
    return planned, out


def measure_model(
    model: str,
    publish: Callable[..., dict[int, Path]],
    folder: Path,
    setting: Setting,
    options: PaperOptions,
    infos: dict[str, SubjectInfo],
    left_out: dict[str, str],
    progress: Progress,
) -> list[Row]:
    """The rows of one model at every n, ours and eager; ``infos`` and ``left_out`` as in :func:`run`."""
    until = time.monotonic() + 60 * options.minutes
    given = options.given or {}
    missing = [n for n in GROUP_SIZES if (model, n) not in given]
    progress(f"{model}: writing random weights")
    pace, limits = options.pace, options.limits
    began = time.monotonic()
    on_cpu = options.device in CPUS
    made = publish(model, missing, folder, precision="fp32" if on_cpu else "fp16") if missing else {}
    if not on_cpu:
        build: Callable[[list[str]], int] = optional("par_export.cli.build", "engines for the paper suite", "main")
        for path in made.values():
            if build([str(path), "--target", "local", "--max-images", "1", "--quiet"]):
                raise RequestError(f"no engine could be built for {model}; --device cpu runs the suite without")
    if made:
        pace.writing = max(LEAST_PACE, (time.monotonic() - began) / (weight_bytes(model) / 1e9 * WRITE_S_PER_GB))
    paths = made | {n: path for (name, n), path in given.items() if name == model}

    def open_subject(n: int, eager: bool) -> SubjectProcess:
        label = f"{model.removeprefix('PAR-')} n={n}" + (" eager" if eager else "")
        progress(f"{label}: loading")
        end = options.end + GRACE_S
        if eager:
            return open_eager(paths[n], label, threads=options.threads, device="cpu" if on_cpu else "cuda", end=end)
        return open_bundle(
            paths[n], label, device=options.device, threads=options.threads, selftest=(model, n) in given, end=end
        )

    variants = [(n, eager) for eager in ((False, True) if options.eager else (False,)) for n in GROUP_SIZES]
    rows: list[Row] = []
    groups = group_variants(variants, process_bytes(model), system.available_bytes())
    done = 0
    for group in groups:
        with ExitStack() as held:
            subjects: list[SubjectProcess] = []
            first: dict[str, Sample] = {}
            for n, eager in group:
                # What those before it need at least, and what it needs itself.
                start_s, image_s = (0.0, 0.0) if limits is None else guessed_seconds(model, n, eager, limits)
                needed = LEAST_REPETITIONS * sum(sample.image_ms for sample in first.values()) / 1e3
                needed += (start_s + LEAST_REPETITIONS * image_s) * pace.of(eager)
                began = time.monotonic()
                name = f"{model} n={n}{' eager' if eager else ''}"
                if began + needed > until:
                    left_out[name] = f"time: needs about {needed:.0f} s, {max(0.0, until - began):.0f} s were left"
                    continue
                try:
                    subject = open_subject(n, eager)
                    held.callback(subject.close)
                    infos[subject.info.label] = subject.info
                    warm = warm_up(subject, [*subjects, subject], setting, progress)
                except OutOfTimeError as error:
                    left_out[name] = f"time: {error}"
                    continue
                subjects.append(subject)
                if warm is not None:
                    first[subject.info.label] = warm
                if start_s:
                    pace.learn(eager, time.monotonic() - began, start_s)
            left = (until - time.monotonic()) * len(group) / (len(variants) - done)
            in_time = replace(setting, until=until)
            group_rows = measure_within(subjects, in_time, left, progress, first) if first else []
            labels = {row.label for row in group_rows}
            for subject in subjects:
                label, name = subject.info.label, f"{model} n={subject.info.n}{' eager' * subject.info.pytorch}"
                if label in setting.failed:
                    left_out[name] = f"failed: {setting.failed[label]}"
                elif label not in labels:
                    left_out[name] = "time: no repetition would have ended in time"
        done += len(group)
        if len(groups) > 1:
            note = f"not in turns: memory holds {len(group)} of the model's {len(variants)} subjects at a time"
            group_rows = [replace(row, flags=(*row.flags, note)) for row in group_rows]
        rows += group_rows
    return rows


def group_variants(
    variants: Sequence[tuple[int, bool]], each_bytes: float, free_bytes: int | None
) -> list[list[tuple[int, bool]]]:
    """The variants (n, in PyTorch) of a model in groups that are measured in turns, as many at once as memory allows.

    One group of all, or one of ours and one of PyTorch's, or each variant alone.
    """

    def fit(count: int) -> bool:
        return free_bytes is None or count * each_bytes < MEMORY_SHARE * free_bytes

    if fit(len(variants)):
        return [list(variants)]
    if fit(len(GROUP_SIZES)):
        halves = [[one for one in variants if one[1] is eager] for eager in (False, True)]
        return [group for group in halves if group]
    return [[one] for one in variants]


def warm_up(
    subject: SubjectProcess, others: Sequence[SubjectProcess], setting: Setting, progress: Progress
) -> Sample | None:
    """The last of :data:`WARM_UPS` short images; None if the subject failed and one of ``others`` has not."""
    progress(f"{subject.info.label}: warming up")
    short = partial(subject.run, setting.images, setting.guided, FEWEST_CALLS)
    return [attempt(subject, others, setting, short) for _ in range(WARM_UPS)][-1]


def measure_within(
    subjects: Sequence[SubjectProcess],
    setting: Setting,
    seconds: float,
    progress: Progress,
    first: Mapping[str, Sample],
) -> list[Row]:
    """Rows of ``subjects`` in turns within about ``seconds``; ``first``: the warm-up of each that has not failed."""
    subjects = [subject for subject in subjects if subject.info.label in first]
    left = seconds * BETWEEN_TIMES / (BETWEEN_TIMES + 1)  # the rest is for the limits, between the repetitions
    whole = {s.info.label: image_ms(first[s.info.label], s.info) / 1e3 for s in subjects}
    least = {label: sample.image_ms / 1e3 for label, sample in first.items()}
    repetitions = max(LEAST_REPETITIONS, min(setting.repetitions, int(left / max(sum(least.values()), 1e-3))))
    shares = share_time(whole, left / repetitions)
    calls = {}
    for subject in subjects:
        label = subject.info.label
        if shares[label] < whole[label]:
            others = sum(sum(v) for name, v in first[label].calls_ms.items() if name in ("decoder", "copy")) / 1e3
            each = max(whole[label] - others, 1e-6) / subject.info.architecture.calls
            calls[label] = max(FEWEST_CALLS, int((shares[label] - others) / each))
    return rows_in_turns(subjects, replace(setting, repetitions=repetitions, most_calls=calls), progress)


def share_time(wanted: Mapping[str, float], total: float) -> dict[str, float]:
    """``total`` shared equally, except that none gets more than it wants; the remainder goes to the others."""
    out: dict[str, float] = {}
    for i, (name, want) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        out[name] = min(want, max(0.0, total - sum(out.values())) / (len(wanted) - i))
    return out


def process_bytes(model: str) -> float:
    """Memory of the process of one subject: its weights in fp32, and :data:`OVERHEAD_BYTES`."""
    return weight_bytes(model) * 1.1 + OVERHEAD_BYTES


def weight_bytes(model: str) -> float:
    """All weights of a model of the paper in fp32, the embedding and the decoder included."""
    a = architecture_of(next(p for p in PUBLISHED if p.model == model))
    decoder = 0 if model == VIDEO else count_decoder(VQ16, (1, 24, 24))[0]
    return 4.0 * (a.step_parameters + a.dim * (a.vocab_size + 1001) + decoder)


def reason_to_leave_out(model: str, seconds: float, limits: Limits, options: PaperOptions) -> str | None:
    """Why ``model`` does not fit into ``seconds``, memory or the disk; None if it does."""
    size = weight_bytes(model)
    free = system.available_bytes()
    if free is not None and process_bytes(model) > MEMORY_SHARE * free:
        return f"memory: one process takes about {process_bytes(model) / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    disk = shutil.disk_usage(options.work).free
    if size * 1.1 > disk:
        return f"disk: its weights take {size / 1e9:.0f} GB, {disk / 1e9:.0f} GB are free in the work folder"
    needed = least_seconds(model, limits, False, options.pace)  # PyTorch's side is left out alone where it does not fit
    if needed > seconds:
        return f"time: needs about {math.ceil(needed / 60)} minutes, {max(0.0, seconds) / 60:.1f} were left"
    return None


def least_seconds(model: str, limits: Limits, eager: bool, pace: Pace) -> float:
    """About how long the shortest useful run of a model takes: writing, loading, a few repetitions of every subject."""
    total = weight_bytes(model) / 1e9 * WRITE_S_PER_GB * pace.writing
    for n in GROUP_SIZES:
        for in_pytorch in (False, True) if eager else (False,):
            start_s, image_s = guessed_seconds(model, n, in_pytorch, limits)
            total += (start_s + LEAST_REPETITIONS * image_s) * pace.of(in_pytorch)
    return total


def guessed_seconds(model: str, n: int, eager: bool, limits: Limits) -> tuple[float, float]:
    """How long a subject takes by cautious guesses: (to load and to warm up, for the shortest image)."""
    decoder_s = 0.0
    if model != VIDEO:
        decoder_s = (
            count_decoder(VQ16, (1, 24, 24))[1] / ((limits.matrix_tflop_s or UNKNOWN_TFLOP_S) * DECODER_OF_BOUND) / 1e12
        )
    architecture = architecture_of(next(p for p in PUBLISHED if p.model == model and p.n in (n, 1)))
    architecture = replace(architecture, phases=phases_of(n, architecture.n_tokens))
    work = image_work(architecture, 1, True, 4.0, 4.0)
    call_s = bound(work, limits.read_gb_s(work[-1].bytes), limits.matrix_tflop_s).ms / 1e3 / len(work)
    image_s = FEWEST_CALLS * call_s / (EAGER_OF_BOUND if eager else OURS_OF_BOUND) + decoder_s
    return weight_bytes(model) / 1e9 * LOAD_S_PER_GB + WARM_UPS * image_s, image_s
