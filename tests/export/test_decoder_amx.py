"""The C decoder in bf16 with AMX: against the network in PyTorch that rounds at the same places, and against fp32."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_native_clips as of_clips
import test_native_decoder as of_images
import torch
import torch.nn.functional as F
from instruction_sets import IN_BF16, decoded_by, needs_amx
from numpy.typing import NDArray
from planted import decoder_with, one_by_default
from torch import Tensor, nn

from par_export.restored import read_weights, restored_decoder
from par_model.config import VQConfig
from par_model.vq import Upsample
from par_runtime import Bundle
from par_runtime.backends.native import decoder as native_decoder
from par_runtime.backends.native import decoding
from par_runtime.backends.native.decoding import NativeDecoder, open_decoder
from par_runtime.loaded import LoadedFiles
from par_runtime.metrics import psnr_db

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
HERE = ["--device", "cpu", "--threads", "1", "--quiet"]
FEW_LEVELS = 2  #: what an order of additions moves, where it makes a number round to another one of bf16
LEAST_DB = 40.0  #: of a decoder in half precision, as the export's gate asks of fp16


#: Shallow, so that one number that rounds to another one does not make all behind it round otherwise.
FORMS = {
    "one level": of_images.FORMS["one level"],
    "several blocks": ((35, 37), VQConfig(64, 4, 48, (1,), 1, 16, 8)),
    "whole tiles": ((16, 32), VQConfig(64, 4, 32, (1,), 1, 32, 4)),
    "upsampled": ((19, 21), VQConfig(64, 4, 40, (1, 1), 1, 40, 8)),
    "upsampled, whole tiles": ((16, 16), VQConfig(64, 4, 32, (1, 1), 1, 32, 4)),
}


def in_bf16(bundle: Bundle, tokens: NDArray[np.int64], threads: int = 2) -> NDArray[np.uint8]:
    """On this CPU: with AMX, where it has it."""
    decoder = NativeDecoder(LoadedFiles(bundle), threads, "bf16")
    assert decoder.computes == "bf16"
    assert decoder.name.endswith(IN_BF16)
    try:
        return decoder.run(tokens)
    finally:
        decoder.close()


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


class Rounded(nn.Module):
    """A 3x3 convolution that rounds what it multiplies."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = rounded(conv.weight), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(rounded(x), self.weight, self.bias, padding=1)


