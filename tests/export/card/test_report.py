"""The whole report of a GPU, rehearsed: real processes on the stand-in, engines that compute nothing, tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_report import BASELINE, SMALL, of_parts, options, wrong

from par_export.card.findings import Known
from par_export.card.plan import BATCHES
from par_export.card.report import CardOptions, Report, report
from par_export.card.table import NOT_RUN, figures_table
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.rows import Row, read
from par_runtime.bench.subjects.process import open_eager
from par_runtime.cli import dispatch as cli

#: What a machine with a GPU may lack.
MISSING = ("onnxruntime", "tensorrt", "tensorrt_rtx", "safetensors", "huggingface_hub", "scipy", "pytest")


def test_it_needs_nothing_but_what_it_says() -> None:
    script = (
        f"import sys; sys.modules |= dict.fromkeys({MISSING}); import par_export.card.report, par_runtime.cli.bench"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_make_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    command = ["make", "-s", "gpu-report", f"REPORT_PYTHON={sys.executable}", f"GPU_OUT={tmp_path}"]
    run = subprocess.run(
        command, cwd=root, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "--suite gpu needs an NVIDIA GPU: " in run.stderr
    assert (tmp_path / "report.md").read_text() == ""


@pytest.mark.slow
def test_a_whole_report(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its command, with a smaller plan."""
    monkeypatch.setenv("PARVIS_TEST_BLOCK", ",".join(MISSING))
    monkeypatch.setattr("par_export.card.plan.MODELS", [SMALL])

    def smaller(**given: object) -> CardOptions:
        assert given["torch"] == "cuda:0"
        kept = {name: given[name] for name in ("checked", "models", "minutes", "repetitions", "twins", "work")}
        return options(tmp_path, tiny, **kept)

    monkeypatch.setattr("par_export.card.report.CardOptions", smaller)
    file = tmp_path / "rows.jsonl"
    command = ["bench", str(tiny), "--suite", "gpu", "--sizes", "L", "--minutes", "2", "--repetitions", "2"]
    figure = tmp_path / "figure.svg"
    assert cli.main([*command, "--json", str(file), "--svg", str(figure), "--work", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert out.err.splitlines()[-1].endswith("checks failed")  # the kernels compute nothing, and that is seen
    rows = read(file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {kind: [o for o in lines if o["kind"] == kind] for kind in ("check", "limit", "kernel", "left_out")}
    phases = {(row.label, row.phase) for row in rows}
    for label in ("PAR-L n=1", "PAR-L n=4", "PAR-L n=4 int8 group 32"):
        assert {(label, phase) for phase in ("group", "decoder", "copy", "image")} <= phases
    assert {label for label, phase in phases if phase == "load"} == {"PAR-L n=4"}
    assert ("PAR-L n=4 eager", "image") in phases
    by = {(row.label, row.phase): row for row in rows}
    image = by["PAR-L n=4", "image"]
    assert image.suite == "gpu"
    assert len(image.samples_ms) == 2
    assert image.machine.gpu == "Stand-in GPU"
    group = by["PAR-L n=4", "group"]
    assert group.percent_of_bound is not None
    assert group.limits_from.startswith("measured in the same run")
    coded = by["PAR-L n=4 int8 group 32", "group"]
    assert (coded.bundle, coded.precision, coded.calls) == ("PAR-L-int8-g32-n4", "fp16", group.calls)
    assert coded.bytes is not None
    assert group.bytes is not None
    assert 0.5 < coded.bytes / group.bytes < 0.75  # the keys that a call reads stay in fp16
    assert {line["name"] for line in kinds["limit"]} >= {"copy bandwidth", "launch", "fp16 matrix peak"}
    step = [line for line in kinds["kernel"] if line["label"] == "PAR-L n=4" and line["program"] == "step"]
    assert [line["count"] for line in step] == [3]  # two layers, and one behind them
    assert step[0]["bytes"] == 64 * SMALL.config.ffn_dim * 2
    assert all(len(line["samples_us"]) == 5 for line in step)
    assert all(line["gpu"] == "Stand-in GPU" for own in kinds.values() for line in own)
    passed = {line["name"]: line["passed"] for line in kinds["check"]}
    assert passed["tiny: loads"]
    assert passed["tiny: memory"]
    assert not passed["tiny: self-test"]
    page = out.out
    assert page.startswith("## GPU report\n\n### Runs\n\n| file | card | driver | date | commit |")
    assert "\n| rows.jsonl | Stand-in GPU | " in page
    assert "| tiny: self-test | WRONG |" in page
    for heading in ("What the card allows", "Figures to reach", "Rows", "Kernels, each alone", "Left out"):
        assert f"### {heading}" in page
    assert "compute-sanitizer" in page.partition("### Left out")[2].partition("###")[0]
    assert "| PAR-L n=4, batch 1 | pack.panels layers.{i}.w2 | 3 |" in page
    assert "| PAR-L n=4 int8 group 32, batch 1 | pack.panels" in page
    beside = page.partition("### int8 and int4 beside fp16")[2].partition("###")[0]
    (line,) = (line for line in beside.splitlines() if "int8 group 32" in line)
    assert f"| {100 * coded.bytes / group.bytes:.0f} % |" in line
    assert coded.call_ms is not None
    assert group.call_ms is not None
    assert f"| {100 * coded.call_ms / group.call_ms:.0f} % |" in line
    assert "in doubt: above the bound" in page  # nothing was computed, so it took less than is possible
    again = tmp_path / "again.svg"
    assert cli.main(["bench", "--suite", "gpu", "--from", str(file), "--svg", str(again)]) == 0
    assert capsys.readouterr().out.partition("\n\nwritten: ")[0] == page.partition("\n\nwritten: ")[0]
    assert again.read_bytes() == figure.read_bytes()
    assert "PAR-L n = 4: eager" in figure.read_text().partition("<desc>")[2].partition("</desc>")[0]
    assert not list(tmp_path.glob("parvis-gpu-*"))
    assert not file.with_name("rows.jsonl.part").exists()


def test_a_report_without_time_says_what_it_left_out(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    journal = Journal(None, lambda _: None)
    rows = report(options(tmp_path, tiny, minutes=0.02), stand_in, lambda _: None, journal)
    outcome = journal.finish(rows)
    assert time.monotonic() - began < 30
    assert rows == []
    assert "- PAR-L, batch 1: time" in outcome.page
    assert "Nothing was measured." in outcome.page
    assert outcome.wrong
    for line in figures_table(Known([])).splitlines()[2:]:
        assert NOT_RUN in line


@pytest.mark.slow
def test_the_driver_alone(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    rows, page, lines = of_parts(tmp_path, tiny, stand_in, "driver")
    assert rows == []
    assert wrong(lines) == {}
    assert "| driver | 13 of 13 |" in page
    assert [line for line in lines if line["kind"] == "limit"] == []


@pytest.mark.slow
def test_pytorch_alone_is_measured_in_every_batch(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    rows, page, lines = of_parts(tmp_path, tiny, stand_in, "baselines", images=(1, 2))
    images = {(row.label, row.images) for row in rows if row.phase == "image"}
    assert images == {(f"PAR-L n={n} eager", batch) for n in (1, 4) for batch in (1, 2)}
    assert {"group", "decoder"} <= {row.phase for row in rows}
    assert all(row.pytorch for row in rows)
    assert [line for line in lines if line["kind"] == "left_out"] == []
    assert {line["name"] for line in lines if line["kind"] == "limit"} >= {"copy bandwidth", "fp16 matrix peak"}
    assert "### Figures to reach" not in page
    assert "| PAR-L n=4 eager | 2 |" in page


@pytest.mark.slow
def test_onnx_runtime_without_cuda_is_a_check_that_says_so(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    rows, page, lines = of_parts(tmp_path, tiny, stand_in, "cuda-ort")
    assert rows == []
    said = wrong(lines)
    assert set(said) == {"tiny n=4 cuda-ort: loads", "PAR-S n=4 cuda-ort: loads"}
    assert all("needs ONNX Runtime with CUDA" in text for text in said.values())
    assert page.count("needs ONNX Runtime with CUDA") >= 4  # the rows of both are left out


@pytest.mark.slow
def test_a_plan_that_is_refused_is_a_check_with_the_sentence_that_was_said(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path
) -> None:
    """TensorRT-RTX builds for a GPU that is not here; here its runtime finds no driver."""
    pytest.importorskip("tensorrt_rtx")
    rows, _, lines = of_parts(tmp_path, tiny, stand_in, "tensorrt-rtx")
    assert rows == []
    assert [line["name"] for line in lines if line["kind"] == "check" and line["passed"]] == [
        "tiny n=4 tensorrt-rtx: a plan is built for SM80"
    ]
    said = wrong(lines)
    assert "cannot load it" in said["tiny n=4 tensorrt-rtx: a plan for SM80 loads and makes an image"]
    assert "tiny n=4 tensorrt-rtx: a plan is built for local" in said
    assert not any("PAR-S" in line["name"] for line in lines if line["kind"] == "check")


@pytest.mark.slow
def test_a_part_that_ends_in_an_error_does_not_end_the_others(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> list[Row]:
        raise OSError(28, "No space left on device", "weights.data")

    monkeypatch.setattr("par_export.card.libraries.write_family", lambda *_, **__: fails(0))
    _, _, lines = of_parts(tmp_path, tiny, stand_in, "cuda-ort", "driver")
    assert wrong(lines) == {"cuda-ort": "[Errno 28] No space left on device: 'weights.data'"}
    assert sum(line["kind"] == "check" and line["passed"] for line in lines) == 13


@pytest.mark.slow
def test_a_subject_that_had_no_time_is_left_out_once(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    journal = Journal(None, lambda _: None)
    session = Report(options(tmp_path, tiny), stand_in, lambda _: None, journal).session
    with closing(open_eager(tiny, "tiny n=4 eager")) as subject:
        for _ in range(2):
            assert session.rows("x", [subject], session.setting(1, until=time.monotonic())) == []
        assert session.left_out == ["tiny n=4 eager, batch 1: time"]
        assert session.rows("x", [subject], session.setting(1)) != []
    assert len(session.left_out) == 1


@pytest.mark.parametrize(
    ("given", "images"), [([], BATCHES), (["--batches", "1"], (1,)), (["--batches", "8", "2"], (2, 8))]
)
def test_the_batches_of_the_command_are_those_of_the_rows(
    stand_in: gpu.Gpu, tiny: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], images: tuple[int, ...]
) -> None:
    asked: list[CardOptions] = []

    def nothing(card: CardOptions, *_: object) -> list[Row]:
        asked.append(card)
        return []

    monkeypatch.setattr("par_export.card.report.report", nothing)
    cli.main(["bench", str(tiny), "--suite", "gpu", "--quiet", *given])
    assert [card.images for card in asked] == [images]


@pytest.mark.slow
def test_a_report_is_compared_with_an_earlier_one(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def smaller(**given: Any) -> CardOptions:
        baselines = [replace(BASELINE, twins=(4,))]
        return options(tmp_path, tiny, parts=given["parts"], images=(1,), repetitions=7, baselines=baselines)

    monkeypatch.setattr("par_export.card.report.CardOptions", smaller)
    command = ["bench", "--suite", "gpu", "--parts", "baselines", "--work", str(tmp_path)]
    assert cli.main([*command, "--json", str(tmp_path / "old.jsonl")]) == 0
    slow = tmp_path / "old.jsonl"
    lines = [json.loads(line) for line in slow.read_text().splitlines()]
    for line in lines:
        if "samples_ms" in line:
            line["samples_ms"] = [ms / 1000 for ms in line["samples_ms"]]
            line["median_ms"] /= 1000
            line["flags"] = []
    slow.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("par_runtime.bench.machine.disturbances", lambda *_: [])
    capsys.readouterr()
    assert cli.main([*command, "--compare", str(slow), "--fail-above", "10"]) == 1
    assert "slower than --fail-above 10: " in capsys.readouterr().err
