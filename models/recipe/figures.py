"""How well a bundle knows images that no training has seen: the figures of models/README.md.

    python figures.py ../demo --held-out ../../build/demo/val --train ../../build/demo/train

Of the held-out images that are equal to no training image: ``nats`` is the model's mean cross entropy per token, of the
tokens that the bundle's own encoder gives (uniform guessing: log of the codebook size); ``dB`` is the PSNR of the
images behind encoder and decoder; ``kept`` is the share of their low-contrast detail that is still there
(``par_model/training/detail.py``). Both folders are as ``render.mjs`` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from heldout import add_folders, read_unseen
from numpy.typing import NDArray
from script import run

from par_model.training.cli import Parser
from par_model.training.detail import low_contrast
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.metrics import psnr_db

CHUNK = 96  #: images at once


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Measure a bundle on images that no training has seen.")
    p.add_argument("bundle", type=Path, help="folder of a bundle with an encoder")
    add_folders(p, each=1000)
    args = p.parse_args(argv)

    def work() -> int:
        images, labels = read_unseen(args, Bundle.open(args.bundle))
        with Pipeline.load(args.bundle) as pipeline:
            nats, psnr, kept = measured(pipeline, images, labels)
        print(f"{len(images)} images: {nats:.3f} nats per token, {psnr:.2f} dB, {kept:.3f} kept")
        return 0

    return run("figures.py", work, BundleError, RequestError)


def measured(pipeline: Pipeline, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Nats per token, PSNR in dB and kept detail of ``images`` [M,H,W,3] with classes ``labels`` [M]."""
    again, nats, detail = np.empty_like(images), 0.0, torch.zeros(2)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        tokens = pipeline.encode(images[part])
        nats -= float(pipeline.score(tokens, labels[part].tolist()).mean(1).sum())
        again[part] = pipeline.decode(tokens)
        detail += low_contrast(*(torch.from_numpy(x[part]).permute(0, 3, 1, 2) / 127.5 - 1 for x in (images, again)))
    return nats / len(images), psnr_db(images, again), float(detail[0] / detail[1].clamp_min(1e-9))


if __name__ == "__main__":
    sys.exit(main())
