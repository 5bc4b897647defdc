"""Turn a folder of images into token ids once, before training: ``parvis encode`` (paper, section 4.1)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from par_model.training.run import ImageFolder, InputError, Parser, channels_last, guarded, load_tokenizer
from par_model.vq import VQModel


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
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write ``args.out``. Raises InputError, CheckpointError, OSError."""
    data = ImageFolder.open(args.data)
    codes = encode(load_tokenizer(args.tokenizer), data, args.batch)
    part = args.out.with_suffix(".part.npz")
    np.savez(part, codes=codes, labels=data.labels, class_names=np.array(data.class_names))
    os.replace(part, args.out)
    print(f"{args.out}: {len(codes)} images of {codes.shape[1]}x{codes.shape[2]} codes")


@torch.no_grad()
def encode(model: VQModel, data: ImageFolder, batch: int) -> np.ndarray:
    """Code ids [count,h,w] uint16 of every image, in raster order. Raises InputError for a codebook beyond uint16."""
    if model.config.codebook_size > 65536:
        raise InputError(f"codebook_size={model.config.codebook_size}; codes.npz holds ids up to 65535")
    channels_last(model).eval()
    out = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(data.images), batch):
            x = data.batch(np.arange(start, min(start + batch, len(data.images))))
            out.append(model.encode(x.to(memory_format=torch.channels_last)).numpy().astype(np.uint16))
    return np.concatenate(out)


if __name__ == "__main__":
    raise SystemExit(main())
