"""From trained weights to the bundles that ship: n = 4, 1 and 16, in int8, and all of them side by side.

    python bundles.py ../../build/demo/gpu --work ../../build/demo/bundles --out ../../build/demo/shipped
    python bundles.py ../../build/demo/siblings --take ../demo --work ../../build/demo/bundles --out OUT

The first makes all three of what ``gpu.py`` made, the second the siblings that were trained of a bundle that is there,
which stays as it is (``--take``, one or two bundles). For each model that is made: an export in fp16, held-out images
put into it (of ``val.npz``, or those of the first bundle of ``--take``), ``parvis calibrate --weights int8``.
``--compact`` names those that become smaller still: int4 weights that are trained to stay close, and no encoder;
``--fp16`` those that keep their weights, which a CPU multiplies in bf16 where the report proves it. OUT then holds the
folders of those that were made, of demo (n = 4), demo-n1 and demo-n16; ``--sheet`` is a PNG of images of every class,
two by each of the three models, from the same seeds.
Prints a table with the calls and the time of an image on this machine. Exit code 1 where a bundle did not pass its
report, or where the three are larger than ``--most-mb`` together; 2 for what it cannot use, said before it makes
anything. Needs the extras ``cpu,calibrate``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from script import run

from par_calibration import heldout
from par_calibration.cli import calibrate
from par_calibration.errors import CalibrationError
from par_calibration.places import is_report
from par_model.checkpoint import CheckpointError, open_checkpoint, par_config
from par_model.training.classes import other_class
from par_model.training.cli import Parser, numbers, parsed, words
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, alone_in, folder_for, followed, keep_inputs, same, written_beside
from par_model.training.run import load_tokenizer
from par_model.training.transformer import load_codes
from par_model.vq import VQModel
from par_model.words import printable
from par_runtime import Pipeline
from par_runtime.bundle import HELDOUT, MANIFEST, Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import BundleError, RequestError
from par_runtime.known import raster_array
from par_runtime.metrics import psnr_db
from par_runtime.system import check_different, check_writable
from par_runtime.tokenizer import Tokenizer

NAMES = {4: "demo", 1: "demo-n1", 16: "demo-n16"}
SAME_DB = 40  #: least PSNR of images that two bundles decode from the same tokens, where they have the same tokenizer
HELD_OUT_EACH = 20  #: real images of each class that a bundle holds
#: Options of ``parvis calibrate`` for a bundle, for one of ``--compact`` (half an hour on two cores without AVX-512),
#: and for one of ``--fp16``.
PLAIN = ("--weights", "int8")
COMPACT = ("--weights", "int4", "--group", "32", "--keep", "head", "--refine", "1200")
WHOLE = ("--weights", "keep", "--arithmetic", "bf16", "--cache", "bf16")
FOUND_AGAIN = 0.2  #: least share of tokens that a trained encoder finds again; a random one finds 1 in 1000
LOOKED_AT = 4  #: images that show whether two tokenizers are one
TIMED = 5  #: images whose times give the median
ROWS = 2  #: of images by each model
LIMITS = {
    "guidance": Limit(0, 1000),
    "top_p": Limit(0, 1, above=True),
    "compact": Limit(1, 16),
    "fp16": Limit(1, 16),
    "most_mb": Limit(0, 10**6, above=True),
    "seed": Limit(0, 2**31 - 1),
}
REPORTS = ("html", "json")  #: endings of the reports in --work
MARGIN = 8  #: pixels between the models


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Make the three bundles of the demo from trained weights.")
    p.add_argument("results", type=Path, help="folder with tokenizer.pt, model-n1.pt, ..., and val.npz, as of gpu.py")
    p.add_argument("--work", type=Path, required=True, help="folder for the bundles in fp16 and the reports")
    p.add_argument("--out", type=Path, required=True, help="folder for the bundles")
    p.add_argument(
        "--take", type=Path, nargs="+", default=[], metavar="BUNDLE",
        help="take these for their n as they are, and make the others only",
    )  # fmt: skip
    p.add_argument(
        "--fp16", type=int, nargs="+", default=[], choices=sorted(NAMES), metavar="N",
        help="make these n with the weights as they are, in fp16",
    )  # fmt: skip
    p.add_argument(
        "--compact", type=int, nargs="+", default=[], choices=sorted(NAMES), metavar="N",
        help="make these n smaller: int4 weights that are trained to stay close (half an hour), and no encoder",
    )  # fmt: skip
    p.add_argument("--sheet", type=Path, metavar="PNG", help="images of all three (default: OUT/siblings.png)")
    p.add_argument("--guidance", type=float, default=1.5, help="of the bundles (default 1.5)")
    p.add_argument("--top-p", type=float, default=0.8, help="of the bundles (default 0.8)")
    p.add_argument("--most-mb", type=float, default=40.0, help="that the three may have together (default 40)")
    p.add_argument("--seed", type=int, default=1, help="of the sheet (default 1)")
    p.add_argument("--calibrate-options", default="", help="more of parvis calibrate, in one text")
    args = p.parse_args(argv)
    args.sheet = args.sheet or args.out / "siblings.png"
    return run("bundles.py", lambda: all_three(args), CheckpointError, BundleError, RequestError, CalibrationError)


def all_three(args: argparse.Namespace) -> int:
    """Make the bundles, the sheet and the table; returns the exit code. Errors as in :func:`check` and :func:`made`."""
    taken = taken_bundles(args.take)
    made_here = {n: name for n, name in NAMES.items() if n not in taken}
    check(args, made_here, taken)
    with alone_in("--work", args.work), alone_in("--out", args.out):
        failed = [name for n, name in made_here.items() if not made(args, n, name, taken)]
    if failed:
        print(f"bundles.py: no bundle {', '.join(failed)}; {why(args.work, failed)}", file=sys.stderr)
        return 1
    bundles = {n: taken[n].path if n in taken else args.out / name for n, name in sorted(NAMES.items())}
    print(side_by_side(bundles, args.sheet, args.seed))
    size = sum(megabytes(path) for path in bundles.values())
    print("\n" + printable(f"{', '.join(map(str, bundles.values()))}: {size:.1f} MB together"))
    if size > args.most_mb:
        print(
            f"bundles.py: the bundles have {size:.1f} MB, --most-mb {args.most_mb:g} allows less; make some of them "
            f"smaller: --compact {' '.join(map(str, made_here))}",
            file=sys.stderr,
        )
        return 1
    return 0


def taken_bundles(paths: Sequence[Path]) -> dict[int, Bundle]:
    """The bundles of ``--take`` by their n, in the order that was given. Raises InputError, BundleError, OSError."""
    taken: dict[int, Bundle] = {}
    for path in paths:
        bundle = Bundle.open(path)
        n = bundle.group_size
        if n not in NAMES or HELDOUT not in bundle.files or bundle.image_size is None:
            raise InputError(
                f"--take {path}: expected a bundle of n = 1, 4 or 16 (it has n = {n}) that makes images and has "
                "held-out ones (heldout.py puts them into it)"
            )
        if n in taken:
            raise InputError(f"--take {path}: has n = {n}, as {taken[n].path} has; give one bundle for an n")
        for other in taken.values():
            if (why := other_class(bundle.class_names, other.class_names)) is not None:
                raise InputError(f"--take {path}: {why} as in {other.path}; give bundles of the same classes")
        taken[n] = bundle
    if len(taken) == len(NAMES):
        raise InputError(f"--take {' '.join(map(str, paths))}: leaves no bundle to make; give two at most")
    return taken


def check(args: argparse.Namespace, names: dict[int, str], taken: dict[int, Bundle]) -> None:
    """Raise an error for what cannot be used, before anything is made of the rest.

    Raises InputError, CheckpointError, CalibrationError, RequestError, BundleError, OSError.
    """
    numbers.check(args, LIMITS)
    more = words("--calibrate-options", args.calibrate_options)
    own = ["bundle", "--weights", "int8", "--out", "out", "--html", "html", "--json", "json"]
    without, options = (parsed("--calibrate-options", calibrate.parser(), [*own, *each], False) for each in ((), more))
    for name in ("weights", "out", "html", "json"):
        if getattr(options, name) != getattr(without, name):
            raise InputError(f"--calibrate-options: has --{name}, which bundles.py sets itself; leave it out")
    check_folders(args, names)
    for option, given in (("--compact", args.compact), ("--fp16", args.fp16)):
        for n in set(given) & set(taken):
            raise InputError(
                f"{option} {n}: {taken[n].path} stays as it is; give of {', '.join(map(str, names))}, or do not take it"
            )
    for n in set(args.compact) & set(args.fp16):
        raise InputError(f"--compact {n} --fp16 {n}: one says int4, the other fp16; give one of them")
    if not args.results.is_dir():
        raise InputError(f"{args.results}: no such folder; expected trained weights, as gpu.py leaves them")
    needed = ["tokenizer.pt", *(f"model-n{n}.pt" for n in names), *([] if taken else ["val.npz"])]
    missing = [name for name in needed if not (args.results / name).is_file()]
    if missing:
        raise InputError(f"{args.results}: has no {', '.join(missing)}; expected {', '.join(needed)}")
    sizes, classes, of = sizes_of(args, taken, encodes=bool(set(names) - set(args.compact)))
    for n in names:
        file = args.results / f"model-n{n}.pt"
        checkpoint = open_checkpoint(file)
        model = par_config(checkpoint)
        given = (model.group_size, model.vocab_size, model.n_classes, model.grid[1:])
        if given[0] != n or given[1] < sizes[0] or given[2:] != sizes[1:]:
            raise InputError(
                f"{file}: has n, codes, classes and grid {given}; expected {(n, *sizes)}, of {of}: give what was "
                "trained together"
            )
        if (why := other_class(checkpoint.class_names, classes)) is not None:
            raise InputError(f"{file}: {why} as in {of}; give what was trained together")
    check_different([args.sheet, *(folder / name for folder in (args.work, args.out) for name in names.values())])
    check_writable(args.sheet)


def sizes_of(
    args: argparse.Namespace, taken: dict[int, Bundle], encodes: bool
) -> tuple[tuple[int, int, tuple[int, ...]], Sequence[str] | None, str]:
    """Codes, classes and grid that a model must have, names of the classes, and in words what has them. ``encodes``:
    the encoder is shipped.

    Raises InputError, CheckpointError, CalibrationError, RequestError, BundleError, OSError.
    """
    file = args.results / "tokenizer.pt"
    tokenizer = load_tokenizer(file).eval()
    size = tokenizer.config.codebook_size
    for bundle in taken.values():
        if size != bundle.vocab_size or not decode_alike(tokenizer, bundle):
            raise InputError(
                f"{file}: is not the tokenizer of {bundle.path}, the same tokens give other images; give its own "
                "(from_bundle.py), and models that were trained on its codes"
            )
    if not taken:
        codes, _, names = load_codes(args.results / "val.npz", size)
        return (size, len(names), codes.shape[1:]), names, "tokenizer.pt and val.npz"
    first = next(iter(taken.values()))
    if encodes and (share := found_again(tokenizer, some_codes(first))) < FOUND_AGAIN:
        raise InputError(
            f"{file}: its encoder gives {100 * share:.0f} % of the tokens of an image again, so it is untrained (that "
            "of a bundle without one is random, from_bundle.py says so); give the tokenizer of a bundle that has one"
        )
    return (first.vocab_size, first.n_classes, first.grid[1:]), first.class_names, f"{first.path}"


def some_codes(bundle: Bundle) -> NDArray[np.int64]:
    """Tokens [M,h,w] of the first held-out images of ``bundle``, in raster order. Raises CalibrationError, OSError."""
    some = heldout.read(bundle, bundle.path / HELDOUT, "held-out images").first(LOOKED_AT).tokens
    return raster_array(bundle, some).reshape(-1, *bundle.grid[1:]).astype(np.int64)


def decode_alike(tokenizer: VQModel, bundle: Bundle) -> bool:
    """Whether ``tokenizer`` makes the images of ``bundle`` from the same tokens; they have as many codes.

    Raises CalibrationError, RequestError, BundleError, OSError.
    """
    codes = some_codes(bundle)
    with torch.no_grad():
        images = tokenizer.decode(torch.from_numpy(codes)).clamp(-1, 1)
    ours = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    theirs = Tokenizer(bundle).decode(codes.reshape(len(codes), -1)[:, list(bundle.order)])
    return ours.shape == theirs.shape and psnr_db(ours, theirs) >= SAME_DB


def found_again(tokenizer: VQModel, codes: NDArray[np.int64]) -> float:
    """The share of ``codes`` [M,h,w] that the encoder gives of the images that the decoder makes of them."""
    ids = torch.from_numpy(codes)
    with torch.no_grad():
        return float((tokenizer.encode(tokenizer.decode(ids).clamp(-1, 1)) == ids).float().mean())


def check_folders(args: argparse.Namespace, names: dict[int, str]) -> None:
    """Raise InputError where the bundles would replace each other, or what they are made of."""
    inputs = [("results", args.results), *(("bundle of --take", path) for path in args.take)]
    for option, folder in (("--work", args.work), ("--out", args.out)):
        folder_for(option, folder)
        for what, path in inputs:
            if same(folder, path):
                raise InputError(f"{option} {folder}: is the folder of the {what}; give another")
            for name in names.values():  # an export replaces such a folder as a whole
                if followed(path).is_relative_to(followed(folder / name)):
                    raise InputError(f"{option} {folder}: would replace {folder / name}, with the {what}; give another")
    work, out = followed(args.work), followed(args.out)
    if same(work, out) or out.is_relative_to(work) or work.is_relative_to(out):
        raise InputError(f"--out {args.out} and --work {args.work}: one is in the other; give two folders side by side")
    if args.sheet.is_dir() or args.sheet.suffix.lower() != ".png":
        raise InputError(f"--sheet {args.sheet}: expected a file's name that ends in .png")
    for report in (args.work / f"{name}.{ending}" for name in names.values() for ending in REPORTS):
        if os.path.lexists(report) and not is_report(report):
            raise InputError(f"--work {args.work}: would replace {report}, no report of parvis calibrate; give another")
    for path in args.take:
        keep_inputs(f"--sheet {args.sheet}", [args.sheet], take=path)
    for name in names.values():
        if any(followed(args.sheet).is_relative_to(followed(folder / name)) for folder in (args.work, args.out)):
            raise InputError(f"--sheet {args.sheet}: is in the folder of a bundle that is made; give another name")


def why(work: Path, failed: Sequence[str]) -> str:
    """Where to read why the bundles of these names failed."""
    reports = [str(work / f"{name}.html") for name in failed if (work / f"{name}.html").is_file()]
    return f"see {', '.join(reports)}" if reports else "what is printed above says why"


def made(args: argparse.Namespace, n: int, name: str, taken: dict[int, Bundle]) -> bool:
    """Export and calibrate one model; False where its report refused it.

    Raises CalibrationError, RequestError, BundleError, OSError.
    """
    whole = args.work / name
    for ending in REPORTS:  # of an earlier try
        (args.work / f"{name}.{ending}").unlink(missing_ok=True)
    model, tokenizer = args.results / f"model-n{n}.pt", args.results / "tokenizer.pt"
    export = ["export", "--checkpoint", model, "--tokenizer", tokenizer, "--precision", "fp16", "--name", name]
    if n in args.compact:
        export.append("--no-encoder")
    if parvis(*export, "--out", whole, "--force", "--guidance", args.guidance, "--top-p", args.top_p) != 0:
        return False
    bundle = Bundle.open(whole)
    tokens, labels = held_out(args, bundle, taken)
    heldout.attach(bundle, tokens, labels)
    reports = ["--html", args.work / f"{name}.html", "--json", args.work / f"{name}.json"]
    command = ["calibrate", whole, "--out", args.out / name, "--force", *reports]
    weights = COMPACT if n in args.compact else WHOLE if n in args.fp16 else PLAIN
    return parvis(*command, *weights, *shlex.split(args.calibrate_options)) == 0


def held_out(args: argparse.Namespace, bundle: Bundle, taken: dict[int, Bundle]) -> tuple[Int, Sequence[int]]:
    """Real images for ``bundle``: tokens [M,N] in its sequence order, and classes [M].

    Raises CalibrationError, RequestError, BundleError, OSError.
    """
    if taken:
        first = next(iter(taken.values()))
        theirs = heldout.read(first, first.path / HELDOUT, "held-out images")
        return raster_array(first, theirs.tokens)[:, list(bundle.order)], theirs.labels
    val = heldout.read(bundle, args.results / "val.npz", "val.npz").first(HELD_OUT_EACH * bundle.n_classes)
    return val.tokens, val.labels


def megabytes(path: Path) -> float:
    """Size of the bundle at ``path`` without engines that were built for it. Raises BundleError, OSError."""
    files = Bundle.open(path).files.values()
    return (sum(int(file["bytes"]) for file in files) + (path / MANIFEST).stat().st_size) / 1e6


def parvis(*options: object) -> int:
    """Run the command; returns its exit code. Where this script is stopped, it stops the command, and waits for it."""
    with subprocess.Popen([sys.executable, "-m", "par_runtime", *map(str, options)]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # it removes its unfinished files; leaving the block waits until it has
            raise


def side_by_side(bundles: dict[int, Path], out: Path, seed: int) -> str:
    """Write a sheet of images by the ``bundles`` of each n from the same seeds; returns a table of calls and times.

    Raises BundleError, RequestError, OSError.
    """
    bands, lines = [], ["| | calls | an image here |", "|---|---|---|"]
    for n, path in bundles.items():
        with Pipeline.load(path) as pipeline:
            classes = list(range(pipeline.bundle.n_classes))
            images = pipeline.generate(classes * ROWS, seed=seed).images
            assert images is not None  # the tokenizer is in each bundle
            times = [pipeline.generate([0], seed=seed + i).timings for i in range(TIMED)]
        seconds = statistics.median(each["total"] for each in times) / 1000
        calls = pipeline.bundle.calls
        lines.append(f"| n = {n} | {calls} | {duration(seconds)} |")
        bands.append((f"n = {n}: {calls} calls", images.reshape(ROWS, len(classes), *images.shape[1:])))
    write_sheet(bands, out)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time for the table: milliseconds where seconds say too little."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"


def write_sheet(bands: Sequence[tuple[str, np.ndarray]], out: Path) -> None:
    """Write a PNG with the images [rows,columns,H,W,3] of each band under its caption, at twice their size."""
    rows, columns, high, wide, _ = bands[0][1].shape
    caption = 12
    step = caption + rows * high + MARGIN
    sheet = Image.new("RGB", (columns * wide, step * len(bands) - MARGIN), "white")
    for i, (text, images) in enumerate(bands):
        ImageDraw.Draw(sheet).text((2, i * step), text, fill="black")
        pixels = images.transpose(0, 2, 1, 3, 4).reshape(rows * high, columns * wide, 3)
        sheet.paste(Image.fromarray(pixels), (0, i * step + caption))
    with written_beside(out) as part:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(part, "PNG")


if __name__ == "__main__":
    sys.exit(main())
