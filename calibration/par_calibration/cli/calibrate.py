"""``parvis calibrate``: smaller weights or cheaper arithmetic, and the proof that images do not suffer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from par_runtime.cli import options
from par_runtime.cli.common import Bar, Parser, fail, printable
from par_runtime.dtypes import ARITHMETICS
from par_runtime.errors import RequestError
from par_runtime.quantised import GROUPS

if TYPE_CHECKING:
    from par_calibration.run import Request

#: What ``--activations`` is called elsewhere -> an arithmetic.
SAME_AS = {"none": "fp32"}
#: What ``--ranges`` has no use for.
NOT_OF_RANGES = (
    *("weights", "keep", "refine", "arithmetic", "cache", "decoder_precision"),
    *("real", "held_out", "generated", "budget", "html", "show_images"),
)
FP8 = (
    "fp8: no engine here computes in it: CPUs have no fp8 units, and neither have GPUs of SM80 and SM86 (an A100, an "
    "RTX 30); give bf16 or int8"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, 1 where the report is beyond its budget, 2 on bad input."""
    args = parser().parse_args(argv)
    from par_export.cli.common import guarded
    from par_model.checkpoint.errors import CheckpointError

    advice = "give an --out, or the --work that you named, in a folder you can write to"
    kept = "no bundle was written; --resume goes on with what was recorded"
    return guarded(lambda: run(args), expected=(CheckpointError,), stopped=kept, no_permission=advice, out=args.out)


def run(args: argparse.Namespace) -> int:
    """Calibrate, printing what is done. Raises what :func:`par_calibration.run.calibrate` raises."""
    request = _request(args)
    from par_calibration.refine.state import FILE as TRAINING
    from par_calibration.run import KEEP_WEIGHTS, OverBudgetError, calibrate

    if args.ranges:
        return _ranges(args, request)
    with (
        Bar(args.quiet, unit="image") as images,
        Bar(args.quiet, unit="matrix") as matrices,
        Bar(args.quiet, unit="step") as steps,
    ):

        def say(line: str) -> None:
            if not args.quiet:
                steps.clear()  # the only bar that is there while lines are printed
                print(printable(line), flush=True)

        try:
            calibrate(request, say=say, on_image=images, on_matrix=matrices, on_step=steps)
        except OverBudgetError as error:
            for line in error.lines:
                fail(f"beyond the budget: {line}")
            training = f"; before a training with other ones remove {TRAINING}, which lies there"
            recorded = (
                " What was recorded is kept: --resume uses it with other --keep, --group or --weights"
                f"{training if args.refine else ''};"
            )
            return fail(
                "the calibration is beyond its budget, so no bundle was written; the report is."
                f"{'' if request.weights == KEEP_WEIGHTS else recorded} --budget changes the limits",
                1,
            )
    return 0


def _ranges(args: argparse.Namespace, request: Request) -> int:
    from par_calibration.quantise.activations import as_json, table
    from par_calibration.run import measured_ranges
    from par_runtime.system import check_writable, write_beside

    if args.json is not None:
        check_writable(args.json)
    with Bar(args.quiet, unit="image") as bar:
        found = measured_ranges(request, on_image=bar)
    for line in table(found):
        print(line)
    if args.json is not None:
        text = json.dumps(as_json(found), indent=1) + "\n"
        write_beside(args.json, lambda part: part.write_text(text))
    return 0


def _request(args: argparse.Namespace) -> Request:
    """The options as a request. Raises RequestError."""
    from par_calibration.record.record import RecordOptions
    from par_calibration.report import Options
    from par_calibration.run import Request
    from par_runtime.bundle import Bundle
    from par_runtime.cli.inputs import class_indices

    if args.weights is None and not args.ranges:
        raise RequestError(
            "--weights: what to do is missing; give int8, int4, or keep with --arithmetic, --cache or "
            "--decoder-precision"
        )
    useless = [f"--{name.replace('_', '-')}" for name in NOT_OF_RANGES if getattr(args, name) is not None]
    if args.ranges and useless:
        raise RequestError(
            f"{', '.join(useless)}: --ranges only measures what was recorded, and writes no bundle; leave it out, or "
            f"{'this' if len(useless) == 1 else 'these'}"
        )
    options.check_counts(args, "images", "samples", "threads", "held_out", "refine")
    if args.generated is not None and args.generated < 0:
        raise RequestError(f"--generated {args.generated}: expected 0 or more")
    seed = 0 if args.seed is None else args.seed
    if not 0 <= seed < 2**63:
        raise RequestError(f"--seed {seed}: expected 0 .. 2**63-1")
    labels = None if args.label is None else class_indices(Bundle.open(args.bundle, verify="none"), args.label)
    default = RecordOptions()
    return Request(
        bundle=args.bundle,
        weights=args.weights or "int8",
        out=args.out,
        group=args.group,
        keep=args.keep or (),
        arithmetic=args.arithmetic,
        cache=args.cache,
        decoder_precision=args.decoder_precision,
        refine=args.refine or 0,
        record=RecordOptions(args.images or default.images, args.samples or default.samples, seed, labels),
        report=Options(
            images=args.held_out,
            samples=args.generated,
            seed=seed,
            labels=tuple(labels or ()),
            real=args.real,
            say=(lambda _: None) if args.quiet else lambda line: print(printable(line), flush=True),
        ),
        budget=args.budget,
        work=args.work,
        resume=args.resume,
        force=args.force,
        html=args.html,
        json=args.json,
        show_images=args.show_images,
        threads=args.threads,
    )