class RoundedUpsample(nn.Module):
    """The same behind a doubling, with weights that see the same number added up before they are rounded."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.bias, weight = conv.bias, conv.weight
        self.weights = {}
        for below, right in np.ndindex(2, 2):
            kernel = torch.zeros(*weight.shape[:2], 2, 2, dtype=weight.dtype)
            for y, x in np.ndindex(3, 3):
                kernel[:, :, (below + y + 1) // 2 - below, (right + x + 1) // 2 - right] += weight[:, :, y, x]
            self.weights[below, right] = rounded(kernel)

    def forward(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        padded = F.pad(rounded(x), (1, 1, 1, 1))
        out = torch.empty(images, len(self.bias), 2 * height, 2 * width, dtype=x.dtype)
        for (below, right), kernel in self.weights.items():
            seen = padded[:, :, below : below + height + 1, right : right + width + 1]
            out[:, :, below::2, right::2] = F.conv2d(seen, kernel, self.bias)
        return out


def round_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Upsample):
            setattr(module, name, RoundedUpsample(child.conv))
        elif isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
            setattr(module, name, Rounded(child))
        else:
            round_convolutions(child)


def wanted(bundle: Bundle, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
    restored = restored_decoder(bundle, read_weights(bundle), torch.float64, torch.device("cpu"))
    assert restored is not None
    model, codes = restored
    with torch.no_grad():
        round_convolutions(model.decoder)
        raster = np.empty_like(tokens)
        raster[:, bundle.order] = tokens
        given = codes[torch.from_numpy(raster)].reshape(len(tokens), *bundle.grid[1:], -1).permute(0, 3, 1, 2)
        levels = 127.5 * model.decode_codes(given) + 128
    pixels: NDArray[np.uint8] = levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def made(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setitem(of_images.FORMS, form, FORMS[form])
    return Bundle.open(of_images.make(folder, form))


@needs_amx
@pytest.mark.parametrize("form", FORMS)
def test_every_number_is_rounded_where_it_is_multiplied(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made(tmp_path, form, monkeypatch)
    tokens = of_images.tokens_of(bundle, 2)
    right, got = wanted(bundle, tokens), in_bf16(bundle, tokens)
    assert right.std() > 3, "an image without a content proves nothing"
    assert np.abs(right.astype(int) - got).max() <= FEW_LEVELS
    assert (got != of_images.ours(bundle.path, 2)).any()


@needs_amx
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("form", "line", "bug"),
    [
        ("several blocks", "at.x + at.columns + 1;", "at.x + at.columns;"),
        ("several blocks", "y <= at.y + at.rows;", "y < at.y + at.rows;"),
        ("several blocks", "if (row != y && !op->edge) {", "if (0) {"),
        ("several blocks", "chunk == 0, to, to + columns * PANEL);\n        }", "1, to, to + columns * PANEL);\n        }"),  # noqa: E501
        ("several blocks", "value, x + y == 0);", "value, x == 0);"),
        ("one level", "y += 2) {\n            float *", "y += 4) {\n            float *"),
        ("upsampled", "+ part % 2 * AMX_CHANNELS;", ";"),
        ("upsampled", "if (x * 2 + y == tap)", "if (y * 2 + x == tap)"),
    ],
)  # fmt: skip
def test_a_planted_bug_is_seen(tmp_path: Path, form: str, line: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made(tmp_path / "b", form, monkeypatch)
    tokens = of_images.tokens_of(bundle, 2)
    library = decoder_with(tmp_path, line, bug)
    monkeypatch.setattr(decoding, "decoder_file", lambda: library)
    assert np.abs(wanted(bundle, tokens).astype(int) - in_bf16(bundle, tokens)).max() > FEW_LEVELS


@needs_amx
@pytest.mark.parametrize("form", one_by_default(list(of_images.FORMS)))
def test_every_form_of_tokenizer_is_near_fp32(tmp_path: Path, form: str) -> None:
    bundle = Bundle.open(of_images.make(tmp_path, form))
    tokens = of_images.tokens_of(bundle, 3)
    for one, exact in zip(in_bf16(bundle, tokens), of_images.ours(bundle.path, 3), strict=True):
        assert psnr_db(one, exact) >= LEAST_DB


@needs_amx
@pytest.mark.parametrize("form", one_by_default(list(of_clips.FORMS)))
def test_every_form_of_clips_is_near_fp32(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(of_clips.make(tmp_path, form))
    tokens = of_clips.tokens_of(bundle, 2)
    got = in_bf16(bundle, tokens)
    for one, exact in zip(got, of_clips.ours(bundle, tokens), strict=True):
        assert psnr_db(one, exact) >= LEAST_DB
    for at_once in (1, 2):  # in calls of one or two latent frames: the same bits
        pixels = at_once * 2 * bundle.time_downsampling * got[0, 0, :, :, 0].size
        monkeypatch.setattr("par_runtime.backends.native.clips.CALL_PIXELS", pixels)
        np.testing.assert_array_equal(in_bf16(bundle, tokens), got)


@needs_amx
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("line", "bug"),
    [
        ("column == x || op->edge", "column == x"),
        ("row != y && !op->edge", "row != y"),
        ("w += op->in_channels * 9 * PANEL)", "w += 0)"),
        ("beta[h] = kind == BETA_avx512 ?", "beta[h] = 0 ?"),
    ],
)
def test_a_planted_bug_of_clips_is_seen(tmp_path: Path, line: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(of_clips.make(tmp_path / "b", "like the published one"))
    tokens = of_clips.tokens_of(bundle, 1)
    exact = of_clips.ours(bundle, tokens)
    library = decoder_with(tmp_path, line, bug)
    monkeypatch.setattr(decoding, "decoder_file", lambda: library)
    assert psnr_db(in_bf16(bundle, tokens), exact) < LEAST_DB


@needs_amx
def test_an_image_is_the_same_in_any_batch_and_with_any_number_of_threads() -> None:
    bundle = Bundle.open(DEMO)
    tokens = of_images.tokens_of(bundle, 5)
    batch = in_bf16(bundle, tokens, 1)
    assert psnr_db(batch, of_images.ours(DEMO, 5)) > 50
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(in_bf16(bundle, tokens, threads), batch)
    decoder = NativeDecoder(LoadedFiles(bundle), 2, "bf16")
    for part in (slice(3, 4), slice(0, 5), slice(0, 1)):
        np.testing.assert_array_equal(decoder.run(tokens[part]), batch[part])
    decoder.close()


def check_that_memory_is_written_first(
    decode: Callable[[Bundle, NDArray[np.int64]], NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the demo, the pixels of ``decode`` are the same where its memory holds no numbers."""
    bundle = Bundle.open(DEMO)
    tokens, empty = of_images.tokens_of(bundle, 2), native_decoder.empty
    right = decode(bundle, tokens)

    def full(*how: object) -> NDArray[np.uint8]:
        memory = empty(*how)  # type: ignore[arg-type]
        memory.view(np.uint8).fill(0xFF)
        return memory

    monkeypatch.setattr(native_decoder, "empty", full)
    np.testing.assert_array_equal(decode(bundle, tokens), right)


