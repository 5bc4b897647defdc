"""From what ``gpu.py`` made to the bundles that ship: n = 4, 1 and 16, in int8, and all of them side by side.

    python gpu_bundles.py ../../build/demo/gpu --work ../../build/demo/bundles --out ../../build/demo/shipped

For each model: an export in fp16, held-out images put into it, ``parvis calibrate --weights int8``. OUT then holds the
folders demo, demo-n1 and demo-n16, and ``siblings.png``: images of every class, two by each model, from the same seeds.
Prints a table with the calls and the time of an image on this machine. Exit code 1 where a bundle did not pass its
report, or where the three are larger than ``--most-mb`` together. Needs the extras ``cpu,calibrate``.
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
from par_calibration.errors import CalibrationError
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError

NAMES = {4: "demo", 1: "demo-n1", 16: "demo-n16"}
HELD_OUT_EACH = 20  #: real images of each class that a bundle holds
TIMED = 5  #: images whose times give the median
ROWS = 2  #: of images by each model
MARGIN = 8  #: pixels between the models


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Make the three bundles of the demo from the results of gpu.py.")
    p.add_argument("results", type=Path, help="folder of gpu.py: tokenizer.pt, model-n4.pt, ..., val.npz")
    p.add_argument("--work", type=Path, required=True, help="folder for the bundles in fp16 and the reports")
    p.add_argument("--out", type=Path, required=True, help="folder for the bundles and the sheet")
    p.add_argument("--guidance", type=float, default=1.5, help="of the bundles (default 1.5)")
    p.add_argument("--top-p", type=float, default=0.95, help="of the bundles (default 0.95)")
    p.add_argument("--most-mb", type=float, default=40.0, help="that the three may have together (default 40)")
    p.add_argument("--seed", type=int, default=1, help="of the sheet (default 1)")
    p.add_argument("--calibrate-options", default="", help="more of parvis calibrate, in one text")
    args = p.parse_args(argv)
    try:
        failed = [name for n, name in NAMES.items() if not made(args, n, name)]
        if failed:
            print(f"gpu_bundles.py: no bundle {', '.join(failed)}; see the report in {args.work}", file=sys.stderr)
            return 1
        print(side_by_side({n: args.out / name for n, name in NAMES.items()}, args.out / "siblings.png", args.seed))
    except (BundleError, RequestError, CalibrationError, OSError) as error:
        print(f"gpu_bundles.py: error: {error}", file=sys.stderr)
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


def made(args: argparse.Namespace, n: int, name: str) -> bool:
    """Export and calibrate one model; False where its report refused it.

    Raises CalibrationError, RequestError, BundleError, OSError.
    """
    whole = args.work / name
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
    calibrate = ["calibrate", whole, "--weights", "int8", "--out", args.out / name, "--force", *reports]
    return parvis(*calibrate, *shlex.split(args.calibrate_options)) == 0


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
        lines.append(f"| n = {n} | {calls} | {seconds:.2f} s |")
        bands.append((f"n = {n}: {calls} calls", images.reshape(ROWS, len(classes), *images.shape[1:])))
    write_sheet(bands, out)
    return "\n".join(lines)


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
