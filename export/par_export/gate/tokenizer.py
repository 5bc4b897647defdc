"""The parity gate of the tokenizer's graphs: encoder and decoders on ONNX Runtime against the PyTorch oracle.

The oracle's weights are rounded to the bundle's precision, so that the comparison tests the graph (see ``oracle.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from par_export.errors import ParityError
from par_export.fp16 import FP16_ALLOWED, REASON
from par_export.gate.magnitudes import Largest
from par_export.gate.oracle import rounded
from par_export.gate.runner import session
from par_export.graphs.decoder import HALF_DECODER
from par_export.weights import TORCH_DTYPE
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order
from par_model.shapes import without_weights
from par_model.vq import VQModel
from par_runtime.metrics import finite, psnr_db

PIXEL_TOLERANCE = 1  #: of the decoder, in grey levels of 255
#: Codes whose products with a position differ by less than this may swap by rounding. The products lie in -1..1.
TIE_TOLERANCE = 1e-4
#: The decoder in fp16 is left out where its PSNR against fp32 is lower. Measured: 50 to 60 dB; broken: below 30.
HALF_MIN_PSNR_DB = 40.0


@torch.no_grad()
def gate(
    folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str, graphs: dict[str, Any]
) -> dict[str, Any]:
    """Compare every tokenizer graph in ``folder`` with the oracle; returns the manifest's entries, by graph.

    The decoder in fp16 is removed from ``folder`` and ``graphs`` where half precision is not enough for these weights.
    ``why`` in its entry then tells the reason. Raises ParityError where another graph is beyond its tolerance,
    CheckpointError where weights are not finite.
    """
    largest = Largest()
    report = {"decoder": _decoder(folder, config, vq, checkpoint, dtype, largest)}
    report[HALF_DECODER] = half = _half_decoder(folder, config, largest)
    if half["left_out"]:
        (folder / graphs.pop(HALF_DECODER)["file"]).unlink()
    if "encoder" in graphs:
        report["encoder"] = _encoder(folder, config, vq, checkpoint, dtype)
    return report


def _decoder(
    folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str, largest: Largest
) -> dict[str, Any]:
    """Compare ``decoder.onnx`` with the oracle's decoder on random tokens; ``largest`` gets the oracle's numbers."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (1, config.n_tokens))
    model = without_weights(VQModel, vq)
    model.load_state_dict(rounded(checkpoint, "", model.state_dict(), dtype), assign=True)
    # The graph stores the normalised codebook, rounded.
    raster = np.empty_like(tokens)
    raster[:, token_order(config)] = tokens
    codebook = F.normalize(checkpoint.tensor("quantize.embedding.weight").float(), dim=-1)
    codes = codebook.to(TORCH_DTYPE[dtype]).float()[torch.from_numpy(raster.reshape(-1, *config.grid[1:]))]
    with largest.watching_decoder({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder}):
        image = model.decode_codes(codes.permute(0, 3, 1, 2))
    wanted = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = session(folder / "decoder.onnx").run(["images"], {"tokens": tokens})[0]
    worst = int(np.abs(got.astype(int) - wanted.astype(int)).max())
    if worst > PIXEL_TOLERANCE:
        raise ParityError(
            f"decoder.onnx: pixels differ from the oracle by up to {worst} of 255; at most {PIXEL_TOLERANCE} is "
            "allowed. Nothing was published; this is a bug in the export, please report it"
        )
    return {"max_pixel_error": worst, "equal_pixels": float((got == wanted).mean())}


def _half_decoder(folder: Path, config: PARConfig, largest: Largest) -> dict[str, Any]:
    """Compare the decoder in fp16 with fp32. A large difference is a property of the weights, not an error.

    ``largest`` holds the largest numbers of the decoder in fp32: a CPU computes the graph in fp32 between its casts, so
    that the pictures alone do not show that a GPU's numbers would be infinite.
    """
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, config.n_tokens))
    exact, half = (
        session(folder / f"{name}.onnx").run(["images"], {"tokens": tokens})[0] for name in ("decoder", HALF_DECODER)
    )
    return half_report(half, exact, largest)


def half_report(half: NDArray[Any], exact: NDArray[Any], largest: Largest) -> dict[str, Any]:
    """The manifest's entry of the decoder in fp16, whose pixels ``half`` are ``exact`` in fp32: "why" it is left out,
    if it is. ``largest``: the numbers of the decoder in fp32.
    """
    half, exact = half.astype(np.int64), exact.astype(np.int64)
    error = np.abs(exact - half)
    psnr = psnr_db(half, exact)
    value, _, place = largest.worst()
    why = None
    if not value <= FP16_ALLOWED:
        why = f"{place} computes numbers up to {value:.4g}; {REASON}"
    elif not psnr >= HALF_MIN_PSNR_DB:
        why = f"its images differ from fp32's: PSNR {psnr:.1f} dB, at least {HALF_MIN_PSNR_DB:.0f} dB is expected"
    report = {"max_pixel_error": int(error.max()), "psnr_db": finite(psnr), "largest": float(f"{value:.4g}")}
    return report | {"left_out": why is not None} | ({"why": why} if why else {})


def _encoder(folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Compare the tokens of a smooth random image; one may differ where both codes are equally near to the oracle."""
    _, h, w = config.grid
    size = (h * vq.downsampling, w * vq.downsampling)
    coarse = torch.rand((1, 3, h, w), generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    image = (255 * smooth).to(torch.uint8)
    z, codebook = _features(image, vq, checkpoint, dtype)
    got = session(folder / "encoder.onnx").run(["tokens"], {"images": image.permute(0, 2, 3, 1).numpy()})[0]
    products = (z @ codebook.T)[token_order(config).tolist()]  # [N,V], sequence order
    behind = products.max(1).values - products[torch.arange(config.n_tokens), torch.from_numpy(got[0])]
    if not bool((behind <= TIE_TOLERANCE).all()):
        place = int(behind.argmax())
        raise ParityError(
            f"encoder.onnx: token {place} is code {got[0, place]}, which is {float(behind[place]):.3g} further "
            f"than the oracle's {int(products[place].argmax())} (cosine; at most {TIE_TOLERANCE:g} is allowed). "
            "Nothing was published; this is a bug in the export, please report it"
        )
    report: dict[str, Any] = {"tokens": config.n_tokens, "ties": int((behind > 0).sum())}
    if dtype != "float32":
        exact_z, exact_codebook = _features(image, vq, checkpoint, "float32")
        exact = (exact_z @ exact_codebook.T).argmax(1)
        agreement = float((exact[token_order(config).tolist()] == torch.from_numpy(got[0])).float().mean())
        report["rounding"] = {"token_agreement": agreement}
    return report


def _features(image: Tensor, vq: VQConfig, checkpoint: Checkpoint, dtype: str) -> tuple[Tensor, Tensor]:
    """The oracle's normalised features [N,c] of ``image`` [1,3,H,W] uint8 in raster order, and its codebook [V,c]."""
    model = without_weights(VQModel, vq)
    keys = [key for key in model.state_dict() if key.startswith(("encoder.", "quant_conv."))]
    model.load_state_dict(rounded(checkpoint, "", keys, dtype), assign=True, strict=False)
    z = model.quant_conv(model.encoder(image.float() / 127.5 - 1))
    z = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, vq.codebook_dim), dim=-1)
    # The bundle stores the normalised codebook, rounded; the graph normalises it again.
    codebook = F.normalize(checkpoint.tensor("quantize.embedding.weight").float(), dim=-1)
    return z, F.normalize(codebook.to(TORCH_DTYPE[dtype]).float(), dim=-1)
