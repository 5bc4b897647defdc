"""Fixtures: the golden files, models with golden weights, and bundles exported from them (once per session)."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Kernels run in Triton's interpreter in this process, which it decides when they are imported. (A build compiles in
# processes of its own, without this.)
os.environ["TRITON_INTERPRET"] = "1"

#: Fixtures of the stand-in GPU, of the stub of its driver, and of shared pipelines, for tests in several files.
pytest_plugins = ["double.fixtures", "sharing", "stub_cuda.children"]

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
#: The CPUs of the tests, where the system says it.
CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
#: Lines of ``tests/test_gpu.py`` for an issue; printed at the end of ``pytest -m gpu``.
GPU_REPORT: list[str] = []


def pytest_configure() -> None:
    """As in an activated environment: what tests run is found there, and errors name ``pip`` without a path.

    Each of the processes that run tests at the same time has a CPU of its own. What takes as many threads as there are
    CPUs then takes one, in place of several that wait for those of the other processes.
    """
    # Python looks for garbage after every 700 new objects, among all that PyTorch and pytest made: 4 % of the time.
    gc.set_threshold(100_000, 50, 100)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and CPUS:
        os.sched_setaffinity(0, {sorted(CPUS)[int(worker.removeprefix("gw")) % len(CPUS)]})
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if GPU_REPORT:
        terminalreporter.section("GPU report")
        for line in GPU_REPORT:
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``pytest -m gpu`` that tested nothing has not passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.markexpr == "gpu" and exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _load(GOLDEN / "recipe.py")


@pytest.fixture(autouse=True)
def cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with the marker ``two_cores`` may use every CPU of the machine, and is left out where there is one."""
    if request.node.get_closest_marker("two_cores") is None or not CPUS:
        yield
        return
    if len(CPUS) < 2:
        pytest.skip("needs two CPUs")
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, Any]]:
    """name -> arrays of ``par_n4_grid8`` and ``ar_n1_grid8``, with ``spec`` and ``keys`` parsed."""
    out = {}
    for name in ("par_n4_grid8", "ar_n1_grid8"):
        with np.load(GOLDEN / f"{name}.npz") as f:
            arrays = dict(f)
        arrays["spec"] = json.loads(str(arrays["spec"]))
        arrays["keys"] = {k: tuple(v) for k, v in json.loads(str(arrays["keys"])).items()}
        out[name] = arrays
    return out


def golden_weights(model: Any) -> Any:
    """Give ``model`` the weights of the recipe, by key; returns it in eval mode."""
    import torch

    state = {}
    for key, tensor in model.state_dict().items():
        value = (
            torch.zeros(tensor.shape)
            if key == "quantize.codebook_used"
            else torch.from_numpy(recipe.weight(key, tuple(tensor.shape)))
        )
        state[key] = value
    model.load_state_dict(state)
    return model.eval()


def golden_config(arrays: dict[str, Any]) -> Any:
    from par_model.config import PARConfig

    s = arrays["spec"]
    return PARConfig(
        dim=s["dim"],
        n_layers=s["layers"],
        n_heads=s["heads"],
        vocab_size=s["vocab"],
        n_classes=s["classes"],
        grid=(1, s["grid"], s["grid"]),
        group_size=s["n"],
    )


