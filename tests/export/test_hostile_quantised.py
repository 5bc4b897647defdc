"""Quantised bundles as an enemy made them, sealed again: one clear line, or a bundle that works.

``test_hostile_bundles.py`` and ``test_hostile_files.py`` have what any bundle can have wrong, ``test_heldout.py`` has
held-out images.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from hostile import Change, put

from par_export.kernels.contents import Contents
from par_export.quantised import quantised_with, write_bundle
from par_export.restored import read_weights
from par_runtime.bundle import WEIGHTS, Bundle, seal
from par_runtime.cli import inspect
from par_runtime.errors import BundleError
from par_runtime.pipeline import Pipeline
from par_runtime.quantised import scale_fault
from par_runtime.system import sha256

KEPT = "layers.0.w2"  #: the matrix that stays in fp16
QUANTISED = "layers.1.wo"  #: int8 [64,64], in groups of 32
SCALES = QUANTISED + ".scale"
OTHER = "layers.0.wqkv"


@pytest.fixture(scope="module")
def source(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in int8 that the C step runs, with a self-test."""
    bundle, out = Bundle.open(bundles["fp16"]), tmp_path_factory.mktemp("hostile") / "int8"
    quantise = quantised_with("int8", 32, "float16", (KEPT,))
    report = {"measures": {"top1": 0.99, "kl": 2e-4, "layer": None}, "budget": {"top1": 0.98}, "images": 16}
    calibration = {"weights": "int8", "group": 32, "report": report}
    return write_bundle(bundle, out, quantise, calibration, say=lambda _: None)


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Path:
    """A copy of it whose files are links, but for the manifest."""
    path = tmp_path / "bundle"
    path.mkdir()
    for file in source.iterdir():
        if file.name != "manifest.json":
            os.link(file, path / file.name)
    (path / "manifest.json").write_text((source / "manifest.json").read_text())
    return path


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


def entry(name: str, *changes: Any) -> Change:
    """Other dtype, shape, offset and length of a tensor; None: as it was."""

    def change(manifest: Any) -> None:
        at = manifest["weights"][name]
        at[: len(changes)] = [old if new is None else new for old, new in zip(at, changes, strict=False)]

    return change


def extra(name: str, shape: list[int]) -> Change:
    """One more tensor of fp16, at a place that no other takes."""

    def change(manifest: dict[str, Any]) -> None:
        tables = (manifest["weights"], manifest["tokenizer"]["weights"])
        taken = sorted((at[2], at[2] + at[3]) for table in tables for at in table.values())
        gaps = (end for (_, end), (start, _) in itertools.pairwise(taken) if start - end >= 2 * math.prod(shape))
        manifest["weights"][name] = ["float16", shape, next(gaps), 2 * math.prod(shape)]

    return change


