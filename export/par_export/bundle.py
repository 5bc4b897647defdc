"""Checkpoint to bundle: weights are streamed, graphs written, the parity gate run, then the folder is renamed once.

Everything is written into a hidden folder beside the target; a kill, a full disk or a failed parity gate leaves no
bundle. A folder that a killed process left behind is removed by the next export to the same place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from par_export import imagenet
from par_export.errors import ExportError
from par_export.fp16 import FP16_MAX, largest_in
from par_export.graphs.decoder import HALF_DECODER
from par_export.graphs.sampling import why_not_searched
from par_export.parts import SELFTEST_GUIDANCE, Tokenizer, architecture_entries, write_graphs, write_manifest
from par_export.staging import check_place, staging
from par_export.weights import (
    WeightsWriter,
    parameter_count,
    write_tokenizer_weights,
    write_video_weights,
    write_weights,
)
from par_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    Kind,
    downsampling,
    infer,
    is_video,
    open_checkpoint,
    video_config,
    vq_config,
)
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.ordering import phases
from par_runtime.backends.tails import Tail, least_tail
from par_runtime.bundle import WEIGHTS
from par_runtime.checked import Mismatch, Value, shown
from par_runtime.dtypes import DTYPE, FLOAT32_MAX, MOST_GUIDANCE
from par_runtime.manifest import MOST_CLASS_NAME, MOST_NAME
from par_runtime.system import peak_bytes, utf8_name


@dataclass(frozen=True)
class ExportRequest:
    """What to export. ``heads`` and ``grid`` are needed where neither the checkpoint nor a named size fixes them."""

    checkpoint: Path
    tokenizer: Path | None  #: None: a bundle that ends at tokens
    out: Path
    precision: str = "fp32"
    heads: int | None = None
    grid: tuple[int, int, int] | None = None
    sampling: Tail | None = None  #: of the static graphs; None: ``topk``, or ``exact`` where its settings need it
    name: str | None = None
    class_names: list[str] | None = None
    class_names_file: Path | None = None  #: where they are from, for messages
    encoder: bool = True  #: write the tokenizer's encoder too, which editing and reconstructing an image need
    imagenet_names: bool = True  #: give a model of ImageNet's shape its class names
    defaults: dict[str, Any] | None = None
    force: bool = False
    weights: Kind | None = None  #: of files that hold trained and averaged ones; None: as the published code takes them


def export(request: ExportRequest, say: Callable[[str], None] = print) -> Path:
    """Write the bundle of ``request``; returns its path. ``say`` receives lines of text for the user.

    Raises ExportError, OutputError, CheckpointError, ParityError, OSError.
    """
    # Here: a bundle of random weights, which has no gate, is written without ONNX Runtime.
    from par_export.gate import model as model_gate
    from par_export.gate import tokenizer as tokenizer_gate
    from par_export.gate import video as video_gate

    started = time.monotonic()
    if request.precision not in DTYPE:
        raise ExportError(f"precision {request.precision!r}; expected one of {', '.join(DTYPE)}")
    dtype = DTYPE[request.precision]
    check_place(request.out)
    _check_defaults(request.defaults or {}, "")
    folder_name = utf8_name(request.out.absolute())
    if folder_name is None:
        raise ExportError(
            f"--out {request.out}: its path is not UTF-8, and ONNX Runtime opens no other files; give another --out"
        )
    _check_text("name", Path(folder_name).name if request.name is None else request.name, MOST_NAME)
    checkpoint = open_checkpoint(request.checkpoint, request.weights)
    name, defaults = _name_and_defaults(request, checkpoint, say)
    opened = None if request.tokenizer is None else _open_tokenizer(request, request.tokenizer, checkpoint)
    vq_file, vq = opened or (None, None)
    inferred = infer(
        checkpoint,
        heads=request.heads,
        grid=request.grid,
        pixels_per_token=vq.downsampling if isinstance(vq, VQConfig) else None,
    )
    config = inferred.config
    for file in [checkpoint] if vq_file is None else [checkpoint, vq_file]:
        for note in file.notes:
            say(f"{file.path}: {note}")
    for warning in inferred.warnings:
        say(f"warning: {request.checkpoint}: {warning}")
    if config.causal_groups:
        raise ExportError(
            f"{request.checkpoint}: was trained with causal attention inside a group; the step graph shows every "
            "position of a call the same keys, so only par_model.generate can run this ablation"
        )
    if vq_file is not None and vq is not None:
        _check_tokenizer(vq_file.path, vq, config, checkpoint)
    sampling = _tail(request, config.vocab_size, defaults)
    names, synsets = _class_names(request, config, checkpoint, say)
    parameters = parameter_count(checkpoint)
    t, h, w = config.grid
    say(
        f"{request.checkpoint}: width {config.dim}, {config.n_layers} layers, {config.n_heads} heads of "
        f"{config.head_dim} ({inferred.heads_from}), {parameters:,} parameters, {config.n_classes} classes, "
        f"{config.vocab_size} codes, grid {t}x{h}x{w} ({inferred.grid_from}){_pixels(config, vq)}, "
        f"n = {config.group_size}, {sum(p.repeat for p in phases(config))} calls per {'clip' if t > 1 else 'image'}"
    )
    with staging(request.out, request.force) as folder:
        weights = WeightsWriter(folder / WEIGHTS)
        try:
            write_weights(weights, config, checkpoint, dtype)
            if vq_file is not None and isinstance(vq, VideoTokenizerConfig):
                write_video_weights(weights, vq_file, vq, dtype, request.encoder)
            elif vq_file is not None:
                write_tokenizer_weights(weights, vq_file, dtype, request.encoder)
        finally:
            weights.close()
        checkpoint.release()  # otherwise what was read stays mapped, and counts beside the memory that the gate needs
        graphs = write_graphs(folder, config, vq, weights, dtype, sampling, request.encoder)
        say(f"graphs and weights written after {time.monotonic() - started:.1f} s; checking them against PyTorch")
        checked = model_gate.gate(folder, config, checkpoint, weights, guidance=SELFTEST_GUIDANCE)
        if not any(checked["parity"]["largest"]["logits"]):
            say(f"warning: {request.checkpoint}: every logit is 0, as before a training: images will be noise")
        if vq is not None and vq_file is not None:
            if isinstance(vq, VideoTokenizerConfig):
                checked["parity"] |= video_gate.gate(folder, config, vq, vq_file, dtype, graphs)
            else:
                checked["parity"] |= tokenizer_gate.gate(folder, config, vq, vq_file, dtype, graphs)
            if why := checked["parity"][HALF_DECODER].get("why"):
                say(f"{HALF_DECODER}.onnx is left out, images are decoded in fp32: {why}")
        entries = {"name": name, "precision": request.precision, "defaults": defaults}
        architecture = architecture_entries(config, vq, graphs, parameters, weights)
        write_manifest(folder, entries | architecture | {"class_names": names, "class_synsets": synsets} | checked)
    size = sum(f.stat().st_size for f in request.out.iterdir())
    peak = (peak_bytes() or 0) / 1e6
    say(
        f"{request.out}: {size / 1e6:.1f} MB, {time.monotonic() - started:.1f} s, peak memory {peak:.0f} MB; "
        f"{_parity_line(checked['parity'])}"
    )
    return request.out


def _open_tokenizer(request: ExportRequest, path: Path, checkpoint: Checkpoint) -> tuple[Checkpoint, Tokenizer]:
    """The tokenizer at ``path``. A file with one set of weights has it taken, whatever the transformer's file holds.

    Raises CheckpointError.
    """
    try:
        file = open_checkpoint(path, request.weights)
    except CheckpointError:
        file = open_checkpoint(path)
        if len(file.kinds) > 1:
            raise
    if "tok_embeddings.weight" in file.tensors and "quantize.embedding.weight" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path} is a tokenizer and {path} is a model; swap them: --checkpoint {path} --tokenizer "
            f"{checkpoint.path}"
        )
    return file, video_config(file) if is_video(file) else vq_config(file)


def _check_tokenizer(path: Path, vq: Tokenizer, config: PARConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError or ExportError where the tokenizer at ``path`` is not the one of the model."""
    if vq.codebook_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: has {vq.codebook_size} codes, the model was trained on {config.vocab_size}; "
            "give the tokenizer whose codes the model was trained on"
        )
    grid = "x".join(map(str, config.grid))
    if isinstance(vq, VideoTokenizerConfig):
        if config.grid[0] == 1:
            raise ExportError(
                f"{path}: is a video tokenizer, and grid {grid} has one frame; give an image tokenizer, or none"
            )
        return
    if config.grid[0] != 1:
        raise ExportError(
            f"{path}: is an image tokenizer, and grid {grid} is of video; give a video tokenizer, or --tokenizer none"
        )
    check_downsampling(path, vq, checkpoint)


