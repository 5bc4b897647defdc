"""``parvis train-tokenizer``: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from par_model.training.cli import Parser, add_run, path, verb


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis train-tokenizer``."""
    p = Parser(prog="parvis train-tokenizer", description="Train a VQ tokenizer on a folder of images.")
    p.add_argument(
        "--data",
        type=path,
        required=True,
        help="a folder with a folder of pictures (PNG, JPEG, WebP, ...) for each class, or with the "
        "pictures themselves; or the raw form: images.u8, labels.u8, meta.json",
    )
    p.add_argument("--val", type=path, required=True, help="held-out folder of the same form")
    add_run(p, "sheet.png", "images", steps=4000, batch=32, report=250)
    p.add_argument("--size", type=int, help="pixels of a side that pictures are scaled to; needed for pictures")
    start = p.add_mutually_exclusive_group()
    start.add_argument(
        "--init",
        type=path,
        metavar="TOKENIZER",
        help="begin with the weights of this tokenizer, which gives the sizes, and train all of it further. Codes "
        "move, so a model of these codes must be trained further too",
    )
    start.add_argument(
        "--encoder-for",
        type=path,
        metavar="TOKENIZER",
        help="keep this tokenizer's codebook, decoder and sizes, and train an encoder for them from nothing",
    )
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    p.add_argument(
        "--structure",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the structural dissimilarity (of SSIM) in the loss: 1 to 3 keep features of low contrast, "
        "as of dark faces, that the other parts of the loss give up",
    )
    p.add_argument("--codes", type=int, default=1024, help="codebook size")
    p.add_argument("--channels", type=int, default=32, help="at full resolution")
    p.add_argument("--res-blocks", type=int, default=1, help="per encoder level; the decoder has one more")
    p.add_argument(
        "--multipliers",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="channels of each level; every level after the first halves the size (default: 1 2 3)",
    )
    p.add_argument("--z-channels", type=int, default=64, help="of the encoder's output")
    p.add_argument("--norm-groups", type=int, default=8, help="of the group norms; a divisor of all channels")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """``parvis train-tokenizer``; returns the exit code."""
    return verb(parser(), argv, "tokenizer")


if __name__ == "__main__":
    raise SystemExit(main())
