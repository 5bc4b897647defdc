"""Two backends on one bundle, measured against each other: logits, tokens, images.

Two implementations never round alike, and one rounded bit can change a token, and then all that follow it. So tokens
are not simply compared: where they part for the first time, both saw the same inputs, and the logits of both at that
call tell whether rounding explains the other draw (a near-tie) or nothing does.

Letters: B images, R rows, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from par_runtime.backends.draws import distance_of
from par_runtime.dtypes import LOGIT_ROUNDING, Float, Int
from par_runtime.errors import BundleError
from par_runtime.metrics import log_softmax, psnr_db
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule


@dataclass(frozen=True)
class Floors:
    """What a candidate must keep. Beyond them something is broken: rounding alone stays several times below.

    ``logits``: largest error of a logit, relative to the phase's largest |logit|. ``argmax``: least share of positions
    with the same most probable code, over all phases (a phase of one call has too few). ``kl``: largest mean
    Kullback-Leibler divergence of a phase, in nats. ``tie``: largest distance of a draw, in probability, at which
    another token may count as a near-tie. ``psnr``: least of any image, in dB; the decoder is fp32 in every bundle.
    """

    logits: float
    argmax: float
    kl: float
    tie: float
    psnr: float


#: By the precision that the less exact of both backends computes in. Image models are flat (their best codes lie close together), so the
#: argmax changes sooner than anything that can be seen.
FLOORS = {
    "fp32": Floors(logits=LOGIT_ROUNDING["fp32"], argmax=0.99, kl=1e-5, tie=1e-3, psnr=40.0),
    "fp16": Floors(logits=LOGIT_ROUNDING["fp16"], argmax=0.90, kl=1e-2, tie=5e-2, psnr=40.0),
    "bf16": Floors(logits=LOGIT_ROUNDING["bf16"], argmax=0.60, kl=1e-1, tie=2e-1, psnr=40.0),
}


@dataclass(frozen=True)
class Trial:
    """What both backends are given: a class, settings and a seed per image, ``batch`` images at once."""

    classes: list[int]
    settings: list[Settings]
    seeds: list[int]
    batch: int

    def parts(self) -> Iterator[slice]:
        for first in range(0, len(self.classes), self.batch):
            yield slice(first, first + self.batch)


@dataclass(frozen=True)
class PhaseLogits:
    """Guided logits of one phase, teacher-forced: ``max_error`` and ``scale`` (largest |logit|) in logits."""

    phase: str
    calls: int
    positions: int
    max_error: float
    scale: float
    relative_error: float
    argmax_agreement: float
    kl: float


@dataclass(frozen=True)
class Divergence:
    """A token that differs although both backends were fed the same: in its image's first differing call.

    ``logit_gap``: the reference's logit of its own token less that of the candidate's. ``distance``: how far the
    uniform draw lay from the candidate's token in the reference's CDF, as a probability; None where its filter leaves
    that token out. ``explained``: how far rounding can move the CDF, from the difference of both backends' logits here.
    """

    image: int
    label: int
    seed: int
    phase: str
    position: int
    reference_token: int
    candidate_token: int
    logit_gap: float
    logit_error: float
    distance: float | None
    explained: float
    near_tie: bool
    verdict: str


@dataclass(frozen=True)
class Tokens:
    """Free-running tokens with shared noise."""

    tokens: int
    equal: int
    images: int
    identical_images: int
    divergences: tuple[Divergence, ...]


@dataclass(frozen=True)
class Images:
    """Decoded from the same tokens. ``psnr``: of the worst image, inf where all are equal; differences of 255."""

    images: int
    identical_images: int
    psnr: float
    max_difference: int


@dataclass(frozen=True)
class Check:
    """One number held against one floor."""

    name: str
    value: float
    floor: float
    passed: bool
    text: str


def start_both(candidate: Pipeline, reference: Pipeline, trial: Trial, part: slice) -> Schedule:
    """The schedule of a part of the trial, for both backends, which forget what they held."""
    for pipeline in (candidate, reference):
        pipeline.backend.release()
    return Schedule.of(reference.bundle, trial.classes[part], trial.settings[part], trial.seeds[part])


def compare_logits(
    candidate: Pipeline, reference: Pipeline, trial: Trial, groups: int | None = None
) -> list[PhaseLogits]:
    """Both teacher-forced on the same random tokens; of the last, longest phase only the first ``groups`` calls."""
    bundle = reference.bundle
    random = np.random.default_rng(trial.seeds[0]).integers(
        bundle.vocab_size, size=(len(trial.classes), bundle.n_tokens)
    )
    rows: dict[str, list[tuple[float, ...]]] = {phase.name: [] for phase in bundle.phases}
    last = bundle.phases[-1]
    for part in trial.parts():
        schedule = start_both(candidate, reference, trial, part)
        for call, ids, write in schedule.walk(random[part]):
            if groups is not None and call.phase == last and call.write >= last.start + groups * last.query:
                break
            mine, wanted = (p.backend.logits(schedule.batch, ids, write) for p in (candidate, reference))
            rows[call.phase.name].append(_errors(mine, wanted))
    result = []
    for name, calls in rows.items():
        # numpy's max and sum, not Python's: a NaN must come through.
        error, scale, same, kl, positions = (np.array(column) for column in zip(*calls, strict=True))
        count, largest = float(positions.sum()), float(scale.max())
        result.append(
            PhaseLogits(
                phase=name,
                calls=len(calls),
                positions=int(count),
                max_error=float(error.max()),
                scale=largest,
                relative_error=_relative(float(error.max()), largest),
                argmax_agreement=float(same.sum() / count),
                kl=float(kl.sum() / count),
            )
        )
    return result


def _errors(mine: Float, wanted: Float) -> tuple[float, ...]:
    """Largest error, largest |logit|, positions with the same argmax, sum of KL, positions; of logits [B,q,V]."""
    if mine.shape != wanted.shape:
        raise BundleError(
            f"the candidate's logits have shape {mine.shape}, the reference's {wanted.shape}; build its engine again"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is the finding
        a, b = mine.astype(np.float64), wanted.astype(np.float64)
        log_a, log_b = log_softmax(mine), log_softmax(wanted)
        kl = (np.exp(log_b) * (log_b - log_a)).sum()
        same = (a.argmax(-1) == b.argmax(-1)).sum()
        return float(np.abs(a - b).max()), float(np.abs(b).max()), float(same), float(kl), float(a[..., 0].size)


def _relative(error: float, scale: float) -> float:
    return error / max(scale, 1e-30) if scale == scale else math.nan


def compare_tokens(
    candidate: Pipeline, reference: Pipeline, trial: Trial, floors: Floors, logits: Sequence[PhaseLogits]
) -> tuple[Tokens, Int]:
    """Both free-running with the same noise, and the reference's tokens [B,N]. ``logits`` gives each phase's scale."""
    scales = {p.phase: p.scale for p in logits}
    mine, wanted = (_generate(pipeline, trial) for pipeline in (candidate, reference))
    divergences: list[Divergence] = []
    for part in trial.parts():
        divergences += _divergences(candidate, reference, trial, part, mine[part], wanted[part], floors, scales)
    differs = mine != wanted
    tokens = Tokens(
        tokens=differs.size,
        equal=int((~differs).sum()),
        images=len(differs),
        identical_images=int((~differs.any(1)).sum()),
        divergences=tuple(sorted(divergences, key=lambda d: (d.image, d.position))),
    )
    return tokens, wanted


def _generate(pipeline: Pipeline, trial: Trial) -> Int:
    """Tokens [B,N] as a user gets them: whole images in one launch where the backend makes them so."""
    return pipeline.generate(
        trial.classes, trial.settings, seeds=trial.seeds, max_batch=trial.batch, decode=False
    ).tokens


def _divergences(
    candidate: Pipeline,
    reference: Pipeline,
    trial: Trial,
    part: slice,
    mine: Int,
    wanted: Int,
    floors: Floors,
    scales: dict[str, float],
) -> list[Divergence]:
    """Every differing token of each image's first differing call: up to there both were fed the same."""
    differs = mine != wanted
    first = {int(b): int(differs[b].argmax()) for b in np.flatnonzero(differs.any(1))}
    found: list[Divergence] = []
    if not first:
        return found
    classes, settings, seeds = trial.classes[part], trial.settings[part], trial.seeds[part]
    schedule = start_both(candidate, reference, trial, part)
    for call, ids, write in schedule.walk(wanted):
        here = [b for b, position in first.items() if call.write <= position < call.here.stop]
        if not here:  # this call only fills the cache
            for pipeline in (candidate, reference):
                pipeline.backend.step(schedule.batch, ids, write, schedule.noise[:, call.here])
            continue
        logits = [p.backend.logits(schedule.batch, ids, write) for p in (candidate, reference)]
        for b in here:
            for position in call.write + np.flatnonzero(differs[b, call.here]):
                judged = _judge(
                    logits[0][b],
                    logits[1][b],
                    int(position) - call.write,
                    settings[b],
                    float(schedule.noise[b, position]),
                    int(mine[b, position]),
                    int(wanted[b, position]),
                    scales[call.phase.name],
                    floors,
                )
                found.append(
                    Divergence(
                        image=part.start + b,
                        label=classes[b],
                        seed=seeds[b],
                        phase=call.phase.name,
                        position=int(position),
                        reference_token=int(wanted[b, position]),
                        candidate_token=int(mine[b, position]),
                        **judged,
                    )
                )
        if call.here.stop > max(first.values()):
            break
    return found


