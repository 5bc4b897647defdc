"""Turn a folder of images into token ids once, before training: ``parvis encode`` (paper, section 4.1)."""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch

from par_model.training.run import ImageFolder, InputError, channels_last, load_tokenizer
from par_model.vq import VQModel


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
