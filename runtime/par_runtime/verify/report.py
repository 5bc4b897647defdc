"""A whole comparison of two backends: measure everything, check every number against its floor, print the result."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from par_runtime import __version__
from par_runtime.backends.base import BackendInfo
from par_runtime.bundle import Bundle
from par_runtime.checked import shown_path
from par_runtime.dtypes import least_exact
from par_runtime.late import importing
from par_runtime.metrics import finite
from par_runtime.pipeline import Pipeline
from par_runtime.verify.compare import (
    Images,
    PhaseLogits,
    Tokens,
    Trial,
    compare_images,
    compare_logits,
    compare_tokens,
)
from par_runtime.verify.judge import FLOORS, Floors

DIVERGENCES_SHOWN = 12  #: in the text; the JSON lists all


@dataclass(frozen=True)
class Check:
    """One number compared with one floor."""

    name: str
    value: float
    floor: float
    passed: bool
    text: str


@dataclass(frozen=True)
class Report:
    """The result of a comparison. ``floors_of``: the precision whose default floors were taken."""

    bundle: Bundle
    candidate: Pipeline
    reference: Pipeline
    trial: Trial
    groups: int | None
    floors: Floors
    floors_of: str
    logits: list[PhaseLogits]
    tokens: Tokens
    images: Images | None
    checks: list[Check]
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether every number is within its floor."""
        return all(check.passed for check in self.checks)


def run(
    candidate: Pipeline,
    reference: Pipeline,
    trial: Trial,
    groups: int | None = None,
    overrides: dict[str, float] | None = None,
) -> Report:
    """Compare logits, tokens and images, and check them. ``overrides`` replaces single floors by name.

    ``groups``: see :func:`compare_logits`. Raises BundleError where the outputs have different shapes.
    """
    least = least_exact(candidate.backend.info.least_exact, reference.backend.info.least_exact)
    floors = Floors(**(asdict(FLOORS[least]) | (overrides or {})))
    logits = compare_logits(candidate, reference, trial, groups)
    tokens, wanted = compare_tokens(candidate, reference, trial, floors, logits)
    notes = [candidate.note] if candidate.note else []
    images = None
    if reference.bundle.image_size is None:
        notes.append("the bundle ends at tokens: no images were compared")
    else:
        images = compare_images(candidate, reference, wanted)
    return Report(
        bundle=reference.bundle,
        candidate=candidate,
        reference=reference,
        trial=trial,
        groups=groups,
        floors=floors,
        floors_of=least,
        logits=logits,
        tokens=tokens,
        images=images,
        checks=checks(logits, tokens, images, floors, reference.bundle.kind),
        notes=notes,
    )


def checks(
    logits: Sequence[PhaseLogits], tokens: Tokens, images: Images | None, floors: Floors, kind: str = "image"
) -> list[Check]:
    """Every number compared with its floor. A NaN passes no check. ``kind``: "image" or "clip", as the text says it."""

    def at_most(name: str, value: float, floor: float) -> Check:
        return Check(name, value, floor, value <= floor, f"{name} {value:.3g}, allowed up to {floor:g}")

    def at_least(name: str, value: float, floor: float, unit: str = "") -> Check:
        return Check(name, value, floor, value >= floor, f"{name} {value:.5g}{unit}, expected {floor:g}{unit} or more")

    rows = [at_most(f"relative logit error of {p.phase}", p.relative_error, floors.logits) for p in logits]
    rows += [at_most(f"KL divergence of {p.phase} (nats)", p.kl, floors.kl) for p in logits]
    positions = sum(p.positions for p in logits)
    agreement = sum(p.argmax_agreement * p.positions for p in logits) / positions
    rows.append(at_least("argmax agreement", agreement, floors.argmax))
    rows.append(at_most("tokens that rounding does not explain", sum(not d.near_tie for d in tokens.divergences), 0))
    if images is not None:
        rows.append(at_least(f"PSNR of the worst {kind}", images.psnr, floors.psnr, " dB"))
    return rows