@pytest.fixture(scope="session")
def small_vq() -> Any:
    """A tokenizer with golden weights for the golden models: 512 codes, 2x downsampling."""
    from par_model.config import VQConfig
    from par_model.vq import VQModel

    config = VQConfig(codebook_size=512, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)
    return golden_weights(VQModel(config))


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, golden: dict[str, dict[str, Any]], small_vq: Any
) -> dict[str, Path]:
    """Checkpoint files as published: ``par_n4_grid8``, ``par_n16_grid8``, ``ar_n1_grid8`` and the tokenizer ``vq``."""
    import torch

    folder = tmp_path_factory.mktemp("checkpoints")
    out = {}
    for name, arrays in golden.items():
        out[name] = folder / f"{name}.pt"
        torch.save({k: torch.from_numpy(v) for k, v in recipe.state_dict(arrays["keys"]).items()}, out[name])
    from dataclasses import replace

    from par_model.transformer import PAR

    out["par_n16_grid8"] = folder / "par_n16_grid8.pt"
    sixteen = replace(golden_config(golden["par_n4_grid8"]), group_size=16)
    torch.save(golden_weights(PAR(sixteen)).state_dict(), out["par_n16_grid8"])
    out["vq"] = folder / "vq.pt"
    torch.save(small_vq.state_dict(), out["vq"])
    return out


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Exported golden bundles: ``fp32``, ``fp16``, ``bf16`` (n=4, with decoder), ``n1`` and ``n16`` (end at tokens)."""
    from par_export.bundle import ExportRequest, export

    precisions = ("fp32", "fp16", "bf16")
    ends = {"n1": "ar_n1_grid8", "n16": "par_n16_grid8"}
    with made_once(tmp_path_factory, "bundles") as (folder, made):
        if not made:
            for precision in precisions:
                request = ExportRequest(
                    checkpoints["par_n4_grid8"],
                    checkpoints["vq"],
                    folder / precision,
                    precision,
                    heads=4,
                    grid=(1, 8, 8),
                )
                export(request, say=lambda _: None)
            for name, checkpoint in ends.items():
                request = ExportRequest(checkpoints[checkpoint], None, folder / name, heads=4, grid=(1, 8, 8))
                export(request, say=lambda _: None)
    return {name: folder / name for name in (*precisions, *ends)}


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """The folder ``name`` of this run of the tests, and whether it was made already, by this process or another one of
    the run. It counts as made where the block ends without an error; the others wait until then.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of the run; each of its processes has a folder in there
    folder, done = base / f"shared-{name}", base / f"shared-{name}.made"
    with (base / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made := done.exists():
            yield folder, made
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder, made
        done.touch()


@contextmanager
def child(command: list[str], **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process that hears Ctrl-C and SIGHUP even where the tests run in the background or under nohup, and that
    never outlives its test.
    """

    def hear() -> None:
        # Background jobs inherit "ignore" for the first, those of nohup for the second.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(command, text=True, preexec_fn=hear, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def heard() -> Iterator[None]:
    """This process hears Ctrl-C and SIGHUP, as a :func:`child` does."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The committed bundle of a few hundred kB; needs no torch."""
    return TESTS / "data" / "tiny"


@pytest.fixture(scope="session")
def tiny_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video bundle of ``video_bundles.write_tiny_video``: fp32, n = 4, with an encoder."""
    from video_bundles import write_tiny_video

    return write_tiny_video(tmp_path_factory.mktemp("video") / "fp32")


@pytest.fixture(scope="session")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 8x8 in 2 classes, in the raw form: left or right half bright."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    labels = np.arange(48, dtype=np.uint8) % 2
    pixels = rng.integers(0, 60, (48, 8, 8, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 180
    pixels.tofile(folder / "images.u8")
    labels.tofile(folder / "labels.u8")
    (folder / "meta.json").write_text(json.dumps({"count": 48, "size": 8, "styles": ["left", "right"]}))
    return folder


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees no GPU, so trainings are on the CPU, where the same seed gives the same bits."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to build engines in, with an engine cache of its own."""
    monkeypatch.setenv("PARVIS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def kernels_bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it with a really compiled engine of kernels, for SM90 and 1 image.

    It was built by a process that needed neither torch nor triton itself. Its engine cache is the folder ``cache``
    beside the bundle. Processes that run tests at the same time share it: compiling takes longest.
    """
    pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")
    with made_once(tmp_path_factory, "kernels") as (folder, made):
        if not made:
            build_kernels(tiny, folder, "SM90")
    return folder / "tiny"


def build_kernels(tiny: Path, folder: Path, target: str) -> None:
    """An engine for ``target`` in ``folder / "tiny"``, by a process of its own."""
    path = shutil.copytree(tiny, folder / "tiny")
    code = (
        "import sys; from par_export.cli import build as build_cli\n"
        "code = build_cli.main(sys.argv[1:])\n"
        "needed = {'torch', 'triton', 'onnxruntime'} & set(sys.modules)\n"
        "assert not needed, needed; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(path), "--engine", "kernels", "--target", target, "--images", "1"]
    places = {"PARVIS_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*command, "--quiet"], check=True, env=os.environ | places)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A test that waits (for a pipe that nobody writes, say) fails instead."""

    def stop(*_: object) -> None:
        pytest.fail("it waits")  # no OSError, which readers take for a file that cannot be read

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def stand_in(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in GPU of a whole report, which the report's own processes find too. PyTorch's twins are eager ones."""
    from par_export.card import plan, prepare
    from par_runtime.bench import gpu

    monkeypatch.syspath_prepend(str(TESTS / "export" / "card" / "children"))
    monkeypatch.setenv("PARVIS_TEST_STAND_IN", "1")
    for module in (plan, prepare):
        monkeypatch.setattr(module, "TWINS", ("eager",))
    return gpu.describe(0)
