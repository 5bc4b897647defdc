"""Tiny video bundles and their checkpoints, with random weights, in about a tenth of a second."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from par_export.bundle import ExportRequest, export
from par_model.config import PARConfig, VideoTokenizerConfig
from par_model.transformer import PAR
from par_model.video import VideoTokenizer

TOKENIZER = VideoTokenizerConfig(
    levels=(4, 3), widths=(8, 16), strides=((2, 2, 2),), res_blocks=1, last_blocks=1, norm_groups=4
)


def tiny_model(n: int = 4, dim: int = 16) -> PARConfig:
    """Clips of 5 frames of 16x16 pixels, 3 x 8 x 8 tokens of 12 codes, 3 classes; ``n`` tokens per group.

    The C step takes widths that are multiples of 32.
    """
    return PARConfig(dim=dim, n_layers=2, n_heads=2, vocab_size=12, n_classes=3, grid=(3, 8, 8), group_size=n)


def tiny_tokenizer(seed: int = 0, config: VideoTokenizerConfig = TOKENIZER) -> VideoTokenizer:
    """A tokenizer whose gains, biases and betas are no ones and zeros, and whose pixels lie inside of [0,1], mostly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoTokenizer(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim != 5 or parameter.shape[2] == 1:  # not of the kernels
                    parameter += 0.2 * torch.randn_like(parameter)
            model.decoder_layers[-1].conv.weight *= 0.3
            model.decoder_layers[-1].conv.bias += 0.5
    return model


def write_checkpoints(folder: Path, n: int = 4, seed: int = 0, dim: int = 16) -> tuple[Path, Path]:
    """The files of a tiny model and of its tokenizer, in ``folder``."""
    config = tiny_model(n, dim)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PAR(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "model.pt", folder / "video.pt"
    files: list[dict[str, Any]] = [
        {"model": model.state_dict(), "config": asdict(config)},
        {"model": tiny_tokenizer(seed).state_dict(), "config": asdict(TOKENIZER) | {"kind": "video-tokenizer"}},
    ]
    for path, file in zip(paths, files, strict=True):
        torch.save(file, path)
    return paths


def write_tiny_video(path: Path, n: int = 4, precision: str = "fp32", encoder: bool = True, dim: int = 16) -> Path:
    """Export a tiny video bundle of ``n`` tokens per group to ``path``, which is returned."""
    model, tokenizer = write_checkpoints(path.with_name(f".{path.name}-checkpoints"), n, dim=dim)
    request = ExportRequest(model, tokenizer, path, precision, encoder=encoder, force=True)
    return export(request, say=lambda _: None)
