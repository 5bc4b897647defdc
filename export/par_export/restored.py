"""A bundle read back into PyTorch: the inverse of ``weights.py``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from par_export.graphs.step import padded_head_dim
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import WeightTable
from par_export.weights import TORCH_DTYPE
from par_model.checkpoint import check_keys
from par_model.config import PARConfig
from par_model.manifest import config_from_manifest, read_manifest, tokenizer_from_manifest
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime.bundle import WEIGHTS, Bundle


def read_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Name -> tensor of the weights file, for every tensor that a graph uses, in the dtype that it is stored in.

    Raises BundleError, OSError.
    """
    data = np.memmap(bundle.path / WEIGHTS, np.uint8, "r")
    tensors = {}
    for graph in bundle.graphs.values():
        for name, at in WeightTable.read(bundle.path / graph.file).entries.items():
            if name not in tensors:
                raw = torch.from_numpy(np.array(data[at.offset : at.offset + at.length]))
                tensors[name] = raw.view(TORCH_DTYPE[at.dtype]).reshape(at.shape)
    return tensors


def model_state(config: PARConfig, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a :class:`PAR` of ``config``, of what :func:`read_weights` returned; some are views."""
    size, padded = config.head_dim, padded_head_dim(config)

    def heads(w: Tensor) -> Tensor:  # [k*H*D', d] -> [k*H*D, d]: removes the padding
        return w.reshape(-1, padded, w.shape[1])[:, :size].reshape(-1, w.shape[1])

    tables = {"tok_embeddings.weight": config.vocab_size, "cls_embedding.embedding_table.weight": config.n_classes + 1}
    if config.group_size > 1:
        tables["spe_tok_embeddings.special_embeddings.weight"] = config.group_size - 1
    state = dict(zip(tables, torch.split(stored["embed"], list(tables.values())), strict=True))
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            state[f"{layer}.{norm}.weight"] = stored[f"{layer}.{norm}"]
        state[f"{layer}.attention.wqkv.weight"] = heads(stored[f"{layer}.wqkv"].T)
        state[f"{layer}.attention.wo.weight"] = heads(stored[f"{layer}.wo"]).T
        gates = stored[f"{layer}.w13"].T.chunk(2)
        for name, matrix in zip(("w1", "w3", "w2"), (*gates, stored[f"{layer}.w2"].T), strict=True):
            state[f"{layer}.feed_forward.{name}.weight"] = matrix
    return state | {"norm.weight": stored["norm"], "output.weight": stored["output"].T}


def restored_model(bundle: Bundle, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> PAR:
    """The bundle's transformer in PyTorch. Raises ManifestError, CheckpointError."""
    config = config_from_manifest(read_manifest(bundle.path))
    state = model_state(config, stored)
    with torch.device("meta"):
        model = PAR(config)
    check_keys(bundle.path, state, model.state_dict())
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    for name, table in list(model.named_buffers()):  # of the order of tokens: they are never on the device "meta"
        setattr(model, name, table.to(device))
    return model.eval()


def restored_decoder(
    bundle: Bundle, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[VQModel, Tensor] | None:
    """The bundle's decoder in PyTorch, without encoder, and its codes [V,c] of length 1; None where it ends at tokens.

    Raises ManifestError.
    """
    config = tokenizer_from_manifest(read_manifest(bundle.path))
    if config is None:
        return None
    with torch.device("meta"):
        model = VQModel(config)
    del model.encoder, model.quant_conv, model.quantize
    own = {name[len(PREFIX) :]: tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    state = {
        key: own[key].to(device, dtype).reshape(meta.shape)  # gains are stored as [C,1,1]
        for key, meta in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval(), own["codebook"].to(device, dtype)
