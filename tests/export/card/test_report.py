"""The whole report of a GPU, rehearsed: real processes on the stand-in, engines that compute nothing, tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from double import kernels
from double.driver import Driver

from par_export.card import checks, plan, prepare
from par_export.card import rows as rows_of_report
from par_export.card.ahead import wanted
from par_export.card.checks import SANITIZER, Checks
from par_export.card.findings import Findings, Known
from par_export.card.plan import BATCHES, MODELS, Figure, Model, blocks
from par_export.card.processes import Ended
from par_export.card.report import CardOptions, Report, report
from par_export.card.samples import Sample
from par_export.card.table import NOT_RUN, figures_table, markdown
from par_export.kernels.plan import Planner
from par_export.kernels.plan import plan as plan_kernels
from par_export.kernels.spec import Planned, Spec
from par_export.quantised import Codes
from par_model.config import PARConfig, VQConfig
from par_runtime.backends.program import Pointer, Profile, Program, Weight
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.machine import describe
from par_runtime.bench.rows import Row, read
from par_runtime.bench.subjects.base import OutOfTimeError
from par_runtime.bench.subjects.process import open_eager
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.errors import RequestError

CHILDREN = Path(__file__).parent / "children"
SMALL = Model(
    "PAR-L",
    PARConfig(dim=64, n_layers=2, n_heads=4, vocab_size=256, n_classes=10, grid=(1, 8, 8)),
    VQConfig(codebook_size=256, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32),
    twins=(4,),
    group_sizes=(1, 4),
    codes=(Codes("int8", 32),),
)
SAMPLE = Sample("odd", SMALL.config, None, 4)
BASELINE = replace(SMALL, twins=(1, 4), codes=(), ours=False)


def planned(bundle: Bundle, images: Sequence[int]) -> Planned:
    """An engine whose one kernel takes a matrix of each layer; the decoder has a kernel too. Neither computes."""
    plan = Planned()
    constants = {"K": 64, "N": 64, "WIDTH": 64, "ORDER": "plain", "HEAD": 8, "PADDED": 8, "DROP_ROWS": False}
    types = (("raw", "*fp16"), ("packed", "*fp16"))
    spec = Spec("pack.panels", tuple(sorted((constants | {"BN": 16, "BK": 16, "PART": 16}).items())), types, 4, 1)
    for name, at in bundle.weights.items():
        pack = plan.launch(spec, (4, 4, 1), {"raw": Pointer("raw"), "packed": Pointer("packed")})
        whole = len(at.shape) == 2 and at.dtype == "float16" and name != "embed"
        plan.weights[name] = Weight(at.length, at, 0, pack if whole else None)
    layer = plan.launch(spec, (4, 4, 1), {"raw": Pointer("layers.{i}.w2"), "packed": Pointer("x")})
    end = plan.launch(spec, (1, 1, 1), {"raw": Pointer("x"), "packed": Pointer("tokens")})
    decoded = plan.launch(spec, (1, 1, 1), {"raw": Pointer("tokens"), "packed": Pointer("images")})
    profiles = {b: Profile((), (layer,), (end,), {"x": (0, 4096)}, 4096) for b in images}
    phases = tuple(phase.name for phase in bundle.phases)
    layers = bundle.model["n_layers"]
    plan.programs["step"] = Program(bundle.group_size, phases, layers, profiles, {}, 0)
    if bundle.image_size is not None:
        only = {b: Profile((decoded,), (), (), {}, 0) for b in images}
        plan.programs["decoder"] = Program(0, (), 0, only, {}, 0)
    return plan


def build(path: Path, images: Sequence[int], *, planner: Planner = plan_kernels) -> None:
    bundle = Bundle.open(path)
    kernels.write_engine(bundle, planned(bundle, images), precision="fp16", decoder_precision="fp16")


@pytest.fixture
def stand_in(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> gpu.Gpu:
    monkeypatch.syspath_prepend(str(CHILDREN))
    monkeypatch.setenv("PARVIS_TEST_STAND_IN", "1")
    for module in (plan, prepare):
        monkeypatch.setattr(module, "TWINS", ("eager",))
    return gpu.describe(0)


def options(tmp_path: Path, tiny: Path, **changes: object) -> CardOptions:
    small = {"copy_bytes": 2**20, "launches": 9, "side": 64}
    settings = {"minutes": 2.0, "checked": [tiny], "models": [SMALL], "images": (1,), "repetitions": 2, "stress": 4}
    settings |= {"samples": (), "codes": ()}
    settings |= {"published": ("PAR-S", SMALL.config, SMALL.vq), "baselines": [BASELINE]}
    settings |= {"work": tmp_path, "torch": "cpu", "groups": 1, "limits": small, "build": build}
    return CardOptions(**(settings | changes))  # type: ignore[arg-type]


Lines = list[dict[str, Any]]
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
        assert {(label, phase) for phase in ("group", "decoder", "copy", "image", "load")} <= phases
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


@pytest.mark.parametrize(
    ("words", "code", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "| compute-sanitizer | 1 of 1 |"),
        (
            "========= Invalid __global__ read of size 4 bytes\\n========= ERROR SUMMARY: 1 error",
            9,
            "one image | WRONG | Invalid __global__ read of size 4 bytes; ERROR SUMMARY: 1 error |",
        ),
        (
            "========= Error: Device not supported",
            1,
            "- compute-sanitizer: its process ended with code 1 Error: Device",
        ),
    ],
)
def test_the_checker_of_memory_accesses(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, found: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nprintf '{words}\\n'; echo '{{\"kind\": \"done\"}}'; exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    journal = Journal(None, lambda _: None)
    made = Checks(Report(CardOptions(), stand_in, lambda _: None, journal).session, time.monotonic() + 60)
    (tmp_path / "weights.data").touch()
    ((name, run),) = made.sanitized({"tiny": tmp_path})
    assert name == SANITIZER
    made.take(name, run())
    assert found in journal.finish([]).page


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (8, 1), (16, 2), (64, 8)])
def test_checks_at_once_share_the_cores_and_their_seconds_are_said(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    """Eight that each take a thread for every core wait for each other until their time is over."""
    given: dict[str, int | None] = {}

    def run_stage(name: str, *_: object, threads: int | None = None) -> Ended:
        given[name] = threads
        return Ended(seconds={"kernels": 3.4, "images": 40.0}.get(name, 0.6))

    monkeypatch.setattr(checks, "run_stage", run_stage)
    monkeypatch.setattr(checks, "available_cores", lambda: cores)
    monkeypatch.setattr(Checks, "sanitized", lambda *_: [])
    set_up = options(tmp_path, tiny, samples=(SAMPLE,))
    session = Report(set_up, stand_in, lambda _: None, Journal(None, lambda _: None)).session
    made = Checks(replace(session, work=tmp_path), time.monotonic() + 60)
    made.run()
    made.memory()
    assert given == {"kernels": threads, "images": threads, "memory": None}  # the last runs alone
    (note,) = (line["text"] for line in session.lines if line["kind"] == "note")
    assert note == "seconds of the checks, up to 8 at once: tiny: images 40, odd: kernels 3"


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


@pytest.mark.parametrize(("error", "shown"), [(1e-3, "50 % of the allowed"), (None, "not finite")])
def test_errors_of_checks_are_summed_up(stand_in: gpu.Gpu, error: float | None, shown: str) -> None:
    found = Findings(describe(stand_in), "c", "d")
    text = {"passed": error is not None, "text": "x"}
    found.lines = [
        {"kind": "check", "name": "odd: step.qkv", "error": error, "allowed": 2e-3, **text},
        {"kind": "check", "name": "odd: step's counters", "passed": True, "text": "y"},
    ]
    assert f"| odd | {2 - (error is None)} of 2 | {shown} |" in markdown([found])


def test_the_plan_has_every_model_at_batch_1_first_and_figures_that_it_measures() -> None:
    planned_blocks = blocks(MODELS)
    images = [block.images for block in planned_blocks]
    assert images == sorted(images)
    assert planned_blocks[0].name == "PAR-3B, batch 1"
    assert MODELS[0].labels == [
        "PAR-3B n=4", "PAR-3B n=16", "PAR-3B n=1", "PAR-3B n=4 int8 group 64", "PAR-3B n=4 int4 group 64"
    ]  # fmt: skip
    assert sum(bool(model.codes) for model in MODELS) == 2
    from par_export.card.plan import FIGURES

    models = {model.name: model for model in MODELS}
    for figure in FIGURES:
        assert isinstance(figure, Figure)
        assert figure.n in models[figure.model].group_sizes
        if figure.what in ("eager", "compiled"):
            assert figure.n in models[figure.model].twins


def of_parts(tmp_path: Path, tiny: Path, gpu_: gpu.Gpu, *parts: str, **changes: object) -> tuple[list[Row], str, Lines]:
    """Rows, page and lines of a report of these parts."""
    journal = Journal(None, lambda _: None)
    rows = report(options(tmp_path, tiny, parts=parts, **changes), gpu_, lambda _: None, journal)
    outcome = journal.finish(rows)
    return outcome.rows, outcome.page, outcome.others


def wrong(lines: Lines) -> dict[str, str]:
    """Texts of the checks that failed, by their names."""
    return {line["name"]: line["text"] for line in lines if line["kind"] == "check" and not line["passed"]}


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


def test_a_twin_without_memory_waits_for_that_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WARM_AGAIN_S", 0.0)
    preparation = prepare.Preparation([], tmp_path, lambda *_: None, (1, 8), "cpu", time.monotonic() + 60)
    done: list[str] = []

    class Process:
        def __init__(self, *outcomes: Exception | None) -> None:
            self.outcomes = list(outcomes)

        def run(self, images: int, guided: bool, most_calls: int) -> None:
            done.append(f"run {images} {guided} {most_calls}")
            outcome = self.outcomes.pop(0)
            if outcome is not None:
                raise outcome

        def forget(self) -> None:
            done.append("forget")

    full, run = MemoryError("full"), f"run 8 True {prepare.WARM_CALLS}"
    for outcomes, error, tries in (
        ([full, full, None], None, 3),
        ([full] * 99, "full", prepare.WARM_TRIES),
        ([MemoryError("killed"), RequestError("ended by itself")], "ended by itself", 2),
        ([RequestError("cannot be compiled"), None], "cannot be compiled", 1),
    ):
        done.clear()
        found = preparation._warm(Process(*outcomes), 8)  # type: ignore[arg-type]
        assert (found if found is None else str(found)) == error
        assert done == [run, *["forget", run] * (tries - 1)]
    preparation.close()
    with pytest.raises(OutOfTimeError):
        preparation._warm(Process(full, full), 8)  # type: ignore[arg-type]


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


def test_of_a_subject_that_fails_in_everything_a_few_checks_are_shown() -> None:
    lines = [{"kind": "check", "name": f"odd: {i}", "passed": False, "text": f"text {i}"} for i in range(300)]
    lines += [{"kind": "check", "name": "demo: loads", "passed": False, "text": "no file"}]
    page = markdown([Findings(describe(None), "c", "d", lines=lines)])
    assert "| odd | 0 of 300 |" in page
    assert "| odd: 4 | WRONG | text 4 |" in page
    assert "odd: 5" not in page
    assert "| odd | 295 more WRONG | in the lines of --json |" in page
    assert "| demo: loads | WRONG | no file |" in page


@pytest.mark.slow
def test_ready_engines_are_named_and_those_of_other_sources_refused(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    family = prepare.family_of(SMALL, None, tmp_path / "family")
    build(family[1], (1,))
    shutil.copytree(family[1] / "engines", ready / "PAR-L-n1" / "engines")
    _, page, _ = of_parts(tmp_path, tiny, stand_in, "kernels", engines=ready, checked=(), twins=False)
    assert "- engines ready: PAR-L-n1\n- engines built here: PAR-L-n4, PAR-L-int8-g32-n4\n" in page
    (ready / "sources").write_text("0" * 64)
    with pytest.raises(RequestError, match="built by other sources than this checkout's; build them again"):
        of_parts(tmp_path, tiny, stand_in, "kernels", engines=ready)


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


def test_pytorch_is_prepared_only_for_batches_that_it_is_measured_in(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside ours that is 1: the largest batches are for ours alone."""
    prepared: list[list[tuple[int, ...]]] = []

    def preparation(models: Sequence[Model], *_: object) -> None:
        prepared.append([model.twins for model in models])

    monkeypatch.setattr(rows_of_report, "Preparation", preparation)
    for images, twins in (((1, 8), True), ((8,), True), ((1,), False)):
        set_up = options(tmp_path, tiny, images=images, twins=twins)
        session = Report(set_up, stand_in, lambda _: None, Journal(None, lambda _: None)).session
        rows_of_report.Rows(session, [SMALL, BASELINE])
    assert prepared == [[(4,), (1, 4)], [(), (1, 4)], [(), ()]]