CASES: list[tuple[Change, str]] = [
    (lambda m: m["weights"].pop(SCALES), f"no entry '{SCALES}' in weights"),
    (
        entry(SCALES, None, [1, 64], None, 128),
        rf"weights.{SCALES}\[1\] is \[1, 64\]; expected \[2, 64\], which follows",
    ),
    (
        entry(SCALES, None, [64, 2]),
        rf"weights.{SCALES}\[1\] is \[64, 2\]; expected \[2, 64\], which follows from {QUANTISED}",
    ),
    (entry(SCALES, None, [128]), r"is \[128\]; expected \[2, 64\]"),
    (entry(SCALES, "int8", [2, 64], None, 128), rf"weights.{SCALES}\[0\] is 'int8'; expected one of float32, float16"),
    (entry(SCALES, "float32"), rf"weights.{SCALES}\[3\] is 256; expected 512 bytes, as a float32 of shape"),
    (entry(SCALES, None, None, 10**12), rf"weights.{SCALES}\[2\] is 1000000000000; expected 256 bytes inside"),
    (
        lambda m: entry(SCALES, None, None, m["weights"][OTHER + ".scale"][2])(m),
        f"weights .* and .* overlap in {WEIGHTS}",
    ),
    (entry(QUANTISED, None, None, None, 4095), rf"weights.{QUANTISED}\[3\] is 4095; expected 4096 bytes, as a int8"),
    (
        entry(QUANTISED, None, [64, 32], None, 2048),
        rf"weights.{QUANTISED}\[1\] is \[64, 32\]; expected \[64, 64\], which",
    ),
    (entry(QUANTISED, "int4"), rf"weights.{QUANTISED}\[3\] is 4096; expected 2048 bytes, as a int4"),
    (
        entry(QUANTISED, "int4", None, None, 2048),
        rf"{QUANTISED}\[0\] is 'int4'; expected a dtype of .* or 'int8', as the",
    ),
    (entry("layers.0.ffn_norm", "int8", None, None, 64), r"layers.0.ffn_norm\[0\] is 'int8'; expected one of float32"),
    (entry("embed", "int8"), r"weights.embed\[3\] is \d+; expected \d+ bytes, as a int8"),
    (extra(KEPT + ".scale", [1]), f"weights has '{KEPT}.scale', and '{KEPT}' is not quantised"),
    (extra("norm.scale", [4, 4]), "weights has 'norm.scale', and 'norm' is not quantised"),
    (put("weights", {}), "calibration.weights is 'int8'; expected 'kept', as the manifest has no table of weights"),
    (
        put("calibration/group", 64),
        r"\[1\] is \[\d+, \d+\]; expected \[\d+, \d+\], which follows from .* and the group",
    ),
    (put("calibration/group", 128), r"is \[64, .*\]; expected rows that are a multiple of the group, 128"),
    (put("calibration/group", 48), "calibration.group is 48; expected one of 32, 64, 128"),
    (put("calibration/group", 0), "calibration.group is 0; expected one of 32, 64, 128"),
    (put("calibration/group", -32), "calibration.group is -32; expected a whole number from 0"),
    (put("calibration/group", True), "calibration.group is True; expected a whole number"),
    (put("calibration/weights", "int4"), r"\[0\] is 'int8'; expected a dtype of .* or 'int4', as the calibration says"),
    (put("calibration/weights", "kept"), "calibration.group is 32; expected 0"),
    (put("calibration/weights", "int2"), "calibration.weights is 'int2'; expected one of kept, int8, int4"),
    (
        lambda m: m["calibration"].update(weights="kept", group=0),
        r"\[0\] is 'int8'; expected a dtype of float32, float16, bfloat16, as the calibration says",
    ),
    (
        lambda m: m.pop("calibration"),
        r"'int8'; expected a dtype of float32, float16, bfloat16, as there is no calibration",
    ),
    (put("calibration", None), r"'int8'; expected a dtype of float32, float16, bfloat16, as there is no calibration"),
    (put("calibration", []), r"no entry 'weights' in calibration|calibration is \[\]; expected an object"),
    (
        put("calibration/kept", [KEPT, "layers.9.w2"]),
        rf"kept is \[.*'layers.9.w2'\]; expected \['{KEPT}'\], the matrices",
    ),
    (put("calibration/kept", [KEPT, QUANTISED]), rf"calibration.kept is \[.*\]; expected \['{KEPT}'\], the matrices"),
    (put("calibration/kept", [KEPT, KEPT]), rf"calibration.kept is \[.*\]; expected \['{KEPT}'\], the matrices"),
    (put("calibration/kept", []), rf"calibration.kept is \[\]; expected \['{KEPT}'\], the matrices"),
    (put("calibration/kept", [KEPT, "embed"]), r"calibration.kept is .*; expected"),
    (put("calibration/kept", [7]), r"calibration.kept\[0\] is 7; expected a text"),
    (put("calibration/arithmetic", "fp8"), "calibration.arithmetic is 'fp8'; expected one of fp32, bf16, int8"),
    (put("calibration/cache", "int8"), "calibration.cache is 'int8'; expected one of fp32, bf16"),
    (
        put("calibration/decoder_precision", "fp16"),
        "calibration.decoder_precision is 'fp16'; expected one of fp32, bf16",
    ),
    (put("calibration/decoder_precision", None), "calibration.decoder_precision is None; expected one of fp32, bf16"),
    (lambda m: m["calibration"].pop("cache"), "no entry 'cache' in calibration"),
    (put("calibration/source", "x"), "calibration.source is 'x'; expected 64 hexadecimal digits"),
    (put("calibration/report", []), r"calibration.report is \[\]; expected an object"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=range(len(CASES)))
def test_what_a_changed_manifest_is_told(bundle: Path, change: Change, message: str) -> None:
    hostile.check_refused(bundle, change, message, verify="none")


def rewrite(bundle: Path, name: str, number: int, value: float) -> None:
    """Another number in the tensor ``name`` of fp16, in a weights file of its own."""
    manifest, file = manifest_of(bundle), bundle / WEIGHTS
    content = bytearray(file.read_bytes())
    offset, length = manifest["weights"][name][2:]
    np.frombuffer(content, np.float16, length // 2, offset)[number] = value
    file.unlink()
    file.write_bytes(content)
    manifest["files"][WEIGHTS]["sha256"] = sha256(file)
    hostile.write(bundle, seal(manifest))


@pytest.mark.parametrize("value", [0.0, -0.0, -0.5, math.nan, math.inf, -math.inf])
def test_scales_that_are_not_positive_are_refused_by_whoever_reads_them(bundle: Path, value: float) -> None:
    """Also without self-test, where nothing else would see it, and by builders."""
    rewrite(bundle, SCALES, 127, value)
    opened = Bundle.open(bundle)
    readers: list[Callable[[], object]] = [
        lambda: Pipeline.load(bundle, "cpu", selftest=False),
        lambda: Pipeline.load(bundle, "cpu-ort", selftest=False, verify="none"),
        lambda: read_weights(opened),
        lambda: Contents(opened, "fp16", "fp16").step,
    ]
    for reader in readers:
        with pytest.raises(BundleError) as caught:
            reader()
        assert str(caught.value) == (
            f"{bundle / WEIGHTS}: {SCALES} holds the scale {value:g} (number 127 of 128); expected positive, finite "
            "numbers; copy the bundle again, or calibrate again"
        )


@pytest.mark.parametrize(("dtype", "good"), [("float16", 2.0**-24), ("float32", 1e-45), ("bfloat16", 1e-40)])
def test_the_least_and_the_largest_scale_are_none_of_them(dtype: str, good: float) -> None:
    for value, fault in ((good, False), (60000.0, False), (math.inf, True), (-good, True), (0.0, True)):
        wide = np.array([1.0, value], np.float32)
        stored = (wide.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else wide.astype(dtype)
        assert (scale_fault(stored, dtype) is not None) == fault, value


def test_scales_of_another_matrix_fail_the_self_test(bundle: Path) -> None:
    """What no check of entries can see; ONNX Runtime takes the places from its graph, and so makes the right image."""
    manifest = manifest_of(bundle)
    one, other = (manifest["weights"][f"layers.{i}.w13.scale"] for i in (0, 1))
    one[2], other[2] = other[2], one[2]
    hostile.write(bundle, seal(manifest))
    with pytest.raises(BundleError, match="self-test failed on native-cpu") as caught:
        Pipeline.load(bundle, "cpu")
    hostile.check_line(caught.value)


@pytest.mark.parametrize("count", [80, pytest.param(240, marks=pytest.mark.slow)])
def test_any_change_of_what_is_quantised_is_one_line_or_a_bundle_that_works(count: int, bundle: Path) -> None:
    manifest = manifest_of(bundle)
    names = (QUANTISED, SCALES, KEPT, "output.scale")
    part = {"calibration": manifest["calibration"], "weights": {name: manifest["weights"][name] for name in names}}
    refused = 0
    for number, (what, changed) in enumerate(hostile.mutations(part, count, seed=1)):
        weights = changed["weights"]
        if isinstance(weights, dict):
            weights = {name: at for name, at in manifest["weights"].items() if name not in names} | weights
        hostile.write(bundle, seal(manifest | {"calibration": changed["calibration"], "weights": weights}))
        try:
            opened = Bundle.open(bundle, verify="none")
            assert all(line.isprintable() for line in inspect.lines(inspect.describe(opened))), what
            if number % 4 == 0:
                Pipeline.load(bundle, verify="none").close()
        except BundleError as error:
            hostile.check_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    assert count / 2 < refused < 0.92 * count
