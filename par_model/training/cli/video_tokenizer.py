"""``parvis train-video-tokenizer``: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from par_model.training.cli import Parser, add_run, path, verb


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis train-video-tokenizer``."""
    p = Parser(
        prog="parvis train-video-tokenizer",
        description="Train a causal video tokenizer (FSQ) on raw clips: a folder with clips.u8 "
        "(uint8 [count,frames,size,size,channels]), labels.u8 (uint8 [count]) and meta.json (count, frames, size, "
        "channels 1 or 3, class_names).",
    )
    p.add_argument("--data", type=path, required=True, help="a folder with clips.u8, labels.u8, meta.json")
    p.add_argument("--val", type=path, required=True, help="held-out folder of the same form")
    add_run(p, "sheet.png", "clips", steps=1500, batch=16, report=100)
    p.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    p.add_argument(
        "--levels",
        type=int,
        nargs="+",
        metavar="N",
        default=[8, 5, 5, 5],
        help="of FSQ; their product is the number of codes (default: 8 5 5 5)",
    )
    p.add_argument(
        "--widths",
        type=int,
        nargs="+",
        metavar="N",
        default=[16, 48, 96],
        help="channels of each level (default: 16 48 96)",
    )
    p.add_argument(
        "--time-strides",
        type=int,
        nargs="+",
        metavar="N",
        default=[2, 2],
        help="1 or 2 between each two levels: by how much time shrinks there; height and width halve (default: 2 2)",
    )
    p.add_argument("--res-blocks", type=int, default=1, help="residual units of a level")
    p.add_argument("--last-blocks", type=int, default=2, help="residual units of the last level")
    p.add_argument("--norm-groups", type=int, default=16, help="of the group norms; a divisor of all widths")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """``parvis train-video-tokenizer``; returns the exit code."""
    return verb(parser(), argv, "video")


if __name__ == "__main__":
    raise SystemExit(main())
