"""The parity gate of the video tokenizer's graphs, as ``tokenizer.py`` has it for images.

One side is in memory at a time: the oracle is freed before a session is opened, and a session before the next one. The
oracle's weights are rounded to the bundle's precision, so that the comparison tests the graphs (see ``oracle.py``).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from par_export.errors import ParityError
from par_export.gate.magnitudes import Largest
from par_export.gate.oracle import rounded
from par_export.gate.runner import session
from par_export.gate.tokenizer import PIXEL_TOLERANCE, half_report
from par_export.graphs.decoder import HALF_DECODER
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig, VideoTokenizerConfig
from par_model.ordering import token_order
from par_model.shapes import without_weights
from par_model.video import VideoTokenizer, to_pixels
from par_runtime.manifest_video import FIRST, NEXT
from par_runtime.system import give_back
from par_runtime.video_shapes import past_shapes

#: A number this close to the border between two levels may be rounded to either. Levels are 1 apart.
BORDER_TOLERANCE = 2e-3


@torch.no_grad()
def gate(
    folder: Path,
    config: PARConfig,
    tokenizer: VideoTokenizerConfig,
    checkpoint: Checkpoint,
    dtype: str,
    graphs: dict[str, Any],
) -> dict[str, Any]:
    """Compare every tokenizer graph in ``folder`` with the oracle; returns the manifest's entries, by graph.

    The decoder in fp16 is removed from ``folder`` and ``graphs`` where half precision is not enough for these weights.
    ``why`` in its entry then tells the reason. Raises ParityError where another graph is beyond its tolerance,
    CheckpointError where weights are not finite.
    """
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, config.n_tokens))
    largest = Largest()
    wanted = _decoded(config, tokenizer, checkpoint, tokens, dtype, largest)
    give_back()
    exact = _session(folder, "decoder").run(["images"], {"tokens": tokens})[0]
    report: dict[str, Any] = {"decoder": _compared("decoder", exact, wanted)}
    give_back()
    half = _session(folder, HALF_DECODER).run(["images"], {"tokens": tokens})[0]
    report[HALF_DECODER] = half_report(half, exact, largest)
    if report[HALF_DECODER]["left_out"]:
        (folder / graphs.pop(HALF_DECODER)["file"]).unlink()
    give_back()
    report |= _by_latent_frame(folder, config, tokenizer, tokens, wanted)
    if "encoder" in graphs:
        report["encoder"] = _encoder(folder, config, tokenizer, checkpoint, dtype)
    return report


def _session(folder: Path, name: str) -> ort.InferenceSession:
    return session(folder / f"{name}.onnx", keep=False)


def _model(tokenizer: VideoTokenizerConfig, checkpoint: Checkpoint, side: str, dtype: str) -> VideoTokenizer:
    """The oracle with the weights of one side, "decoder" or "encoder", rounded to ``dtype``; the other has none."""
    model = without_weights(VideoTokenizer, tokenizer)
    model.quantizers = type(model.quantizers)(tokenizer.levels)  # its tables are no weights
    keys = [key for key in model.state_dict() if key.startswith(f"{side}_layers.")]
    model.load_state_dict(rounded(checkpoint, "", keys, dtype), assign=True, strict=False)
    return model


def _decoded(
    config: PARConfig,
    tokenizer: VideoTokenizerConfig,
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    dtype: str,
    largest: Largest,
) -> NDArray[np.uint8]:
    """The oracle's clip of ``tokens`` [1,N]; ``largest`` gets its numbers."""
    model = _model(tokenizer, checkpoint, "decoder", dtype)
    raster = np.empty_like(tokens)
    raster[:, token_order(config)] = tokens
    with largest.watching_decoder({"decoder_layers": model.decoder_layers}):
        clip = model.decode(torch.from_numpy(raster).view(1, *config.grid))
    pixels: NDArray[np.uint8] = to_pixels(clip).numpy()
    return pixels