def arithmetic(text: str) -> str:
    """An arithmetic of the C step, for argparse; ``none`` rounds nothing."""
    if text == "fp8":
        raise argparse.ArgumentTypeError(FP8)
    found = SAME_AS.get(text, text)
    if found not in ARITHMETICS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {', '.join(ARITHMETICS)}, or none, which is fp32")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in options.text(text).split(",") if part.strip())


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis calibrate``."""
    p = Parser(
        prog="parvis calibrate",
        description="Make a bundle with int8 or int4 weights, chosen on recorded activations, and compare it with the "
        "bundle that it is made from: logits, likelihood of real images, generated images. It is written only if the "
        "report stays within the budget; exit code 1 if not.",
    )
    options.add_bundle(p)
    p.add_argument(
        "--weights",
        choices=["int8", "int4", "keep"],
        help="what matrices become; 'keep' leaves them as they are and proves --arithmetic, --cache and "
        "--decoder-precision alone",
    )
    p.add_argument(
        "--out",
        type=options.path,
        help="bundle to write (default: beside BUNDLE, with -int8, -int4, ... added to its name)",
    )
    p.add_argument(
        "--group", type=int, default=64, help=f"rows that share a scale: {', '.join(map(str, GROUPS))} (default: 64)"
    )
    options.add_list(
        p,
        "--keep",
        _names,
        metavar="NAME",
        help="matrices that stay as they are: 'head', a kind (wqkv, wo, w13, w2), 'layers.3', or 'layers.3.w2'",
    )
    p.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="then train codes and scales, all matrices together, for so many steps of four generated images, until "
        "the distributions are closer to the original's; meant for int4 (default: none; 2000 is a good number)",
    )
    p.add_argument(
        "--arithmetic",
        "--activations",
        type=arithmetic,
        metavar="A",
        help="what the C step multiplies in, and so rounds activations to: fp32 ('none' is the same), bf16 or int8; "
        "the report proves it, and the bundle says it to every command that loads it (default: bf16 with int8 and "
        "int4 weights, else what is proven for BUNDLE; fp32 where the C step does not run)",
    )
    p.add_argument(
        "--cache",
        choices=["fp32", "bf16"],
        help="what the C step keeps keys and values in (default: as for --arithmetic)",
    )
    p.add_argument(
        "--decoder-precision",
        choices=["fp32", "bf16"],
        help="what the C decoder computes in; 'bf16' can only be proven on a CPU with AMX, or with AMD's dot products "
        "in bf16, and elsewhere the decoder stays in fp32 (default: what is proven for BUNDLE, else fp32)",
    )
    p.add_argument("--images", type=int, metavar="N", help="images that are made to record activations (default: 24)")
    p.add_argument(
        "--samples", type=int, metavar="N", help="rows of activations that are kept for each matrix (default: 4096)"
    )
    p.add_argument("--seed", type=int, help="of the first image, recorded and generated (default: 0)")
    options.add_labels(p, "classes of recorded, learned and generated images, which take turns (default: all)")
    p.add_argument(
        "--real",
        type=options.path,
        metavar="PATH",
        help="real images that no training has seen: a folder of pictures, one folder per class, or a .npz of tokens "
        "(default: those that the bundle holds)",
    )
    p.add_argument("--held-out", type=int, metavar="N", help="real images that are compared (default: 240, or fewer)")
    p.add_argument("--generated", type=int, metavar="N", help="images that both models generate (default: 96)")
    p.add_argument(
        "--budget",
        metavar="LIMITS",
        help="limits other than the defaults, as top1=0.97,kl=0.01, or a JSON file of them; none takes a limit away",
    )
    p.add_argument("--html", type=options.path, help="page of the report (default: beside --out)")
    p.add_argument("--json", type=options.path, help="figures of the report (default: beside --out)")
    p.add_argument("--show-images", type=options.path, metavar="PNG", help="images of both models side by side")
    p.add_argument(
        "--ranges",
        action="store_true",
        help="only measure what rounding activations to int8 costs, with static and dynamic scales; writes no bundle",
    )
    p.add_argument(
        "--work",
        type=options.path,
        metavar="FOLDER",
        help="what is recorded goes there and stays (default: a hidden folder beside --out, removed at the end)",
    )
    p.add_argument("--resume", action="store_true", help="go on with what an earlier run recorded")
    p.add_argument("--force", action="store_true", help="replace the bundle at --out; begin a recording again")
    options.add_threads(p)
    options.add_quiet(p, "no progress bar, no text; errors only")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