def _judge(
    mine: Float,
    wanted: Float,
    slot: int,
    s: Settings,
    uniform: float,
    token: int,
    right: int,
    scale: float,
    floors: Floors,
) -> dict[str, Any]:
    """Whether rounding explains that the candidate drew ``token`` and not ``right``; logits [q,V] of one image."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = _relative(float(np.abs(mine.astype(np.float64) - wanted).max()), scale)
        if not 0 <= token < wanted.shape[1]:
            gap, distance, explained = math.nan, None, 0.0
        else:
            gap = float(wanted[slot, right]) - float(wanted[slot, token])
            t, k, p = (1.0, 1, 1.0) if s.greedy else (s.temperature, s.top_k, s.top_p)
            distance, explained = distance_of(wanted[slot], mine[slot], token, uniform, t, k, p)
    near = False
    if not 0 <= token < wanted.shape[1]:
        verdict = f"a real disagreement: codes are 0..{wanted.shape[1] - 1}"
    elif not error <= floors.logits:
        verdict = "a real disagreement: the logits of this call differ by more than rounding"
    elif distance is None:
        verdict = "a real disagreement: neither filter leaves this token"
    elif not distance <= explained:
        verdict = "a real disagreement: the logits do not explain this draw"
    elif not distance <= floors.tie:
        verdict = "a real disagreement: too far for rounding"
    else:
        near, verdict = True, "a near-tie, decided by rounding"
    return {
        "logit_gap": gap,
        "logit_error": error,
        "distance": distance,
        "explained": explained,
        "near_tie": near,
        "verdict": verdict,
    }


def compare_images(candidate: Pipeline, reference: Pipeline, tokens: Int) -> Images:
    """Both decoders on the same ``tokens`` [B,N]. Raises RequestError where the bundle ends at tokens."""
    mine, wanted = candidate.decode(tokens), reference.decode(tokens)
    if mine.shape != wanted.shape:
        raise BundleError(f"the candidate's images have shape {mine.shape}, the reference's {wanted.shape}")
    difference = np.abs(mine.astype(np.int64) - wanted).reshape(len(tokens), -1)
    return Images(
        images=len(tokens),
        identical_images=int((~difference.any(1)).sum()),
        psnr=min(psnr_db(a, b) for a, b in zip(mine, wanted, strict=True)),
        max_difference=int(difference.max()),
    )


def checks(logits: Sequence[PhaseLogits], tokens: Tokens, images: Images | None, floors: Floors) -> list[Check]:
    """Every number against its floor. A NaN passes none."""

    def most(name: str, value: float, floor: float) -> Check:
        return Check(name, value, floor, value <= floor, f"{name} {value:.3g}, allowed up to {floor:g}")

    def least(name: str, value: float, floor: float, unit: str = "") -> Check:
        return Check(name, value, floor, value >= floor, f"{name} {value:.5g}{unit}, expected {floor:g}{unit} or more")

    rows = [most(f"relative logit error of {p.phase}", p.relative_error, floors.logits) for p in logits]
    rows += [most(f"KL divergence of {p.phase} (nats)", p.kl, floors.kl) for p in logits]
    positions = sum(p.positions for p in logits)
    agreement = sum(p.argmax_agreement * p.positions for p in logits) / positions
    rows.append(least("argmax agreement", agreement, floors.argmax))
    rows.append(most("tokens that rounding does not explain", sum(not d.near_tie for d in tokens.divergences), 0))
    if images is not None:
        rows.append(least("PSNR of the worst image", images.psnr, floors.psnr, " dB"))
    return rows