def table(r: Report) -> str:
    """The report as text."""
    b, t, count = r.bundle, r.tokens, len(r.trial.classes)
    first, seeds = r.trial.settings[0], str(r.trial.seeds[0])
    if count > 1:
        seeds += f"..{r.trial.seeds[-1]}"
    how = f"guidance {first.guidance:g}, " + (
        "greedy" if first.greedy else f"temperature {first.temperature:g}, top-k {first.top_k}, top-p {first.top_p:g}"
    )
    if first.guidance_interval != -1:
        how += f", guidance interval {first.guidance_interval}"
    lines = [
        f"bundle     {shown_path(b.path)} ({b.name}, {b.precision}, {b.n_tokens} tokens in {b.calls} calls, "
        f"hash {b.hash[:12]})",
        f"candidate  {_names(r.candidate.backend.info)}",
        f"reference  {_names(r.reference.backend.info)}",
        f"request    {_many(count, b.kind)}, seed {seeds}, {how}",
        *(f"note       {note}" for note in r.notes),
        "",
        "logits, both fed the same random tokens" + (f" (of the last phase {r.groups} calls)" if r.groups else ""),
        f"  {'phase':12}{'calls':>6}{'positions':>11}{'max error':>11}{'largest':>9}{'relative':>10}{'argmax':>11}"
        f"{'KL (nats)':>11}",
    ]
    for p in r.logits:
        lines.append(
            f"  {p.phase:12}{p.calls:6}{p.positions:11}{p.max_error:11.2e}{p.scale:9.2f}{p.relative_error:10.1e}"
            f"{100 * p.argmax_agreement:9.2f} %{p.kl:11.1e}"
        )
    lines += [
        "",
        "tokens, both on their own with the same noise",
        f"  {t.equal} of {t.tokens} equal ({100 * t.equal / t.tokens:.2f} %), "
        f"{t.identical_images} of {_many(t.images, b.kind)} identical",
    ]
    for d in t.divergences[:DIVERGENCES_SHOWN]:
        missed = (
            "no draw gives the candidate's code"
            if d.distance is None
            else f"the draw missed the candidate's code by {d.distance:.1e}; the difference of the logits explains "
            f"up to {d.explained:.1e}"
        )
        lines.append(
            f"  {b.kind} {d.image} (label {d.label}, seed {d.seed}) differs at token {d.position} ({d.phase}): "
            f"{d.reference_token} in the reference, {d.candidate_token} in the candidate; "
            f"in the reference their logits differ by {d.logit_gap:.2g}; {missed}: {d.verdict}"
        )
    if len(t.divergences) > DIVERGENCES_SHOWN:
        lines.append(f"  and {len(t.divergences) - DIVERGENCES_SHOWN} more (--json lists all)")
    lines += ["", f"{b.kind}s, both decoding the reference's tokens"]
    i = r.images
    if i is None:
        lines.append("  skipped: the bundle ends at tokens")
    elif i.identical_images == i.images:
        lines.append("  identical")
    else:
        lines.append(
            f"  {i.identical_images} of {i.images} identical; the worst has {i.psnr:.1f} dB PSNR, "
            f"values differ by up to {i.max_difference} of 255"
        )
    lines += ["", f"floors of {r.floors_of}"]
    lines += [f"  {'pass' if check.passed else 'FAIL'}  {check.text}" for check in r.checks]
    failed = sum(not check.passed for check in r.checks)
    both = f"{r.candidate.backend.info.name} against {r.reference.backend.info.name}"
    verdict = f"FAIL, {failed} of {_many(len(r.checks), 'check')}" if failed else "pass"
    lines += ["", f"verify: {verdict}: {both}"]
    return "\n".join(lines)


def _names(info: BackendInfo) -> str:
    """The backend, and what decodes where that is another one."""
    decoder = f"; decoder {info.decoder}" if info.decoder not in ("", info.name) else ""
    return f"{info.name}{decoder}"


def _backend(info: BackendInfo) -> dict[str, str]:
    decoder = {"decoder": info.decoder, "decoder_precision": info.decoder_computes} if info.decoder else {}
    return {"backend": info.name, "precision": info.computes} | decoder


def _many(count: int, what: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def as_json(r: Report) -> dict[str, Any]:
    """The report as one JSON object; numbers that are not finite are null (an infinite PSNR too: see "identical")."""
    with importing("onnxruntime"):
        import onnxruntime  # here: the comparison itself runs without it

    images = None
    if r.images is not None:
        images = asdict(r.images) | {"identical": r.images.identical_images == r.images.images}
    row = {
        "passed": r.passed,
        "bundle": {
            "path": str(r.bundle.path),
            "name": r.bundle.name,
            "hash": r.bundle.hash,
            "precision": r.bundle.precision,
        },
        "candidate": _backend(r.candidate.backend.info),
        "reference": _backend(r.reference.backend.info),
        "versions": {
            "parvis": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "request": asdict(r.trial) | {"groups": r.groups},
        "floors": asdict(r.floors) | {"precision": r.floors_of},
        "logits": [asdict(p) for p in r.logits],
        "tokens": asdict(r.tokens),
        "images": images,
        "checks": [asdict(check) for check in r.checks],
        "notes": r.notes,
    }
    plain: dict[str, Any] = finite(row)
    return plain
