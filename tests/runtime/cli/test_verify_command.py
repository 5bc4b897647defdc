"""``parvis verify`` as a command: table, JSON, exit codes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from instruction_sets import IN_BF16, needs_bf16
from test_verify import Sabotaged

from par_runtime.backends.base import Batch
from par_runtime.backends.native import library
from par_runtime.bundle import seal
from par_runtime.cli import dispatch as cli
from par_runtime.dtypes import Float, Int
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.verify import load

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "models" / "demo"
needs_c = pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU")


def command(*arguments: object) -> int:
    try:
        return cli.main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    exact = ("--arithmetic", "fp32", "--cache", "fp32")  # the demo's own rounding draws other tokens now and then
    assert command(DEMO, "--device", "cpu", "--images", 1, "--groups", 5, "--json", *exact) == 0
    row = json.loads(capsys.readouterr().out)
    assert [p["calls"] for p in row["logits"]] == [1, 3, 1, 5]
    assert row["tokens"]["equal"] == row["tokens"]["tokens"] == 256
    assert row["bundle"]["hash"] == json.loads((DEMO / "manifest.json").read_text())["hash"]


@pytest.fixture
def half_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's candidate has one logit that is half off."""

    class Off(Sabotaged):
        def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
            logits: Float = self.true.logits(batch, ids, write)
            logits[..., 3] += 0.5
            return logits

    def sabotaged(path: Path, device: str, *others: Any, **rounding: str) -> Pipeline:
        pipeline = load(path, device, *others, **rounding)
        return Pipeline(pipeline.bundle, Off(pipeline.backend)) if device == "cpu" else pipeline

    monkeypatch.setattr("par_runtime.verify.load", sabotaged)


def test_table_and_exit_code_0(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tiny, "--label", "otter", "--label", 0, "--images", 3, "--seed", 5) == 0
    text = capsys.readouterr().out
    for line in (
        "request    3 images, seed 5..7, guidance 1.5, temperature 1, top-k 0, top-p 1",
        "note       running on the CPU: ",
        "  192 of 192 equal (100.00 %), 3 of 3 images identical",
        "  identical",
        "verify: pass",
    ):
        assert f"\n{line}" in text
    assert "FAIL" not in text


def test_exit_code_1_with_a_line_for_each_failed_check(
    tiny: Path, capsys: pytest.CaptureFixture[str], half_off: None
) -> None:
    arguments = [tiny, "--device", "cpu", "--against", "cpu-opset23", "--images", 2]
    assert command(*arguments) == 1
    text = capsys.readouterr().out
    assert text.count("\n  FAIL  ") == 4
    assert command(*arguments, "--quiet") == 1
    quiet = capsys.readouterr().out
    assert quiet.startswith("FAIL  relative logit error of prefill 0.0")
    assert quiet.count("\n") == 4
    assert command(*arguments, "--json") == 1
    row = json.loads(capsys.readouterr().out)
    assert not row["passed"]
    assert [c["name"] for c in row["checks"] if not c["passed"]] == [
        f"relative logit error of {p}" for p in ("prefill", "sequential", "transition", "group")
    ]
    assert command(*arguments, "--floor-logits", 0.1, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_json_contains_everything(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tiny, "--device", "cpu", "--json", "--greedy", "--floor-psnr", 30, "--label", "all") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["passed"] is True
    assert row["bundle"]["hash"] == json.loads((tiny / "manifest.json").read_text())["hash"]
    assert row["candidate"]["backend"].startswith("onnxruntime-cpu ")
    assert row["reference"]["backend"].endswith("(step_opset23)")
    assert set(row["versions"]) == {"parvis", "python", "numpy", "onnxruntime"}
    assert row["request"]["classes"] == [0, 1, 2, 3, 4, 5]
    assert row["request"]["settings"][0]["greedy"] is True
    assert row["floors"]["psnr"] == 30
    assert row["images"] == {"images": 6, "identical_images": 6, "psnr": None, "max_difference": 0, "identical": True}
    assert all(set(c) == {"name", "value", "floor", "passed", "text"} for c in row["checks"])


@pytest.mark.parametrize(
    ("bundle", "device", "against", "instead"),
    [
        ("tests/data/tiny", "cpu", "cpu", "cpu-opset23"),  # which the C kernels do not run
        ("tests/data/tiny", "auto", "cpu-ort", "cpu-opset23"),
        ("tests/data/tiny", "cpu-opset23", "cpu-opset23", "cpu-ort"),
        pytest.param("models/demo", "auto", "cpu", "cpu-ort", marks=needs_c),
    ],
)
def test_a_backend_is_not_compared_with_itself(
    bundle: str, device: str, against: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [ROOT / bundle, "--device", device, "--against", against, "--images", 1, "--groups", 1, "--quiet"]
    arguments += ["--arithmetic", "fp32", "--cache", "fp32"]
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"parvis: error: --against {against}: candidate and reference are both ")
    assert error.endswith(f" and agree even where it is wrong; give --against {instead}\n")
    arguments[4] = instead
    assert command(*arguments) == 0


@needs_c
def test_what_decodes_is_named_and_why_not_in_bf16(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [ROOT / "models" / "demo", "--device", "cpu", "--decoder-precision", "bf16"]
    arguments += ["--images", 1, "--groups", 1]
    with monkeypatch.context() as patch:
        patch.setattr("par_runtime.backends.native.decoding.bf16_form", lambda *_: "")
        assert command(*arguments, "--json") == 0
        row = json.loads(capsys.readouterr().out)
        assert row["candidate"]["decoder"].startswith("native-cpu ")
        assert row["candidate"]["decoder_precision"] == "fp32"
        assert len(row["notes"]) == 1
        assert row["notes"][0].startswith("decoding was asked for in bf16, and is not: the C decoder has neither AMX ")
        # Nor is that the reason where ONNX Runtime decodes.
        assert command(*arguments, "--device", "cpu-ort", "--against", "cpu") == 0
        text = capsys.readouterr().out
    assert re.search(r"^candidate  (onnxruntime-cpu [\d.]+)\n", text, re.MULTILINE)
    assert re.search(r"^reference  native-cpu [^;]+\n", text, re.MULTILINE)  # which decodes too
    assert re.search(r"^note +decoding was asked for in bf16, and is not: onnxruntime-cpu \S+ decodes\n", text, re.M)


@needs_bf16
def test_a_decoder_in_bf16_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [ROOT / "models" / "demo", "--device", "cpu", "--decoder-precision", "bf16", "--images", 1, "--json"]
    assert command(*arguments, "--groups", 1) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["candidate"]["decoder_precision"], row["notes"]) == ("bf16", [])
    assert row["candidate"]["decoder"].endswith(IN_BF16)


def test_a_bundle_without_decoder_skips_images(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "tokens"))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(seal(manifest | {"tokenizer": None})))
    assert command(path, "--images", 1) == 0
    text = capsys.readouterr().out
    assert "skipped: the bundle ends at tokens" in text
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(path, device) as pipeline:
            made = pipeline.generate(0)
            assert made.made_on is not None
            assert (made.made_on.decoder, set(made.made_on.rounding)) == ("", {"arithmetic", "cache"})
            with pytest.raises(RequestError, match="this bundle ends at tokens; export it with a tokenizer for images"):
                pipeline.backend.decode(made.tokens)
    assert "PSNR" not in text


