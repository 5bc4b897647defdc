"""``parvis inspect`` of a checkpoint: what it is as far as the file says, and what its bundle will need and could reach."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from par_export.graphs.step import padded_head_dim
from par_model.checkpoint import (
    INDEX,
    UNUSED,
    Checkpoint,
    CheckpointError,
    Inferred,
    hub,
    infer,
    open_checkpoint,
    vq_config,
)
from par_model.config import PARConfig
from par_model.ordering import phases
from par_runtime.cost.architecture import Architecture, phases_of
from par_runtime.cost.data_sheets import bandwidth_bounds_ms
from par_runtime.cost.memory import memory_table
from par_runtime.dtypes import BYTES


def show(path: str | Path, as_json: bool) -> int:
    """Print what the checkpoint at ``path`` (or of that name on the hub) is; exit code 2 where it is none."""
    try:
        facts = describe(hub.local(path, lambda line: print(line, file=sys.stderr)))
    except CheckpointError as error:
        print(f"parvis: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts) if as_json else "\n".join(_lines(facts)))
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Kind, sizes, and what shapes leave open. Sizes in bytes, times in milliseconds. Raises CheckpointError."""
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
    """A config with some head count and grid that fit the shapes; these two mean nothing."""
    group = checkpoint.tensors.get("spe_tok_embeddings.special_embeddings.weight")
    side = max(4, int(((group.shape[0] + 1) if group is not None else 1) ** 0.5) * 2)
    return infer(checkpoint, heads=1, grid=(1, side, side)).config


def _files(path: Path) -> list[Path]:
    """The files that a checkpoint consists of, or may."""
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
    """What a bundle of the model needs: memory of a guided batch, and the least time of a guided image by bandwidth alone."""
    head_dim = padded_head_dim(config)
    calls = phases_of(config.group_size, config.n_tokens)
    sizes = (config.dim, config.n_layers, config.n_heads, head_dim, config.ffn_dim, config.vocab_size)
    architecture = Architecture(*sizes, calls)
    return {
        "parameters_read_per_call": architecture.step_parameters,
        "memory_bytes": memory_table(architecture, {name: BYTES[name] for name in ("fp32", "fp16")}),
        "bound_ms": bandwidth_bounds_ms(architecture, BYTES["fp16"]),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    total = sum(facts["files"].values())
    out = [
        f"{facts['path']}: {facts['kind']}, {facts['parameters']:,} parameters in {facts['tensors']} tensors "
        f"({facts['dtypes']}), {total / 1e6:.1f} MB in {len(facts['files'])} file{'s' if len(facts['files']) > 1 else ''}"
    ]
    rows = dict(facts["config"])
    if "memory_bytes" in facts:
        rows["memory"] = "of weights and cache, guided, in fp32 (a CPU) and fp16: " + ", ".join(
            f"{images} image{'s' if images != '1' else ''} {need['fp32'] / 1e9:.2f} and {need['fp16'] / 1e9:.2f} GB"
            for images, need in facts["memory_bytes"].items()
        )
        bounds = ", ".join(f"{gpu} {ms:.3g}" for gpu, ms in facts["bound_ms"].items())
        rows["bound"] = f"at least, in fp16 by memory bandwidth, for one guided image without decoding, in ms: {bounds}"
    out += [f"  {name:20} {value}" for name, value in rows.items()]
    return out + ([f"  open: {facts['open']}"] if facts["open"] else [])