def _pixels(config: PARConfig, vq: Tokenizer | None) -> str:
    """The image's size in words, where a tokenizer says it."""
    if vq is None:
        return ""
    t, h, w = config.grid
    if isinstance(vq, VideoTokenizerConfig):
        side = vq.downsampling[1]
        return f", clips of {vq.frames(t)} frames of {w * side}x{h * side} pixels"
    return f", images of {w * vq.downsampling}x{h * vq.downsampling} pixels"


def _tail(request: ExportRequest, vocab: int, defaults: Mapping[str, Any]) -> Tail:
    """The tail of the static graphs: the one asked for, or the least that draws with the bundle's settings. Raises
    ExportError."""
    tail = request.sampling or least_tail(vocab, defaults["top_k"], defaults["top_p"])
    why = why_not_searched(tail, vocab)
    if why is not None and request.sampling is not None:
        raise ExportError(f"{request.checkpoint}: {why}")
    return tail if why is None else "topk"


def _name_and_defaults(
    request: ExportRequest, checkpoint: Checkpoint, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """The bundle's name and sampling settings: the request's, else those of the bundle the checkpoint was read from.

    Raises ExportError where these are no settings.
    """
    given = request.defaults or {}
    kept = {key: value for key, value in checkpoint.defaults.items() if key not in given}
    _check_defaults(kept, f"{checkpoint.path}: ")
    name = request.name
    if name is None:
        name = checkpoint.name or Path(utf8_name(request.out) or "").name
    _check_text("name", name, MOST_NAME)
    parts = [f"{key} {value:g}" for key, value in kept.items()]
    if request.name is None and checkpoint.name is not None:
        parts.append(f"name {name!r}")
    if parts:
        say(f"{checkpoint.path}: {', '.join(parts)}: of the bundle that it was read from (options change them)")
    defaults = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | kept | given
    if defaults.get("guidance_interval") == -1:
        del defaults["guidance_interval"]  # a manifest without it says the same, and older runtimes can read it
    return name, defaults


def _class_names(
    request: ExportRequest, config: PARConfig, checkpoint: Checkpoint, say: Callable[[str], None]
) -> tuple[list[str] | None, list[str] | None]:
    """Class names and synsets: the request's names, else the checkpoint's, else ImageNet's for a model of its shape.

    Raises ExportError where there is not one name per class.
    """
    names, synsets = request.class_names, None
    where = "" if request.class_names_file is None else f"{request.class_names_file}: "
    if names is None and checkpoint.class_names is not None:
        names, where = checkpoint.class_names, f"{checkpoint.path}: "
    if names is None and request.imagenet_names and imagenet.fits(config):
        names, synsets = imagenet.classes()
        say(
            f"{len(names)} classes and {config.vocab_size} codes: taken as ImageNet's, so classes have its names "
            "(--class-names none: no names)"
        )
    if names is not None and len(names) != config.n_classes:
        raise ExportError(
            f"{where}{len(names)} class names for a model of {config.n_classes} classes; give one per class"
        )
    for name in names or ():
        _check_text(f"{where}class name", name, MOST_CLASS_NAME)
    return names, synsets


def _check_text(what: str, text: str, most: int) -> None:
    """Raise ExportError for a text that the manifest may not hold."""
    try:
        Value(text, what).text(most)
    except Mismatch as error:
        raise ExportError(str(error)) from error


def check_downsampling(path: Path, vq: VQConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the model was trained with another number of pixels per token than the tokenizer's."""
    trained = downsampling(checkpoint.args)
    if trained is not None and trained != vq.downsampling:
        raise CheckpointError(
            f"{path}: makes a token of {vq.downsampling}x{vq.downsampling} pixels, the model's args say "
            f"downsample_size {trained}; give the tokenizer whose codes the model was trained on"
        )


def _check_defaults(defaults: Mapping[Any, Any], where: str) -> None:
    """Raise ExportError for what are no sampling settings; ``where`` begins the message."""
    ranges = {"guidance": MOST_GUIDANCE, "temperature": FLOAT32_MAX, "top_k": 2.0**53, "top_p": 1.0}
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ExportError(f"{where}default {str(name)[:80]!r} is a {type(value).__name__}; expected a number")
        if name == "guidance_interval":
            if not (isinstance(value, int) and -1 <= value <= 2**53):
                raise ExportError(
                    f"{where}default {name} {shown(value)}; expected a whole number, -1 (every call is guided) or more"
                )
            continue
        if name not in ranges:
            raise ExportError(
                f"{where}default {str(name)[:80]!r}; expected one of {', '.join(ranges)}, guidance_interval"
            )
        if not (0 <= value <= ranges[name] and math.isfinite(value)):
            expected = "0 to 1" if name == "top_p" else "0 or more"
            raise ExportError(f"{where}default {name} {shown(value)}; expected {expected}")
        if name == "top_k" and not isinstance(value, int):
            raise ExportError(f"{where}default {name} {shown(value)}; expected a whole number")


def _parity_line(parity: dict[str, Any]) -> str:
    worst = max(phase["max_logit_error"] for phase in parity["phases"].values())
    line = (
        f"largest logit error {worst:.2g} of {parity['logit_scale']:.3g}, "
        f"{parity['greedy']['tokens']} greedy tokens as in PyTorch ({parity['greedy']['ties']} ties)"
    )
    value, quantity, _ = largest_in(parity) or (0.0, "", 0)
    return f"{line}; the largest number in the network is {value:.4g} ({quantity}), fp16 holds {FP16_MAX:.0f}"
