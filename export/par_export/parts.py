"""What a bundle has beside its weights: the graphs, and the manifest's entries that follow from the architecture.

Bundles of trained, random and quantised weights are written with it alike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch

from par_export.errors import ExportError
from par_export.graphs import video
from par_export.graphs.decoder import HALF_DECODER, decoder_graph
from par_export.graphs.encoder import encoder_graph
from par_export.graphs.sampling import SamplingVariant
from par_export.graphs.step import COMPATIBLE_STEP, io_table, padded_head_dim, step_graph
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import COMPATIBLE_OPSET, OPSET, Graph, WeightTable
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.manifest import phase_entries
from par_model.ordering import token_order
from par_runtime import __version__
from par_runtime.bundle import MANIFEST, SCHEMA, Stored, seal
from par_runtime.checked import Mismatch
from par_runtime.manifest import check
from par_runtime.manifest_video import FIRST, NEXT, VIDEO
from par_runtime.system import sha256
from par_runtime.tokenizer_shapes import decoder_shapes
from par_runtime.video_shapes import decoder_shapes as clip_decoder_shapes
from par_runtime.video_shapes import past_shapes

Tokenizer = VQConfig | VideoTokenizerConfig
SELFTEST_GUIDANCE = 1.5  #: guidance of the greedy images that the gate compares and the runtime's self-test repeats


def architecture_entries(
    config: PARConfig, vq: Tokenizer | None, graphs: Mapping[str, Any], parameters: int, weights: WeightTable
) -> dict[str, Any]:
    """The manifest's entries that follow from the architecture and the graphs."""
    return {
        "model": _model_entry(config, parameters),
        "grid": list(config.grid),
        "group_size": config.group_size,
        "n_tokens": config.n_tokens,
        "order": token_order(config).tolist(),
        "phases": phase_entries(config),
        "ids": {
            "class_base": config.vocab_size,
            "no_class": config.vocab_size + config.n_classes,
            "learnable_base": config.vocab_size + config.n_classes + 1,
        },
        "graphs": dict(graphs),
        "cache": {
            "dtype": "float32",
            "inputs": [i["name"] for i in graphs["step"]["inputs"] if i["name"].startswith("past_")],
            "outputs": [o["name"] for o in graphs["step"]["outputs"] if o["name"].startswith("present_")],
            "heads": config.n_heads,
            "head_dim": padded_head_dim(config),
        },
        "weights": {
            name: _place(at)
            for name, at in weights.entries.items()
            if not name.startswith(PREFIX) and not name.partition(".")[2].isdigit()  # cos.4: of another n
        },
        "tokenizer": _tokenizer_entry(config, vq, weights),
    }


def _tokenizer_entry(config: PARConfig, vq: Tokenizer | None, weights: WeightTable) -> dict[str, Any] | None:
    t, h, w = config.grid
    if vq is None:
        return None
    if isinstance(vq, VideoTokenizerConfig):
        time, side = vq.downsampling
        return {
            "kind": VIDEO,
            "downsampling": side,
            "time_downsampling": time,
            "frames": vq.frames(t),
            "image_size": [h * side, w * side],
            "codebook_size": vq.codebook_size,
            "config": asdict(vq),
            "weights": decoder_table(clip_decoder_shapes(asdict(vq)), weights),
        }
    return {
        "downsampling": vq.downsampling,
        "image_size": [h * vq.downsampling, w * vq.downsampling],
        "codebook_size": vq.codebook_size,
        "config": asdict(vq),
        "weights": decoder_table(decoder_shapes(asdict(vq)), weights),
    }


def decoder_table(names: Iterable[str], weights: WeightTable) -> dict[str, Any]:
    """The manifest's ``tokenizer.weights``: where the decoder's tensors ``names`` lie."""
    return {name: _place(weights.entries[PREFIX + name]) for name in names}


def _place(at: Stored) -> list[Any]:
    return [at.dtype, list(at.shape), at.offset, at.length]


