"""Engines of kernels are loaded on the stand-in GPU: weights, modules, prepared launches, and what can go wrong there.

Their kernels are real ones, in programs that compute nothing of use: what is tested is how they are run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import bare, kernels
from double.driver import Driver, ViolationError
from double.hand_made import BK, BN, hand_made
from double.twins import Twins

from par_export.kernels.spec import Planned
from par_runtime.backends import choose, cuda
from par_runtime.backends.engines import Engine
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels import backend as kernels_backend
from par_runtime.backends.native import decoding
from par_runtime.bundle import Bundle, Calibration
from par_runtime.cli.inputs import load_pipeline
from par_runtime.dtypes import AUTO
from par_runtime.errors import BundleError, CudaError, EngineError, OutOfMemory, RequestError
from par_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny, tmp_path / "bundle"))


Load = Callable[..., GpuBackend]


@pytest.fixture
def load(driver: Driver, bundle: Bundle) -> Load:
    def make(plan: Planned | None = None, target: str = "SM80", **how: Any) -> GpuBackend:
        driver.twin = Twins(driver)
        folder = kernels.write_engine(bundle, plan or hand_made(bundle), target=target)
        bare.register(driver, folder)
        return kernels_backend.load(bundle, Engine.open(folder, bundle), cuda.Device.open(0), **how)

    return make


def packed(matrix: np.ndarray) -> np.ndarray:
    k, n = matrix.shape
    padded = np.zeros((-(-k // BK) * BK, -(-n // BN) * BN), np.float32)
    padded[:k, :n] = matrix
    return padded.reshape(padded.shape[0] // BK, BK, -1, BN).transpose(2, 0, 3, 1)


@pytest.mark.parametrize("block", [2**25, 1000])
def test_weights_are_packed_and_nothing_else_stays(
    load: Load, driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Also through blocks that are much smaller than a tensor, and filled by several threads."""
    monkeypatch.setattr("par_runtime.backends.kernels.upload.BLOCK_BYTES", block)
    monkeypatch.setattr("par_runtime.backends.kernels.upload.PIECE_BYTES", 300)
    seen: list[tuple[int, int]] = []
    plan = hand_made(bundle)
    backend = load(plan, on_load=lambda done, total: seen.append((done, total)))
    shared = backend.programs["step"].shared  # type: ignore[attr-defined]
    raw = (bundle.path / "weights.data").read_bytes()
    for name, weight in plan.weights.items():
        got = driver.span(shared.addresses[name], weight.bytes, name)
        if weight.stored is None:
            wanted = plan.constants[name]
        else:
            wanted = raw[weight.stored.offset : weight.stored.offset + weight.stored.length]
            if weight.pack is not None:
                wanted = packed(np.frombuffer(wanted, np.float16).reshape(weight.stored.shape)).tobytes()
        assert got.tobytes() == wanted, name
    read = sum(w.bytes if w.stored is None else w.stored.length for w in plan.weights.values())
    assert seen[-1] == (read, read)
    assert seen == sorted(set(seen))
    assert len(driver.device) == 2  # all weights, and the counters
    assert not driver.pinned
    assert (driver.span(shared.states["step"], 2048, "counters") == 0).all()
    backend.close()
    backend.close()
    assert not driver.device
    assert not driver.modules


@pytest.mark.parametrize(("target", "dependent"), [("SM80", False), ("SM90", True)])
def test_launches_in_order_with_the_addresses_of_now(
    load: Load, driver: Driver, bundle: Bundle, target: str, dependent: bool
) -> None:
    driver.capability = (int(target[2]), int(target[3]))
    backend = load(hand_made(bundle, dependent=dependent), target)
    driver.launches.clear()
    stream = backend.stream
    program = backend.programs["step"]
    with backend.device.allocate(program.scratch_bytes(1), "scratch") as scratch:
        context = program.context(1, scratch.pointer, scratch.size, stream)
        with pytest.raises(EngineError, match=r"step call: no address for past_k.0, past_k.1; please report"):
            context.enqueue(stream, "step call")
        with backend.device.allocate(4096, "keys") as keys, backend.device.allocate(4096, "others") as others:
            for buffer in (keys, others):
                buffer.zero(stream)
                for i in range(2):
                    context.bind(f"past_k.{i}", buffer.pointer + 1024 * i)
                context.enqueue(stream, "step call")  # the arguments of the first are copied, so they may change now
            stream.synchronize()
            one = np.zeros((BN, BK), np.float32)
            one[:8, :8] = 1
            for buffer in (keys, others):
                got = driver.span(buffer.pointer, 4096, "keys").view(np.float32).reshape(4, BN, BK)
                np.testing.assert_array_equal(got, [one, one, one * 0, one * 0])
            out = driver.span(scratch.pointer + 256, 1024, "scratch").view(np.float32).reshape(BN, BK)
            np.testing.assert_array_equal(out, one)
            with pytest.raises(EngineError, match=r"address 0x[0-9a-f]+ of 'past_k.0'; expected a multiple of 16"):
                context.bind("past_k.0", keys.pointer + 8)
            with pytest.raises(EngineError, match=r"no tensor 'past_q.0'"):
                context.bind("past_q.0", keys.pointer)
    assert [waits for _, waits in driver.launches] == ([False] + 5 * [dependent]) * 2
    assert {name for name, _ in driver.launches} == {"pack.panels"}
    backend.close()