def _compared(name: str, got: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> dict[str, float]:
    worst = int(np.abs(got.astype(np.int16) - wanted).max())
    if worst > PIXEL_TOLERANCE:
        raise ParityError(
            f"{name}.onnx: pixels differ from the oracle by up to {worst} of 255; at most {PIXEL_TOLERANCE} is "
            "allowed. Nothing was published; this is a bug in the export, please report it"
        )
    return {"max_pixel_error": worst, "equal_pixels": float((got == wanted).mean())}


def _by_latent_frame(
    folder: Path,
    config: PARConfig,
    tokenizer: VideoTokenizerConfig,
    tokens: NDArray[np.int64],
    wanted: NDArray[np.uint8],
) -> dict[str, Any]:
    """The graphs of the first latent frame and of the others, one after another, against the oracle's whole clip."""
    t, h, w = config.grid
    parts = tokens.reshape(1, t, h * w)
    present = [f"present.{i}" for i in range(len(past_shapes(asdict(tokenizer), h, w)))]
    frames, *past = _session(folder, FIRST).run(["images", *present], {"tokens": parts[:, 0]})
    report = {FIRST: _compared(FIRST, frames, wanted[:, :1])}
    give_back()
    following, clip = _session(folder, NEXT), []
    for part in range(1, t):
        feed = {"tokens": parts[:, part]} | {f"past.{i}": value for i, value in enumerate(past)}
        frames, *past = following.run(["images", *present], feed)
        clip.append(frames)
    return report | {NEXT: _compared(NEXT, np.concatenate(clip, axis=1), wanted[:, 1:])}


def _encoder(
    folder: Path, config: PARConfig, tokenizer: VideoTokenizerConfig, checkpoint: Checkpoint, dtype: str
) -> dict[str, Any]:
    """Compare the tokens of a smooth random clip; one may differ where the oracle's number lies on a border."""
    t, h, w = config.grid
    shape = (tokenizer.frames(t), h * tokenizer.downsampling[1], w * tokenizer.downsampling[1])
    coarse = torch.rand((1, 3, t, h, w), generator=torch.Generator().manual_seed(3))
    clip = (255 * F.interpolate(coarse, shape, mode="trilinear", align_corners=False)).to(torch.uint8)
    give_back()
    got = _session(folder, "encoder").run(["tokens"], {"images": clip.permute(0, 2, 3, 4, 1).numpy()})[0]
    give_back()
    wanted, distance = _features(clip, tokenizer, checkpoint, dtype)
    order = token_order(config).tolist()
    wanted, distance = wanted[order], distance[order]
    other = got[0] != wanted
    if (distance[other] > BORDER_TOLERANCE).any():
        place = int(np.flatnonzero(other & (distance > BORDER_TOLERANCE))[0])
        raise ParityError(
            f"encoder.onnx: token {place} is code {got[0, place]}, the oracle's is {wanted[place]}, whose numbers are "
            f"{distance[place]:.3g} or more from the next level (at most {BORDER_TOLERANCE:g} is allowed). Nothing was "
            "published; this is a bug in the export, please report it"
        )
    report: dict[str, Any] = {"tokens": config.n_tokens, "ties": int(other.sum())}
    if dtype != "float32":
        give_back()
        exact, _ = _features(clip, tokenizer, checkpoint, "float32")
        report["rounding"] = {"token_agreement": float((exact[order] == got[0]).mean())}
    return report


def _features(
    clip: Tensor, tokenizer: VideoTokenizerConfig, checkpoint: Checkpoint, dtype: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The oracle's ids [N] of ``clip`` [1,3,T,H,W] uint8 in raster order, and how far [N] the number of each that is
    nearest to a border between two levels is from it.
    """
    model = _model(tokenizer, checkpoint, "encoder", dtype)
    features = model.features(clip.float() / 255)
    bounded = model.quantizers.bound(features)
    distance = (0.5 - (bounded - bounded.round()).abs()).amin(1)
    return model.quantizers.ids(features).flatten().numpy(), distance.flatten().numpy()
