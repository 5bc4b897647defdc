"""Engines of kernels that cannot be run are refused: damaged or foreign lists and files, and tokens that are no codes.

Their kernels are real ones, in programs that compute nothing of use: what is tested is what is noticed of them.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from double import bare, kernels
from double.driver import Driver
from double.hand_made import hand_made

from par_export.cli import build as build_cli
from par_runtime.backends.engines import ENGINE_JSON, Engine
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.errors import BundleError, EngineError
from par_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny, tmp_path / "bundle"))


def unknown_tensor(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["2"]["layer"][0][2][1][0] = "past_v.{i}x"


def layer_too_many(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["layers"] = 3


def beyond_scratch(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0][2][1][1] = 4096


def crooked(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0][2][1][1] = 8


def beyond_weights(e: dict[str, Any]) -> None:
    stored = e["kernels"]["weights"]["table"]["stored"]
    stored["offset"] = 2**30


def beyond_constants(e: dict[str, Any]) -> None:
    e["kernels"]["weights"]["ones"]["offset"] = 256


def phase_missing(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["phases"].remove("group")


def profile_missing(e: dict[str, Any]) -> None:
    del e["kernels"]["programs"]["step"]["profiles"]["2"]


def two_of_a_name(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["scratch"]["ids"] = [0, 16]


def plans_too(e: dict[str, Any]) -> None:
    e["plans"] = {"step": {"file": "x", "bytes": 1, "sha256": "0" * 64, "query": 4, "phases": []}}


def no_kernels(e: dict[str, Any]) -> None:
    del e["kernels"]


def pack_of_a_constant(e: dict[str, Any]) -> None:
    e["kernels"]["weights"]["ones"]["pack"] = e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0]


def pack_from_elsewhere(e: dict[str, Any]) -> None:
    weight = next(w for w in e["kernels"]["weights"].values() if w["pack"])
    weight["pack"][2][0][0] = "table"


REFUSED = [
    (unknown_tensor, r"programs.step.profiles.2: panels-\w+ takes 'past_v.0x', which is no tensor, weight or buffer"),
    (layer_too_many, r"takes 'past_k.2', which is no tensor"),
    (beyond_scratch, r"takes byte 4096 of 'out.a'; expected a multiple of 16 below 4096"),
    (crooked, r"takes byte 8 of 'out.a'; expected a multiple of 16"),
    (beyond_weights, r"kernels.weights.table is \d+ bytes at 1073741824 of weights.data, which has 159568"),
    (beyond_constants, r"kernels.weights.ones is 128 bytes at 256 of constants.data, which has 128"),
    (phase_missing, r"no program serves the phase 'group'; expected one with a query of 4 positions"),
    (profile_missing, r"kernels.programs.step.profiles are \[1\]; expected \[1, 2\]"),
    (two_of_a_name, r"a tensor, a weight, scratch and state have different names"),
    (plans_too, r"plans is .*; expected none, and no decoder, in an engine of kernels"),
    (no_kernels, r"runtime is 'kernels'; expected kernels where there is an entry kernels"),
    (pack_of_a_constant, r"kernels.weights.ones.pack is .*; expected null"),
    (pack_from_elsewhere, r"takes 'table', which is no tensor, weight or buffer"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[f.__name__ for f, _ in REFUSED])
def test_lists_that_cannot_be_run_are_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = kernels.write_engine(bundle, hand_made(bundle))
    Engine.open(folder, bundle)
    kernels.edited(folder, change)
    with pytest.raises(EngineError, match=message) as error:
        Engine.open(folder, bundle)
    assert f"parvis build {bundle.path}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kernels-1-sm80-fp16", "--engine kernels --target SM80 --precision fp16"),
        ("tensorrt_rtx-1.7.1.116-sm89-bf16-per-phase", "--target SM89 --precision bf16 --engines per-phase"),
        ("tensorrt-10.15.0-sm90-fp16-tune-norm-after", "--target local --precision fp16"),
        ("other", "--target local"),
    ],
)
def test_the_command_that_builds_an_unreadable_engine_again(
    tiny: Path, tmp_path: Path, name: str, options: str
) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "my 'first' bundle"))
    (path / "engines" / name).mkdir(parents=True)
    (path / "engines" / name / ENGINE_JSON).write_text("{}")
    with pytest.raises(EngineError) as error:
        Engine.open(path / "engines" / name, Bundle.open(path))
    command = shlex.split(str(error.value).partition("build it again with: ")[2])
    assert command == ["parvis", "build", str(path), *options.split()]
    build_cli.parser().parse_args(command[2:])  # it has all that the command needs


@pytest.mark.parametrize("name", ["constants.data", "cubin"])
@pytest.mark.parametrize("verify", ["auto", "none"])
def test_damaged_files_are_refused_whatever_is_checked(driver: Driver, bundle: Bundle, name: str, verify: Any) -> None:
    folder = kernels.write_engine(bundle, hand_made(bundle))
    bare.register(driver, folder)
    file = next(f for f in folder.iterdir() if f.name.endswith(name))
    file.write_bytes(b"!" + file.read_bytes()[1:])
    with pytest.raises(
        EngineError,
        match=rf"{file.name}: its content was changed.*; rebuild with: parvis build .* "
        "--engine kernels --target SM80 --precision fp32 --max-images 2",
    ):
        Pipeline.load(bundle.path, "cuda", verify=verify, selftest=False)
    assert not driver.device
    assert not driver.modules


def test_an_engine_whose_tokens_are_no_codes_is_refused(
    driver: Driver, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))  # it writes no tokens
    failed = r"self-test failed on kernels 1 .* gives token -\d+ at position 0, at export it .* \(--no-selftest\) loads"
    no_code = r"kernels 1 .* gives token -\d+ at position 0; expected 0\.\.63: it com"
    with pytest.raises(BundleError, match=failed):
        Pipeline.load(bundle.path, "cuda")
    with Pipeline.load(bundle.path, "cuda", selftest=False) as pipeline:
        for how in ({}, {"preview_every": 1, "on_preview": lambda *_: None}):
            with pytest.raises(EngineError, match=no_code):
                pipeline.generate(0, seed=1, **how)
    command = ["generate", str(bundle.path), "--label", "0", "--device", "cuda", "--out", str(tmp_path / "x.png")]
    for options, words in (([], failed), (["--no-selftest"], no_code)):
        assert cli.main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert re.match(f"parvis: error: .*{words}", error), error
        assert error.count("\n") == 1
        assert ("self-test" in error) == (not options)
    assert not (tmp_path / "x.png").exists()
