"""The parity gate of the tokenizer's graphs: encoder and decoders on ONNX Runtime against the PyTorch oracle.

The oracle's weights are rounded to the bundle's precision, so that what is compared is the graph (see ``verify.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_export.gate.model import ParityError, gate_decoder, session
from par_export.weights import TORCH_TYPE
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order
from par_model.vq import VQModel
from par_runtime.metrics import finite, psnr_db

HALF_DECODER = "decoder_fp16"
#: Codes whose products with a position differ less than this may swap by rounding. The products lie in -1..1.
NEAR = 1e-4
#: Least PSNR (dB, of 255) of the decoder in fp16 against the one in fp32. Measured: 50 to 60; a broken one is below 30.
HALF_FLOOR_DB = 40.0


@torch.no_grad()
def gate(
    folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str, graphs: dict[str, Any]
) -> dict[str, Any]:
    """Compare every tokenizer graph in ``folder`` with the oracle; the manifest's entries, by graph.

    The decoder in fp16 is dropped from ``folder`` and ``graphs`` where half precision is not enough for these weights.
    Raises ParityError below the floors of the others.
    """
    report = {"decoder": gate_decoder(folder, config, vq, checkpoint, dtype, token_order(config))}
    report[HALF_DECODER] = half = _half_decoder(folder, config)
    if half["left_out"]:
        (folder / graphs.pop(HALF_DECODER)["file"]).unlink()
    if "encoder" in graphs:
        report["encoder"] = _encoder(folder, config, vq, checkpoint, dtype)
    return report


def _half_decoder(folder: Path, config: PARConfig) -> dict[str, Any]:
    """The decoder in fp16 against the one in fp32: what rounding costs is a property of the weights, not an error."""
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, config.n_tokens))
    exact, half = (
        session(folder / f"{name}.onnx").run(["images"], {"tokens": tokens})[0].astype(np.int64)
        for name in ("decoder", HALF_DECODER)
    )
    error = np.abs(exact - half)
    psnr = psnr_db(half, exact)
    return {"max_pixel_error": int(error.max()), "psnr_db": finite(psnr), "left_out": psnr < HALF_FLOOR_DB}


def _encoder(folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Tokens of a smooth random image; a token may differ where the oracle finds both codes equally near."""
    _, h, w = config.grid
    size = (h * vq.downsampling, w * vq.downsampling)
    coarse = torch.rand((1, 3, h, w), generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    image = (255 * smooth).to(torch.uint8)
    z, codebook = _features(image, vq, checkpoint, dtype)
    got = session(folder / "encoder.onnx").run(["tokens"], {"images": image.permute(0, 2, 3, 1).numpy()})[0]
    products = (z @ codebook.T)[token_order(config).tolist()]  # [N,V], sequence order
    behind = products.max(1).values - products[torch.arange(config.n_tokens), torch.from_numpy(got[0])]
    if not bool((behind <= NEAR).all()):
        place = int(behind.argmax())
        raise ParityError(
            f"encoder.onnx: token {place} is code {got[0, place]}, which is {float(behind[place]):.3g} further than the "
            f"oracle's {int(products[place].argmax())} (cosine; at most {NEAR:g} is allowed). Nothing was published; this "
            "is a bug in the export, please report it"
        )
    report: dict[str, Any] = {"tokens": config.n_tokens, "ties": int((behind > 0).sum())}
    if dtype != "float32":
        exact_z, exact_codebook = _features(image, vq, checkpoint, "float32")
        exact = (exact_z @ exact_codebook.T).argmax(1)
        agreement = float((exact[token_order(config).tolist()] == torch.from_numpy(got[0])).float().mean())
        report["rounding"] = {"token_agreement": agreement}
    return report


def _features(image: Tensor, vq: VQConfig, checkpoint: Checkpoint, dtype: str) -> tuple[Tensor, Tensor]:
    """The oracle's normalised features [N,c] of ``image`` [1,3,H,W] uint8, raster order, and its codebook [V,c]."""
    with torch.device("meta"):
        model = VQModel(vq)
    keys = [key for key in model.state_dict() if key.startswith(("encoder.", "quant_conv."))]
    rounded = {key: checkpoint.tensor(key).to(TORCH_TYPE[dtype]).float() for key in keys}
    model.load_state_dict(rounded, assign=True, strict=False)
    z = model.quant_conv(model.encoder(image.float() / 127.5 - 1))
    z = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, vq.codebook_dim), dim=-1)
    # The bundle stores the normalised codebook, rounded; the graph normalises it again.
    codebook = F.normalize(checkpoint.tensor("quantize.embedding.weight").float(), dim=-1)
    return z, F.normalize(codebook.to(TORCH_TYPE[dtype]).float(), dim=-1)
