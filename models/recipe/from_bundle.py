"""Read a bundle back into PyTorch checkpoints, the inverse of ``parvis export``.

    python from_bundle.py ../demo --out ../../build/demo/restored

Writes OUT/model.pt and OUT/tokenizer.pt, which must not exist, as ``parvis train`` and ``parvis train-tokenizer`` save
them: the numbers of the bundle in fp32, with its class names, its name and sampling settings, which an export takes.
Exporting them in the bundle's precision stores the same numbers again (the script prints the command). The script
exists because the demo's checkpoints were not kept, and training an encoder for its codebook needs the tokenizer's
checkpoint.

Weights that a bundle does not hold are initialised anew: the encoder where the bundle was exported without one (train
it with ``parvis train-tokenizer --encoder-for``), and the ring buffer of used codes (which is never read).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from script import run
from torch import Tensor

from par_export.graphs.vq import PREFIX
from par_export.restored import model_state, read_weights
from par_model.checkpoint import CheckpointError, check_keys
from par_model.config import VideoTokenizerConfig, VQConfig
from par_model.manifest import ManifestError, config_from_manifest, read_manifest, tokenizer_from_manifest
from par_model.training.cli import Parser
from par_model.training.files import InputError, folder_for
from par_model.training.run import save_together
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_model.words import printable
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError

INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Read a bundle back into PyTorch checkpoints.")
    p.add_argument("bundle", type=Path, help="folder that parvis export wrote")
    p.add_argument("--out", type=Path, required=True, help="folder for model.pt and tokenizer.pt")
    args = p.parse_args(argv)

    def work() -> int:
        try:
            restore(args.bundle, args.out)
        except ManifestError as error:
            raise InputError(f"{args.bundle}: {error}") from error
        return 0

    return run("from_bundle.py", work, BundleError, CheckpointError)


def restore(path: Path, out: Path) -> None:
    """Write the checkpoints of the bundle at ``path`` into ``out``.

    Raises InputError, BundleError, ManifestError, CheckpointError, OSError.
    """
    folder_for("--out", out)
    for file in (out / "model.pt", out / "tokenizer.pt"):
        if os.path.lexists(file):  # it may be of a training, and of no bundle
            raise InputError(f"{file} exists; give another --out, or remove it where it is not needed")
    bundle = Bundle.open(path, verify="full")
    vq = tokenizer_from_manifest(read_manifest(path))
    if isinstance(vq, VideoTokenizerConfig):
        raise InputError(f"{path}: makes clips; only a bundle of images can be read back: give one")
    stored = read_weights(bundle)
    contents = {"model.pt": model_checkpoint(bundle, stored)}
    if vq is None:
        print(f"{path}: ends at tokens, so there is no tokenizer to restore")
    else:
        contents["tokenizer.pt"] = tokenizer_checkpoint(path, vq, stored)
    save_together({out / name: content for name, content in contents.items()})
    for name, content in contents.items():
        print(printable(f"{out / name}: {sum(t.numel() for t in content['model'].values()):,} numbers"))
    tokenizer = "none" if vq is None else out / "tokenizer.pt"
    print(
        printable(
            f"a bundle of the same images: parvis export --checkpoint {out / 'model.pt'} --tokenizer {tokenizer} "
            f"--precision {bundle.precision} --out NEW_FOLDER"
        )
    )


def model_checkpoint(bundle: Bundle, stored: dict[str, Tensor]) -> dict[str, Any]:
    """The checkpoint that ``parvis train`` would save of the bundle's transformer: the inverse of
    ``par_export.weights.write_weights``. Raises ManifestError, CheckpointError."""
    config = config_from_manifest(read_manifest(bundle.path))
    state = model_state(config, stored)
    with torch.device("meta"):
        expected = PAR(config).state_dict()
    check_keys(bundle.path, state, expected)
    content: dict[str, Any] = {"model": _fp32(state, expected), "config": asdict(config) | {"kind": "par"}}
    defaults = asdict(bundle.defaults)
    if defaults["guidance_interval"] == -1:  # as in a manifest
        del defaults["guidance_interval"]
    content["bundle"] = {"name": bundle.name, "defaults": defaults}  # an export takes them
    if bundle.class_names is not None and bundle.class_synsets is None:  # an export adds ImageNet's names itself
        content["class_names"] = list(bundle.class_names)
    return content


def tokenizer_checkpoint(path: Path, config: VQConfig, stored: dict[str, Tensor]) -> dict[str, Any]:
    """The checkpoint that ``parvis train-tokenizer`` would save of the tokenizer of the bundle at ``path``.

    ``stored`` is that of :func:`read_weights`. Raises CheckpointError.
    """
    torch.manual_seed(0)  # for an encoder that the bundle does not hold
    initial = VQModel(config).state_dict()
    state = {name[len(PREFIX) :]: tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    codebook = state.pop("codebook")
    state["quantize.embedding.weight"] = before_rounding(codebook)
    changed = _rounded(state["quantize.embedding.weight"], codebook.dtype) != codebook
    if changed.any():
        print(
            f"{path}: {int(changed.sum())} of {changed.numel()} numbers of the codebook will differ in the last bit "
            "after an export"
        )
    for key, tensor in initial.items():
        if ".norm" in key and key in state:
            state[key] = state[key].reshape(tensor.shape)  # stored as [C,1,1]
    missing = [key for key in initial if key not in state]
    if "encoder.conv_in.weight" in missing:
        print(f"{path}: holds no encoder; that of tokenizer.pt is random, train it before use")
    in_decoder = [key for key in missing if not key.startswith(("encoder.", "quant_conv.", "quantize.codebook_used"))]
    check_keys(path, state, {key: t for key, t in initial.items() if key in state or key in in_decoder})
    return {"model": _fp32(initial | state, initial), "config": asdict(config) | {"kind": "vq"}}


def before_rounding(stored: Tensor) -> Tensor:
    """Codes of length 1 in fp32 [V,c] that an export rounds to ``stored`` [V,c].

    An export normalises the codes and rounds them. The length of a rounded code is not exactly 1, so normalising it
    again would change the last bit of some numbers. Each number has an interval that rounds to it; the code that was
    exported lies in the box of these intervals and has length 1. A code that is scaled by s and then clipped to the
    box has a length that grows with s, so a bisection over s finds a code of length 1 in the box. Codes stored in fp32
    are rounded to the precision of this computation, so their last bit (6e-8) may change.
    """
    size = stored.abs()
    bits = size.view(INTEGER[size.dtype])
    below, above = ((bits + step).clamp_min(0).view(size.dtype).double() for step in (-1, 1))
    size = size.double()
    # Not quite half way to the neighbours, so that the rounding of fp32 on the way cannot leave the interval.
    low, high = (size + 0.499 * (neighbour - size) for neighbour in (below, above))
    least, most = torch.full((len(size), 1), 0.5).double(), torch.full((len(size), 1), 2.0).double()
    for _ in range(60):
        middle = (least + most) / 2
        short = (size * middle).clamp(low, high).norm(dim=1, keepdim=True) < 1
        least, most = torch.where(short, middle, least), torch.where(short, most, middle)
    return ((size * most).clamp(low, high) * stored.double().sign()).float()


def _rounded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes`` as ``par_export.weights.write_tokenizer_weights`` stores them."""
    return F.normalize(codes, dim=-1).to(dtype)


def _fp32(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` in fp32 and in the order of ``like``, in which an export writes a tokenizer."""
    return {key: state[key].float().contiguous() for key in like}


if __name__ == "__main__":
    sys.exit(main())
