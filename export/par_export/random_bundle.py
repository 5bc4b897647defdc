"""Bundles with random weights, for benchmarks: speed depends on the shapes of the weights, not on their values.

``write_family`` writes one weights file for several n. The bundles of a model differ only in their rotary tables and in
how many rows of the embedding table are learnable tokens, so all of them link to this file. ``write_like`` writes a
bundle of the architecture of another one at another n. No checkpoint is needed and no parity gate is run, since there
is no model to compare with. The self-test in their manifests is empty: ``Pipeline.load`` refuses them unless its
self-test is off.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from par_export.graphs.writer import WeightTable
from par_export.parts import SELFTEST_GUIDANCE, Tokenizer, architecture_entries, write_graphs, write_manifest
from par_export.quantised import Codes, can_quantise, nearest, stored_scales
from par_export.weights import (
    WeightsWriter,
    parameters,
    write_rotary,
    write_tokenizer_weights,
    write_video_weights,
    write_weights,
)
from par_model.checkpoint import Checkpoint
from par_model.config import (
    PARConfig,
    VideoTokenizerConfig,
    VQConfig,
    named,
)
from par_model.manifest import config_from_manifest, read_manifest, tokenizer_from_manifest
from par_model.shapes import without_weights
from par_model.transformer import INIT_STD, PAR
from par_model.video import VideoTokenizer
from par_model.vq import VQModel
from par_runtime import __version__
from par_runtime.backends.tails import least_tail
from par_runtime.bundle import WEIGHTS, Bundle
from par_runtime.dtypes import DTYPE
from par_runtime.errors import BundleError
from par_runtime.manifest import matrices_of
from par_runtime.quantised import MOST_CODE, SCALE

#: The sampling settings of benchmarks. Other published settings take the same time, except for greedy ones.
DEFAULTS = {"guidance": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
#: Of the paper's video model.
VIDEO_DEFAULTS = DEFAULTS | {"guidance": 1.15, "top_k": 8000}
NO_SOURCE = "0" * 64  #: of a quantised bundle of random weights: the hash of the bundle that it was made from


class RandomTensors(Mapping[str, Tensor]):
    """The state dict of a model that was never trained; each tensor is made when it is read.

    Matrices, embeddings and the head are uniform with the standard deviation of an untrained model (with a head of
    zeros all logits would be equal); gains are one, biases zero. Every read draws new numbers, also of a key that was
    read before. Layers therefore differ, which they must: TensorRT stores equal weights once.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self._shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
        self._random = torch.Generator().manual_seed(seed)

    def __getitem__(self, key: str) -> Tensor:
        shape, dtype = self._shapes[key]
        if not dtype.is_floating_point or len(shape) < 2:
            return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype)
        bound = 3**0.5 * INIT_STD
        return torch.empty(shape).uniform_(-bound, bound, generator=self._random)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class NoTensors(RandomTensors):
    """As :class:`RandomTensors`, but matrices have no numbers (device "meta"): a weights file of them is full of holes.

    Whoever loads such a bundle fills them in its own memory; reading 6 GB of random numbers takes longer than that.
    """

    def __getitem__(self, key: str) -> Tensor:
        shape, dtype = self._shapes[key]
        if dtype.is_floating_point and len(shape) > 1:
            return torch.empty(shape, dtype=dtype, device="meta")
        return super().__getitem__(key)


class VariedTensors(RandomTensors):
    """As :class:`RandomTensors`, but gains lie between 0.25 and 4 and biases are not zero, as in a trained model."""

    def __getitem__(self, key: str) -> Tensor:
        shape, dtype = self._shapes[key]
        if not dtype.is_floating_point or len(shape) > 1:
            return super().__getitem__(key)
        numbers = torch.empty(shape).uniform_(-1, 1, generator=self._random)
        return 0.1 * numbers if key.endswith("bias") else torch.exp2(2 * numbers)