@pytest.mark.parametrize(
    ("gigabytes", "twins"),
    [
        (None, {"PAR-3B": (1, 4, 16), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (150, {"PAR-3B": (1, 4, 16), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (85, {"PAR-3B": (1, 4), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (40, {"PAR-3B": (1, 4), "PAR-L": (1, 4), "PAR-XL": (1, 4)}),
    ],
)
def test_pytorch_gives_up_n_16_of_the_largest_models_where_memory_does_not_hold_all(
    gigabytes: int | None, twins: dict[str, tuple[int, ...]]
) -> None:
    """An H200, an H100 and an A100 of 40 GB, with our engines of one model beside them."""
    kept = prepare.that_fit(MODELS, None if gigabytes is None else gigabytes * 10**9)
    assert {model.name: model.twins for model in kept if model.twins} == twins
    assert [replace(model, twins=()) for model in kept] == [replace(model, twins=()) for model in MODELS]


def test_pytorch_alone_fits_into_80_gb_with_every_n() -> None:
    assert prepare.that_fit(plan.BASELINES, 80 * 10**9) == list(plan.BASELINES)


@pytest.mark.slow
def test_a_report_of_one_batch_takes_engines_that_have_more(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    ready, model = tmp_path / "ready", replace(SMALL, codes=())
    for n, path in prepare.family_of(model, None, tmp_path / "family").items():
        build(path, (1, 2))
        shutil.copytree(path / "engines", ready / f"PAR-L-n{n}" / "engines")
    settings = {"models": [model], "engines": ready, "checked": (), "twins": False, "images": (2,)}
    rows, page, lines = of_parts(tmp_path, tiny, stand_in, "kernels", **settings)
    assert "- engines ready: PAR-L-n4, PAR-L-n1\n" in page
    assert "engines built here" not in page
    assert {(row.label, row.images) for row in rows} == {("PAR-L n=1", 2), ("PAR-L n=4", 2)}
    assert {line["images"] for line in lines if line["kind"] == "kernel"} == {2}
    assert "| PAR-L n=4 | 2 |" in page


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


@pytest.mark.slow
def test_what_is_built_ahead_is_all_that_a_report_wants(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    """By name and by batches: whatever one of both does not know would be compiled on the machine that is measured."""
    ready = tmp_path / "ready"
    codes = (Codes("int8", 32),)
    wanted_here = {"checked": [tiny], "samples": (SAMPLE,), "codes": codes, "models": [SMALL]}
    for each in wanted(tmp_path / "ahead", **wanted_here):  # type: ignore[arg-type]
        path = each.write()
        assert path.name == each.name
        build(path, each.images)
        shutil.copytree(path / "engines", ready / each.name / "engines")
    built: dict[str, tuple[int, ...]] = {}

    def build_here(path: Path, images: Sequence[int], *, planner: Planner = plan_kernels) -> None:
        built[path.name] = tuple(images)

    wanted_here |= {"engines": ready, "build": build_here, "images": BATCHES, "twins": False, "minutes": 1.0}
    _, page, _ = of_parts(tmp_path, tiny, stand_in, "kernels", **wanted_here)
    assert built == {}
    named = page.partition("- engines ready: ")[2].partition("\n")[0].split(", ")
    assert sorted(named) == sorted(path.name for path in ready.iterdir())
