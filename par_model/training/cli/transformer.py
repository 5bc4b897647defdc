"""``parvis train``: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from par_model.config import ORDERS, SIZES
from par_model.training.cli import Parser, add_run, path, verb


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis train``."""
    p = Parser(prog="parvis train", description="Train a PAR model on encoded images or clips.")
    p.add_argument("--codes", type=path, required=True, help="codes.npz of parvis encode")
    p.add_argument("--val", type=path, required=True, help="held-out codes.npz")
    p.add_argument("--vocab", type=int, required=True, help="codebook size of the tokenizer")
    add_run(p, "sheets", "images", steps=10000, batch=32, report=100)
    p.add_argument(
        "--init", type=path, metavar="MODEL", help="begin with the weights of this model, which may have another n"
    )
    p.add_argument("--tokenizer", type=path, help="tokenizer checkpoint, for sample sheets")
    p.add_argument("--size", choices=list(SIZES), default="tiny", help="of the model, by name")
    p.add_argument("--dim", type=int, help="width, with --layers and --heads instead of --size")
    p.add_argument("--layers", type=int, help="with --dim and --heads")
    p.add_argument("--heads", type=int, help="with --dim and --layers")
    p.add_argument("--group-size", type=int, default=4, help="n, tokens per parallel step")
    p.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: AdamW for the rest")
    p.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    p.add_argument("--lr", type=float, help="of AdamW (default: 1e-4 per 256 images of a batch)")
    p.add_argument(
        "--muon-lr",
        type=float,
        help="of Muon (default: 0.02; half of it or less keeps more of good weights that --init gives)",
    )
    p.add_argument("--warmup", type=int, default=50, help="steps in which the learning rate rises from 0")
    p.add_argument("--dropout", type=float, default=0.1, help="of the embeddings and of what each layer adds")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights, which is exported")
    p.add_argument("--sheet", type=int, default=500, help="steps between sample sheets")
    p.add_argument("--guidance", type=float, default=2.0, help="of the sample sheets")
    p.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: where the device has instructions for it)",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="let torch.compile fuse the kernels of a layer: worth it on a GPU in runs of a few minutes or more",
    )
    add_ablations(p)
    return p


def add_ablations(p: argparse.ArgumentParser) -> None:
    """Add what the paper's ablations change (its table 4). They are for comparing: the defaults are the method."""
    group = p.add_argument_group("ablations of the paper", "to see what the method gains by each of its parts")
    group.add_argument(
        "--order",
        choices=ORDERS,
        default=ORDERS[0],
        help="distant: a group takes one token in each of n regions; raster: it is n neighbours of the raster order",
    )
    group.add_argument(
        "--parallel-initial",
        action="store_true",
        help="draw the first n tokens in one call too, and not one by one",
    )
    group.add_argument(
        "--causal-groups",
        action="store_true",
        help="a token of a group does not see the inputs of those behind it; such a model cannot be exported",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``parvis train``; returns the exit code."""
    return verb(parser(), argv, "transformer")


if __name__ == "__main__":
    raise SystemExit(main())
