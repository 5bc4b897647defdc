"""Give a bundle real images that no training has seen, as tokens, for the reports of ``parvis calibrate``.

    python heldout.py ../demo --held-out ../../build/demo/val --train ../../build/demo/train

Takes the first ``--each`` images of every class of the held-out set that are equal to no training image, encodes them
with the bundle's own encoder, and writes ``heldout.npz`` into the bundle with its hash in the manifest. No other byte
of the bundle changes. Both folders are as ``render.mjs`` writes them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from script import run

from par_calibration import heldout
from par_model.training.classes import other_class
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError
from par_model.training.raw import RawImages
from par_model.words import printable
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.tokenizer import Tokenizer

EACH = Limit(1, 10**6)  #: of ``--each``


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Put held-out images, as tokens, into a bundle.")
    p.add_argument("bundle", type=Path, help="folder of a bundle with an encoder")
    add_folders(p, each=20)
    args = p.parse_args(argv)

    def work() -> int:
        bundle = Bundle.open(args.bundle)
        images, labels = read_unseen(args, bundle)
        file = heldout.attach(bundle, Tokenizer(bundle).encode(images), labels.tolist())
        print(printable(f"{file}: {len(images)} images, {file.stat().st_size} bytes"))
        return 0

    return run("heldout.py", work, BundleError, RequestError)


def add_folders(p: argparse.ArgumentParser, each: int) -> None:
    """Add the options that ``read_unseen`` reads; ``each`` is the default of ``--each``."""
    p.add_argument("--held-out", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--train", type=Path, required=True, help="the images that the models were trained on")
    p.add_argument("--each", type=int, default=each, help=f"most images of each class (default {each})")


def read_unseen(args: argparse.Namespace, bundle: Bundle) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first ``--each`` images [M,H,W,3] of every class of ``--held-out`` that are not in ``--train``, and their
    labels [M]; M is 1 or more.

    Raises InputError where they are not of the classes and the size of ``bundle``; OSError.
    """
    numbers.check(argparse.Namespace(each=args.each), {"each": EACH})
    held_out, train = RawImages.open(args.held_out), RawImages.open(args.train)
    for folder, images in ((args.held_out, held_out), (args.train, train)):
        check_fits(bundle, folder, images)
    seen = {hashlib.sha256(image).digest() for image in train.images}
    chosen = unseen(held_out.images, held_out.labels, seen, args.each)
    if not chosen:
        raise InputError(f"{args.held_out}: every image is in {args.train} too; give images that are not")
    return held_out.images[chosen], held_out.labels[chosen]


def check_fits(bundle: Bundle, folder: Path, raw: RawImages) -> None:
    """Raise InputError where the images of ``folder`` are not of the size and the classes of ``bundle``."""
    size, given = bundle.image_size, raw.images.shape[1:3]
    if bundle.video or size is None:
        raise InputError(f"{bundle.path}: makes {'clips' if bundle.video else 'no images'}; give a bundle of images")
    if size != given or len(raw.meta["styles"]) != bundle.n_classes:
        raise InputError(
            f"{folder}: {len(raw.meta['styles'])} classes of images of {pixels(given)}; the bundle makes "
            f"{bundle.n_classes} classes of {pixels(size)}: give the images that it was made for"
        )
    why = other_class(raw.meta["styles"], bundle.class_names)
    if why is not None:
        raise InputError(f"{folder}: {why} as in {bundle.path}; give the images that it was made for")


def pixels(size: tuple[int, int]) -> str:
    """``size`` (height, width) as errors say it."""
    return f"{size[1]}x{size[0]} pixels"


def unseen(images: NDArray[np.uint8], labels: NDArray[np.uint8], seen: set[bytes], each: int) -> list[int]:
    """The first ``each`` images of every class whose sha256 is not in ``seen``, in their order."""
    chosen: list[int] = []
    counts: dict[int, int] = {}
    for i, label in enumerate(labels.tolist()):
        if counts.get(label, 0) < each and hashlib.sha256(images[i]).digest() not in seen:
            chosen.append(i)
            counts[label] = counts.get(label, 0) + 1
    return chosen


if __name__ == "__main__":
    sys.exit(main())