def write_manifest(folder: Path, entries: Mapping[str, Any], hashes: dict[tuple[int, int], str] | None = None) -> None:
    """Write ``manifest.json``, the last file of a bundle: ``entries``, versions, and the size and hash of every file.

    ``hashes``, by (device, inode), is filled here; given again, it saves hashing a file that several bundles link to.
    Raises ExportError for entries that no runtime would read again, OSError.
    """
    hashes = {} if hashes is None else hashes
    files = {}
    for file in sorted(folder.iterdir()):
        stat = file.stat()
        key = (stat.st_dev, stat.st_ino)
        hashes[key] = hashes.get(key) or sha256(file)
        files[file.name] = {"bytes": stat.st_size, "sha256": hashes[key]}
    created = {"parvis": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    gate = sys.modules.get("onnxruntime")  # random weights pass no gate
    if gate is not None:
        created["onnxruntime"] = gate.__version__
    manifest = seal({"schema": SCHEMA, "created": created, **entries, "files": files})
    try:
        check(manifest)
    except Mismatch as error:
        raise ExportError(f"{MANIFEST} would not be readable: {error}") from error
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def write_graphs(
    folder: Path,
    config: PARConfig,
    vq: Tokenizer | None,
    weights: WeightTable,
    dtype: str,
    sampling: SamplingVariant,
    encoder: bool = True,
) -> dict[str, Any]:
    """Write every graph of a bundle into ``folder``; returns the manifest's ``graphs`` entry."""
    entries: dict[str, Any] = {}

    def add(name: str, graph: Graph, tail: str | None, inputs: list[Any], outputs: list[Any]) -> None:
        graph.save(folder / f"{name}.onnx")
        entries[name] = {
            "file": f"{name}.onnx",
            "opset": graph.opset,
            "sampling": tail,
            "inputs": inputs,
            "outputs": outputs,
        }

    n = config.group_size
    step_graphs: list[tuple[str, int | None, str, SamplingVariant, int]] = [
        ("step", None, "float32", "dynamic", OPSET),
        (COMPATIBLE_STEP, None, "float32", "dynamic", COMPATIBLE_OPSET),
        ("prefill", 1, dtype, sampling, OPSET),
        ("transition", n, dtype, sampling, OPSET),
        ("group", n, dtype, sampling, OPSET),
    ]
    for name, query, compute, tail, opset in step_graphs:
        graph = step_graph(config, weights, name=name, compute=compute, query=query, sampling=tail, opset=opset)
        inputs, outputs = ([asdict(io) for io in table] for table in io_table(config, compute, query))
        add(name, graph, tail, inputs, outputs)
    if vq is not None:
        for name, (graph, inputs, outputs) in _tokenizer_graphs(config, vq, weights, encoder).items():
            add(name, graph, None, inputs, outputs)
    return entries


def _tokenizer_graphs(
    config: PARConfig, vq: Tokenizer, weights: WeightTable, encoder: bool
) -> dict[str, tuple[Graph, list[Any], list[Any]]]:
    """Each graph of the tokenizer by name, with the manifest's description of its inputs and outputs."""
    t, h, w = config.grid
    tokens = {"name": "tokens", "dtype": "int64", "shape": ("B", config.n_tokens)}
    if not isinstance(vq, VideoTokenizerConfig):
        images = {"name": "images", "dtype": "uint8", "shape": ("B", h * vq.downsampling, w * vq.downsampling, 3)}
        graphs = {
            "decoder": (decoder_graph(config, vq, weights), [tokens], [images]),
            HALF_DECODER: (decoder_graph(config, vq, weights, "float16"), [tokens], [images]),
        }
        if encoder:
            graphs["encoder"] = (encoder_graph(config, vq, weights), [images], [tokens])
        return graphs
    time, side = vq.downsampling
    clip, first, following = (
        {"name": "images", "dtype": "uint8", "shape": ("B", frames, h * side, w * side, 3)}
        for frames in (vq.frames(t), 1, time)
    )
    latent = tokens | {"shape": ("B", h * w)}
    past, present = (
        [
            {"name": f"{side}.{i}", "dtype": "float32", "shape": ("B", *shape)}
            for i, shape in enumerate(past_shapes(asdict(vq), h, w))
        ]
        for side in ("past", "present")
    )
    graphs = {
        "decoder": (video.decoder_graph(config, vq, weights), [tokens], [clip]),
        HALF_DECODER: (video.decoder_graph(config, vq, weights, "float16"), [tokens], [clip]),
        FIRST: (video.first_graph(config, vq, weights), [latent], [first, *present]),
        NEXT: (video.next_graph(config, vq, weights), [latent, *past], [following, *present]),
    }
    if encoder:
        graphs["encoder"] = (video.encoder_graph(config, vq, weights), [clip], [tokens])
    return graphs


def _model_entry(config: PARConfig, parameters: int) -> dict[str, int]:
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "head_dim": config.head_dim,
        "head_dim_padded": padded_head_dim(config),
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "n_classes": config.n_classes,
        "parameters": parameters,
    }
