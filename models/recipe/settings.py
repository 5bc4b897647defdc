"""What other sampling settings do to a bundle's images: a table and a sheet, to choose its defaults by.

    python settings.py ../demo --held-out ../../build/demo/val --out ../../build/demo/settings.png

For each guidance and top-p: ``distance`` is the Frechet distance between generated and held-out images, in features of
the bundle's own encoder; ``spread`` is how much images of a class differ in these features, relative to the held-out
ones of the class (1 where they differ as much). The first row compares the two halves of the held-out images: no
setting can be expected to be much nearer. The features see colours and layout, hardly whether a face is whole
(``docs/calibration.md``); that is what the sheet is for, a row of it for each row of the table, with the same seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_calibration.errors import CalibrationError
from par_calibration.report.frechet import Features, distance
from par_model.training.cli import numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, keep_inputs, text_of, written_beside
from par_model.training.raw import RawImages
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError

LIMITS = {
    "guidance": Limit(0, 1000),
    "top_p": Limit(0, 1, above=True),
    "each": Limit(1, 10**6),
    "shown": Limit(1, 100),
    "seed": Limit(0, 2**31 - 1),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Compare sampling settings of a bundle.")
    p.add_argument("bundle", type=Path, help="folder of a bundle with an encoder")
    p.add_argument("--held-out", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--out", type=Path, required=True, help="PNG to write")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0, 2.5], help="default: 1.5 2 2.5")
    p.add_argument("--top-p", type=float, nargs="+", default=[0.8, 0.85, 0.9, 0.95], help="default: 0.8 0.85 0.9 0.95")
    p.add_argument("--each", type=int, default=40, help="images of each class that are compared (default 40)")
    p.add_argument("--shown", type=int, default=2, help="images of each class on the sheet (default 2)")
    p.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    args = p.parse_args(argv)
    try:
        numbers.check(args, LIMITS)
        keep_inputs(f"--out {args.out}", [args.out], bundle=args.bundle, held_out=args.held_out)
        compare(args)
    except (InputError, BundleError, RequestError, CalibrationError, OSError) as error:
        print(f"settings.py: error: {text_of(error)}", file=sys.stderr)
        return 2
    return 0


def compare(args: argparse.Namespace) -> None:
    """Print the table and write the sheet. Raises InputError, BundleError, RequestError, CalibrationError, OSError."""
    held_out = RawImages.open(args.held_out)
    first, second = halves(held_out, args.each)
    with Pipeline.load(args.bundle) as pipeline, written_beside(args.out) as part:
        check(pipeline.bundle, held_out, args.held_out)
        features = Features(pipeline.bundle)
        real, other = features.of(held_out.images[first]), features.of(held_out.images[second])
        classes = held_out.labels[first]
        whole = spread(real, classes)
        print("guidance  top-p  distance  spread")
        print(f"{'held out':15}  {distance(real, other):8.3f}  {spread(other, classes) / whole:6.2f}", flush=True)
        rows = []
        labels = [label for _ in range(args.each) for label in range(pipeline.bundle.n_classes)]
        for guidance in args.guidance:
            for top_p in args.top_p:
                made = pipeline.generate(labels, seed=args.seed, guidance=guidance, top_p=top_p).images
                assert made is not None
                found = features.of(made)
                numbers_of = f"{distance(real, found):8.3f}  {spread(found, np.array(labels)) / whole:6.2f}"
                print(f"{guidance:8g}  {top_p:5g}  {numbers_of}", flush=True)
                rows.append(np.concatenate(made[: args.shown * pipeline.bundle.n_classes], axis=1))
        Image.fromarray(np.concatenate(rows)).save(part, format="PNG")


def check(bundle: Bundle, held_out: RawImages, folder: Path) -> None:
    """Raise InputError where ``bundle`` cannot be compared with ``held_out``, the images in ``folder``."""
    if bundle.video or "encoder" not in bundle.graphs:
        raise InputError(f"{bundle.path}: has no encoder of images, whose features are compared; give another bundle")
    size, given = bundle.image_size, held_out.images.shape[1:3]
    assert size is not None  # it has an encoder
    if size != given or len(held_out.meta["styles"]) != bundle.n_classes:
        raise InputError(
            f"{folder}: {len(held_out.meta['styles'])} classes of images of {given[1]}x{given[0]} pixels; the bundle "
            f"makes {bundle.n_classes} classes of {size[1]}x{size[0]}: give the images that it was made for"
        )


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
