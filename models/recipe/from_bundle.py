"""Read a bundle back into PyTorch checkpoints, the inverse of ``parvis export``.

    python from_bundle.py ../demo --out ../../build/demo/restored

Writes OUT/model.pt and OUT/tokenizer.pt, as ``parvis train`` and ``parvis train-tokenizer`` save them: the numbers of
the bundle in fp32. Exporting them in the bundle's precision stores the same numbers again. It is there because the
demo's checkpoints were not kept, and an encoder for its codebook can only be trained with the tokenizer at hand.

What a bundle does not hold is made fresh: an encoder where it was exported without one (train it with
``parvis train-tokenizer --encoder-for``), the ring buffer of used codes (never read).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_export.graphs.step import padded_head_dim
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import WeightTable
from par_export.weights import TORCH_DTYPE
from par_model.checkpoint.model import CheckpointError, check_keys
from par_model.config import Order, PARConfig, VQConfig
from par_model.ordering import phases, token_order
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime.bundle import MANIFEST, WEIGHTS, Bundle
from par_runtime.errors import BundleError

INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Read a bundle back into PyTorch checkpoints.")
    p.add_argument("bundle", type=Path, help="folder that parvis export wrote")
    p.add_argument("--out", type=Path, required=True, help="folder for model.pt and tokenizer.pt")
    args = p.parse_args(argv)
    try:
        restore(args.bundle, args.out)
    except (BundleError, CheckpointError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"from_bundle.py: error: {text}", file=sys.stderr)
        return 2
    return 0


def restore(path: Path, out: Path) -> None:
    """Write the checkpoints of the bundle at ``path`` into ``out``. Raises BundleError, CheckpointError, OSError."""
    bundle = Bundle.open(path, verify="full")
    stored = read_weights(bundle)
    out.mkdir(parents=True, exist_ok=True)
    _save(out / "model.pt", model_checkpoint(bundle, stored))
    tokenizer = json.loads((path / MANIFEST).read_text())["tokenizer"]
    if tokenizer is None:
        print(f"{path}: ends at tokens, so there is no tokenizer to restore")
        return
    _save(out / "tokenizer.pt", tokenizer_checkpoint(path, VQConfig(**tokenizer["config"]), stored))


def read_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Every tensor of the weights file that a graph names, as it is stored."""
    data = np.memmap(bundle.path / WEIGHTS, np.uint8, "r")
    tensors = {}
    for graph in bundle.graphs.values():
        for name, at in WeightTable.read(bundle.path / graph.file).entries.items():
            if name not in tensors:
                raw = torch.from_numpy(np.array(data[at.offset : at.offset + at.length]))
                tensors[name] = raw.view(TORCH_DTYPE[at.dtype]).reshape(at.shape)
    return tensors


def model_checkpoint(bundle: Bundle, stored: dict[str, Tensor]) -> dict[str, Any]:
    """What ``parvis train`` would save of the bundle's transformer; undoes ``par_export.weights.write_weights``."""
    config = _config(bundle)
    size, padded = config.head_dim, padded_head_dim(config)

    def heads(w: Tensor) -> Tensor:  # [k*H*D', d] -> [k*H*D, d]: the padding goes
        return w.reshape(-1, padded, w.shape[1])[:, :size].reshape(-1, w.shape[1])

    tables = {"tok_embeddings.weight": config.vocab_size, "cls_embedding.embedding_table.weight": config.n_classes + 1}
    if config.group_size > 1:
        tables["spe_tok_embeddings.special_embeddings.weight"] = config.group_size - 1
    found = dict(zip(tables, torch.split(stored["embed"], list(tables.values())), strict=True))
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            found[f"{layer}.{norm}.weight"] = stored[f"{layer}.{norm}"]
        found[f"{layer}.attention.wqkv.weight"] = heads(stored[f"{layer}.wqkv"].T)
        found[f"{layer}.attention.wo.weight"] = heads(stored[f"{layer}.wo"]).T
        gates = stored[f"{layer}.w13"].T.chunk(2)
        for name, matrix in zip(("w1", "w3", "w2"), (*gates, stored[f"{layer}.w2"].T), strict=True):
            found[f"{layer}.feed_forward.{name}.weight"] = matrix
    found |= {"norm.weight": stored["norm"], "output.weight": stored["output"].T}
    with torch.device("meta"):
        expected = PAR(config).state_dict()
    check_keys(bundle.path, found, expected)
    content: dict[str, Any] = {"model": _fp32(found, expected), "config": asdict(config) | {"kind": "par"}}
    if bundle.class_names is not None and bundle.class_synsets is None:  # ImageNet's an export finds by itself
        content["class_names"] = list(bundle.class_names)
    return content


