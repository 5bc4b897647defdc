"""Stages of a GPU's report: whole images on the stand-in, limits on the CPU, and processes that end in every way."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import tensorrt
from double.driver import Driver

from par_export.card import images, limits, ort, stages
from par_export.card.prepare import copies
from par_export.card.processes import run_stage, shared_cores
from par_export.quantised import Codes
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.bundle import Bundle
from par_runtime.pipeline import Pipeline


class Lines(list[dict[str, Any]]):
    """What a stage emits."""

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append({"kind": kind} | fields)

    def checks(self) -> dict[str, bool]:
        return {line["name"]: line["passed"] for line in self if line["kind"] == "check"}


@pytest.fixture
def on_gpu(driver: Driver, tiny: Path, tmp_path: Path) -> Path:
    """The tiny bundle with an engine on the stand-in."""
    path = tmp_path / "tiny"
    shutil.copytree(tiny, path)
    tensorrt.write_engine(Bundle.open(path), (1, 2, 4))
    return path


def images_of(path: Path, **changes: Any) -> Lines:
    lines = Lines()
    spec = {"path": str(path), "name": "t", "device": "cuda:0", "reference": "cpu", "groups": 2, "seed": 5}
    images.check_images(spec | changes, lines)
    return lines


def test_every_check_of_whole_images_passes_on_a_right_backend(on_gpu: Path, driver: Driver) -> None:
    lines = images_of(on_gpu)
    checks = lines.checks()
    assert all(checks.values()), [x for x in lines if x["kind"] == "check" and not x["passed"]]
    wanted = ("loads", "self-test", "launched by image", "launched by none", "alone as in a batch", "the same again")
    assert {f"t: {name}" for name in wanted} < set(checks)
    assert "t: tokens that rounding does not explain" in checks
    assert "t: PSNR of the worst image" in checks
    measured = [line for line in lines if "allowed" in line]
    assert len(measured) == 8  # logits and KL of four phases
    assert all(0 <= line["error"] < line["allowed"] for line in measured)
    begun = [line["name"] for line in lines if line["kind"] == "begin"]
    assert begun[0] == "t: loads"
    assert begun[-1] == "t: verify"
    assert not driver.device


@pytest.mark.parametrize("codes", [Codes("int4", 64)], ids=str)
def test_images_of_quantised_copies_are_compared_with_the_same_codes(
    driver: Driver, tiny: Path, tmp_path: Path, codes: Codes
) -> None:
    """The reference dequantises them. Against the bundle that they were made from, logits would be too far off."""
    made = copies([tiny], [codes], tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in made] == ["checked/tiny", "quantised/tiny-int4"]
    for make in made.values():
        make()
    path = tmp_path / "quantised" / "tiny-int4"
    bundle = Bundle.open(path, verify="full")
    assert bundle.quantised == "int4"
    assert bundle.weights["layers.1.w2"].dtype == "int4"  # the others have no whole groups
    tensorrt.write_engine(bundle, (1, 2, 4))
    lines = images_of(path, groups=1)
    checks = lines.checks()
    assert all(checks.values()), [x for x in lines if x["kind"] == "check" and not x["passed"]]
    assert "t: self-test" not in checks  # there is none
    assert "t: relative logit error of group" in checks


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "codes"), [("fp16", None), ("bf16", None), ("fp16", Codes("int4", 64))])
def test_images_of_our_kernels(driver: Driver, tiny: Path, tmp_path: Path, precision: str, codes: Codes | None) -> None:
    """As on a GPU, with the kernels' own source."""
    from double import bare, kernels
    from double.twins import Twins

    *_, (path, make) = copies([tiny], [] if codes is None else [codes], tmp_path).items()
    make()
    planned = kernels.planned(Bundle.open(path), (1, 4), "SM90", precision, "fp16")
    driver.fill = 0xFF
    bare.register(driver, kernels.write_engine(Bundle.open(path), planned, precision, "fp16", "SM90"))
    driver.capability, driver.twin = (9, 0), Twins(driver)
    lines = images_of(path)
    assert all(lines.checks().values()), lines


