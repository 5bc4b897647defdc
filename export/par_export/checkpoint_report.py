"""What a checkpoint is, as far as its file shows; what its bundle will need, and the least time a GPU allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from par_export.graphs.step import padded_head_dim
from par_model.checkpoint.file import INDEX
from par_model.checkpoint.model import UNUSED, Checkpoint, CheckpointError, Inferred, infer, open_checkpoint, vq_config
from par_model.config import PARConfig
from par_model.ordering import phases
from par_runtime.bench.subjects.base import Shape
from par_runtime.cost.bound import DATA_SHEETS, all_calls, bound, phases_of, step_parameters
from par_runtime.dtypes import BYTES

MEMORY_PRECISIONS = ("fp32", "fp16")  #: what a CPU computes in, and a usual precision of GPUs
BATCHES = (1, 2, 4, 8)


def describe(path: Path) -> dict[str, Any]:
    """Kind, sizes, and what the file leaves open, as plain values. Sizes in bytes, times in milliseconds.

    Raises CheckpointError.
    """
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    out: dict[str, Any] = {
        "path": str(path),
        "parameters": sum(t.numel() for key, t in tensors.items() if key != UNUSED),
        "tensors": len(tensors),
        "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "files": {file.name: file.stat().st_size for file in _files(path)},
        "open": "",
    }
    if "quantize.embedding.weight" in tensors:
        vq = vq_config(checkpoint)
        return out | {"kind": "VQ tokenizer", "config": vars(vq) | {"downsampling": vq.downsampling}}
    try:
        inferred = infer(checkpoint)
    except CheckpointError as error:
        if "give --heads" not in str(error) and "give --grid" not in str(error):
            raise
        return out | {
            "kind": "PAR model",
            "config": _sizes(_any_config(checkpoint)),
            "open": str(error).removeprefix(f"{checkpoint.path}: "),
        }
    kind = "PAR model" if inferred.config.group_size > 1 else "AR model (LlamaGen)"
    return out | {"kind": kind, "config": _sizes(inferred.config) | _settled(inferred)} | _needs(inferred.config)


def _any_config(checkpoint: Checkpoint) -> PARConfig:
    """A config whose widths are the checkpoint's; its head count and grid are arbitrary ones that fit the shapes."""
    group = checkpoint.tensors.get("spe_tok_embeddings.special_embeddings.weight")
    side = max(4, int(((group.shape[0] + 1) if group is not None else 1) ** 0.5) * 2)
    return infer(checkpoint, heads=1, grid=(1, side, side)).config


def _files(path: Path) -> list[Path]:
    """The files that the checkpoint at ``path`` may consist of."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return sorted({path, *path.parent.glob("*.safetensors")}) if path.name.endswith(INDEX) else [path]


def _sizes(config: PARConfig) -> dict[str, Any]:
    return {
        "width": config.dim,
        "layers": config.n_layers,
        "ffn width": config.ffn_dim,
        "codes": config.vocab_size,
        "classes": config.n_classes,
        "n": config.group_size,
    }


def _settled(inferred: Inferred) -> dict[str, Any]:
    config = inferred.config
    return {
        "heads": f"{config.n_heads} of {config.head_dim} ({inferred.heads_from})",
        "grid": f"{'x'.join(map(str, config.grid))} ({inferred.grid_from})",
        "calls per image": sum(phase.repeat for phase in phases(config)),
    }


def _needs(config: PARConfig) -> dict[str, Any]:
    """The memory for guided batches of the model, and the least time of a guided image by memory bandwidth alone."""
    head_dim = padded_head_dim(config)
    calls = phases_of(config.group_size, config.n_tokens)
    shape = Shape(config.dim, config.n_layers, config.n_heads, head_dim, config.ffn_dim, config.vocab_size, calls)
    read = step_parameters(shape)
    cache = (
        2 * 2 * config.n_layers * config.n_heads * head_dim * config.n_tokens
    )  # numbers of an image: 2 rows, k and v
    return {
        "parameters_read_per_call": read,
        "memory_bytes": {
            str(images): {p: int((read + images * cache) * BYTES[p]) for p in MEMORY_PRECISIONS} for images in BATCHES
        },
        "bound_ms": {
            gpu: bound(all_calls(shape, 1, True, 2, 2), sheet.gb_s, None).ms for gpu, sheet in DATA_SHEETS.items()
        },
    }
