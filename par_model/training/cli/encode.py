"""``parvis encode``: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from par_model.training.cli import Parser, add_device, path, verb


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis encode``."""
    p = Parser(
        prog="parvis encode",
        description="Encode a folder of images, or of raw clips, to token ids (codes.npz), which 'parvis train' takes. "
        "Pictures of any format and size are turned upright, put on white where transparent, cropped to their "
        "largest middle square and scaled.",
    )
    p.add_argument(
        "--data",
        type=path,
        required=True,
        help="a folder with a folder of pictures (PNG, JPEG, WebP, ...) for each class, or with the "
        "pictures themselves; or the raw form: images.u8 (or clips.u8), labels.u8, meta.json",
    )
    p.add_argument("--tokenizer", type=path, required=True, help="its weights: of parvis train-tokenizer, or published")
    p.add_argument("--out", type=path, required=True, help="codes.npz to write")
    p.add_argument(
        "--size", type=int, help="pixels of a side that pictures are scaled to (default: 24 codes; 384 with VQ-16)"
    )
    p.add_argument("--batch", type=int, default=64, help="images encoded at once")
    add_device(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """``parvis encode``; returns the exit code."""
    return verb(parser(), argv, "encode", "run")


if __name__ == "__main__":
    raise SystemExit(main())
