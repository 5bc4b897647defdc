"""An engine of kernels with random weights as a subject: what is filled, what is timed, on the stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from double import bare, kernels
from double.driver import Driver

from par_export.card.subject import EngineSubject, as_type, gpu_backend, kernels_of, programs
from par_export.quantised import Codes
from par_export.random_bundle import NoTensors, write_family
from par_model.config import PARConfig, VQConfig
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError
from par_runtime.pipeline import Pipeline

CONFIG = PARConfig(dim=200, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8))  # heads of 100
VQ = VQConfig(codebook_size=256, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)


@pytest.fixture
def subject(driver: Driver, tmp_path: Path) -> Iterator[EngineSubject]:
    """Nothing is computed: launches are only checked."""
    yield from subject_of(driver, tmp_path, CONFIG)


@pytest.fixture(params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def coded(driver: Driver, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EngineSubject]:
    """The same with quantised weights, and a width that has whole groups."""
    yield from subject_of(driver, tmp_path, replace(CONFIG, dim=160), Codes(request.param, 32))


def subject_of(driver: Driver, folder: Path, config: PARConfig, codes: Codes | None = None) -> Iterator[EngineSubject]:
    path = write_family(config, [4], folder, name="x", precision="fp16", vq=VQ, tensors=NoTensors, codes=codes)[4]
    planned = kernels.planned(Bundle.open(path), (1, 2), "SM90", "fp16", "fp16")
    bare.register(driver, kernels.write_engine(Bundle.open(path), planned, "fp16", "fp16", "SM90"))
    driver.capability = (9, 0)
    driver.fill = 0  # kernels compute nothing here: what they leave must be tokens all the same
    made = EngineSubject(path, "x", "cuda:0")
    yield made
    made.close()
    assert not driver.device
    assert not driver.pinned


def test_matrices_are_random_and_everything_else_is_the_bundles(subject: EngineSubject, driver: Driver) -> None:
    addresses = programs(subject.pipeline)["step"].shared.addresses
    bundle = subject.pipeline.bundle
    data = np.fromfile(bundle.path / "weights.data", np.uint8)
    seen = set()
    for name, weight in kernels_of(subject.pipeline).weights.items():
        content = driver.span(addresses[name], weight.bytes, name)
        if name == "embed" or name.endswith((".wqkv", ".wo", ".w13", ".w2")) or name in ("output", "decoder.codebook"):
            numbers = content.view(np.float16).astype(np.float64)
            assert numbers.std() == pytest.approx(0.02, rel=0.1), name
            assert abs(numbers.mean()) < 0.002, name
            seen.add(numbers[:8].tobytes())
        elif weight.stored is not None and weight.pack is None:
            at = weight.stored
            assert content.tobytes() == data[at.offset : at.offset + at.length].tobytes(), name
    assert len(seen) == 1 + 4 * CONFIG.n_layers + 1 + 1  # no two begin alike


def test_codes_are_random_and_their_scales_as_large_as_an_untrained_models(
    coded: EngineSubject, driver: Driver
) -> None:
    """So that the numbers are as those of the subject in fp16, though the file holds zeros."""
    addresses = programs(coded.pipeline)["step"].shared.addresses
    bundle, weights = coded.pipeline.bundle, kernels_of(coded.pipeline).weights
    names = [name for name, at in bundle.weights.items() if at.dtype == bundle.quantised]
    assert len(names) == 4 * CONFIG.n_layers + 1
    stored = np.fromfile(bundle.path / "weights.data", np.uint8)
    seen = set()
    for name in names:
        at, scales_at = bundle.weights[name], bundle.weights[name + ".scale"]
        assert not stored[at.offset : at.offset + at.length].any()
        (scale,) = set(stored[scales_at.offset : scales_at.offset + scales_at.length].view(np.float16).tolist())
        held = driver.span(addresses[name], weights[name].bytes, name)
        codes = (
            held.astype(int) - 128 if bundle.quantised == "int8" else np.stack([held & 15, held >> 4]).astype(int) - 8
        )
        assert (codes * scale).std() == pytest.approx(0.02, rel=0.2), name
        seen.add(held[:8].tobytes())
        # Left to the kernel that packs them, which computes nothing here.
        assert not driver.span(addresses[name + ".scale"], weights[name + ".scale"].bytes, name).any()
    assert len(seen) == len(names)


def test_of_codes_a_kernel_reads_fewer_bytes(coded: EngineSubject) -> None:
    timed = {line["of"]: line for line in coded.kernels(1) if line["source"] == "step.gates"}
    bits = {"int8": 8, "int4": 4}[str(coded.pipeline.bundle.quantised)]
    least = 160 * 2 * replace(CONFIG, dim=160).ffn_dim * (bits + 0.5) / 8  # and 16 bits for each 32 of them
    assert least <= timed["layers.{i}.w13"]["bytes"] < 1.5 * least
    assert coded.info.weight_bytes == pytest.approx(coded.pipeline.bundle.weight_bytes)
    assert bits / 8 < coded.info.weight_bytes < bits / 8 + 0.2


def test_every_kernel_of_a_call_is_timed_with_the_weights_that_it_reads(subject: EngineSubject) -> None:
    for images in (1, 2):
        timed = subject.kernels(images)
        step = {line["source"]: line for line in timed if line["program"] == "step" and line["count"] > 1}
        by_source: dict[str, int] = {}
        for line in timed:
            if line["program"] == "step":
                by_source[line["source"]] = by_source.get(line["source"], 0) + line["count"]
        assert by_source == {
            "step.embed": 1,
            "step.qkv": 2,
            "attention.attend": 2,
            "step.residual": 4,
            "step.gates": 2,
            "step.head": 1,
            "draw.resident": 1,
        }
        least = CONFIG.dim * 2 * CONFIG.ffn_dim * 2
        assert least <= step["step.gates"]["bytes"] < 1.4 * least  # the padding of tiles too
        (embed,) = (line for line in timed if line["source"] == "step.embed")
        assert embed["bytes"] == 0  # it reads a few rows of its table
        assert step["attention.attend"]["bytes"] == 0
        of = {line["of"] for line in timed if line["source"] == "step.residual"}
        assert of == {"layers.{i}.wo", "layers.{i}.w2"}
        launches = len(list(programs(subject.pipeline)["decoder"].program.launches(images)))
        assert sum(line["count"] for line in timed if line["program"] == "decoder") == launches
        assert all(len(line["samples_us"]) == 5 and min(line["samples_us"]) > 0 for line in timed)


def test_the_bound_counts_heads_without_their_padding(subject: EngineSubject) -> None:
    assert subject.info.architecture.head_dim == 100
    assert gpu_backend(subject.pipeline).engine.precision == subject.info.computes == "fp16"


def test_bf16_is_written_as_kernels_read_it() -> None:
    numbers = np.array([1.0, -2.5, 0.02], np.float32)
    bits = as_type(numbers, "*bf16")
    assert bits.dtype == np.uint16
    assert (bits.astype(np.uint32) << 16).view(np.float32)[:2].tolist() == [1.0, -2.5]
    assert as_type(numbers, "*fp32").dtype == np.float32


def test_another_backend_is_refused(tiny: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(shutil.copytree(tiny, tmp_path / "t"), "cpu-ort")
    with pytest.raises(EngineError, match=r"runs on onnxruntime-cpu .*, not on an engine of kernels"):
        gpu_backend(pipeline)
