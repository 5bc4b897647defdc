"""What happens to any engine of kernels: its folder, the cache, the precisions, kernels that cannot run."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trial_plan import panels, trial_plan

from par_export.errors import BuildError
from par_export.kernels.build import build_kernels
from par_export.kernels.contents import Contents
from par_export.kernels.plan import plan
from par_export.kernels.request import KernelsRequest
from par_export.kernels.spec import Planned, Refused, Spec
from par_export.kernels.targets import TARGETS, Target
from par_export.quantised import quantised_with, write_bundle
from par_runtime.backends.engines import Engine
from par_runtime.backends.program import CONSTANTS
from par_runtime.bundle import Bundle, seal
from par_runtime.cost.architecture import Architecture
from par_runtime.cost.work import largest_read_bytes
from par_runtime.errors import BundleError

pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")


def build(folder: Path, *targets: str, lines: list[str] | None = None, **fields: object) -> list[Path]:
    request = KernelsRequest(folder, targets or ("SM80",), images=(1, 2), **({"workers": 1} | fields))  # type: ignore[arg-type]
    return build_kernels(request, (lambda _: None) if lines is None else lines.append, planner=trial_plan)


def change_manifest(folder: Path, **entries: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | entries
    del manifest["hash"]
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))


def test_a_bundle_becomes_an_engine_for_each_target(tiny_copy: Path) -> None:
    lines: list[str] = []
    steps: list[tuple[str, float]] = []
    request = KernelsRequest(tiny_copy, ("SM80", "SM90"), images=(1, 2))
    folders = build_kernels(request, lines.append, lambda *step: steps.append(step), trial_plan)
    assert folders == [tiny_copy / "engines" / f"kernels-1-{target}-fp16" for target in ("sm80", "sm90")]
    bundle = Bundle.open(tiny_copy)
    for folder, capability in zip(folders, ((8, 0), (9, 0)), strict=True):
        engine = Engine.open(folder, bundle, verify="full")
        assert engine.capability == capability
        assert engine.images == (1, 2)
        assert engine.precision == "fp16"
        assert engine.kernels is not None
        assert engine.kernels.compiler.startswith("triton 3.")
        assert engine.kernels.decoder_precision == "fp16"  # since the bundle has decoder_fp16.onnx
        names = {kernel.file for kernel in engine.kernels.kernels.values()}
        assert {file.name for file in folder.iterdir()} == {*names, CONSTANTS, "engine.json"}
        for name, kernel in engine.kernels.kernels.items():
            assert kernel.file == f"{name}.cubin"
            assert (folder / kernel.file).read_bytes().startswith(b"\x7fELF")
            assert kernel.source == "pack.panels"
            assert kernel.constants["BK"] == 32
            assert kernel.spills == 0
        assert engine.rebuild == (
            f"parvis build {tiny_copy} --engine kernels --target SM{capability[0]}0 --precision fp16 --max-images 2"
        )
        assert "kernels" in engine.report
    assert steps[-1] == ("SM90: kernel 2 of 2", 1.0)
    assert any(line.startswith("tiny: step for SM80, 2 kernels by triton 3.") for line in lines)
    assert any(line.split()[:6] == ["step", "1", "3", "1", "1", "2"] for line in lines)
    assert not [path for path in folders[0].parent.iterdir() if path not in folders]


def test_constants_lie_where_their_weights_say(tiny_copy: Path) -> None:
    (folder,) = build(tiny_copy)
    bundle = Bundle.open(tiny_copy)
    kernels = Engine.open(folder, bundle).kernels
    assert kernels is not None
    data = (folder / CONSTANTS).read_bytes()
    contents = Contents(bundle, "fp16", "fp16")
    for i in range(2):
        weight = kernels.weights[f"gain.{i}"]
        assert weight.offset == 256 * i
        gain = np.frombuffer(data, np.float32, weight.bytes // 4, weight.offset)
        assert np.array_equal(gain, contents.read(bundle.weights[f"layers.{i}.ffn_norm"]))


def test_the_second_build_comes_from_the_cache_and_equals_the_first(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    (first,) = build(tiny_copy, lines=lines)
    files = {file.name: file.read_bytes() for file in first.iterdir()}
    assert not any("taken from" in line for line in lines)
    shutil.rmtree(first)
    lines.clear()
    (again,) = build(tiny_copy, lines=lines)
    assert "taken from the engine cache" in lines[0]
    assert {file.name: file.read_bytes() for file in again.iterdir()} == files
    damaged = next(again.glob("*.cubin"))
    with damaged.open("r+b") as file:  # in place: it is a hard link to the cache's
        file.write(b"damaged")
    lines.clear()
    build(tiny_copy, lines=lines)
    assert not any("taken from" in line for line in lines)
    assert damaged.read_bytes() == files[damaged.name]  # byte for byte: nothing is timed, nothing is named by its place


@pytest.mark.slow
def test_a_build_of_another_precision_is_another_one(tiny_copy: Path) -> None:
    for other in ({}, {"precision": "bf16"}, {"decoder_precision": "fp32"}):
        lines: list[str] = []
        build(tiny_copy, lines=lines, **other)
        assert not any("taken from" in line for line in lines), other


def test_a_failed_build_leaves_nothing_and_a_good_engine_stays(tiny_copy: Path) -> None:
    def failing(contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()) -> Planned:
        planned = trial_plan(contents, images, target)
        planned.add(replace(panels(contents.step["output"], "fp16"), source="pack.nothing"))
        return planned

    request = KernelsRequest(tiny_copy, ("SM80",), images=(1,), workers=1)
    with pytest.raises(BuildError, match=r"kernel pack\.nothing for SM80"):
        build_kernels(request, lambda _: None, planner=failing)
    assert not (tiny_copy / "engines").exists()
    (good,) = build(tiny_copy)
    before = (good / "engine.json").read_bytes()
    with pytest.raises(BuildError, match=r"kernel pack\.nothing for SM80"):
        build_kernels(request, lambda _: None, planner=failing)
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert (good / "engine.json").read_bytes() == before


@pytest.mark.slow
def test_a_kernel_that_needs_too_much_is_refused_by_name(tiny_copy: Path) -> None:
    def spilling(contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()) -> Planned:
        planned = trial_plan(contents, images, target)
        planned.add(replace(panels(contents.step["output"], "fp16", BN=256, BK=128), warps=1))
        return planned

    with pytest.raises(BuildError, match=r"^kernel pack.panels for SM80 .* keeps .* bytes .*; build with --engine t"):
        build_kernels(KernelsRequest(tiny_copy, ("SM80",), workers=1), lambda _: None, planner=spilling)


@pytest.mark.slow
def test_a_product_that_finds_no_registers_is_planned_in_another_shape(tiny_copy: Path) -> None:
    """The first choice spills: it is refused, and what is planned in its place is built."""
    asked: list[Refused] = []

    def gates(BN: int, BK: int, BM: int) -> Spec:  # noqa: N803
        constants = {"D_MODEL": 256, "STRIDE": 256, "TILES": 4, "POWER": 256, "F": 256, "F_STRIDE": 256}
        constants |= {
            "BN": BN,
            "BK": BK,
            "BM": BM,
            "PARTS": 1,
            "PANELS": 0,
            "DEEP": 0,
            "AHEAD": 0,
            "HELD": 0,
            "EARLY": False,
            "DEPENDENT": False,
        }
        constants |= {"BITS": 0, "GROUP": 0, "SUB": 0, "scales": 0}
        kinds = {"h": "*fp16", "ss": "*fp32", "weights": "*fp16", "gains": "*fp32", "g": "*fp16", "M": "i32"}
        return Spec("step.gates", tuple(constants.items()), tuple(kinds.items()), 1, 2)

    def planner(contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()) -> Planned:
        asked.append(refused)
        planned = trial_plan(contents, images, target)
        planned.add(gates(64, 64, 8) if refused else gates(128, 16, 64))
        return planned

    build_kernels(KernelsRequest(tiny_copy, ("SM80",), images=(1,), workers=1), lambda _: None, planner=planner)
    assert asked == [frozenset(), frozenset({gates(128, 16, 64)})]


def test_every_kind_of_product_is_planned_without_the_shapes_that_were_refused(tiny: Path) -> None:
    contents = Contents(Bundle.open(tiny), "fp16", "fp16")
    first = plan(contents, (1, 2), TARGETS["SM90"])
    tried = {"step.qkv", "step.gates", "step.head", "attention.attend"}  # 16 columns of residual have one shape
    tried |= {"decoder.conv", "decoder_attention.qkv", "decoder_attention.attention"}
    for source in tried:
        refused = frozenset(spec for spec in first.specs.values() if spec.source == source)
        again = plan(contents, (1, 2), TARGETS["SM90"], refused)
        assert not refused & set(again.specs.values()), source
        assert {spec.source for spec in again.specs.values()} == {spec.source for spec in first.specs.values()}, source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp32"}, r"^precision fp32: kernels compute in fp16 or bf16; give one of these$"),
        (
            {"precision": "fp8"},
            r"^precision fp8: kernels compute in fp16 or bf16 \(GPUs of SM80 and SM86 have no .* fp8",
        ),
        ({"precision": "int8"}, r"^precision int8: .* \(no report has proven int8 .*: parvis calibrate\); give one"),
        ({"decoder_precision": "bf16"}, r"^decoder precision bf16: .* compute in fp16 or fp32; give one of these$"),
        ({"targets": ("SM90", "SM75")}, "^target 'SM75': engines of kernels are built for SM80"),
        ({"targets": ("local",)}, "^target local needs a GPU: .*; name the GPU .* --target SM90 for an H100"),
        ({"images": (2, 1)}, r"^images \(2, 1\); expected ascending numbers from 1$"),
        ({"images": tuple(range(200, 0, -1))}, r"^images \(200, 199, .*\.\.\.; expected ascending numbers from 1$"),
        ({"images": (1, 4097)}, r"^images \(1, 4097\); an engine has at most 4096 images$"),
        ({"images": tuple(range(1, 66))}, "^65 batch sizes; an engine has at most 64: name fewer, a batch in between"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(
    tiny_copy: Path, fields: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        build_kernels(replace(KernelsRequest(tiny_copy, ("SM80",)), **fields), lambda _: None, planner=trial_plan)
    assert not (tiny_copy / "engines").exists()


def test_a_bundle_in_fp32_needs_a_precision(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"in fp32, kernels compute in fp16 or bf16; give --precision fp16 or --prec"):
        build(bundles["fp32"], out=tmp_path, use_cache=False)
    (folder,) = build(bundles["fp32"], out=tmp_path, use_cache=False, precision="bf16")
    assert folder.name == "kernels-1-sm80-bf16"


@pytest.mark.slow
def test_quantised_weights_stay_codes(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Built for real: no kernel spills, products take codes, and the report says how little a call reads."""
    source = Bundle.open(bundles["n16"])
    quantise = quantised_with("int8", 32, "float32", ("layers.0.w2",))
    how = {"weights": "int8", "group": 32}
    path = write_bundle(source, tmp_path / "int8", quantise, how, say=lambda _: None, gate=False)
    lines: list[str] = []
    request = KernelsRequest(path, ("SM80",), images=(1,), precision="fp16", out=tmp_path / "out", use_cache=False)
    (folder,) = build_kernels(request, lines.append)
    engine, bundle = Engine.open(folder, Bundle.open(path), verify="full"), Bundle.open(path)
    assert folder.name == "kernels-1-sm80-fp16"
    assert engine.kernels is not None
    products = [kernel for kernel in engine.kernels.kernels.values() if "BITS" in kernel.constants]
    assert {kernel.constants["BITS"] for kernel in products} == {0, 8}
    assert all(kernel.spills == 0 for kernel in products)
    assert engine.report["weight_bytes"] == pytest.approx(bundle.bytes_read(2, stored_scales=True))
    assert engine.report["weights_bytes"] < 1.2 * engine.report["bundle_weights_bytes"]
    assert any(
        f"a call reads {bundle.bytes_read(2, stored_scales=True):.2f} bytes for each parameter" in line
        for line in lines
    )
    after = engine.report["programs"]["step"]["profiles"][0]["read_bytes"]
    assert after < 0.75 * largest_read_bytes(Architecture.of(source), 1, True, 2, 2)


def test_numbers_beyond_fp16_are_refused(tiny_copy: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    manifest = json.loads((tiny_copy / "manifest.json").read_text())
    change_manifest(tiny_copy, parity=manifest["parity"] | {"largest": {"gate": [10.0, 90000.0]}})
    with pytest.raises(BuildError, match=r"^precision fp16: the gate w1 x reaches 9e\+04 .*; give --precision bf16$"):
        build(tiny_copy)
    build(tiny_copy, precision="bf16")
    copied = tmp_path / "fp32"
    shutil.copytree(bundles["fp32"], copied)
    stored = Bundle.open(copied).weights["layers.1.w2"]
    with (copied / "weights.data").open("r+b") as file:
        file.seek(stored.offset + stored.length - 4)  # the last number
        file.write(struct.pack("<f", -70000.0))
    with pytest.raises(BundleError, match="its content was changed"):
        build(copied, precision="fp16", use_cache=False)
    with pytest.raises(
        BuildError, match=r"weight 'layers.1.w2' reaches 7e\+04, beyond float16; give --precision bf16$"
    ):
        Contents(Bundle.open(copied, verify="none"), "fp16", "fp32").check_range()
    Contents(Bundle.open(copied, verify="none"), "bf16", "fp32").check_range()
