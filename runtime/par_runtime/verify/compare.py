"""Compare the logits, the tokens and the images of two backends on one bundle.

Two implementations round differently. One rounded bit can change a token, and then all tokens after it, so a different
token alone is no failure. At the first call where the tokens of an image differ, both backends had the same inputs. The
logits of both at that call show whether rounding explains the different draw (a near-tie) or not.

Letters: B images, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng

from par_runtime.dtypes import Float, Int
from par_runtime.errors import BundleError
from par_runtime.metrics import log_softmax, psnr_db
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule
from par_runtime.verify.judge import Floors, judge, relative_error


@dataclass(frozen=True)
class Trial:
    """The request that both backends get: a class, settings and a seed per image; ``batch`` images at once."""

    classes: list[int]
    settings: list[Settings]
    seeds: list[int]
    batch: int

    def parts(self) -> Iterator[slice]:
        """The images of each batch."""
        for first in range(0, len(self.classes), self.batch):
            yield slice(first, first + self.batch)


@dataclass(frozen=True)
class PhaseLogits:
    """How the guided logits of one phase differ, with the same tokens given to both backends (teacher-forced).

    ``max_error``: the largest difference of a logit. ``scale``: the reference's largest |logit|. ``relative_error``:
    their ratio. ``argmax_agreement``: the share of positions with the same most probable code. ``kl``: mean
    Kullback-Leibler divergence in nats.
    """

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
    """A token that differs although both backends had the same inputs.

    It belongs to the first call of its image in which tokens differ, because the inputs of later calls differ too.

    ``logit_gap``: the reference's logit of its own token minus its logit of the candidate's token. ``logit_error``: the
    largest difference of both backends' logits at this call, relative to the phase's largest |logit|. ``distance``: how
    far the uniform number of the draw is from the candidate's token in the reference's CDF, as a probability; None
    where the filter of neither backend keeps that token. ``explained``: how far the difference of both backends' logits
    at this position can move the CDF.
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
    """Tokens that each backend drew on its own, with the same noise."""

    tokens: int
    equal: int
    images: int
    identical_images: int
    divergences: tuple[Divergence, ...]


@dataclass(frozen=True)
class Images:
    """How images differ that both backends decoded from the same tokens.

    ``psnr``: of the worst image, in dB; infinite where all are equal. ``max_difference``: the largest of all values,
    which are 0..255.
    """

    images: int
    identical_images: int
    psnr: float
    max_difference: int


def start_both(candidate: Pipeline, reference: Pipeline, trial: Trial, part: slice) -> Schedule:
    """The schedule of these images of the trial, after releasing the caches of both backends."""
    for pipeline in (candidate, reference):
        pipeline.backend.release()
    return Schedule.of(reference.bundle, trial.classes[part], trial.settings[part], trial.seeds[part])


def compare_logits(
    candidate: Pipeline, reference: Pipeline, trial: Trial, groups: int | None = None
) -> list[PhaseLogits]:
    """Compare the logits of every phase, with the same random tokens given to both backends.

    ``groups``: how many calls of the last phase, which is the longest, are compared (default: all). Raises BundleError.
    """
    bundle = reference.bundle
    random = default_rng(trial.seeds[0]).integers(bundle.vocab_size, size=(len(trial.classes), bundle.n_tokens))
    rows: dict[str, list[tuple[float, ...]]] = {phase.name: [] for phase in bundle.phases}
    last = bundle.phases[-1]
    for part in trial.parts():
        schedule = start_both(candidate, reference, trial, part)
        for call, batch, ids, write in schedule.walk(random[part]):
            if groups is not None and call.phase == last and call.write >= last.start + groups * last.query:
                break
            rows[call.phase.name].append(
                _errors(*(p.backend.logits(batch, ids, write) for p in (candidate, reference)))
            )
    result = []
    for name, calls in rows.items():
        # numpy's max and sum give NaN for an array with a NaN; Python's max does not.
        error, scale, same, kl, positions = (np.array(column) for column in zip(*calls, strict=True))
        count, largest = float(positions.sum()), float(scale.max())
        result.append(
            PhaseLogits(
                phase=name,
                calls=len(calls),
                positions=int(count),
                max_error=float(error.max()),
                scale=largest,
                relative_error=relative_error(float(error.max()), largest),
                argmax_agreement=float(same.sum() / count),
                kl=float(kl.sum() / count),
            )
        )
    return result


