"""The weights file of a bundle, streamed tensor by tensor from checkpoints: a model is never in memory as a whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_export.graphs.step import padded_head_dim
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import WeightTable
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig, VideoTokenizerConfig
from par_model.ordering import rotary_table
from par_model.shapes import without_weights
from par_model.transformer import PAR
from par_model.video import FSQ
from par_runtime.bundle import Stored
from par_runtime.dtypes import STORAGE
from par_runtime.manifest import STORED_BYTES
from par_runtime.video_shapes import CODEBOOK, decoder_layers, encoder_layers, tensor_shapes

PAGE_BYTES = 4096  # large tensors start on a page, so that a runtime can map them in place
LARGE_BYTES = 64 * 1024
LINE_BYTES = 64  # small ones on a cache line
#: dtype -> torch's own; both use the same names.
TORCH_DTYPE: dict[str, torch.dtype] = {dtype: getattr(torch, dtype) for dtype in STORAGE}


class WeightsWriter(WeightTable):
    """The weights file of a bundle, written tensor by tensor; ``entries`` holds where each one lies."""

    def __init__(self, path: Path) -> None:
        super().__init__({})
        self.path = path
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, parts: Iterable[Tensor], dtype: str) -> None:
        """Append ``parts``, concatenated along their first axis, as tensor ``name``; each part is freed when written.

        A part on the device "meta" has no numbers, and becomes a hole: zeros that take no space on most file systems.
        Raises ValueError for a name that was written before, OSError.
        """
        if name in self.entries:
            raise ValueError(f"weight {name!r} was already written")
        offset = -1
        shape: tuple[int, ...] = ()
        for part in parts:
            if offset < 0:
                offset = self._begin(part.numel() * part.element_size())
            # Contiguous bytes of any dtype, bf16 included, which numpy does not know.
            part = part.detach().to(TORCH_DTYPE[dtype]).contiguous()
            if part.is_meta:
                self._file.seek(part.numel() * part.element_size(), os.SEEK_CUR)
            else:
                self._file.write(part.view(-1).view(torch.uint8).numpy().data)
            shape = (part.shape[0] + (shape[0] if shape else 0), *part.shape[1:])
        self.entries[name] = Stored(dtype, shape, offset, self._file.tell() - offset)

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[bytes]) -> None:
        """Append tensor ``name``, whose bytes are those of ``parts``, one after another.

        Raises ValueError for a name that was written before or another number of bytes than ``shape`` has, OSError.
        """
        if name in self.entries:
            raise ValueError(f"weight {name!r} was already written")
        length = math.ceil(math.prod(shape) * STORED_BYTES[dtype])
        offset = self._begin(length)
        for part in parts:
            self._file.write(part)
        written = self._file.tell() - offset
        if written != length:
            raise ValueError(f"weight {name!r} of shape {shape} in {dtype} has {written} bytes; expected {length}")
        self.entries[name] = Stored(dtype, shape, offset, length)

    def add_hole(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Append tensor ``name`` without its numbers: zeros that take no space on most file systems.

        Raises ValueError for a name that was written before, OSError.
        """
        if name in self.entries:
            raise ValueError(f"weight {name!r} was already written")
        length = math.ceil(math.prod(shape) * STORED_BYTES[dtype])
        offset = self._begin(length)
        self._file.seek(length, os.SEEK_CUR)
        self.entries[name] = Stored(dtype, shape, offset, length)

    def _begin(self, length: int) -> int:
        """Where a tensor whose first part has ``length`` bytes begins; the file is filled up to there."""
        start, align = self._file.tell(), PAGE_BYTES if length >= LARGE_BYTES else LINE_BYTES
        offset = -(-start // align) * align
        self._file.write(b"\0" * (offset - start))
        return offset

    def close(self) -> None:
        """Close the file; ``entries`` stay."""
        self._file.truncate()  # a hole at the end belongs to it
        self._file.close()


def parameters(config: PARConfig) -> int:
    """How many parameters a model of ``config`` has."""
    return sum(tensor.numel() for tensor in without_weights(PAR, config).parameters())


def parameter_count(checkpoint: Checkpoint) -> int:
    """How many numbers the tensors of a checkpoint hold."""
    return sum(tensor.numel() for tensor in checkpoint.tensors.values())


def write_weights(weights: WeightsWriter, config: PARConfig, checkpoint: Checkpoint, dtype: str) -> None:
    """Stream the transformer into the weights file, one matrix at a time, in the layout the graphs read.

    ``embed`` [V + C + 1 + n - 1, d] is codes, classes, "no class", learnable tokens. Matrices are (in, out).
    Head sizes are padded with zero columns; q, k, v and the two gates are one matrix each.
    """
    heads, size, padded = config.n_heads, config.head_dim, padded_head_dim(config)
    get = checkpoint.tensor
    tables = ["tok_embeddings.weight", "cls_embedding.embedding_table.weight"]
    if config.group_size > 1:
        tables.append("spe_tok_embeddings.special_embeddings.weight")
    weights.add("embed", (get(key) for key in tables), dtype)
    write_rotary(weights, config)

    def pad_heads(w: torch.Tensor) -> torch.Tensor:  # [k*H*D, d] -> [k*H*D', d]
        if padded == size:
            return w
        w = w.view(-1, size, w.shape[1])
        return F.pad(w, (0, 0, 0, padded - size)).view(-1, w.shape[2])

    store = TORCH_DTYPE[dtype]
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            weights.add(f"{layer}.{norm}", [get(f"{layer}.{norm}.weight")], dtype)
        # Casting before the transpose keeps the copies small.
        wqkv = get(f"{layer}.attention.wqkv.weight").to(store)
        weights.add(f"{layer}.wqkv", [pad_heads(wqkv).T], dtype)
        wo = get(f"{layer}.attention.wo.weight").to(store)
        weights.add(f"{layer}.wo", [pad_heads(wo.T)], dtype)
        gates = [get(f"{layer}.feed_forward.{name}.weight").to(store) for name in ("w1", "w3")]
        weights.add(f"{layer}.w13", [torch.cat(gates).T], dtype)
        del gates
        weights.add(f"{layer}.w2", [get(f"{layer}.feed_forward.w2.weight").to(store).T], dtype)
    assert heads * size == config.dim
    weights.add("norm", [get("norm.weight")], dtype)
    weights.add("output", [get("output.weight").to(store).T], dtype)


def write_rotary(weights: WeightsWriter, config: PARConfig, suffix: str = "") -> None:
    """Write the rotary table by input position, ``cos`` and ``sin`` [N,D'/2] fp32, under these names plus ``suffix``.

    No other part of the weights depends on the order of the tokens.
    """
    pad = ((0, 0), (0, (padded_head_dim(config) - config.head_dim) // 2))
    for name, table in zip(("cos", "sin"), rotary_table(config), strict=True):
        weights.add(name + suffix, [torch.from_numpy(np.pad(table, pad))], "float32")


def write_tokenizer_weights(weights: WeightsWriter, checkpoint: Checkpoint, dtype: str, encoder: bool) -> None:
    """Stream the tokenizer into the weights file: codebook and decoder, and the encoder if ``encoder``."""
    codebook = F.normalize(checkpoint.tensor("quantize.embedding.weight").float(), dim=-1)
    weights.add(PREFIX + "codebook", [codebook], dtype)
    halves = ("decoder.", "post_quant_conv.", *(("encoder.", "quant_conv.") if encoder else ()))
    for key in checkpoint.tensors:
        if key.startswith(halves):
            tensor = checkpoint.tensor(key)
            if ".norm" in key:  # gain and bias per channel: [C,1,1] over [B,C,h,w]
                tensor = tensor.reshape(-1, 1, 1)
            weights.add(PREFIX + key, [tensor], dtype)


def write_video_weights(
    weights: WeightsWriter, checkpoint: Checkpoint, config: VideoTokenizerConfig, dtype: str, encoder: bool
) -> None:
    """Stream a video tokenizer into the weights file: the code of each id and the decoder; the encoder if ``encoder``.

    Codes stay fp32: they are few. Convolutions have the layout of ``par_runtime.video_shapes``.
    """
    weights.add(PREFIX + CODEBOOK, [FSQ(config.levels).lookup(torch.arange(config.codebook_size))], "float32")
    sizes = asdict(config)
    shapes = tensor_shapes(decoder_layers(sizes))
    if encoder:
        shapes |= tensor_shapes(encoder_layers(sizes))
    for key, shape in shapes.items():
        weights.add(PREFIX + key, [video_tensor(checkpoint.tensor(key), shape)], dtype)


def video_tensor(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a video tokenizer's checkpoint in the ``shape`` that bundles have."""
    if tensor.ndim == 5 and len(shape) == 4:  # [out,in,frames,h,w]: the frames beside each other
        tensor = tensor.transpose(1, 2)
    return tensor.reshape(shape)
