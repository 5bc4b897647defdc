"""``parvis sample``: as many images as an evaluation takes, in one ``.npz``; the same command goes on after a stop."""

from __future__ import annotations

import argparse
import errno
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Bar, Parser, guarded, out_of_memory, printable
from par_runtime.cli.inputs import check_batch, load_pipeline, say_why_on_the_cpu
from par_runtime.errors import BundleError, CudaError, OutputsError, RequestError
from par_runtime.request import in_words
from par_runtime.samples import LABELS, Plan, join_samples, make_samples
from par_runtime.samples.file import check_new, part_of
from par_runtime.system import explain

LINES_S = 60.0  #: between two lines of progress, where no terminal shows a bar
WITH_JOIN = ("bundle", "out", "join", "quiet", "json")  #: options that mean something beside ``--join``


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: join(args) if args.join else run(args), "fewer images in flight, --batch")


def run(args: argparse.Namespace) -> int:
    """Check the request, load the bundle, make the images that are not there yet."""
    bundle, plan = _checked(args)
    check_new(args.out)
    pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
    check_batch(args, pipeline)
    say_why_on_the_cpu(args, pipeline)
    started = time.perf_counter()
    with _Shown(args) as shown:
        made = make_samples(pipeline, plan, args.out, max_batch=args.batch, on_images=shown)
    seconds = time.perf_counter() - started
    row = {
        "written": str(args.out),
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "backend": pipeline.backend.info.name,
        "decoder": pipeline.backend.info.decoder,
        "images": len(plan),
        "made_now": made,
        "shape": list(plan.image_shape),
        "first": plan.start,
        "count": plan.count,
        "seed": plan.seed,
        "labels": plan.labels,
        "settings": asdict(plan.settings),
        "seconds": seconds,
    }
    _report(
        args,
        row,
        f"{args.out}: {len(plan)} images of {_size(plan.image_shape)}, {plan.labels} labels, {in_words(plan.settings)}",
    )
    if made and not (args.quiet or args.json):
        print(f"{made} made now in {duration(seconds)}, {pipeline.backend.info.name}")
    return 0


def join(args: argparse.Namespace) -> int:
    """Write the images of all parts into one file."""
    plain = parser()
    for name, value in vars(args).items():
        if name not in WITH_JOIN and value != plain.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise RequestError(f"{option}: --join makes no images, and takes the rest from the parts; leave it out")
    bundle = Bundle.open(args.bundle)
    check_new(args.out)
    with _Shown(args) as shown:
        about = join_samples(args.join, args.out, bundle=bundle, on_images=shown)
    row = {"written": str(args.out), "images": about["count"], "shape": about["shape"]}
    files = "1 file" if len(args.join) == 1 else f"{len(args.join)} files"
    _report(args, row, f"{args.out}: {about['count']} images of {_size(about['shape'])}, of {files}")
    return 0


def _checked(args: argparse.Namespace) -> tuple[Bundle, Plan]:
    """What can be checked before the bundle is loaded. Raises RequestError, BundleError, OSError."""
    options.check_counts(args, "batch")
    check_batch(args)
    bundle = Bundle.open(args.bundle)
    named = {name: getattr(args, name) for name in ("count", "seed", "labels", "size")}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return bundle, Plan.of(bundle, part=_part(args.part), **given, **options.sampling(args))


def _part(text: str | None) -> tuple[int, int]:
    """``--part``: "2/8" is the second of eight. Raises RequestError."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text, re.ASCII)
    if match is None:
        raise RequestError(f"--part {text}: expected I/K, for instance 2/8, the second of eight parts")
    return int(match[1]), int(match[2])


def _size(shape: Sequence[int]) -> str:
    """[H,W,3] or [T,H,W,3] for a person."""
    *frames, height, width, _ = shape
    return "".join(f"{t} frames of " for t in frames) + f"{width}x{height}"


class _Shown:
    """How far it is: a bar on a terminal, elsewhere a line from time to time, with how long the rest takes.

    Whatever ends the run, the line that says so also says that what is made stays.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet, self._part = args.quiet or args.json, part_of(args.out)
        self._bar = Bar(self._quiet, unit="image", goes_on=True)
        self._begun: tuple[float, int] | None = None
        self._last = time.perf_counter()
        self._done, self._total = 0, 0

    def __enter__(self) -> _Shown:
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self._done, self._total = done, total
        if self._begun is None:
            self._begun = now, done
            if done and not self._quiet:
                print(f"parvis: {done} of {total} images are there already", file=sys.stderr)
        self._bar(done, total)
        began, first = self._begun
        if not self._quiet and not sys.stderr.isatty() and now - self._last >= LINES_S and first < done < total:
            self._last = now
            left = (total - done) * (now - began) / (done - first)
            print(f"parvis: {done} of {total} images, {duration(left)} more", file=sys.stderr)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._bar.__exit__()
        if error is None or not self._total:
            return
        kept = f"{self._done} of {self._total} images are in {self._part}, and the same command goes on"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print(printable(f"parvis: stopped; {kept}"), file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(130) from None
        elif isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = f"no space left for {self._part}; free some" if full else explain(error)
            raise OutputsError(f"{why}: {kept}") from error
        elif isinstance(error, MemoryError):
            raise OutputsError(f"{out_of_memory(error, 'give a smaller --batch')}: {kept}") from error
        elif isinstance(error, BundleError | CudaError):
            raise OutputsError(f"{error}: {kept}") from error


def duration(seconds: float) -> str:
    """For instance "3 h 20 min", "12 min" or "40 s"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _report(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(row))
    elif not args.quiet:
        print(printable(text))


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis sample``."""
    p = Parser(
        prog="parvis sample",
        description="Make the images that an evaluation takes (FID), into one .npz: arr_0 images [M,H,W,3] uint8, "
        "arr_1 classes [M]. Image i draws with seed + i. What is made is kept in OUT.part; the same command goes on "
        "after a stop. docs/evaluation.md shows the way to the published figures.",
    )
    options.add_bundle(p)
    p.add_argument("--out", type=options.path, required=True, help=".npz to write")
    p.add_argument("--count", type=int, help="images of all parts (default: 50000)")
    p.add_argument("--seed", type=int, help="of the first image, 0 .. 2**64-1 (default: 0)")
    p.add_argument(
        "--labels",
        choices=LABELS,
        help="random: each class as likely as another (default, as published); balanced: image i is of class i, and "
        "after the last class of the first again",
    )
    p.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="make the images so many pixels a side, bicubic without a filter: 256 for the published FIDs of models of "
        "384 (default: as the bundle makes them)",
    )
    p.add_argument("--part", metavar="I/K", help="make part I of K, for K processes or GPUs; each with its own --out")
    p.add_argument(
        "--join",
        type=options.path,
        nargs="+",
        metavar="NPZ",
        help="make no images: write those of all parts, which BUNDLE made, into --out; no other options",
    )
    options.add_guidance(p)
    options.add_sampling(p)
    p.add_argument("--batch", type=int, help="most images in flight at once (default: a cache of 2 GB)")
    options.add_common(p)
    options.add_no_selftest(p)
    options.add_json(p)
    return p


if __name__ == "__main__":
    raise SystemExit(main())
