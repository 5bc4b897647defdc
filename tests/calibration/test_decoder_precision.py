"""``parvis calibrate --decoder-precision``: the proof that a decoder in bf16 does no harm, and where there is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from instruction_sets import needs_bf16
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_calibration.heldout import HeldOut
from par_calibration.report import Budget, Options, compare, measure
from par_calibration.run import Request, places_of
from par_runtime.backends.native import decoding
from par_runtime.bundle import Bundle
from par_runtime.cli import main
from par_runtime.dtypes import Int, Rounding
from par_runtime.metrics import psnr_db
from par_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"
FEW = ["--held-out", "4", "--generated", "0", "--quiet"]
BF16 = ["--decoder-precision", "bf16"]


def run(*arguments: object) -> int:
    return main(["calibrate", *map(str, arguments)])


@needs_bf16
def test_the_decoder_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(DEMO, "--weights", "keep", *BF16, "--arithmetic", "fp32", "--cache", "fp32", "--out", out, *FEW) == 0
    made, source = Bundle.open(out), Bundle.open(DEMO)
    assert made.calibration is not None
    assert made.calibration.decoder_precision == "bf16"
    assert made.calibration.report["measures"]["decoder"] > 50
    assert made.calibration.report["budget"]["decoder"] == 40
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["candidate"]["decoder_precision"], figures["original"]["decoder_precision"]) == ("bf16", "fp32")
    assert figures["decoder_psnr"] == figures["measures"]["decoder"]
    page = (tmp_path / "out.html").read_text()
    assert "PSNR of the decoder" in page
    assert "fp32 arithmetic, fp32 cache, decoder in bf16 (native-cpu" in page
    assert (out / "weights.data").read_bytes() == (DEMO / "weights.data").read_bytes()
    assert source.calibration is not None
    assert source.calibration.decoder_precision == "fp32"
    capfd.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "multiplied in fp32, keys and values in fp32, decoded in bf16; made from" in capfd.readouterr().out
    # Another budget, and what to do about it.
    limit = ["--budget", "decoder=90"]
    assert run(DEMO, "--weights", "keep", *BF16, "--out", tmp_path / "no", *FEW, *limit) == 1
    err = capfd.readouterr().err
    assert "PSNR of the decoder: 5" in err
    assert "dB, at least 90 dB (3" in err
    assert "dB too low); give --decoder-precision fp32" in err
    assert err.endswith("so no bundle was written; the report is. --budget changes the limits\n")
    assert not (tmp_path / "no").exists()


@needs_bf16
def test_the_decoder_of_clips(tmp_path: Path) -> None:
    out = tmp_path / "out"
    clips = ["--arithmetic", "fp32", "--cache", "fp32", "--held-out", "1", "--generated", "0", "--quiet"]
    assert run(DEMO.parent / "fashion", "--weights", "keep", *BF16, *clips, "--out", out) == 0
    made = Bundle.open(out).calibration
    assert made is not None
    assert (made.decoder_precision, made.report["measures"]["decoder"] > 50) == ("bf16", True)


def test_a_bundle_that_ends_at_tokens(bundles: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    out = bundles["n1"].parent / "never"
    assert Bundle.open(bundles["n1"]).image_size is None
    assert run(bundles["n1"], "--weights", "keep", *BF16, "--out", out, *FEW) == 2
    assert (
        "nothing could be proven of it here, because the bundle ends at tokens; leave it out\n"
        in capfd.readouterr().err
    )
    assert not out.exists()


@needs_bf16
def test_a_report_decodes_as_the_candidate_will(tmp_path: Path) -> None:
    """Of equal tokens, the pairs of images differ by what the decoder rounds."""
    demo = replace(Bundle.open(DEMO), calibration=None)
    options = Options(images=2, samples=8, arithmetic="fp32", cache="fp32", decoder_precision="bf16", show=8)
    report = compare(demo, demo, options)
    assert report.drawn is not None
    assert report.drawn.identical == 8
    assert report.pairs is not None
    assert (report.pairs[:, 0] != report.pairs[:, 1]).any()
    # As much as dot products round, also where AMX decodes.
    assert abs(report.pairs[:, 0].astype(int) - report.pairs[:, 1]).max() <= 5
    assert psnr_db(report.pairs[:, 0], report.pairs[:, 1]) > 54
    assert report.frechet is not None
    assert report.frechet.same_seeds > 0
    exact = compare(demo, demo, replace(options, decoder_precision="fp32"))
    assert exact.pairs is not None
    assert (exact.pairs[:, 0] == exact.pairs[:, 1]).all()
    assert exact.decoder_psnr is None
    assert exact.exceeded(Budget({"decoder": 90.0})) == []
    assert report.exceeded(Budget({"decoder": 90.0}))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (Request(Path("m"), "keep", arithmetic="bf16", cache="bf16", decoder_precision="bf16"), "m-bf16-cache-decoder"),
        (Request(Path("m"), "keep", arithmetic="fp32", cache="fp32", decoder_precision="bf16"), "m-decoder"),
        (Request(Path("m"), "keep", arithmetic="fp32", cache="bf16"), "m-fp32-cache"),
        (Request(Path("m"), "keep", arithmetic="int8", cache="fp32"), "m-int8"),
        (Request(Path("m"), "int4", arithmetic="bf16", cache="bf16", decoder_precision="bf16"), "m-int4"),
    ],
)
def test_the_folder_is_named_after_what_was_done(given: Request, name: str) -> None:
    assert places_of(given).out.name == name


@pytest.mark.skipif(decoding.decoder_file() is None, reason="no compiler at installation")
def test_where_nothing_can_be_proven(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny, "--weights", "keep", "--out", tmp_path / "out", *FEW) == 2
    assert "--cache bf16, or --decoder-precision bf16, to prove" in capfd.readouterr().err
    monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
    assert run(tiny, "--weights", "keep", *BF16, "--out", tmp_path / "out", *FEW) == 2
    assert capfd.readouterr().err == (
        "parvis: error: --decoder-precision bf16: nothing could be proven of it here, because the C decoder has "
        "neither AMX nor AMD's dot products in bf16: 'parvis doctor' says what it uses; leave it out\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_another_precision_proves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
    bundle = Bundle.open(tiny)
    with pytest.raises(
        CalibrationError, match=r"^a decoder in bf16: (native|onnxruntime)-cpu .* computes in fp32, so the report"
    ):
        compare(bundle, bundle, Options(images=1, samples=0, decoder_precision="bf16"))


@needs_bf16
def test_what_was_proven_before_is_proven_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One proof more loses none: the demo's step is in bf16."""
    out, again, quiet = tmp_path / "out", tmp_path / "again", FEW[:-1]
    assert run(DEMO, "--weights", "keep", *BF16, "--out", out, *quiet) == 0
    assert Bundle.open(out).rounding() == Rounding("bf16", "bf16", "bf16")
    assert "was proven for" not in capfd.readouterr().out
    assert run(out, "--weights", "keep", "--cache", "bf16", "--out", again, *quiet) == 0
    assert Bundle.open(again).rounding() == Rounding("bf16", "bf16", "bf16")
    assert run(out, "--weights", "keep", "--out", tmp_path / "no", *quiet) == 2
    assert "--weights keep: changes nothing by itself" in capfd.readouterr().err


