"""``parvis verify``: a backend against another one on the same bundle, as a table or JSON."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from par_runtime import __version__
from par_runtime import verify as measure
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.backends.trt.backend import Capture
from par_runtime.bundle import Bundle, Verify
from par_runtime.cli.common import add_common, classes_of, guarded
from par_runtime.cli.dispatch import Parser
from par_runtime.dtypes import least_exact
from par_runtime.errors import RequestError
from par_runtime.metrics import finite
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_seeds, image_settings
from par_runtime.verify import FLOORS, Check, Floors, Images, PhaseLogits, Tokens, Trial

OPSET23 = "cpu-opset23"
IMAGES = 4
DIVERGENCES_SHOWN = 12  # the rest is in --json


@dataclass(frozen=True)
class Report:
    """All that was measured. ``floors_of``: the precision that the default floors were taken from."""

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
        return all(check.passed for check in self.checks)


def verify(argv: Sequence[str]) -> int:
    """Compare two backends; exit code 0 if all is within the floors, 1 if not, 2 if it cannot be tried."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _verify(args))


def _verify(args: argparse.Namespace) -> int:
    for option, value in (("--images", args.images), ("--groups", args.groups), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise RequestError(f"{option} {value}: expected 1 or more")
    for field in fields(Floors):
        value = getattr(args, f"floor_{field.name}")
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise RequestError(f"--floor-{field.name} {value}: expected 0 or more")
    bundle = Bundle.open(args.bundle)
    trial = _trial(args, bundle)
    with ExitStack() as held:
        # The bundle's files were checked above; "auto" is for those of an engine.
        candidate = load(args.bundle, args.device, args.threads, "auto", args.capture)
        held.callback(candidate.backend.close)
        reference = load(args.bundle, args.against or default_reference(candidate), args.threads, "none")
        held.callback(reference.backend.close)
        limit = min(candidate.backend.max_images, reference.backend.max_images)
        if args.batch is not None and args.batch > limit:
            raise RequestError(f"--batch {args.batch}: expected 1 to {limit}, the most that both backends take")
        size = args.batch or min(limit, candidate.default_batch)
        trial = replace(trial, batch=min(size, len(trial.classes)))
        report = run(candidate, reference, trial, args.groups, _overrides(args))
    failed = [check for check in report.checks if not check.passed]
    if args.json:
        print(json.dumps(as_json(report), allow_nan=False))
    elif args.quiet:
        print("".join(f"FAIL  {check.text}\n" for check in failed), end="")
    else:
        print(table(report))
    return 1 if failed else 0


def _trial(args: argparse.Namespace, bundle: Bundle) -> Trial:
    """What both are asked for, checked before anything is loaded. Raises RequestError."""
    named = classes_of(bundle, args.label or [])
    count = args.images or max(IMAGES, len(named))
    # Without labels, images are spread over all classes.
    labels = named or [i * bundle.n_classes // count for i in range(count)]
    each = image_settings(
        bundle,
        count,
        guidance=args.guidance,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        greedy=args.greedy,
    )
    return Trial([labels[i % len(labels)] for i in range(count)], each, image_seeds(count, args.seed, None), count)


def load(path: Path, device: str, threads: int | None, verify: Verify, capture: Capture = "image") -> Pipeline:
    """The bundle on ``device``: those of ``Pipeline.load``, or "cpu-opset23". Without self-test: this is a stricter one."""
    if device != OPSET23:
        return Pipeline.load(path, device, threads=threads, selftest=False, verify=verify, capture=capture)
    if threads is not None and threads < 1:
        raise RequestError(f"threads {threads}: expected 1 or more")
    bundle = Bundle.open(path, verify)
    return Pipeline(bundle, OrtBackend(bundle, threads, "step_opset23"))


def default_reference(candidate: Pipeline) -> str:
    """ONNX Runtime on the CPU; where the candidate is just that, the other step graph: two implementations are compared."""
    info = candidate.backend.info
    return OPSET23 if info.runtime == "onnxruntime-cpu" and "opset23" not in info.version else "cpu-ort"


def run(
    candidate: Pipeline,
    reference: Pipeline,
    trial: Trial,
    groups: int | None = None,
    overrides: dict[str, float] | None = None,
) -> Report:
    """Measure and check. ``overrides`` replaces single floors by name."""
    rough = least_exact(candidate.backend.info.computes, reference.backend.info.computes)
    floors = Floors(**(asdict(FLOORS[rough]) | (overrides or {})))
    logits = measure.compare_logits(candidate, reference, trial, groups)
    tokens, wanted = measure.compare_tokens(candidate, reference, trial, floors, logits)
    notes = [candidate.note] if candidate.note else []
    if candidate.backend.info.name == reference.backend.info.name:
        notes.append(
            f"both are {reference.backend.info.name}: this shows that it repeats itself, not that it is right; "
            "give another --against"
        )
    images = None
    if reference.bundle.image_size is None:
        notes.append("the bundle ends at tokens: no images were compared")
    else:
        images = measure.compare_images(candidate, reference, wanted)
    found = measure.checks(logits, tokens, images, floors)
    return Report(
        reference.bundle, candidate, reference, trial, groups, floors, rough, logits, tokens, images, found, notes
    )


def _overrides(args: argparse.Namespace) -> dict[str, float]:
    given = {field.name: getattr(args, f"floor_{field.name}") for field in fields(Floors)}
    return {name: value for name, value in given.items() if value is not None}


def table(r: Report) -> str:
    """The report as text."""
    b, t, count = r.bundle, r.tokens, len(r.trial.classes)
    first = r.trial.settings[0]
    how = f"guidance {first.guidance:g}, " + (
        "greedy" if first.greedy else f"temperature {first.temperature:g}, top-k {first.top_k}, top-p {first.top_p:g}"
    )
    lines = [
        f"bundle     {b.path} ({b.name}, {b.precision}, {b.n_tokens} tokens in {b.calls} calls, hash {b.hash[:12]})",
        f"candidate  {r.candidate.backend.info.name}",
        f"reference  {r.reference.backend.info.name}",
        f"request    {_many(count, 'image')}, seed {r.trial.seeds[0]}{f'..{r.trial.seeds[-1]}' if count > 1 else ''}, {how}",
        *(f"note       {note}" for note in r.notes),
        "",
        "logits, both fed the same random tokens" + (f" (of the last phase {r.groups} calls)" if r.groups else ""),
        f"  {'phase':12}{'calls':>6}{'positions':>11}{'max error':>11}{'largest':>9}{'relative':>10}{'argmax':>11}{'KL (nats)':>11}",
    ]
    for p in r.logits:
        lines.append(
            f"  {p.phase:12}{p.calls:6}{p.positions:11}{p.max_error:11.2e}{p.scale:9.2f}{p.relative_error:10.1e}"
            f"{100 * p.argmax_agreement:9.2f} %{p.kl:11.1e}"
        )
    lines += [
        "",
        "tokens, both on their own with the same noise",
        f"  {t.equal} of {t.tokens} equal ({100 * t.equal / t.tokens:.2f} %), {t.identical_images} of {t.images} images identical",
    ]
    for d in t.divergences[:DIVERGENCES_SHOWN]:
        away = "out of reach" if d.distance is None else f"{d.distance:.1e} away (explained: {d.explained:.1e})"
        lines.append(
            f"  image {d.image} (label {d.label}, seed {d.seed}) parts at token {d.position} ({d.phase}): "
            f"{d.reference_token} in the reference, {d.candidate_token} in the candidate; logits {d.logit_gap:.2g} apart, "
            f"the draw {away}: {d.verdict}"
        )
    if len(t.divergences) > DIVERGENCES_SHOWN:
        lines.append(f"  and {len(t.divergences) - DIVERGENCES_SHOWN} more (--json lists all)")
    lines += ["", "images, both decoding the reference's tokens"]
    i = r.images
    if i is None:
        lines.append("  skipped: the bundle ends at tokens")
    elif i.identical_images == i.images:
        lines.append("  identical")
    else:
        lines.append(
            f"  {i.identical_images} of {i.images} identical; the worst has {i.psnr:.1f} dB PSNR, values differ by up to "
            f"{i.max_difference} of 255"
        )
    lines += ["", f"floors of {r.floors_of}"]
    lines += [f"  {'pass' if check.passed else 'FAIL'}  {check.text}" for check in r.checks]
    failed = sum(not check.passed for check in r.checks)
    lines += ["", f"verify: FAIL, {failed} of {_many(len(r.checks), 'check')}" if failed else "verify: pass"]
    return "\n".join(lines)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def as_json(r: Report) -> dict[str, Any]:
    """The report as one JSON object; numbers that are not finite are null (an infinite PSNR too: see "identical")."""
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
        "candidate": {"backend": r.candidate.backend.info.name, "precision": r.candidate.backend.info.computes},
        "reference": {"backend": r.reference.backend.info.name, "precision": r.reference.backend.info.computes},
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


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis verify",
        description="Compare a backend with another one on the same bundle: logits with the same tokens fed to both, "
        "tokens with the same noise, images of the same tokens. Exit code 0: within the floors; 1: not; 2: cannot be "
        "tried. Where tokens part, it says whether rounding explains it; that alone is no failure.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder made by 'parvis export'")
    add_common(p)
    p.add_argument(
        "--against",
        help=f"the reference: a device as above, or {OPSET23} (the CPU on the bundle's other step graph; --device takes "
        f"it too). Default: cpu-ort (ONNX Runtime), or {OPSET23} where the candidate is just that",
    )
    p.add_argument("--images", type=int, help=f"how many (default: {IMAGES}, or one per label if those are more)")
    p.add_argument("--seed", type=int, default=0, help="of the first image and of the random tokens (default: 0)")
    p.add_argument("--label", action="append", help="class name or index; may be repeated (default: spread over all)")
    p.add_argument("--groups", type=int, help="compare logits of only this many calls of the last phase (default: all)")
    p.add_argument("--batch", type=int, help="most images in flight at once (default: what both backends take)")
    p.add_argument("--guidance", type=float, help="default: the bundle's")
    p.add_argument("--temperature", type=float, help="default: the bundle's")
    p.add_argument("--top-k", type=int, help="default: the bundle's")
    p.add_argument("--top-p", type=float, help="default: the bundle's")
    p.add_argument("--greedy", action="store_true", help="always the most probable code; no noise")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    for name, what in (
        ("logits", "largest relative logit error of a phase"),
        ("argmax", "least share of positions with the same most probable code"),
        ("kl", "largest mean KL divergence of a phase, in nats"),
        ("tie", "largest distance of a draw, in probability, that may be a near-tie"),
        ("psnr", "least PSNR of an image, in dB"),
    ):
        values = ", ".join(f"{key} {getattr(floors, name):g}" for key, floors in FLOORS.items())
        p.add_argument(f"--floor-{name}", type=float, metavar="X", help=f"{what} (default: {values})")
    return p
