"""A bundle read back into PyTorch: the inverse of ``weights.py``."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from par_export.graphs.step import padded_head_dim
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import WeightTable
from par_export.weights import TORCH_DTYPE
from par_model.checkpoint import check_keys
from par_model.config import PARConfig, VQConfig
from par_model.manifest import config_from_manifest, read_manifest, tokenizer_from_manifest
from par_model.shapes import without_weights
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime.bundle import WEIGHTS, Bundle, Stored
from par_runtime.checked import open_regular
from par_runtime.loaded import check_scales
from par_runtime.quantised import MOST_CODE, SCALE, dequantised, unpacked


def read_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Name -> tensor of the weights file, for every tensor that a graph uses, in the dtype that it is stored in.

    Quantised matrices are in fp32, times their scales, which are left out. Raises BundleError, OSError.
    """
    file = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))
    return {name: file.tensor(name) for name in file.table.entries if not name.endswith(SCALE)}


def stored_table(bundle: Bundle) -> WeightTable:
    """Where every tensor lies that a graph of the bundle uses, in the order of the file. Raises BundleError, also where
    a scale is not positive.
    """
    entries: dict[str, Stored] = {}
    for graph in bundle.graphs.values():
        entries |= WeightTable.read(bundle.path / graph.file).entries
    check_scales(bundle, entries)
    return WeightTable(dict(sorted(entries.items(), key=lambda entry: entry[1].offset)))


@dataclass(frozen=True)
class StoredWeights:
    """A weights file whose tensors are read one by one: nothing stays in memory, or mapped."""

    path: Path
    table: WeightTable

    def parts(self, name: str, most: int = 2**24) -> Iterator[bytes]:
        """The bytes of a tensor as they are stored, at most ``most`` at a time. Raises OSError."""
        at = self.table.entries[name]
        with open_regular(self.path) as file:
            file.seek(at.offset)
            left = at.length
            while left:
                part = file.read(min(left, most))
                if not part:
                    raise OSError(errno.EIO, "ends before its last tensor", str(self.path))
                yield part
                left -= len(part)

    def tensor(self, name: str) -> Tensor:
        """A tensor in the dtype that it is stored in; a quantised matrix in fp32, times its scales. Raises OSError."""
        at = self.table.entries[name]
        raw = np.frombuffer(bytearray().join(self.parts(name)), np.uint8)
        if at.dtype in MOST_CODE:
            scales = self.tensor(name + SCALE).float().numpy()
            return torch.from_numpy(dequantised(unpacked(raw, at.dtype, at.shape), scales))
        return torch.from_numpy(raw).view(TORCH_DTYPE[at.dtype]).reshape(at.shape)


def model_state(config: PARConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a :class:`PAR` of ``config``, of what :func:`read_weights` returned; some are views."""
    return {key: take(stored[name]) for key, (name, take) in _sources(config).items()}


class StoredState(Mapping[str, Tensor]):
    """The state dict of a :class:`PAR` of ``config``; each tensor is read from ``file`` when it is asked for."""

    def __init__(self, config: PARConfig, file: StoredWeights) -> None:
        self._sources, self._file = _sources(config), file

    def __getitem__(self, key: str) -> Tensor:
        name, take = self._sources[key]
        return take(self._file.tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _sources(config: PARConfig) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Key of a state dict -> name of the stored tensor that holds it, and how it is taken out of that one."""
    size, padded = config.head_dim, padded_head_dim(config)

    def heads(w: Tensor) -> Tensor:  # [k*H*D', d] -> [k*H*D, d]: removes the padding
        return w.reshape(-1, padded, w.shape[1])[:, :size].reshape(-1, w.shape[1])

    def rows(first: int, count: int) -> Callable[[Tensor], Tensor]:
        return lambda table: table[first : first + count]

    codes, classes = config.vocab_size, config.n_classes + 1
    sources: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "tok_embeddings.weight": ("embed", rows(0, codes)),
        "cls_embedding.embedding_table.weight": ("embed", rows(codes, classes)),
    }
    if config.group_size > 1:
        learnable = rows(codes + classes, config.group_size - 1)
        sources["spe_tok_embeddings.special_embeddings.weight"] = ("embed", learnable)
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            sources[f"{layer}.{norm}.weight"] = (f"{layer}.{norm}", lambda gain: gain)
        sources[f"{layer}.attention.wqkv.weight"] = (f"{layer}.wqkv", lambda w: heads(w.T))
        sources[f"{layer}.attention.wo.weight"] = (f"{layer}.wo", lambda w: heads(w).T)
        sources[f"{layer}.feed_forward.w1.weight"] = (f"{layer}.w13", lambda w: w.T.chunk(2)[0])
        sources[f"{layer}.feed_forward.w3.weight"] = (f"{layer}.w13", lambda w: w.T.chunk(2)[1])
        sources[f"{layer}.feed_forward.w2.weight"] = (f"{layer}.w2", lambda w: w.T)
    return sources | {"norm.weight": ("norm", lambda gain: gain), "output.weight": ("output", lambda w: w.T)}


def restored_model(bundle: Bundle, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> PAR:
    """The bundle's transformer in PyTorch. Raises ManifestError, CheckpointError."""
    config = config_from_manifest(read_manifest(bundle.path))
    state = model_state(config, stored)
    model = without_weights(PAR, config)
    check_keys(bundle.path, state, model.state_dict())
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    for name, table in list(model.named_buffers()):  # of the order of tokens: they are never on the device "meta"
        setattr(model, name, table.to(device))
    return model.eval()


def restored_decoder(
    bundle: Bundle, stored: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[VQModel, Tensor] | None:
    """The bundle's decoder of images in PyTorch, without encoder, and its codes [V,c] of length 1.

    None where the bundle ends at tokens, or makes clips. Raises ManifestError.
    """
    config = tokenizer_from_manifest(read_manifest(bundle.path))
    if not isinstance(config, VQConfig):
        return None
    model = without_weights(VQModel, config)
    del model.encoder, model.quant_conv, model.quantize
    own = {name[len(PREFIX) :]: tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    state = {
        key: own[key].to(device, dtype).reshape(meta.shape)  # gains are stored as [C,1,1]
        for key, meta in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval(), own["codebook"].to(device, dtype)
