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

from par_calibration import heldout
from par_model.training.files import InputError, text_of
from par_model.training.raw import RawImages
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Put held-out images, as tokens, into a bundle.")
    p.add_argument("bundle", type=Path, help="folder of a bundle with an encoder")
    add_folders(p, each=20)
    args = p.parse_args(argv)
    try:
        bundle = Bundle.open(args.bundle)
        images, labels = read_unseen(args)
        file = heldout.attach(bundle, Tokenizer(bundle).encode(images), labels.tolist())
        Bundle.open(args.bundle)
    except (InputError, BundleError, RequestError, OSError, ValueError) as error:
        print(f"heldout.py: error: {text_of(error)}", file=sys.stderr)
        return 2
    print(f"{file}: {len(images)} images, {file.stat().st_size} bytes")
    return 0


def add_folders(p: argparse.ArgumentParser, each: int) -> None:
    """Add the options that ``read_unseen`` reads; ``each`` is the default of ``--each``."""
    p.add_argument("--held-out", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--train", type=Path, required=True, help="the images that the models were trained on")
    p.add_argument("--each", type=int, default=each, help=f"most images of each class (default {each})")


def read_unseen(args: argparse.Namespace) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first ``--each`` images [M,H,W,3] of every class of ``--held-out`` that are not in ``--train``, and their
    labels [M].

    Raises InputError, OSError.
    """
    images, labels = raw(args.held_out)
    seen = {hashlib.sha256(image).digest() for image in raw(args.train)[0]}
    chosen = unseen(images, labels, seen, args.each)
    return images[chosen], labels[chosen]


def raw(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [M,H,W,3], memory-mapped, and labels [M] of a folder of ``render.mjs``. Raises InputError, OSError."""
    raw_images = RawImages.open(folder)
    return raw_images.images, raw_images.labels


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
