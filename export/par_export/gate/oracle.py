"""The PyTorch oracle of the parity gate: its logits, over weights that are rounded to the bundle's precision.

The oracle is loaded layer by layer from the mapped checkpoint, so a 3B model is never in memory as a whole. Its weights
are rounded to what the bundle stores, so that a comparison with it tests the graph alone, and can be tight in every
precision. What the rounding itself changes is measured by :func:`rounding_error`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch

from par_export.gate.magnitudes import Largest
from par_export.weights import TORCH_DTYPE
from par_model.checkpoint import Checkpoint, CheckpointError
from par_model.config import PARConfig
from par_model.shapes import without_weights
from par_model.transformer import PAR, Block
from par_runtime.system import give_back


def rounded(checkpoint: Checkpoint, prefix: str, keys: Iterable[str], dtype: str) -> dict[str, torch.Tensor]:
    """The tensors ``prefix + key`` of ``keys``, rounded to ``dtype``, in fp32.

    Raises CheckpointError where they are not finite.
    """
    out = {}
    for key in keys:
        tensor = checkpoint.tensor(prefix + key)
        out[key] = tensor.to(TORCH_DTYPE[dtype]).float()
        if not bool(out[key].sum().isfinite()) and not bool(out[key].isfinite().all()):
            largest = float(tensor.float().abs().max())
            raise CheckpointError(
                f"{checkpoint.path}: {prefix}{key} holds {int((~tensor.float().isfinite()).sum())} numbers that "
                "are NaN or infinite; give a checkpoint of a training that did not diverge"
                if not math.isfinite(largest)
                else f"{checkpoint.path}: {prefix}{key} holds numbers up to {largest:.3g}, beyond what {dtype} can "
                "store; give --precision bf16 or fp32"
            )
    return out


def check_finite(checkpoint: Checkpoint, dtype: str) -> None:
    """Raise CheckpointError if a tensor of the file, rounded to ``dtype``, is not finite."""
    for key in checkpoint.tensors:
        rounded(checkpoint, "", [key], dtype)


@torch.no_grad()
def oracle_logits(
    config: PARConfig,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    labels: np.ndarray,
    dtype: str,
    largest: Largest | None = None,
) -> np.ndarray:
    """Logits [R,N,V] fp32 of the oracle, teacher-forced with ``tokens`` [R,N] and ``labels`` [R].

    Weights are rounded to ``dtype``; one layer is in memory at a time. ``largest`` gets the largest numbers that the
    network computes. Raises CheckpointError where a weight is not finite.
    """

    def load(module: torch.nn.Module, prefix: str) -> None:
        module.load_state_dict(rounded(checkpoint, prefix, module.state_dict(), dtype), assign=True)

    model = without_weights(PAR, config)
    model.eval()
    outer = ["tok_embeddings", "cls_embedding", "norm", "output"] + (
        ["spe_tok_embeddings"] if config.group_size > 1 else []
    )
    for name in outer:
        load(getattr(model, name), f"{name}.")
    positions = torch.arange(config.n_tokens)
    mask = positions[None, :] < model.visible[:, None]
    x = model.embed(torch.from_numpy(tokens), torch.from_numpy(labels), positions)
    if largest is not None:
        largest.add("residual", "embeddings", x)
    for i, layer in enumerate(model.layers):
        load(layer, f"layers.{i}.")
        assert isinstance(layer, Block)
        with nullcontext() if largest is None else largest.watching(layer, f"layer {i}", model.cos, model.sin, mask):
            x = layer(x, model.cos, model.sin, mask, positions, None)
        layer.to("meta")
        if i % 4 == 3:
            give_back()
    if largest is not None:
        largest.add("norm", "last norm", model.norm(x))
    logits: np.ndarray = model.head(x).numpy()
    if largest is not None:
        largest.add("logits", "head", torch.from_numpy(logits))
    del model, x
    checkpoint.release()
    give_back()
    return logits


def rounding_error(
    config: PARConfig, checkpoint: Checkpoint, tokens: np.ndarray, labels: np.ndarray, rounded: np.ndarray, dtype: str
) -> dict[str, float]:
    """What rounding the weights to ``dtype`` changes, for the manifest.

    ``rounded`` [1,N,V] are the oracle's logits for ``tokens`` [1,N] with rounded weights; they are compared with those
    of the checkpoint's own weights.
    """
    if {tensor.dtype for tensor in checkpoint.tensors.values()} == {TORCH_DTYPE[dtype]}:
        return {"max_logit_error": 0.0, "argmax_agreement": 1.0}
    exact = oracle_logits(config, checkpoint, tokens, labels, "float32")
    return {
        "max_logit_error": float(np.abs(exact - rounded).max()),
        "argmax_agreement": float((exact.argmax(-1) == rounded.argmax(-1)).mean()),
    }