def _config(bundle: Bundle) -> PARConfig:
    """The model's config. The manifest holds the order and the phases, not what made them: that is found by trying."""
    m = bundle.model
    calls = [(phase.query, phase.repeat, phase.start) for phase in bundle.phases]
    orders: tuple[Order, ...] = ("distant", "raster")
    for order, initial in itertools.product(orders, (True, False)):
        config = PARConfig(
            dim=m["dim"],
            n_layers=m["n_layers"],
            n_heads=m["n_heads"],
            vocab_size=m["vocab_size"],
            n_classes=m["n_classes"],
            grid=bundle.grid,
            group_size=bundle.group_size,
            order=order,
            sequential_initial=initial,
        )
        planned = [(phase.query, phase.repeat, phase.start) for phase in phases(config) if phase.repeat]
        if planned == calls and token_order(config).tolist() == list(bundle.order):
            return config
    raise BundleError(f"{bundle.path}: its order of tokens is none that a PAR model has; export the bundle again")


def tokenizer_checkpoint(path: Path, config: VQConfig, stored: dict[str, Tensor]) -> dict[str, Any]:
    """What ``parvis train-tokenizer`` would save of the tokenizer of the bundle at ``path``."""
    torch.manual_seed(0)  # of an encoder that the bundle does not hold
    fresh = VQModel(config).state_dict()
    found = {name[len(PREFIX) :]: tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    codebook = found.pop("codebook")
    found["quantize.embedding.weight"] = before_rounding(codebook)
    changed = _rounded(found["quantize.embedding.weight"], codebook.dtype) != codebook
    if changed.any():
        print(f"{path}: {int(changed.sum())} of {changed.numel()} numbers of the codebook return one last bit off")
    for key, tensor in fresh.items():
        if ".norm" in key and key in found:
            found[key] = found[key].reshape(tensor.shape)  # stored as [C,1,1]
    made = [key for key in fresh if key not in found]
    if "encoder.conv_in.weight" in made:
        print(f"{path}: holds no encoder; that of tokenizer.pt is random, train it before use")
    elsewhere = [key for key in made if not key.startswith(("encoder.", "quant_conv.", "quantize.codebook_used"))]
    check_keys(path, found, {key: t for key, t in fresh.items() if key in found or key in elsewhere})
    return {"model": _fp32(fresh | found, fresh), "config": asdict(config) | {"kind": "vq"}}


def before_rounding(stored: Tensor) -> Tensor:
    """Codes of length 1 in fp32 [V,c] that an export rounds to ``stored`` [V,c].

    An export normalises the codes and rounds them. Rounding leaves their length a little off 1, so normalising the
    rounded ones moves some to another last bit. Each number has an interval that rounds to it; the code that was
    exported lies in the box of these and has length 1. Stretching the code by s and clipping it to the box gives a
    length that grows with s, so a bisection finds a code of length 1 in the box. Codes of fp32 have no room between
    storing and computing: there a last bit (6e-8) may move.
    """
    size = stored.abs()
    bits = size.view(INTEGER[size.dtype])
    below, above = ((bits + step).clamp_min(0).view(size.dtype).double() for step in (-1, 1))
    size = size.double()
    # Not quite half way to the neighbours, so that the rounding of fp32 on the way cannot leave the interval.
    low, high = (size + 0.499 * (neighbour - size) for neighbour in (below, above))
    least, most = torch.full((len(size), 1), 0.5).double(), torch.full((len(size), 1), 2.0).double()
    for _ in range(60):
        middle = (least + most) / 2
        short = (size * middle).clamp(low, high).norm(dim=1, keepdim=True) < 1
        least, most = torch.where(short, middle, least), torch.where(short, most, middle)
    return ((size * most).clamp(low, high) * stored.double().sign()).float()


def _rounded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes`` as ``par_export.weights.write_tokenizer_weights`` stores them."""
    return F.normalize(codes, dim=-1).to(dtype)


def _fp32(found: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order of ``like``, which is the order in which an export writes a tokenizer."""
    return {key: found[key].float().contiguous() for key in like}


def _save(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    torch.save(content, part)
    os.replace(part, path)
    print(f"{path}: {sum(t.numel() for t in content['model'].values()):,} numbers")


if __name__ == "__main__":
    raise SystemExit(main())