def test_weights_that_do_not_fit(load: Load, driver: Driver) -> None:
    driver.memory_bytes = 50_000
    with pytest.raises(
        OutOfMemory,
        match=r"its weights need 0 MB of GPU memory and 0 MB more while they are loaded, of 0 MB on Stand-in GPU 0 MB "
        "are free: not even one image fits",
    ):
        load()
    assert not driver.device


def test_a_kernel_that_reads_out_of_bounds_is_caught(load: Load, driver: Driver, bundle: Bundle) -> None:
    plan = hand_made(bundle)
    name = next(name for name, weight in plan.weights.items() if weight.pack)
    pack = plan.weights[name].pack
    assert pack is not None
    plan.weights[name] = replace(plan.weights[name], pack=replace(pack, grid=(pack.grid[0] * 512, *pack.grid[1:])))
    with pytest.raises(ViolationError, match=r"pack.panels writes number \d+ of packed, which has \d+"):
        load(plan)


def test_what_the_driver_refuses_names_the_kernel(load: Load, driver: Driver, bundle: Bundle) -> None:
    with pytest.raises(
        CudaError,
        match=r"cuModuleLoadData of pack.panels \(panels-\w+.cubin\) failed: "
        "CUDA_ERROR_NO_BINARY_FOR_GPU.*the engine holds no kernels for this GPU",
    ):
        load(target="SM86")
    assert not driver.device


def test_a_bar_is_shown_while_weights_are_loaded(
    driver: Driver, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = argparse.Namespace(
        bundle=bundle.path, device="cuda", threads=None, capture="none", quiet=False, **AUTO._asdict()
    )
    load_pipeline(arguments, bundle, selftest=False).close()
    assert "weights:" in capsys.readouterr().err
    arguments.quiet = True
    load_pipeline(arguments, bundle, selftest=False).close()
    assert capsys.readouterr().err == ""
    with pytest.raises(RequestError, match="on_load 'yes': expected a function"):
        Pipeline.load(bundle.path, "cuda", on_load="yes")  # type: ignore[arg-type]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline.load(bundle.path, "cuda", on_load=stop)
    assert not driver.device
    assert not driver.pinned


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_what_decodes_clips_beside_it_has_the_precision_that_was_asked_for(
    driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))
    opens: list[Any] = []
    monkeypatch.setattr(kernels_backend, "load", lambda *given: opens.append(given[-1]) or "a backend")
    monkeypatch.setattr(decoding, "open_decoder", lambda files, threads=None, precision="fp32": precision)
    for asked, proven, wanted in (
        ("auto", "fp32", "fp32"), ("auto", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("fp32", "bf16", "fp32"),
    ):  # fmt: skip
        calibrated = replace(bundle, calibration=Calibration("kept", 0, (), "fp32", "fp32", "", {}, proven))
        assert choose.choose(calibrated, device, decoder_precision=asked)[0] == "a backend"
        assert opens.pop()(None) == wanted


def test_a_weights_file_that_is_written_while_it_is_read(load: Load, driver: Driver, bundle: Bundle) -> None:
    def write(done: int, total: int) -> None:
        with (bundle.path / "weights.data").open("r+b") as file:
            file.write(b"changed!")

    with pytest.raises(BundleError, match=r"weights.data: was overwritten after it was loaded; load the bundle again"):
        load(on_load=write)
    assert not driver.device


def test_a_weights_file_that_was_replaced_before(load: Load, driver: Driver, bundle: Bundle) -> None:
    """The manifest is of the old one; a file that is cut is noticed where its size was not looked at."""
    file = bundle.path / "weights.data"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(BundleError, match=r"weights.data: was replaced after its manifest was read"):
        load()
    bundle.checked.clear()
    with pytest.raises(BundleError, match=r"weights.data: ends before byte \d+; copy the bundle again"):
        kernels_backend.load(bundle, Engine.open(next(bundle.path.glob("engines/*"))), cuda.Device.open(0))
    assert not driver.device
    assert not driver.pinned
