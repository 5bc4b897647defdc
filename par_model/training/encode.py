"""Turn a folder of images or clips into token ids once, before training: ``parvis encode`` (paper, section 4.1)."""

from __future__ import annotations

import argparse
from typing import BinaryIO

import numpy as np
import torch

from par_model.training.clips import ClipFolder, holds_clips
from par_model.training.data import ImageFolder
from par_model.training.device import Batches, choose_device, exact
from par_model.training.files import InputError, keep_inputs, written_beside
from par_model.training.run import channels_last, load_tokenizer, load_video_tokenizer
from par_model.training.video import check_clips
from par_model.vq import VQModel
from par_model.words import printable

GRID = 24  #: codes of a side that pictures are fitted to by default: 384 pixels with VQ-16, as the published models


def run(args: argparse.Namespace) -> None:
    """Write ``args.out``. Raises InputError, CheckpointError, OSError."""
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; give the name of a file, for instance codes.npz")
    keep_inputs(f"--out {args.out}", [args.out], data=args.data, tokenizer=args.tokenizer)
    device = choose_device(args.device)
    if holds_clips(args.data):
        _encode_clips(args, device)
        return
    model = load_tokenizer(args.tokenizer).to(device)
    pixels = model.config.downsampling
    raw = (args.data / "meta.json").is_file()
    size = args.size if raw or args.size is not None else GRID * pixels
    if size is not None and (size < 1 or size % pixels):
        raise InputError(f"--size {size}: expected a multiple of {pixels}, the pixels of a code of this tokenizer")
    data = ImageFolder.open(args.data, size)
    if data.size % pixels:
        raise InputError(f"{args.data}: {data.size} pixels a side are no multiple of {pixels}, the pixels of a code")
    # Opened before the work, which may take hours.
    with written_beside(args.out) as part, part.open("wb") as file:
        made = _save(file, encode(model, data, args.batch), data, "images")
    print(printable(f"{args.out}: {made}"))


def _save(file: BinaryIO, codes: np.ndarray, data: ImageFolder | ClipFolder, what: str) -> str:
    """Write ``codes`` [M,...] with the classes of ``data`` to ``file``; what was written, as a text."""
    names = data.class_names
    labels = data.labels.astype(np.uint8 if len(names) <= 256 else np.uint16)
    np.savez(file, codes=codes, labels=labels, class_names=np.array(names))
    grid = "x".join(map(str, codes.shape[1:]))
    return f"{len(codes)} {what} of {grid} codes, {len(names)} class{'es' if len(names) > 1 else ''}"


def _encode_clips(args: argparse.Namespace, device: torch.device) -> None:
    """``run`` for raw clips and a video tokenizer."""
    if args.size is not None:
        raise InputError(f"--size {args.size}: raw clips have their size; leave it out")
    model = load_video_tokenizer(args.tokenizer).to(device).eval()
    data = ClipFolder.open(args.data)
    check_clips(model.config, data)
    if model.config.codebook_size > 65536:
        raise InputError(f"{args.tokenizer}: {model.config.codebook_size} codes; codes.npz holds ids up to 65535")
    with written_beside(args.out) as part, part.open("wb") as file:
        codes, batches = [], Batches(data, device, keep=False)
        with torch.no_grad(), exact():
            for start in range(0, len(data), args.batch):
                features = model.features(batches.batch(np.arange(start, min(start + args.batch, len(data)))))
                codes.append(model.quantizers.ids(features.float()).cpu().numpy().astype(np.uint16))
        made = _save(file, np.concatenate(codes), data, "clips")
    print(printable(f"{args.out}: {made}"))


@torch.no_grad()
def encode(model: VQModel, data: ImageFolder, batch: int) -> np.ndarray:
    """Code ids [count,h,w] uint16 of every image, in raster order, computed where ``model`` is.

    Raises InputError for a codebook beyond uint16.
    """
    if model.config.codebook_size > 65536:
        raise InputError(f"codebook_size={model.config.codebook_size}; codes.npz holds ids up to 65535")
    channels_last(model).eval()
    device = model.quantize.embedding.weight.device
    batches, out = Batches(data, device, keep=False), []  # each image is needed once
    with exact():
        for start in range(0, len(data), batch):
            x = batches.batch(np.arange(start, min(start + batch, len(data))))
            out.append(model.encode(x.to(memory_format=torch.channels_last)).cpu().numpy().astype(np.uint16))
    return np.concatenate(out)
