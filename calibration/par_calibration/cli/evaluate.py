"""``parvis evaluate``: how good bundles are, beside real images that no training has seen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from par_runtime.cli import options
from par_runtime.cli.common import Bar, Parser, guarded, printable
from par_runtime.errors import RequestError

if TYPE_CHECKING:
    from par_calibration.evaluate import Request

SETTINGS: dict[str, Callable[[str], float]] = {"guidance": float, "temperature": float, "top_k": int, "top_p": float}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "fewer images in flight, --batch")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the tables. Raises RequestError, BundleError, CudaError, OSError."""
    from par_calibration.evaluate import evaluate
    from par_calibration.evaluate.sheet import write_rows
    from par_calibration.evaluate.text import lines
    from par_runtime.system import check_writable

    if args.sheet is not None:
        _keep_inputs(args)
        check_writable(args.sheet)
    with Bar(args.quiet or args.json, unit="image") as bar:

        def say(line: str) -> None:
            if not (args.quiet or args.json):
                bar.clear()
                print(printable(line), flush=True)

        outcome = evaluate(_request(args, say, bar))
    if args.json:
        print(json.dumps(outcome.evaluation.as_json(), allow_nan=False))
    elif not args.quiet:
        print("\n".join(printable(line) for line in ["", *lines(outcome.evaluation)]))
    if args.sheet is not None:  # last: one that fails must not lose the figures
        write_rows(args.sheet, outcome.rows)
    return 0


def _request(args: argparse.Namespace, say: Callable[[str], object], bar: Bar) -> Request:
    """The options as a request. Raises RequestError, BundleError, OSError."""
    from par_calibration.evaluate.run import MOST_GENERATED, MOST_SHOWN, Request
    from par_runtime.bundle import Bundle
    from par_runtime.cli.inputs import check_batch, class_indices
    from par_runtime.request import first_seed

    options.check_counts(args, "held_out", "batch", "threads")
    check_batch(args)
    for name, least, most in (("generated", 0, MOST_GENERATED), ("shown", 1, MOST_SHOWN)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise RequestError(f"--{name} {value}: expected {least} to {most}")
    settings: dict[str, Any] = {name: getattr(args, name) or (None,) for name in SETTINGS}
    given = [f"--{name.replace('_', '-')}" for name in SETTINGS if getattr(args, name)]
    if given and (args.generated == 0 or (args.samples and args.generated is None)):
        raise RequestError(
            f"{', '.join(given)}: no images are generated, so there is nothing to set; leave it out, or give "
            "--generated N"
        )
    if args.generated == 0 and not args.samples:
        for name in ("sheet", "features_of"):
            if getattr(args, name) is not None:
                raise RequestError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: no images are compared; leave it out, or give "
                    "--generated N or --samples"
                )
    labels = () if args.label is None else class_indices(Bundle.open(args.bundle[0], verify="none"), args.label)
    return Request(
        bundles=args.bundle,
        real=args.real,
        held_out=args.held_out,
        generated=args.generated,
        samples=args.samples or (),
        labels=labels,
        seed=first_seed(args.seed),
        **settings,
        features_of=args.features_of,
        shown=args.shown,
        batch=args.batch,
        load={
            "device": args.device,
            "threads": args.threads,
            "capture": args.capture,
            **options.rounding(args)._asdict(),
        },
        on_image=bar,
        say=say,
    )


def _keep_inputs(args: argparse.Namespace) -> None:
    """Raise RequestError where ``--sheet`` would replace an input, or become a picture of one."""
    from par_model.training.files import InputError, keep_inputs

    try:
        for samples in args.samples or [None]:
            keep_inputs("--sheet", [args.sheet], real=args.real, samples=samples)
        for bundle in args.bundle:
            keep_inputs("--sheet", [args.sheet], bundle=bundle)
    except InputError as error:
        raise RequestError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis evaluate``."""
    p = Parser(
        prog="parvis evaluate",
        description="Compare bundles with real images that no training has seen: how likely the images are, what the "
        "tokenizer keeps of them, and how far generated images are from them, for every combination of settings. "
        "Distances are Frechet distances in features of a bundle's own encoder; they are no FID (docs/evaluation.md).",
    )
    p.add_argument(
        "bundle",
        type=options.path,
        nargs="+",
        metavar="BUNDLE",
        help="folders of bundles of the same classes and sizes",
    )
    p.add_argument(
        "--real",
        type=options.path,
        metavar="PATH",
        help="real images that no training has seen: a folder of pictures, one folder per class; a folder of the "
        "trainers' raw form; or a .npz of 'parvis encode' (default: those that each bundle holds)",
    )
    p.add_argument(
        "--held-out", type=int, metavar="N", help="real images at most (default: 240, fewer of large models)"
    )
    p.add_argument(
        "--generated",
        type=int,
        metavar="N",
        help="images to generate with each bundle and setting, of classes as the real ones; 0: likelihood alone "
        "(default: as many as there are real ones; none with --samples)",
    )
    p.add_argument(
        "--samples", type=options.path, nargs="+", metavar="NPZ", help="files of 'parvis sample', compared too"
    )
    for name, kind in SETTINGS.items():
        options.add_list(
            p,
            f"--{name.replace('_', '-')}",
            _numbers(kind),
            help="one or several; every combination of settings is a row (default: the bundle's)",
        )
    options.add_labels(p, "only these classes (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the first image of every row, 0 .. 2**64-1 (default: 0)")
    p.add_argument(
        "--features-of",
        type=options.path,
        metavar="BUNDLE",
        help="bundle whose encoder gives the features (default: the first BUNDLE that has one)",
    )
    p.add_argument("--sheet", type=options.path, metavar="PNG", help="images of every row, held-out ones first")
    p.add_argument("--shown", type=int, default=12, metavar="N", help="images of a row of the sheet (default: 12)")
    p.add_argument("--batch", type=int, help="most images in flight at once (default: a cache of 2 GB)")
    options.add_common(p)
    options.add_json(p)
    return p


def _numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """The type of a list of numbers, for argparse."""

    def read(text: str) -> tuple[float, ...]:
        return tuple(kind(part) for part in text.split(","))

    read.__name__ = "number" if kind is float else "whole number"
    return read


if __name__ == "__main__":
    raise SystemExit(main())
