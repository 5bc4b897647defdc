"""``parvis inspect`` of a checkpoint: what it is, as far as its shapes say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from par_model.checkpoint import CheckpointError, open_checkpoint, par_config, vq_config
from par_model.ordering import phases

UNUSED = "quantize.codebook_used"  # a buffer of the tokenizer's training


def show(path: Path, as_json: bool) -> int:
    """Print what the checkpoint at ``path`` is; exit code 2 where it is none."""
    try:
        facts = describe(path)
    except CheckpointError as error:
        print(f"parvis: error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(facts))
        return 0
    print(
        f"{path}: {facts['kind']}, {facts['parameters']:,} parameters in {facts['tensors']} tensors ({facts['dtypes']})"
    )
    for name, value in facts["config"].items():
        print(f"  {name:20} {value}")
    if facts["open"]:
        print(f"  open: {facts['open']}")
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Kind, sizes and what shapes leave open. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    out: dict[str, Any] = {
        "path": str(path),
        "parameters": sum(t.numel() for key, t in tensors.items() if key != UNUSED),
        "tensors": len(tensors),
        "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "open": "",
    }
    if "quantize.embedding.weight" in tensors:
        vq = vq_config(checkpoint)
        return out | {"kind": "VQ tokenizer", "config": vars(vq) | {"downsampling": vq.downsampling}}
    try:
        config = par_config(checkpoint)
    except CheckpointError as error:
        if "give --heads" not in str(error) and "give --grid" not in str(error):
            raise
        # Any head count and grid that fit the shapes: they are told as open.
        group = tensors.get("spe_tok_embeddings.special_embeddings.weight")
        side = max(4, int(((group.shape[0] + 1) if group is not None else 1) ** 0.5) * 2)
        config = par_config(checkpoint, heads=1, grid=(1, side, side))
        return out | {
            "kind": "PAR model",
            "config": _sizes(config, settled=False),
            "open": str(error).partition(": ")[2],
        }
    return out | {"kind": "PAR model" if config.group_size > 1 else "AR model (LlamaGen)", "config": _sizes(config)}


def _sizes(config: Any, settled: bool = True) -> dict[str, Any]:
    sizes = {
        "width": config.dim,
        "layers": config.n_layers,
        "codes": config.vocab_size,
        "classes": config.n_classes,
        "n": config.group_size,
    }
    if settled:
        sizes |= {
            "heads": f"{config.n_heads} of {config.head_dim}",
            "grid": "x".join(map(str, config.grid)),
            "calls per image": sum(phase.repeat for phase in phases(config)),
        }
    return sizes