def _errors(candidate: Float, reference: Float) -> tuple[float, ...]:
    """Largest error, largest |logit|, positions with the same argmax, sum of KL, positions; of logits [B,q,V]."""
    if candidate.shape != reference.shape:
        raise BundleError(
            f"the candidate's logits have shape {candidate.shape}, the reference's {reference.shape}; build its engine "
            "again"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN needs no warning here, because it fails the check
        a, b = candidate.astype(np.float64), reference.astype(np.float64)
        log_a, log_b = log_softmax(candidate), log_softmax(reference)
        kl = (np.exp(log_b) * (log_b - log_a)).sum()
        same = (a.argmax(-1) == b.argmax(-1)).sum()
        return float(np.abs(a - b).max()), float(np.abs(b).max()), float(same), float(kl), float(a[..., 0].size)


def compare_tokens(
    candidate: Pipeline, reference: Pipeline, trial: Trial, floors: Floors, logits: Sequence[PhaseLogits]
) -> tuple[Tokens, Int]:
    """Compare the tokens that both draw with the same noise. Returns also the reference's tokens [B,N].

    ``logits``: the result of :func:`compare_logits`, which gives each phase's scale.
    """
    scales = {p.phase: p.scale for p in logits}
    drawn, wanted = (_generate(pipeline, trial) for pipeline in (candidate, reference))
    divergences: list[Divergence] = []
    for part in trial.parts():
        divergences += _divergences(candidate, reference, trial, part, drawn[part], wanted[part], floors, scales)
    differs = drawn != wanted
    tokens = Tokens(
        tokens=differs.size,
        equal=int((~differs).sum()),
        images=len(differs),
        identical_images=int((~differs.any(1)).sum()),
        divergences=tuple(sorted(divergences, key=lambda d: (d.image, d.position))),
    )
    return tokens, wanted


def _generate(pipeline: Pipeline, trial: Trial) -> Int:
    """Tokens [B,N] as a user gets them: with whole images in one launch, if the backend can do that."""
    return pipeline.generate(
        trial.classes, trial.settings, seeds=trial.seeds, max_batch=trial.batch, decode=False
    ).tokens


def _divergences(
    candidate: Pipeline,
    reference: Pipeline,
    trial: Trial,
    part: slice,
    drawn: Int,
    wanted: Int,
    floors: Floors,
    scales: dict[str, float],
) -> list[Divergence]:
    """Every token that differs at the first call where its image differs. Up to that call, the inputs are the same.

    ``drawn`` and ``wanted`` [B,N]: the tokens of candidate and reference for the images ``part``.
    """
    differs = drawn != wanted
    first = {int(b): int(differs[b].argmax()) for b in np.flatnonzero(differs.any(1))}
    if not first:
        return []
    divergences = []
    classes, settings, seeds = trial.classes[part], trial.settings[part], trial.seeds[part]
    schedule = start_both(candidate, reference, trial, part)
    for call, batch, ids, write in schedule.walk(wanted):
        images = [b for b, position in first.items() if call.write <= position < call.positions.stop]
        if not images:  # this call only fills the cache
            for pipeline in (candidate, reference):
                pipeline.backend.step(batch, ids, write, schedule.noise[:, call.positions])
            continue
        logits = [p.backend.logits(batch, ids, write) for p in (candidate, reference)]
        for b in images:
            for position in (int(p) for p in call.write + np.flatnonzero(differs[b, call.positions])):
                candidate_token, reference_token = int(drawn[b, position]), int(wanted[b, position])
                judgement = judge(
                    logits[0][b],
                    logits[1][b],
                    position - call.write,
                    settings[b],
                    float(schedule.noise[b, position]),
                    candidate_token,
                    reference_token,
                    scales[call.phase.name],
                    floors,
                )
                divergences.append(
                    Divergence(
                        image=part.start + b,
                        label=classes[b],
                        seed=seeds[b],
                        phase=call.phase.name,
                        position=position,
                        reference_token=reference_token,
                        candidate_token=candidate_token,
                        **judgement._asdict(),
                    )
                )
        if call.positions.stop > max(first.values()):
            break
    return divergences


def compare_images(candidate: Pipeline, reference: Pipeline, tokens: Int) -> Images:
    """Compare what both decode of the same ``tokens`` [B,N].

    Raises BundleError; RequestError where the bundle ends at tokens.
    """
    decoded, wanted = candidate.decode(tokens), reference.decode(tokens)
    if decoded.shape != wanted.shape:
        raise BundleError(
            f"the candidate's images have shape {decoded.shape}, the reference's {wanted.shape}; build its engine again"
        )
    difference = np.abs(decoded.astype(np.int64) - wanted).reshape(len(tokens), -1)
    return Images(
        images=len(tokens),
        identical_images=int((~difference.any(1)).sum()),
        psnr=min(psnr_db(a, b) for a, b in zip(decoded, wanted, strict=True)),
        max_difference=int(difference.max()),
    )
