"""The report of a checkpoint: its architecture as far as the file shows it, and what its bundle will need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from par_export.graphs.step import padded_head_dim
from par_model.checkpoint import (
    FLOATS,
    INDEXES,
    UNUSED,
    Checkpoint,
    CheckpointError,
    Inferred,
    Kind,
    infer,
    is_video,
    open_checkpoint,
    some,
    video_config,
    vq_config,
)
from par_model.config import PARConfig
from par_model.ordering import phases
from par_runtime.cost.architecture import Architecture, phases_of
from par_runtime.cost.data_sheets import bandwidth_bounds_ms
from par_runtime.cost.memory import memory_table
from par_runtime.dtypes import BYTES

READ_UP_TO_BYTES = 2 * 10**9  #: larger files are described by their keys and shapes alone
MEMORY_PRECISIONS = ("fp32", "fp16")  #: what a CPU computes in, and a usual precision of GPUs


def describe(
    path: Path, weights: Kind | None = None, heads: int | None = None, grid: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Kind, sizes, and what the file leaves open, as plain values. Sizes in bytes, times in milliseconds.

    ``heads``, ``grid`` (T, H, W): of a model, in place of what the file says. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(path, weights)
    tensors = checkpoint.tensors
    out: dict[str, Any] = {
        "path": str(path),
        "parameters": sum(t.numel() for key, t in tensors.items() if key != UNUSED),
        "tensors": len(tensors),
        "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "files": {file.name: file.stat().st_size for file in _files(path)},
        "open": "",
        "notes": list(checkpoint.notes),
        "warnings": _not_finite(checkpoint),
    }
    if "quantize.embedding.weight" in tensors:
        vq = vq_config(checkpoint)
        return out | {"kind": "VQ tokenizer", "config": vars(vq) | {"downsampling": vq.downsampling}}
    if is_video(checkpoint):
        video = video_config(checkpoint)
        time, side = video.downsampling
        shape = {"codes": video.codebook_size, "frames per latent frame": time, "pixels per code": f"{side}x{side}"}
        return out | {"kind": "video tokenizer", "config": vars(video) | shape}
    try:
        inferred = infer(checkpoint, heads=heads, grid=grid)
    except CheckpointError as error:
        if "give --heads" not in str(error) and "give --grid" not in str(error):
            raise
        return out | {
            "kind": "PAR model",
            "config": _sizes(_any_config(checkpoint)),
            "open": str(error).removeprefix(f"{checkpoint.path}: "),
        }
    kind = "PAR model" if inferred.config.group_size > 1 else "AR model (LlamaGen)"
    out["warnings"] += inferred.warnings
    return out | {"kind": kind, "config": _sizes(inferred.config) | _settled(inferred)} | _needs(inferred.config)


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    """A line for weights that are NaN or infinite, which an export refuses; a large file is not read for it."""
    tensors = checkpoint.tensors
    if sum(t.numel() * t.element_size() for t in tensors.values()) > READ_UP_TO_BYTES:
        return []
    wrong = [k for k, t in tensors.items() if t.dtype in FLOATS and not bool(t.sum(dtype=torch.float64).isfinite())]
    return [f"NaN or infinite numbers in {some(wrong)} ({len(wrong)} of {len(tensors)} tensors)"] if wrong else []


def _any_config(checkpoint: Checkpoint) -> PARConfig:
    """A config whose widths are the checkpoint's; its head count and grid are arbitrary ones that fit the shapes."""
    group = checkpoint.tensors.get("spe_tok_embeddings.special_embeddings.weight")
    side = max(4, int(((group.shape[0] + 1) if group is not None else 1) ** 0.5) * 2)
    return infer(checkpoint, heads=1, grid=(1, side, side)).config


def _files(path: Path) -> list[Path]:
    """The files that the checkpoint at ``path`` may consist of."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return sorted({path, *path.parent.glob("*.safetensors")}) if path.name.endswith(INDEXES) else [path]


def _sizes(config: PARConfig) -> dict[str, Any]:
    """The sizes that the shapes of the weights show."""
    return {
        "width": config.dim,
        "layers": config.n_layers,
        "ffn width": config.ffn_dim,
        "codes": config.vocab_size,
        "classes": config.n_classes,
        "n": config.group_size,
    }


def _settled(inferred: Inferred) -> dict[str, Any]:
    """Heads, grid and calls, with the source of each."""
    config = inferred.config
    return {
        "heads": f"{config.n_heads} of {config.head_dim} ({inferred.heads_from})",
        "grid": f"{'x'.join(map(str, config.grid))} ({inferred.grid_from})",
        f"calls per {'clip' if config.grid[0] > 1 else 'image'}": sum(phase.repeat for phase in phases(config)),
    }


def _needs(config: PARConfig) -> dict[str, Any]:
    """The memory for guided batches of the model, and the least time of a guided image by memory bandwidth alone."""
    sizes = (config.dim, config.n_layers, config.n_heads, padded_head_dim(config), config.ffn_dim, config.vocab_size)
    architecture = Architecture(*sizes, phases_of(config.group_size, config.n_tokens))
    return {
        "parameters_read_per_call": architecture.step_parameters,
        "memory_bytes": memory_table(architecture, {name: (BYTES[name], BYTES[name]) for name in MEMORY_PRECISIONS}),
        "bound_ms": bandwidth_bounds_ms(architecture, BYTES["fp16"], BYTES["fp16"]),
    }