@needs_bf16
def test_what_cannot_be_proven_again_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, again, quiet = tmp_path / "out", tmp_path / "again", FEW[:-1]
    assert run(DEMO, "--weights", "keep", *BF16, "--out", out, *quiet) == 0
    monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
    capfd.readouterr()
    assert run(out, "--weights", "keep", "--cache", "bf16", "--out", again, *quiet) == 0
    said = capfd.readouterr().out
    assert f"decoder precision: bf16 was proven for {out}; the new bundle has fp32\n" in said
    assert Bundle.open(again).rounding() == Rounding("bf16", "bf16", "fp32")


def test_the_worst_frame_decides(tiny_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And equal pictures have a PSNR that JSON can hold."""
    bundle = Bundle.open(tiny_video)
    held = HeldOut(np.zeros((2, bundle.n_tokens), np.int64), (0, 1), "", real=False)
    options = Options(threads=1)
    measuring = measure._Measuring(bundle, bundle, options, Rounding(decoder_precision="bf16"), Path())
    made = measure.Tokenizer.decode
    monkeypatch.setattr(measure.Tokenizer, "decode", lambda self, tokens: made(self, tokens) // 2)
    monkeypatch.setattr(decoding, "bf16_form", lambda *_: "")
    assert measuring._decoder_psnr(held) == 100

    def one_frame_off(self: Tokenizer, tokens: Int) -> NDArray[np.uint8]:
        clips = made(self, tokens) // 2
        if self._precision == "bf16":
            clips[0, 1] += 16
        return clips

    monkeypatch.setattr(measure.Tokenizer, "decode", one_frame_off)
    assert measuring._decoder_psnr(held) == pytest.approx(20 * math.log10(255 / 16))


def test_a_budget_of_decibels() -> None:
    assert Budget.parse("decoder=55.5", "int8").limits["decoder"] == 55.5
    assert Budget.of("int4").limits["decoder"] == 40
