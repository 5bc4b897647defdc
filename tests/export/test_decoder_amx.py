"""The C decoder in bf16 with AMX: against the network in PyTorch that rounds at the same places, and against fp32."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_native_clips as of_clips
import test_native_decoder as of_images
import torch
import torch.nn.functional as F
from instruction_sets import IN_BF16, decoded_by, needs_amx, needs_bf16
from numpy.typing import NDArray
from planted import decoder_with, one_by_default
from torch import Tensor, nn

from par_export.restored import read_weights, restored_decoder
from par_model.config import VQConfig
from par_model.vq import Upsample
from par_runtime import Bundle, Pipeline
from par_runtime.backends.base import Decoder
from par_runtime.backends.choose import choose
from par_runtime.backends.native import decoder as native_decoder
from par_runtime.backends.native import decoding
from par_runtime.backends.native.decoding import NativeDecoder, open_decoder, why_not_bf16
from par_runtime.bundle import Calibration, seal
from par_runtime.cli import redo
from par_runtime.cli.dispatch import main
from par_runtime.errors import RequestError
from par_runtime.loaded import LoadedFiles
from par_runtime.metrics import psnr_db
from par_runtime.tokenizer import Tokenizer

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


@needs_bf16
def test_auto_is_what_the_calibration_has_proven() -> None:
    bundle = replace(Bundle.open(DEMO, "none"), calibration=None)
    proven = replace(bundle, calibration=Calibration("kept", 0, (), "fp32", "fp32", "", {}, "bf16"))
    for each, asked, computes in [
        (bundle, "auto", "fp32"), (bundle, "bf16", "bf16"), (proven, "auto", "bf16"), (proven, "fp32", "fp32"),
    ]:  # fmt: skip
        backend, _ = choose(each, "cpu", threads=1, decoder_precision=asked)
        assert (backend.info.decoder_computes, IN_BF16 in backend.info.decoder) == (computes, computes == "bf16")
        backend.close()
    backend, _ = choose(proven, "cpu-ort", threads=1)
    assert (backend.info.decoder_computes, "onnxruntime" in backend.info.decoder) == ("fp32", True)
    backend.close()


def test_why_it_cannot_be(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny)
    assert why_not_bf16(replace(bundle, image_size=None)) == "the bundle ends at tokens"
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "why_not", lambda _: decoding.OLDER)
        assert why_not_bf16(bundle) == f"ONNX Runtime decodes: {decoding.OLDER}"
    if decoding.decoder_file() is not None:
        monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
        monkeypatch.delenv("PARVIS_NATIVE", raising=False)
        assert why_not_bf16(bundle) == decoding.NO_BF16
        monkeypatch.setenv("PARVIS_NATIVE", "avx2")
        assert why_not_bf16(bundle) == f"{decoding.NO_BF16}; PARVIS_NATIVE allows 'avx2' alone"


def test_what_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"^decoder_precision 'int8': expected auto, fp32 or bf16$"):
        Pipeline.load(DEMO, decoder_precision="int8")
    assert main(["generate", str(DEMO), "--label", "0", "--decoder-precision", "fp16"]) == 2
    assert "argument --decoder-precision: invalid choice: 'fp16'" in capsys.readouterr().err


@needs_bf16
def test_redo_and_verify_take_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, rounding = str(tmp_path / "one.png"), ["--decoder-precision", "bf16"]
    generate = ["generate", str(DEMO), "--label", "7", "--seed", "8", "--out", image, *HERE]
    assert main([*generate, *rounding]) == 0
    assert main(["redo", image, "--bundle", str(DEMO), *HERE, *rounding]) == 0
    capsys.readouterr()
    monkeypatch.setattr(redo, "PIXEL_TOLERANCE", 0)  # of the demo, few pixels differ by more than one level
    assert main(["redo", image, "--bundle", str(DEMO), *HERE, "--decoder-precision", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "the tokens are the same, the pixels are not (" in out
    assert "another --device or --decoder-precision decodes otherwise, and so does another CPU in bf16)" in out
    arguments = ["verify", str(DEMO), "--device", "cpu", "--threads", "1", "--images", "2", "--groups", "4", "--json"]
    found = {}
    for precision in ("fp32", "bf16"):
        assert main([*arguments, "--decoder-precision", precision]) == 0
        found[precision] = json.loads(capsys.readouterr().out)["images"]["psnr"]
    assert (found["fp32"] or math.inf) > found["bf16"] + 5


@needs_bf16
def test_a_tokenizer_decodes_as_the_calibration_has_proven(tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(DEMO, made)
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["hash"]
    manifest["calibration"]["decoder_precision"] = "bf16"
    (made / "manifest.json").write_text(json.dumps(seal(manifest)))
    bundle = Bundle.open(made)
    tokens = of_images.tokens_of(bundle, 2)
    rounded, exact = in_bf16(bundle, tokens), of_images.ours(DEMO, 2)
    assert (rounded != exact).any()
    with closing(Tokenizer(bundle, 1)) as one, closing(Tokenizer(bundle, 1, "fp32")) as other:
        np.testing.assert_array_equal(one.decode(tokens), rounded)
        np.testing.assert_array_equal(other.decode(tokens), exact)
    with Pipeline.load(made, "cpu", threads=1) as pipeline:
        assert pipeline.backend.info.decoder_computes == "bf16"
        np.testing.assert_array_equal(pipeline.decode(tokens), rounded)
    with pytest.raises(RequestError, match=r"^decoder_precision 'int8': expected auto, fp32 or bf16$"):
        Tokenizer(bundle, decoder_precision="int8")


@pytest.mark.parametrize(("asked", "proven", "opened"), [
    ("auto", "fp32", "fp32"), ("auto", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("fp32", "bf16", "fp32"),
])  # fmt: skip
def test_a_step_elsewhere_has_the_decoder_that_was_asked_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, asked: str, proven: str, opened: str
) -> None:
    """On ONNX Runtime; test_kernels_load.py has clips beside a GPU."""
    calibration = Calibration("kept", 0, (), "fp32", "fp32", "", {}, proven)
    seen: list[str] = []

    def record(files: LoadedFiles, threads: int | None = None, precision: str = "fp32") -> Decoder:
        seen.append(precision)
        return open_decoder(files, threads, precision)

    monkeypatch.setattr(decoding, "open_decoder", record)
    monkeypatch.setattr("par_runtime.backends.native.library.why_not", lambda _: "as a test wants it")
    backend, _ = choose(replace(Bundle.open(tiny), calibration=calibration), "cpu", threads=1, decoder_precision=asked)
    assert backend.info.runtime == "onnxruntime-cpu"
    assert seen == [opened]
    backend.close()