@needs_amx
def test_memory_that_holds_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind a row of tiles, or behind the last row, is multiplied, and must not show."""
    check_that_memory_is_written_first(in_bf16, monkeypatch)


@pytest.mark.skipif(decoding.decoder_file() is None, reason="no compiler at installation")
def test_on_other_cpus_it_is_fp32(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(tiny)
    tokens = of_images.tokens_of(bundle, 2)
    monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
    with caplog.at_level(logging.INFO):
        decoder = open_decoder(LoadedFiles(bundle), 1, "bf16")
    assert (decoder.computes, "bf16" in decoder.name) == ("fp32", False)
    assert f"{tiny}: decoding in fp32, not in bf16: the C decoder has neither AMX nor AMD's dot products" in caplog.text
    np.testing.assert_array_equal(decoder.run(tokens), of_images.ours(tiny, 2))
    decoder.close()


@needs_amx
@pytest.mark.parametrize("instructions", ["avx512", "avx2"])
def test_instruction_sets_without_it_decode_in_fp32(tmp_path: Path, instructions: str) -> None:
    tokens = of_images.tokens_of(Bundle.open(DEMO), 2)
    pixels = decoded_by(instructions, DEMO, tokens, tmp_path, precision="bf16")
    np.testing.assert_array_equal(pixels, of_images.ours(DEMO, 2))


def with_steep_norms(
    path: Path, monkeypatch: pytest.MonkeyPatch, decode: Callable[[Bundle, NDArray[np.int64]], NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What fp32 and ``decode`` make of a decoder whose swishes get numbers far from zero: e^-x of them is infinite."""
    bundle = Bundle.open(path)
    tokens = of_images.tokens_of(bundle, 2)
    norm = native_decoder.Operations._norm

    def steep(self: native_decoder.Operations, width: int, **names: str) -> dict[str, Any]:
        fields = norm(self, width, **names)
        if not names["gain"].endswith((".norm1.weight", ".fn.0.weight")):  # so many that pictures have a content
            return fields
        gain = (ctypes.c_float * width).from_address(fields["gain"])
        for i in range(width):
            gain[i] *= 60
        return fields

    monkeypatch.setattr(native_decoder.Operations, "_norm", steep)
    with closing(NativeDecoder(LoadedFiles(bundle), 2)) as exact:
        return exact.run(tokens), decode(bundle, tokens)


@needs_amx
@pytest.mark.parametrize("path", [DEMO, ROOT / "models" / "fashion"])
def test_a_swish_far_below_zero_is_zero(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number that is none would make a black picture."""
    exact, got = with_steep_norms(path, monkeypatch, in_bf16)
    assert exact.std() > 3
    assert psnr_db(got, exact) >= LEAST_DB
