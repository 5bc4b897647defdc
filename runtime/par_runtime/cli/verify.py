"""``parvis verify``: compare a backend with another one on the same bundle, as a table or JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace

from par_runtime import verify
from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded
from par_runtime.cli.inputs import class_indices
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_seeds, image_settings
from par_runtime.verify import FLOORS, OPSET23, Floors, Trial

IMAGES = 4
#: floor -> what it bounds, for ``--help``
FLOOR_HELP = {
    "logits": "largest relative logit error of a phase",
    "argmax": "least share of positions with the same most probable code",
    "kl": "largest mean KL divergence of a phase, in nats",
    "tie": "largest distance of a draw, in probability, that may be a near-tie",
    "psnr": "least PSNR of an image, in dB",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0 if all is within the floors, 1 if not, 2 if it cannot be tried."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "fewer images, --batch")


def run(args: argparse.Namespace) -> int:
    """Load both backends, compare them and print the report."""
    import onnxruntime  # noqa: F401  # the reference runs on it; without it the verb is refused before any work

    options.check_counts(args, "images", "groups", "batch")
    overrides = _floors(args)
    bundle = Bundle.open(args.bundle)
    trial = _trial(args, bundle)
    with ExitStack() as loaded:
        # The bundle's files were checked above; "auto" checks those of an engine.
        candidate = verify.load(
            args.bundle, args.device, args.threads, "auto", args.capture, **options.rounding(args)._asdict()
        )
        loaded.callback(candidate.backend.close)
        against = args.against or verify.default_reference(candidate)
        reference = verify.load(args.bundle, against, args.threads, "none")
        loaded.callback(reference.backend.close)
        name = reference.backend.info.name
        if candidate.backend.info.name == name:
            raise RequestError(
                f"--against {against}: candidate and reference are both {name}, and agree even where it is wrong; "
                f"give --against {verify.default_reference(candidate)}"
            )
        limit = min(candidate.backend.max_images, reference.backend.max_images)
        if args.batch is not None and args.batch > limit:
            raise RequestError(f"--batch {args.batch}: expected 1 to {limit}, the most that both backends take")
        size = args.batch or min(limit, candidate.default_batch)
        trial = replace(trial, batch=min(size, len(trial.classes)))
        report = verify.run(candidate, reference, trial, args.groups, overrides)
        report.notes.extend(_not_in_bf16(args, candidate))
    if args.json:
        print(json.dumps(verify.as_json(report), allow_nan=False))
    elif args.quiet:
        print("".join(f"FAIL  {check.text}\n" for check in report.checks if not check.passed), end="")
    else:
        print(verify.table(report))
    return 0 if report.passed else 1


def _not_in_bf16(args: argparse.Namespace, candidate: Pipeline) -> list[str]:
    """Why the candidate does not decode in bf16 although it was asked to."""
    info = candidate.backend.info
    if args.decoder_precision != "bf16" or info.decoder_computes == "bf16":
        return []
    from par_runtime.backends.native.decoding import why_not_bf16

    decoder = info.decoder or info.name
    why = why_not_bf16(candidate.bundle) if decoder.startswith("native-cpu") else f"{decoder} decodes"
    return [f"decoding was asked for in bf16, and is not: {why}"]


def _floors(args: argparse.Namespace) -> dict[str, float]:
    """The floors that the command line gives, by name. Raises RequestError."""
    given = {field.name: getattr(args, f"floor_{field.name}") for field in fields(Floors)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise RequestError(f"--floor-{name} {value}: expected 0 or more")
    return given


def _trial(args: argparse.Namespace, bundle: Bundle) -> Trial:
    """What both backends are asked for, checked before anything is loaded. Raises RequestError."""
    named = class_indices(bundle, args.label or [])
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
        guidance_interval=args.guidance_interval,
    )
    return Trial([labels[i % len(labels)] for i in range(count)], each, image_seeds(count, args.seed, None), count)


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis verify``."""
    p = Parser(
        prog="parvis verify",
        description="Compare a backend with another one on the same bundle: logits with the same tokens fed to both, "
        "tokens with the same noise, images of the same tokens. Exit code 0: within the floors; 1: not; 2: cannot be "
        "tried. Where tokens differ, it reports whether rounding explains it; a difference that rounding explains is "
        "no failure.",
    )
    options.add_bundle(p)
    options.add_common(p)
    p.add_argument(
        "--against",
        help=f"the reference: a device as above, or {OPSET23} (the CPU on the bundle's other step graph; --device "
        f"takes it too). Default: cpu-ort (ONNX Runtime), or {OPSET23} where the candidate is that",
    )
    p.add_argument("--images", type=int, help=f"how many (default: {IMAGES}, or one per label if those are more)")
    p.add_argument("--seed", type=int, default=0, help="of the first image and of the random tokens (default: 0)")
    options.add_labels(p, "classes, each by name, index or synset; 'all' is every class (default: spread over all)")
    p.add_argument("--groups", type=int, help="compare logits of only this many calls of the last phase (default: all)")
    p.add_argument("--batch", type=int, help="most images in flight at once (default: what both backends take)")
    options.add_guidance(p)
    options.add_sampling(p)
    options.add_json(p, instead_of="the table")
    for name, what in FLOOR_HELP.items():
        values = ", ".join(f"{key} {getattr(floors, name):g}" for key, floors in FLOORS.items())
        p.add_argument(f"--floor-{name}", type=float, metavar="X", help=f"{what} (default: {values})")
    return p