def planted(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """What ``GpuBackend.name`` returns is given to ``change``, with the backend."""
    right = getattr(GpuBackend, name)

    def wrong(self: GpuBackend, *arguments: Any, **options: Any) -> Any:
        return change(self, right(self, *arguments, **options))

    monkeypatch.setattr(GpuBackend, name, wrong)


def test_images_that_depend_on_the_way_of_launching_are_seen(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_if_not_captured(self: GpuBackend, made: Any) -> Any:
        return (made[0] ^ 1 if self.capture == "none" else made[0], made[1])

    planted(monkeypatch, "make_images", other_if_not_captured)
    failed = [name for name, passed in images_of(on_gpu).checks().items() if not passed]
    assert failed == ["t: launched by none"]


def test_a_driver_that_refuses_capture_is_no_pass(on_gpu: Path, driver: Driver) -> None:
    driver.refuse_capture_over = 0
    lines = images_of(on_gpu)
    text = next(line["text"] for line in lines if line["name"] == "t: launched by image" and line["kind"] == "check")
    assert text.startswith("the driver refused it, and none is in use")
    assert not lines.checks()["t: launched by image"]
    assert lines.checks()["t: launched by none"]


def test_wrong_numbers_are_seen_by_verify_and_the_selftest(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "logits", lambda self, logits: -logits)
    planted(monkeypatch, "step", lambda self, tokens: tokens * 0)
    failed = {name for name, passed in images_of(on_gpu).checks().items() if not passed}
    assert {"t: self-test", "t: argmax agreement", "t: relative logit error of group"} <= failed


def test_a_nan_in_the_logits_passes_nothing(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "logits", lambda self, logits: logits * np.float32(np.nan))
    failed = {name for name, passed in images_of(on_gpu).checks().items() if not passed}
    assert {"t: KL divergence of group (nats)", "t: relative logit error of group"} <= failed


def memory_of(path: Path) -> tuple[bool, str]:
    """Whether the check of memory passes over 9 images, and its text."""
    lines = Lines()
    images.check_memory({"path": str(path), "name": "t", "device": "cuda:0", "images": 9}, lines)
    assert lines.checks().keys() == {"t: memory"}
    return lines.checks()["t: memory"], lines[-1]["text"]


def test_memory_that_every_batch_size_has_made_stays(on_gpu: Path, driver: Driver) -> None:
    """Graphs of the smaller ones, which are freed when a larger one comes, are not made anew while it is measured."""
    driver.node_bytes = 10**6  # a graph of the tiny bundle takes more than what may be gone
    passed, text = memory_of(on_gpu)
    assert passed
    before = text.split()[2]
    assert text == f"10 images: {before} MB free before, {before} MB after"  # batches of 1, 2, 3 and 4


def test_memory_that_grows_is_seen(on_gpu: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(self: GpuBackend, made: Any) -> Any:
        self.device.allocate(2**23, "nobody")
        return made

    planted(monkeypatch, "make_images", leak)
    passed, text = memory_of(on_gpu)
    assert not passed
    batches, mega = 4, 2**23 / 1e6
    start = 8590 - 4 * mega  # less what was lost before; the rest of the tiny bundle's memory is below 4 MB
    before, after = (int(text.split()[at]) for at in (2, 6))
    assert before == pytest.approx(start, abs=4)
    assert before - after == pytest.approx(batches * mega, abs=2)
    images.make_one({"path": str(on_gpu), "device": "cuda:0"})


def test_graphs_that_are_kept_for_ever_are_seen(on_gpu: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.node_bytes = 10**6

    def forget(self: GpuBackend, made: Any) -> Any:
        self._graphs.clear()  # each batch captures anew, and nothing frees what was captured before
        return made

    planted(monkeypatch, "make_images", forget)
    assert not memory_of(on_gpu)[0]


@pytest.mark.parametrize(("size", "passes"), [(15, True), (17, False)])
def test_how_much_may_be_gone(
    on_gpu: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, size: int, passes: bool
) -> None:
    """In MB, whoever took it: here the driver, for itself, at the second batch that is measured."""
    batches: list[int] = []

    def step(self: GpuBackend, made: Any) -> Any:
        batches.append(1)
        driver.own_bytes += size * 10**6 * (len(batches) == 6)
        return made

    planted(monkeypatch, "make_images", step)
    passed, text = memory_of(on_gpu)
    assert passed == passes
    before, after = (int(text.split()[at]) for at in (2, 6))
    assert before - after == size


@pytest.mark.parametrize(("dependent", "target"), [(False, "sm_80"), (False, "sm_90"), (True, "sm_90")])
def test_the_empty_kernels_are_ptx_that_nvidias_assembler_takes(tmp_path: Path, dependent: bool, target: str) -> None:
    backends = importlib.util.find_spec("triton.backends.nvidia")
    assembler = Path(str(backends and backends.origin)).parent / "bin" / "ptxas"
    if not assembler.exists():
        pytest.skip("no ptxas beside triton")
    kernel, text = limits.empty_kernel(dependent)
    file = tmp_path / "empty.ptx"
    file.write_bytes(text.rstrip(b"\0"))
    subprocess.run([assembler, f"-arch={target}", "-o", tmp_path / "empty.cubin", file], check=True)
    assert kernel.dependent == dependent


# -- processes --------------------------------------------------------------------------------------------------------


def soon() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_limits_of_the_stand_in(driver: Driver, capability: tuple[int, int]) -> None:
    driver.capability = capability
    for dependent in (False, True):
        kernel, text = limits.empty_kernel(dependent)
        driver.register(text, kernel, (9, 0) if dependent else capability)
    lines = Lines()
    stages.limits_stage({"index": 0, "torch": "cpu", "copy_bytes": 2**20, "launches": 9, "side": 64}, lines)
    names = [line["name"] for line in lines if line["kind"] == "limit"]
    assert names == [
        "copy bandwidth",
        "launch",
        *(["dependent launch"] if capability[0] == 9 else []),
        "read bandwidth",
        "fp16 matrix peak",
    ]
    assert [line["text"] for line in lines if line["kind"] == "note"] == (
        [] if capability[0] == 9 else ["dependent launch: this GPU has none (SM90 and newer)"]
    )
    for line in lines:
        if line["kind"] == "limit":
            assert line["value"] == pytest.approx(np.median(line["samples"]))
            assert line["value"] > 0
            assert len(line["samples"]) >= 10
    dependent = [waits for source, waits in driver.launches if source == "card.empty"]
    assert sum(dependent) == (8 if capability[0] == 9 else 0)  # the first of a list waits for nothing
    assert not driver.device
    assert not driver.modules


def test_an_error_of_a_stage_is_kept_in_its_words() -> None:
    ended = run_stage("memory", {"path": "/nowhere", "name": "x", "device": "cuda:0", "images": 1}, soon())
    assert ended.why.startswith("BundleError: ")
    assert "/nowhere" in ended.why
    assert ended.lines == []


def test_a_stage_that_does_not_end_is_killed() -> None:
    began = time.monotonic()
    ended = run_stage("limits", {}, began + 0.3, before=["sh", "-c", "sleep 50; exec true"])
    assert ended.why == "it had not ended when its time was over"
    assert time.monotonic() - began < 20


def test_a_process_that_a_kernel_takes_with_it_says_what_it_had_begun() -> None:
    script = (
        'echo \'{"kind": "check", "name": "a", "passed": true}\'; echo \'{"kind": "begin", "name": "b"}\';'
        "echo noise; echo last words >&2; kill -9 $$"
    )
    ended = run_stage("limits", {}, soon(), before=["sh", "-c", script])
    assert [line["name"] for line in ended.lines] == ["a"]
    assert ended.during == "b"
    assert ended.why == "its process was ended by SIGKILL: last words"


def test_a_program_around_a_stage_can_fail_it() -> None:
    """As compute-sanitizer does, whose own code follows a process that ended well."""
    script = 'echo "===== ERROR SUMMARY: 1 error"; echo \'{"kind": "done"}\'; exit 9'
    ended = run_stage("limits", {}, soon(), before=["sh", "-c", script])
    assert ended.said == ["===== ERROR SUMMARY: 1 error"]
    assert ended.why == "its process ended with code 9"


@pytest.mark.parametrize(("threads", "said"), [(3, "3 3 passive"), (None, "7  ")])
def test_a_stage_beside_others_takes_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, said: str
) -> None:
    """One that runs alone has the variables as they were."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("MKL_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    script = 'echo "$OMP_NUM_THREADS $MKL_NUM_THREADS $OMP_WAIT_POLICY."; echo \'{"kind": "done"}\''
    ended = run_stage("limits", {}, soon(), before=["sh", "-c", script], threads=threads)
    assert ended.said == [f"{said}."]
    assert ended.why == ""


def test_pytorch_takes_the_threads_that_it_is_given() -> None:
    script = "import torch; print(torch.get_num_threads())"
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | shared_cores(1), capture_output=True, text=True, check=True
    )
    assert run.stdout == "1\n"


def test_a_number_that_is_none_is_null_in_a_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Other readers of JSON refuse NaN, and so do rows."""
    monkeypatch.setitem(stages.STAGES, "limits", lambda spec, emit: emit("check", error=float("nan"), name="x"))
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # this process keeps its standard output
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert stages.main(["limits", "{}"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0]) == {"kind": "check", "error": None, "name": "x"}


def test_lines_come_from_standard_output_alone(tmp_path: Path) -> None:
    """A library that prints does not break the lines."""
    (tmp_path / "sitecustomize.py").write_text("print('loud')")
    sys.path.insert(0, str(tmp_path))
    try:
        ended = run_stage("memory", {"path": "/nowhere", "name": "x", "device": "cuda:0"}, soon())
    finally:
        sys.path.pop(0)
    assert ended.why.startswith("BundleError: ")


@pytest.fixture
def ort_lines(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lines]:
    """The checks of ONNX Runtime's backend, its code on CPU buffers."""
    pytest.importorskip("onnxruntime", minversion="1.25")
    from par_runtime.backends.ort import gpu as ort_gpu

    bundle = Bundle.open(tiny)
    backend = ort_gpu.OrtCudaBackend(bundle, provider="CPUExecutionProvider", kind="cpu")
    assert list(backend.opened()) == ["step", "decoder"]
    monkeypatch.setattr(ort, "Pipeline", Loaded(Pipeline(bundle, backend)))

    def lines_of(provider: str, predicted: bool = True) -> Lines:
        monkeypatch.setattr(ort_gpu, "CUDA", provider)  # where operators are expected
        lines = Lines()
        spec = {"path": str(tiny), "name": "t", "device": "cuda-ort:0", "reference": "cpu", "groups": 1, "seed": 5}
        ort.check_ort(spec | {"predicted": predicted}, lines)
        return lines

    return lines_of


class Loaded:
    """``Pipeline.load``, of a backend that needs no GPU."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def load(self, path: Path, device: str, selftest: bool) -> Pipeline:
        assert (device, selftest) == ("cuda-ort:0", False)
        assert path == self._pipeline.bundle.path
        return self._pipeline


def test_onnx_runtime_is_checked_with_the_place_of_every_operator(ort_lines: Callable[..., Lines]) -> None:
    lines = ort_lines("CPUExecutionProvider", predicted=False)
    checks = lines.checks()
    assert all(checks.values()), [x for x in lines if x["kind"] == "check" and not x["passed"]]
    wanted = ("loads", "placement of step", "placement of decoder", "self-test", "the same again")
    assert {f"t: {name}" for name in wanted} < set(checks)
    assert "t: relative logit error of group" in checks
    notes = [line["text"] for line in lines if line["kind"] == "note"]
    assert notes[0].startswith("t: step: CPU ")


def test_operators_that_are_not_where_they_were_predicted_are_seen(ort_lines: Callable[..., Lines]) -> None:
    """All of them: no operator is on a provider that is not there."""
    lines = ort_lines("CUDAExecutionProvider")
    texts = {line["name"]: line["text"] for line in lines if line["kind"] == "check" and not line["passed"]}
    assert set(texts) == {"t: placement of step", "t: placement of decoder"}
    assert "TensorScatter" in texts["t: placement of step"]
    assert texts["t: placement of step"].endswith("; without a GPU it was predicted: nothing")
    assert texts["t: placement of decoder"].endswith("; without a GPU it was predicted: InstanceNormalization")