ERRORS = [
    (["BUNDLE", "--device", "gpu"], "device 'gpu': expected auto, cpu, cuda"),
    (["BUNDLE", "--device", "cuda:0"], "device 'cuda:0' cannot run"),
    (["BUNDLE", "--against", "tpu"], "device 'tpu': expected"),
    (["BUNDLE", "--against", "cpu-opset23", "--threads", "0"], "threads 0: expected 1 or more"),
    (["BUNDLE", "--images", "0"], "--images 0: expected 1 or more"),
    (["BUNDLE", "--groups", "0"], "--groups 0: expected 1 or more"),
    (["BUNDLE", "--batch", "5000"], "--batch 5000: expected 1 to 4096"),
    (["BUNDLE", "--label", "oter"], "unknown label 'oter'; did you mean otter"),
    (["BUNDLE", "--seed", "-1"], "seed -1: expected a whole number"),
    (["BUNDLE", "--top-p", "2"], "top_p 2.0: expected 0 to 1"),
    (["BUNDLE", "--floor-psnr", "nan"], "--floor-psnr nan: expected 0 or more"),
    (["BUNDLE", "--floor-kl", "-1"], "--floor-kl -1.0: expected 0 or more"),
    (["BUNDLE", "--floor-tie", "x"], "argument --floor-tie: invalid float value: 'x'"),
    (["BUNDLE/nope"], "no such folder"),
    ([], "the following arguments are required: BUNDLE"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert command(*(a.replace("BUNDLE", str(tiny)) for a in arguments)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert text in error
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1


def test_help_lists_the_floors(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    assert "(default: fp32 0.001, fp16 0.03, bf16 0.1, int8 0.2)" in " ".join(capsys.readouterr().out.split())


def test_a_tensorrt_engine_on_the_stand_in_gpu(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from double import tensorrt
    from double.driver import Driver

    from par_runtime.backends import cuda
    from par_runtime.backends.trt import module as trt_module
    from par_runtime.bundle import Bundle

    driver = Driver()
    monkeypatch.setattr(cuda, "driver", driver)
    monkeypatch.setattr(trt_module, "load", lambda name=None: tensorrt.make(driver))
    path = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    tensorrt.write_engine(Bundle.open(path), (1, 2), "shared")
    assert command(path, "--images", 3, "--json") == 0  # auto takes the engine
    row = json.loads(capsys.readouterr().out)
    assert row["candidate"]["backend"].startswith("tensorrt_rtx")
    assert row["reference"]["backend"].startswith("onnxruntime-cpu")
    assert row["request"]["batch"] == 2
    assert row["request"]["classes"] == [0, 2, 4]  # spread over all six
    assert row["notes"] == []
    assert not driver.device, "the engine was not closed"
