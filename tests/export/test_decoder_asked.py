"""Who asks for a decoder in bf16, and gets it: bundles, verbs, ``Tokenizer``, and what decodes beside another step."""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_native_decoder as of_images
from instruction_sets import IN_BF16, needs_bf16
from test_decoder_amx import DEMO, HERE, in_bf16

from par_runtime import Bundle, Pipeline
from par_runtime.backends.base import Decoder
from par_runtime.backends.choose import choose
from par_runtime.backends.native import decoding
from par_runtime.backends.native.decoding import open_decoder, why_not_bf16
from par_runtime.bundle import Calibration, seal
from par_runtime.cli import redo
from par_runtime.cli.dispatch import main
from par_runtime.errors import RequestError
from par_runtime.loaded import LoadedFiles
from par_runtime.tokenizer import Tokenizer


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
        assert why_not_bf16(bundle) == f"{decoding.NO_BF16} (PARVIS_NATIVE is set to 'avx2')"


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
    assert main(["redo", image, "--bundle", str(DEMO), *HERE]) == 0  # as it was made
    assert "every pixel" in capsys.readouterr().out
    assert main(["redo", image, "--bundle", str(DEMO), *HERE, "--decoder-precision", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "the tokens are the same, the pixels are not (" in out
    assert "another --device or --decoder-precision decodes otherwise, and so does another CPU in bf16)" in out
    assert re.search(rf"; decoded by native-cpu [^;]+{re.escape(IN_BF16)} then, by native-cpu \S+ \(\w+\) now; ", out)
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
