"""Quantised bundles on engines of our own kernels, on the stand-in GPU: the CPU's tokens, and bugs that it must see."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from backends.test_kernels_bugs import in_launches, with_arguments
from double.driver import Driver, ViolationError
from double.fixtures import Make

from par_export.kernels.spec import Planned
from par_export.quantised import quantised_with, write_bundle
from par_runtime.backends.program import Launch, Pointer
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.dtypes import DTYPE
from par_runtime.pipeline import Pipeline
from par_runtime.quantised import SCALE

#: bundle -> dtype, group, matrices that stay as they are: none, some of each kind of layer, all but one kind
CODES = {
    "fp16": ("int8", 32, ()),
    "n16": ("int4", 64, ("layers.1.w2", "layers.0.wqkv", "output")),
    "n1": ("int4", 32, tuple(f"layers.{i}.{name}" for i in range(3) for name in ("wqkv", "wo", "w13"))),
}


@pytest.fixture(scope="module")
def quantised(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Golden bundles with quantised matrices."""
    folder, out = tmp_path_factory.mktemp("quantised"), {}
    for name, (dtype, group, kept) in CODES.items():
        bundle = Bundle.open(bundles[name])
        quantise = quantised_with(dtype, group, DTYPE[bundle.precision], kept)
        how = {"weights": dtype, "group": group}
        out[name] = write_bundle(bundle, folder / name, quantise, how, say=lambda _: None, gate=False)
    return out


def on_cpu(path: Path) -> Pipeline:
    return Pipeline.load(path, device="cpu-ort", selftest=False)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("fp16", "SM90"),
        pytest.param("n16", "SM80", marks=pytest.mark.slow),
        pytest.param("n1", "SM90", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_cpu(load_kernels: Make, quantised: dict[str, Path], name: str, target: str) -> None:
    gpu, cpu = load_kernels(quantised[name], images=(2,), target=target), on_cpu(quantised[name])
    got, wanted = (p.generate([4, 0], seed=3, guidance=1.7, top_p=0.9, decode=False) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)


@pytest.mark.slow
def test_tokens_of_many_rows_are_those_of_the_cpu_and_of_an_image_alone(
    load_kernels: Make, quantised: dict[str, Path]
) -> None:
    """128 rows and 32, in blocks of the same pieces."""
    gpu, cpu = load_kernels(quantised["n16"], images=(1, 4)), on_cpu(quantised["n16"])
    kernels = gpu.backend.engine.kernels.kernels.values()  # type: ignore[attr-defined]
    many = [dict(kernel.constants) for kernel in kernels if dict(kernel.constants).get("PANELS")]
    assert {constants["BITS"] for constants in many} == {4}
    labels = [4, 0, 2, 5]
    got, wanted = (p.generate(labels, seed=3, guidance=1.7, top_p=0.9, decode=False) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    alone = gpu.generate(labels[-1:], seed=6, guidance=1.7, top_p=0.9, decode=False)
    np.testing.assert_array_equal(alone.tokens[0], got.tokens[-1])


def test_a_call_reads_codes_and_scales(
    load_kernels: Make, quantised: dict[str, Path], bundles: dict[str, Path]
) -> None:
    """The bytes of a parameter are those of the file; on the device there are whole panels, and scales for each."""
    gpu = load_kernels(quantised["fp16"], images=(1,), precision="fp16")
    bundle = gpu.bundle
    assert gpu.backend.info.weight_bytes == pytest.approx(bundle.weight_bytes)
    assert gpu.backend.info.weight_bytes < 0.56 * Bundle.open(bundles["fp16"]).weight_bytes
    kernels = gpu.backend.engine.kernels  # type: ignore[attr-defined]
    codes = {name: at for name, at in bundle.weights.items() if at.dtype == "int8"}
    assert len(codes) == 4 * bundle.model["n_layers"] + 1
    for name, at in codes.items():
        held, scales = kernels.weights[name], kernels.weights[name + SCALE]
        assert (held.stored, scales.stored) == (at, bundle.weights[name + SCALE])
        assert at.length <= held.bytes < 1.5 * at.length
        assert held.bytes / at.length == scales.bytes / scales.stored.length


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_within_the_floors_of_verify(
    load_kernels: Make, quantised: dict[str, Path], capsys: pytest.CaptureFixture[str], driver: Driver, precision: str
) -> None:
    name = {"fp16": "fp16", "bf16": "n16"}[precision]
    gpu = load_kernels(quantised[name], images=(1, 2), precision=precision, decoder="fp16")
    gpu.close()
    driver.twin.parts = None  # type: ignore[union-attr]
    assert cli.main(["verify", str(gpu.bundle.path), "--images", "1", "--groups", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["candidate"]["backend"].startswith(f"kernels 1 {precision} from {CODES[name][0]} on")


def scales_of_another_layer(planned: Planned) -> None:
    def change(launch: Launch, names: list[str]) -> Launch:
        scales = launch.arguments[names.index("scales")]
        assert isinstance(scales, Pointer)
        return with_arguments(launch, names, scales=replace(scales, name=scales.name.replace("{i}", "0")))

    in_launches(planned, "step.gates", change)


def scales_of_the_next_group(planned: Planned) -> None:
    def change(launch: Launch, names: list[str]) -> Launch:
        scales, tile = launch.arguments[names.index("scales")], dict(planned.specs[launch.kernel].constants)["BN"]
        assert isinstance(scales, Pointer)
        return with_arguments(launch, names, scales=replace(scales, offset=2 * int(tile)))

    in_launches(planned, "step.residual", change)


def codes_packed_as_numbers_of_another_width(planned: Planned) -> None:
    for name, spec in planned.specs.items():
        if spec.source == "pack.codes":
            wider = dict(spec.constants) | {"ORDER": "plain"}
            planned.specs[name] = replace(spec, constants=tuple(wider.items()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [
        scales_of_another_layer,
        *(
            pytest.param(bug, marks=pytest.mark.slow)
            for bug in (scales_of_the_next_group, codes_packed_as_numbers_of_another_width)
        ),
    ],
)
def test_a_bug_is_seen(load_kernels: Make, quantised: dict[str, Path], bug: Callable[[Planned], None]) -> None:
    how = {"seed": 3, "guidance": 1.7, "decode": False}
    wanted = on_cpu(quantised["fp16"]).generate([4], **how).tokens
    try:
        got = load_kernels(quantised["fp16"], images=(1,), change=bug).generate([4], **how).tokens
    except ViolationError as error:  # it reads outside of the scales
        print(f"caught: {error}")
        return
    assert (got != wanted).any()
