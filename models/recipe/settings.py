"""What other sampling settings do to a bundle's images: a table and a sheet, to choose its defaults by.

    python settings.py ../demo --held-out ../../build/demo/val --out ../../build/demo/settings.png

For each guidance, temperature and top-p: ``distance`` is the Frechet distance between generated and held-out images, in
features of the bundle's own encoder, or of another one's (``--encoder-of``); ``spread`` is how much images of a class
differ in these features, relative to the held-out ones of the class (1 where they differ as much). The first row
compares the two halves of the held-out images: no setting can be expected to be much nearer. The features see colours
and layout, hardly whether a face is whole (``docs/calibration.md``); that is what the sheet is for: a row of it for
each row of the table, with the same seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from heldout import check_fits, pixels
from numpy.typing import NDArray
from PIL import Image
from script import run

from par_calibration.errors import CalibrationError
from par_calibration.report.frechet import Features, distance
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, keep_inputs, written_beside
from par_model.training.raw import RawImages
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.system import check_writable

LIMITS = {
    "guidance": Limit(0, 1000),
    "temperature": Limit(0, 100, above=True),
    "top_p": Limit(0, 1, above=True),
    "each": Limit(2, 10**6),  # fewer have no spread
    "shown": Limit(1, 100),
    "seed": Limit(0, 2**31 - 1),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Compare sampling settings of a bundle.")
    p.add_argument("bundle", type=Path, help="folder of a bundle")
    p.add_argument(
        "--encoder-of", type=Path, help="folder of a bundle whose encoder gives the features (default: the bundle)"
    )
    p.add_argument("--held-out", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--out", type=Path, required=True, help="PNG to write")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0, 2.5], help="default: 1.5 2 2.5")
    p.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="default: 1")
    p.add_argument("--top-p", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9], help="default: 0.6 0.7 0.8 0.9")
    p.add_argument("--each", type=int, default=40, help="images of each class that are compared (default 40)")
    p.add_argument("--shown", type=int, default=2, help="images of each class on the sheet (default 2)")
    p.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    args = p.parse_args(argv)

    def work() -> int:
        numbers.check(args, LIMITS)
        inputs = {"bundle": args.bundle, "held_out": args.held_out, "encoder_of": args.encoder_of or args.bundle}
        keep_inputs(f"--out {args.out}", [args.out], **inputs)
        check_writable(args.out)
        compare(args)
        return 0

    return run("settings.py", work, BundleError, RequestError, CalibrationError)


def compare(args: argparse.Namespace) -> None:
    """Print the table and write the sheet. Raises InputError, BundleError, RequestError, CalibrationError, OSError."""
    held_out = RawImages.open(args.held_out)
    first, second = halves(held_out, args.each)
    with Pipeline.load(args.bundle) as pipeline, written_beside(args.out) as part:
        encoder = Bundle.open(args.encoder_of) if args.encoder_of else pipeline.bundle
        check(pipeline.bundle, encoder, held_out, args.held_out)
        features = Features(encoder)
        real, other = features.of(held_out.images[first]), features.of(held_out.images[second])
        classes = held_out.labels[first]
        whole = spread(real, classes)
        if whole == 0:
            raise InputError(f"{args.held_out}: the first {args.each} images of each class are the same; give others")
        print("guidance  temperature  top-p  distance  spread")
        print(f"{'held out':28}  {distance(real, other):8.3f}  {spread(other, classes) / whole:6.2f}", flush=True)
        rows = []
        labels = [label for _ in range(args.each) for label in range(pipeline.bundle.n_classes)]
        for guidance, temperature, top_p in product(args.guidance, args.temperature, args.top_p):
            settings = {"guidance": guidance, "temperature": temperature, "top_p": top_p}
            made = pipeline.generate(labels, seed=args.seed, **settings).images
            assert made is not None
            found = features.of(made)
            numbers_of = f"{distance(real, found):8.3f}  {spread(found, np.array(labels)) / whole:6.2f}"
            print(f"{guidance:8g}  {temperature:11g}  {top_p:5g}  {numbers_of}", flush=True)
            rows.append(np.concatenate(made[: args.shown * pipeline.bundle.n_classes], axis=1))
        Image.fromarray(np.concatenate(rows)).save(part, format="PNG")


def check(bundle: Bundle, encoder: Bundle, held_out: RawImages, folder: Path) -> None:
    """Raise InputError where the features of ``encoder`` cannot compare ``bundle`` with the images in ``folder``."""
    if bundle.video or encoder.video or "encoder" not in encoder.graphs:
        raise InputError(
            f"{encoder.path}: has no encoder of images, whose features are compared; give another bundle, or as "
            "--encoder-of the folder of one that has an encoder"
        )
    if encoder.image_size != bundle.image_size:
        assert encoder.image_size is not None  # it has an encoder
        size = "no images" if bundle.image_size is None else f"images of {pixels(bundle.image_size)}"
        raise InputError(
            f"--encoder-of {encoder.path}: encodes images of {pixels(encoder.image_size)}, {bundle.path} makes {size}: "
            "give two bundles of the same image size"
        )
    check_fits(bundle, folder, held_out)


def halves(data: RawImages, each: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Two sets of ``each`` images of every class of ``data``. Raises InputError where it has less."""
    of_class = [np.flatnonzero(data.labels == label)[: 2 * each] for label in range(len(data.meta["styles"]))]
    least = min(len(rows) for rows in of_class)
    if least < 2 * each:
        raise InputError(f"--each {each}: needs {2 * each} held-out images of every class, one has {least}; give less")
    rows = np.stack(of_class)
    return rows[:, :each].ravel(), rows[:, each:].ravel()


def spread(features: NDArray[np.float64], labels: NDArray[np.integer]) -> float:
    """The mean, over classes, of the summed variances of features [M,F] within a class of ``labels`` [M]."""
    return float(np.mean([features[labels == label].var(0).sum() for label in np.unique(labels)]))


if __name__ == "__main__":
    sys.exit(main())
