"""From what ``gpu.py`` made to the bundles that ship: n = 4, 1 and 16, in int8, and all of them side by side.

    python gpu_bundles.py ../../build/demo/gpu --work ../../build/demo/bundles --out ../../build/demo/shipped

For each model: an export in fp16, held-out images put into it, ``parvis calibrate --weights int8``. OUT then holds the
folders demo, demo-n1 and demo-n16, and ``siblings.png``: images of every class, two by each model, from the same seeds.
Prints a table with the calls and the time of an image on this machine. Exit code 1 where a bundle did not pass its
report, or where the three are larger than ``--most-mb`` together; 2 for what it cannot use, said before it makes
anything. Needs the extras ``cpu,calibrate``.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from par_calibration import heldout
from par_calibration.cli import calibrate
from par_calibration.errors import CalibrationError
from par_model.checkpoint import CheckpointError, open_checkpoint, par_config, vq_config
from par_model.training.cli import numbers, parsed, words
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, folder_for, same, text_of
from par_model.training.transformer import load_codes
from par_model.words import printable
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError

NAMES = {4: "demo", 1: "demo-n1", 16: "demo-n16"}
HELD_OUT_EACH = 20  #: real images of each class that a bundle holds
TIMED = 5  #: images whose times give the median
ROWS = 2  #: of images by each model
LIMITS = {
    "guidance": Limit(0, 1000),
    "top_p": Limit(0, 1, above=True),
    "most_mb": Limit(0, 10**6, above=True),
    "seed": Limit(0, 2**31 - 1),
}
MARGIN = 8  #: pixels between the models


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Make the three bundles of the demo from the results of gpu.py.")
    p.add_argument("results", type=Path, help="folder of gpu.py: tokenizer.pt, model-n4.pt, ..., val.npz")
    p.add_argument("--work", type=Path, required=True, help="folder for the bundles in fp16 and the reports")
    p.add_argument("--out", type=Path, required=True, help="folder for the bundles and the sheet")
    p.add_argument("--guidance", type=float, default=1.5, help="of the bundles (default 1.5)")
    p.add_argument("--top-p", type=float, default=0.85, help="of the bundles (default 0.85)")
    p.add_argument("--most-mb", type=float, default=40.0, help="that the three may have together (default 40)")
    p.add_argument("--seed", type=int, default=1, help="of the sheet (default 1)")
    p.add_argument("--calibrate-options", default="", help="more of parvis calibrate, in one text")
    args = p.parse_args(argv)
    try:
        check(args)
        failed = [name for n, name in NAMES.items() if not made(args, n, name)]
        if failed:
            print(f"gpu_bundles.py: no bundle {', '.join(failed)}; {why(args.work, failed)}", file=sys.stderr)
            return 1
        print(side_by_side({n: args.out / name for n, name in NAMES.items()}, args.out / "siblings.png", args.seed))
    except (InputError, CheckpointError, BundleError, RequestError, CalibrationError, OSError) as error:
        print(f"gpu_bundles.py: error: {printable(text_of(error))}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for name in NAMES.values() for file in (args.out / name).rglob("*")) / 1e6
    print(f"\n{args.out}: {size:.1f} MB in three bundles")
    if size > args.most_mb:
        print(
            f"gpu_bundles.py: the bundles have {size:.1f} MB, --most-mb {args.most_mb:g} allows less; take smaller "
            "weights: --calibrate-options='--weights int4 --group 32 --keep head --refine 2000'",
            file=sys.stderr,
        )
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise InputError, CheckpointError or OSError for what cannot be used, before anything is made of the rest."""
    numbers.check(args, LIMITS)
    more = words("--calibrate-options", args.calibrate_options)
    parsed("--calibrate-options", calibrate.parser(), ["bundle", "--weights", "int8", "--out", "out", *more], False)
    check_folders(args)
    if not args.results.is_dir():
        raise InputError(f"{args.results}: no such folder; expected the results of gpu.py")
    needed = ["tokenizer.pt", *(f"model-n{n}.pt" for n in NAMES), "val.npz"]
    missing = [name for name in needed if not (args.results / name).is_file()]
    if missing:
        raise InputError(
            f"{args.results}: has no {', '.join(missing)}; expected what gpu.py leaves: {', '.join(needed)}"
        )
    vq = vq_config(open_checkpoint(args.results / "tokenizer.pt"))
    codes, _, names = load_codes(args.results / "val.npz", vq.codebook_size)
    for n in NAMES:
        file = args.results / f"model-n{n}.pt"
        model = par_config(open_checkpoint(file))
        given = (model.group_size, model.vocab_size, model.n_classes, model.grid[1:])
        wanted = (n, vq.codebook_size, len(names), codes.shape[1:])
        if given[0] != n or given[1] < wanted[1] or given[2:] != wanted[2:]:
            raise InputError(
                f"{file}: has n, codes, classes and grid {given}; expected {wanted}, of tokenizer.pt and val.npz: give "
                "the results of one try of gpu.py"
            )


def check_folders(args: argparse.Namespace) -> None:
    """Raise InputError where the bundles would replace each other, or the results that they are made of."""
    for option, folder in (("--work", args.work), ("--out", args.out)):
        folder_for(option, folder)
        if same(folder, args.results):
            raise InputError(f"{option} {folder}: is the folder of the results; give another")
        for name in NAMES.values():  # an export replaces such a folder as a whole
            if args.results.resolve().is_relative_to((folder / name).resolve()):
                raise InputError(f"{option} {folder}: would replace {folder / name}, with the results; give another")
    work, out = args.work.resolve(), args.out.resolve()
    if same(work, out) or out.is_relative_to(work) or work.is_relative_to(out):
        raise InputError(f"--out {args.out} and --work {args.work}: one is in the other; give two folders side by side")


def why(work: Path, failed: Sequence[str]) -> str:
    """Where to read why the bundles of these names failed."""
    reports = [str(work / f"{name}.html") for name in failed if (work / f"{name}.html").is_file()]
    return f"see {', '.join(reports)}" if reports else "what is printed above says why"


def made(args: argparse.Namespace, n: int, name: str) -> bool:
    """Export and calibrate one model; False where its report refused it.

    Raises CalibrationError, RequestError, BundleError, OSError.
    """
    whole = args.work / name
    for ending in ("html", "json"):  # of an earlier try
        (args.work / f"{name}.{ending}").unlink(missing_ok=True)
    model, tokenizer = args.results / f"model-n{n}.pt", args.results / "tokenizer.pt"
    export = [
        "export",
        "--checkpoint",
        model,
        "--tokenizer",
        tokenizer,
        "--precision",
        "fp16",
        "--name",
        name,
        "--force",
    ]
    if parvis(*export, "--out", whole, "--guidance", args.guidance, "--top-p", args.top_p) != 0:
        return False
    bundle = Bundle.open(whole)
    val = heldout.read(bundle, args.results / "val.npz", "val.npz").first(HELD_OUT_EACH * bundle.n_classes)
    heldout.attach(bundle, val.tokens, val.labels)
    reports = ["--html", args.work / f"{name}.html", "--json", args.work / f"{name}.json"]
    command = ["calibrate", whole, "--weights", "int8", "--out", args.out / name, "--force", *reports]
    return parvis(*command, *shlex.split(args.calibrate_options)) == 0


def parvis(*options: object) -> int:
    """Run the command; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "par_runtime", *map(str, options)], check=False).returncode


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
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(out)


if __name__ == "__main__":
    sys.exit(main())
