"""``parvis encode``: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from par_model.training.cli import Parser, guarded


def parser() -> argparse.ArgumentParser:
    """The command line of ``parvis encode``."""
    p = Parser(prog="parvis encode", description="Encode a folder of images to token ids (codes.npz).")
    p.add_argument("--data", type=Path, required=True, help="folder with images.u8, labels.u8, meta.json")
    p.add_argument("--tokenizer", type=Path, required=True, help="checkpoint.pt of parvis train-tokenizer")
    p.add_argument("--out", type=Path, required=True, help="codes.npz to write")
    p.add_argument("--batch", type=int, default=64)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """``parvis encode``; returns the exit code."""
    args = parser().parse_args(argv)

    def work() -> None:
        from par_model.training.encode import run

        run(args)

    return guarded(work)


if __name__ == "__main__":
    raise SystemExit(main())
