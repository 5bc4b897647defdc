"""Really compiled engines of the tiny bundle: what they launch, and what their kernels take of a processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import build_kernels
from par_export.cli import build as build_cli
from par_export.kernels.targets import TARGETS
from par_runtime.backends.engines import Engine, list_engines
from par_runtime.backends.program import CONSTANTS, Kernels
from par_runtime.bundle import Bundle


@pytest.fixture(scope="module", params=[pytest.param("SM80", marks=pytest.mark.slow), "SM90"])
def engine(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    if request.param == "SM90":
        bundle = request.getfixturevalue("kernels_bundle")
    else:
        bundle = tmp_path_factory.mktemp("kernels") / "tiny"
        build_kernels(tiny, bundle.parent, request.param)
    (engine,), bad = list_engines(Bundle.open(bundle), verify="full")
    assert not bad
    assert engine.target == request.param
    return engine


def kernels_of(engine: Engine) -> Kernels:
    assert engine.kernels is not None
    return engine.kernels


def test_a_step_is_five_kernels_a_layer_and_three_around(engine: Engine) -> None:
    step = kernels_of(engine).programs["step"]
    assert (len(step.profiles[1].layer), step.layers) == (5, 2)
    assert len(step.profiles[1].before) + len(step.profiles[1].after) == 3
    assert engine.report["programs"]["step"]["profiles"][0]["total"] == 13
    sources = [kernels_of(engine).kernels[launch.kernel].source for launch, _ in step.launches(1)]
    assert sources == [
        "step.embed",
        *2 * ["step.qkv", "attention.attend", "step.residual", "step.gates", "step.residual"],
        "step.head",
        "draw.resident",
    ]


def test_no_kernel_keeps_registers_in_memory_or_is_over_a_limit(engine: Engine) -> None:
    card = TARGETS[engine.target]
    for name, kernel in kernels_of(engine).kernels.items():
        assert kernel.spills == 0, name
        assert 0 < kernel.registers <= 255, name
        assert kernel.registers * 32 * kernel.warps <= card.registers, name
        assert kernel.shared <= card.shared_block, name
        assert kernel.trailing == 2, name


def test_only_from_sm90_on_kernels_wait_by_themselves(engine: Engine) -> None:
    launched = {launch.kernel for program in kernels_of(engine).programs.values() for launch, _ in program.launches(1)}
    waiting = {
        kernels_of(engine).kernels[name].dependent for name in launched if "DEPENDENT" in constants(engine, name)
    }
    assert waiting == {engine.target == "SM90"}


def constants(engine: Engine, name: str) -> set[str]:
    return set(kernels_of(engine).kernels[name].constants)


def test_an_engine_has_no_weights_and_all_of_the_bundle_s_are_taken(engine: Engine) -> None:
    kernels = kernels_of(engine)
    assert kernels.constants_bytes == (engine.path / CONSTANTS).stat().st_size < 16384
    taken = {(weight.stored.offset, weight.stored.length) for weight in kernels.weights.values() if weight.stored}
    bundle = Bundle.open(engine.bundle_path)
    norms = [name for name in bundle.weights if name.endswith("norm")]  # these are in the constants
    step = {(s.offset, s.length) for name, s in bundle.weights.items() if name not in norms}
    assert step <= taken
    assert len(taken) > len(step)  # the decoder's


def test_the_command_prints_launches_and_json_of_a_cached_engine(
    kernels_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache-dir", str(kernels_bundle.parent / "cache"), "--out", str(tmp_path)]
    arguments = [str(kernels_bundle), "--engine", "kernels", "--target", "sm90", "--images", "1", *where]
    assert build_cli.main([*arguments, "--kernels", "--list", str(tmp_path / "list.json")]) == 0
    out = capsys.readouterr().out
    assert "taken from the engine cache" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["step", "1", "13", "5", "3", "8"] in [line[:6] for line in lines]
    assert sum("each layer" in line for line in out.splitlines()) == 5
    assert any(line[:1] == ["0"] and line[1].startswith("embed-") for line in lines)
    (folder,) = json.loads((tmp_path / "list.json").read_text())
    assert Engine.open(Path(folder), Bundle.open(kernels_bundle)).target == "SM90"
    assert build_cli.main([*arguments, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["engine"] == folder
    assert entry["runtime"] == "kernels"
    assert entry["report"]["compile_seconds"] > 0