class _CodesWriter(WeightsWriter):
    """A weights file in which the matrices of ``config`` become ``codes``, rounded to the nearest, as far as they have
    whole groups. ``kept``: those that have none.

    Of a matrix without numbers the codes are a hole. Its scales are numbers all the same, for which random codes are as
    large as the numbers of an untrained model: no bundle has scales of zero.
    """

    def __init__(self, path: Path, config: PARConfig, codes: Codes) -> None:
        super().__init__(path)
        self._matrices, self._codes = frozenset(matrices_of(config.n_layers)), codes
        self.kept: list[str] = []

    def add(self, name: str, parts: Iterable[Tensor], dtype: str) -> None:
        """As ``WeightsWriter.add``; a matrix is one part."""
        if name not in self._matrices:
            super().add(name, parts, dtype)
            return
        (matrix,), codes = parts, self._codes
        rows, columns = matrix.shape
        if not can_quantise((rows, columns), codes.dtype, codes.group):
            self.kept.append(name)
            super().add(name, [matrix], dtype)
            return
        if matrix.is_meta:
            self.add_hole(name, codes.dtype, (rows, columns))
            one = np.float32(3**0.5 * INIT_STD / MOST_CODE[codes.dtype])
            scales = stored_scales(np.full((rows // codes.group, columns), one), dtype)
        else:
            quantised = nearest(matrix.float().numpy(), codes.dtype, codes.group, dtype)
            self.add_bytes(name, codes.dtype, (rows, columns), [quantised.code_bytes()])
            scales = quantised.scales
        super().add(name + SCALE, [torch.from_numpy(scales)], dtype)


def write_family(
    config: PARConfig,
    group_sizes: Sequence[int],
    folder: Path,
    *,
    name: str,
    precision: str = "fp32",
    vq: Tokenizer | None = None,
    defaults: Mapping[str, Any] = DEFAULTS,
    tensors: type[RandomTensors] = RandomTensors,
    codes: Codes | None = None,
) -> dict[int, Path]:
    """Write bundles ``{name}-n{n}`` into ``folder``; returns n -> path.

    ``config.group_size`` is ignored; ``vq`` adds a decoder (no encoder). ``tensors``: what the weights are; ``codes``:
    matrices are quantised, in a bundle that stores everything else in ``precision``. Raises ValueError for an n that
    does not fit the grid, OSError.
    """
    configs = {n: replace(config, group_size=n) for n in group_sizes}
    dtype = DTYPE[precision]
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / f".{name}-{WEIGHTS}"
    widest = configs[max(configs)]
    weights = WeightsWriter(shared) if codes is None else _CodesWriter(shared, widest, codes)
    try:
        model = without_weights(PAR, widest)
        write_weights(weights, widest, Checkpoint(shared, tensors(model)), dtype)
        for n, each in configs.items():
            write_rotary(weights, each, f".{n}")
        if vq is not None:
            _write_decoder(weights, vq, tensors, dtype)
    finally:
        weights.close()
    settings: dict[str, Any] = {"precision": precision, "defaults": dict(defaults)}
    if codes is not None and isinstance(weights, _CodesWriter):
        settings["calibration"] = codes.calibration(weights.kept, source=NO_SOURCE)
    hashes: dict[tuple[int, int], str] = {}
    out = {}
    for n, each in configs.items():
        own = {plain: weights.entries[f"{plain}.{n}"] for plain in ("cos", "sin")}
        out[n] = folder / f"{name}-n{n}"
        _write(out[n], each, vq, WeightTable(weights.entries | own), shared, settings, hashes)
    shared.unlink()
    return out


def _write_decoder(weights: WeightsWriter, vq: Tokenizer, tensors: type[RandomTensors], dtype: str) -> None:
    """Write the weights of a decoder of images or of clips."""
    model = without_weights(VideoTokenizer if isinstance(vq, VideoTokenizerConfig) else VQModel, vq)
    checkpoint = Checkpoint(weights.path, tensors(model))
    if isinstance(vq, VideoTokenizerConfig):
        write_video_weights(weights, checkpoint, vq, dtype, encoder=False)
    else:
        write_tokenizer_weights(weights, checkpoint, dtype, encoder=False)


def write_published(
    model: str, group_sizes: Sequence[int], folder: Path, *, precision: str = "fp32"
) -> dict[int, Path]:
    """Write bundles of a model of the paper: "PAR-L" to "PAR-3B" (384 px, with VQ-16's decoder), or "PAR-video" (17
    frames of 128x128, with the paper's settings).

    That of video ends at tokens: decoding is the same for every n, and would hide what the rows of n compare;
    ``--suite decoder`` times it. Returns n -> path. Raises ValueError for another name, OSError.
    """
    config = named(model.removeprefix("PAR-"))
    video = config.grid[0] > 1
    vq, defaults = (None, VIDEO_DEFAULTS) if video else (VQConfig(), DEFAULTS)
    return write_family(config, group_sizes, folder, name=model, precision=precision, vq=vq, defaults=defaults)


def _write(
    folder: Path,
    config: PARConfig,
    vq: Tokenizer | None,
    table: WeightTable,
    shared: Path,
    settings: Mapping[str, Any],
    hashes: dict[tuple[int, int], str],
) -> None:
    folder.mkdir()
    try:
        os.link(shared, folder / WEIGHTS)
    except OSError:  # a file system without links
        shutil.copyfile(shared, folder / WEIGHTS)
    d = settings["defaults"]
    tail = least_tail(config.vocab_size, d["top_k"], d["top_p"])
    graphs = write_graphs(folder, config, vq, table, DTYPE[settings["precision"]], tail, encoder=False)
    entries = {
        # No versions of libraries: they do not change these bundles, and an engine that was built ahead, on a machine
        # with others, is one of the same bundle.
        "created": {"parvis": __version__},
        "name": folder.name,
        "class_names": None,
        "class_synsets": None,
        "parity": {"random_weights": True},
        "selftest": {"labels": [], "guidance": SELFTEST_GUIDANCE, "tokens": []},
    }
    entries |= settings
    write_manifest(folder, entries | architecture_entries(config, vq, graphs, parameters(config), table), hashes)


def write_like(path: str | Path, group_size: int, out: str | Path) -> Path:
    """Write a bundle with random weights into the folder ``out``; returns its path.

    It has the architecture, precision and settings of the bundle at ``path``, but ``group_size`` tokens per group.
    Raises BundleError where the bundle at ``path`` cannot be read, or its grid does not take ``group_size``.
    """
    bundle = Bundle.open(path, verify="none")
    try:
        manifest = read_manifest(path)
        config = replace(config_from_manifest(manifest), group_size=group_size)
        vq = tokenizer_from_manifest(manifest)
    except ValueError as error:
        raise BundleError(f"{path}: no bundle of random weights can be made like it ({error})") from error
    # Random weights are not quantised, so a quantised bundle is replaced by one in fp16.
    precision = bundle.precision if bundle.precision in DTYPE else "fp16"
    defaults = manifest["defaults"]
    name = re.sub(r"[^\w.-]", "_", bundle.name) + "-random"  # it becomes the name of a folder
    return write_family(config, [group_size], Path(out), name=name, precision=precision, vq=vq, defaults=defaults)[
        group_size
    ]
