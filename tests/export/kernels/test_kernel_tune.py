"""``parvis tune --engine kernels`` on the stand-in GPU: shapes are timed kind by kind, the fastest are kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from double import bare
from double.driver import Driver
from double.kernels import stand_in_of
from double.twins import Twins

from par_export.cli import tune as tune_cli
from par_export.engines import timing
from par_export.kernels import tile_shapes, tiles, tune
from par_export.kernels.build import Build
from par_export.kernels.compiler import Compiled
from par_export.kernels.request import KernelsRequest
from par_export.kernels.spec import Spec
from par_export.kernels.targets import TARGETS, Target
from par_export.quantised import quantised_with, write_bundle
from par_model.config import named
from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINES, Engine, list_engines, why_unfit
from par_runtime.backends.program import VERSION, Kernel
from par_runtime.bundle import Bundle
from par_runtime.pipeline import Pipeline

pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")


class Names:
    """In place of the compiler: cubins are names, by which the stand-in knows what to run. One shape spills."""

    version, tools, peak_bytes = "stand-in 1", (), 0
    spills: Callable[[Spec], bool] = staticmethod(lambda spec: spec.source == "step.gates" and spec.warps == 8)

    def __init__(self, workers: int | None = None) -> None:
        pass

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compile(self, specs: Iterable[Spec], target: Target, done: object = None) -> dict[str, Compiled]:
        return {
            spec.name: stand_in_of(
                spec,
                f"{spec.name} for {target.name}",
                shared=0,
                spills=8 if type(self).spills(spec) else 0,
            )
            for spec in specs
        }


class Clock:
    """A GPU that takes time by the number of its launches: 1 ms each, and more for kernels that are ``slow``.

    What is ``broken`` computes nothing.
    """

    def __init__(self, driver: Driver) -> None:
        self.now = 0.0
        self.slow: Callable[[Kernel], bool] = lambda kernel: False
        self.broken: Callable[[Kernel], bool] = lambda kernel: False
        self._twins = Twins(driver)

    def __call__(self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float], at: int) -> None:
        self.now += 5e-3 if self.slow(kernel) else 1e-3
        if not self.broken(kernel):
            self._twins(kernel, grid, arguments, at)

    def done(self) -> None:
        self._twins.done()


@pytest.fixture
def clock(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The stand-in GPU, an SM90 with a simulated clock, on which one kind is tuned."""
    driver.capability = (9, 0)

    class Registering(Build):
        def write(self, folder: Path, *arguments: object, **named: object) -> None:
            super().write(folder, *arguments, **named)  # type: ignore[arg-type]
            bare.register(driver, folder)

    clock = Clock(driver)
    driver.twin = clock
    monkeypatch.setattr(tune, "Build", Registering)
    monkeypatch.setattr(tune, "Compiler", Names)
    monkeypatch.setattr(tune, "ORDER", ("gates",))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "bundle")


@pytest.mark.slow
def test_a_shape_that_other_batches_of_the_engine_cannot_have_is_not_kept(
    bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two warps are the fastest for one image, and have too few registers for two; the next best is kept."""
    two = lambda spec: spec.source == "step.gates" and spec.warps == 2 and dict(spec.constants)["BM"] > 8  # noqa: E731
    monkeypatch.setattr(Names, "spills", staticmethod(two))
    clock.slow = lambda k: k.source == "step.gates" and k.warps != 2
    lines: list[str] = []
    request = KernelsRequest(bundle, ("local",), images=(1, 2))
    folder = tune.tune_kernels(request, images=1, repeats=1, rounds=1, most=9, say=lines.append)
    kept = Engine.open(folder, Bundle.open(bundle), verify="full").tuned["tiles"]["gates"]
    assert kept["warps"] != 2
    said = [line for line in lines if "not kept, for the other batches: kernel step.gates" in line]
    assert any("warps 2," in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("many", [True, False])
def test_eight_images_keep_the_kind_of_block_that_was_the_fastest(bundle: Path, clock: Clock, many: bool) -> None:
    """Of many rows or of few; a single image keeps the panels, and its own kind."""
    clock.slow = lambda k: k.source == "step.gates" and (k.constants["PANELS"] > 0) != many
    request = KernelsRequest(bundle, ("local",), images=(1, 8))
    folder = tune.tune_kernels(request, images=8, repeats=1, rounds=1, most=4, say=lambda _: None)
    engine = Engine.open(folder, Bundle.open(bundle), verify="full")
    assert ("columns" in engine.tuned["tiles"]["gates"]) == many
    assert engine.kernels is not None
    gates = [kernel.constants for kernel in engine.kernels.kernels.values() if kernel.source == "step.gates"]
    assert {constants["PANELS"] > 0 for constants in gates} == ({False, True} if many else {False})
    assert len({constants["BK"] for constants in gates}) == 1


@pytest.mark.slow
def test_the_fastest_shapes_are_kept_for_this_card_and_loaded(bundle: Path, clock: Clock, driver: Driver) -> None:
    config = tune.Contents(Bundle.open(bundle), "fp16", "fp16").config
    shapes = tiles.products(config, "gates", (1, 2), TARGETS["SM90"])
    first = next(shape[1] for shape in shapes if shape[1].warps != 8)  # with 8 its registers do not suffice
    clock.slow = lambda k: k.source == "step.gates" and k.constants["BN"] == first.BN
    lines: list[str] = []
    request = KernelsRequest(bundle, ("local",), images=(1, 2))
    folder = tune.tune_kernels(request, images=1, repeats=1, rounds=2, most=5, say=lines.append)
    assert folder == bundle / ENGINES / "kernels-1-sm90-fp16-stand-in-gpu"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    engine = Engine.open(folder, Bundle.open(bundle), verify="full")
    assert engine.device == engine.tuned["device"] == "Stand-in GPU"
    assert engine.images == (1, 2)
    kept = engine.tuned["tiles"]["gates"]
    assert kept["BN"] != first.BN
    assert engine.kernels is not None
    gates = [kernel for kernel in engine.kernels.kernels.values() if kernel.source == "step.gates"]
    assert {(kernel.constants["BN"], kernel.constants["BK"]) for kernel in gates} == {(kept["BN"], kept["BK"])}
    rows = engine.tuned["rows"]
    assert all(len(row["samples_ms"]) == 2 for row in rows)
    assert {row["kind"] for row in rows} == {"gates", ""}
    assert {row["capture"] for row in rows if row["kind"] == ""} == {"image", "call", "none"}
    measured = {row["tile"]["BN"]: row["ms_per_image"] for row in rows if row["kind"] == "gates"}
    assert measured[first.BN] - measured[kept["BN"]] == pytest.approx(19 * 2 * 4)  # launches of an image, slower
    assert any(line.startswith("gates BN") and "warps 8" in line and "keeps 8 bytes" in line for line in lines)
    assert sum("<- chosen" in line for line in lines) == 1
    with Pipeline.load(bundle, selftest=False) as pipeline:
        assert pipeline.backend.engine.path == folder  # type: ignore[attr-defined]
    assert why_unfit(engine, "kernels", VERSION, (9, 0), "Stand-in GPU") is None
    assert "was tuned on Stand-in GPU, this GPU is Other" in str(why_unfit(engine, "kernels", VERSION, (9, 0), "Other"))
    assert not driver.device
    assert not driver.modules


@pytest.mark.slow
def test_a_shape_that_computes_something_else_is_left_out(
    bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "ORDER", ("attention",))
    config = tune.Contents(Bundle.open(bundle), "fp16", "fp16").config
    wrong = tune.candidates(config, "attention", (1,), TARGETS["SM90"], 2, 1)[1]
    assert isinstance(wrong, tile_shapes.AttentionTile)
    clock.broken = lambda k: (
        k.source == "attention.attend" and (k.constants["SPAN"], k.constants["HELD"]) == (wrong.span, wrong.held)
    )
    lines: list[str] = []
    request = KernelsRequest(bundle, ("local",), images=(1,))
    tune.tune_kernels(request, repeats=1, rounds=1, most=2, say=lines.append)
    (engine,), _ = list_engines(Bundle.open(bundle))
    assert sum(row["kind"] == "attention" for row in engine.tuned["rows"]) == 1
    assert any(line.startswith("left out: ") and "self-test" in line for line in lines)


@pytest.mark.slow
def test_the_command_prints_json(
    bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "ORDER", ())
    command = [str(bundle), "--engine", "kernels", "--max-images", "1", "--repeats", "1", "--rounds", "1", "--json"]
    assert tune_cli.main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["chosen"] is True
    assert Path(row["engine"]).is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "shared"], "--engines: an engine of kernels is always shared"),
        (["--precision", "fp32"], "precision fp32: kernels compute in fp16 or bf16"),
        (["--sizes", "1,2", "--images", "4"], r"images 4: the engine is built for \(1, 2\); give one of these"),
    ],
)
def test_bad_requests_are_one_line(
    bundle: Path, clock: Clock, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tune_cli.main([str(bundle), "--engine", "kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^parvis: error: {message}", error)
    assert error.count("\n") == 1
    assert not (bundle / ENGINES).exists()


def test_tuning_needs_a_gpu_that_kernels_run_on(
    bundle: Path, driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.capability = (7, 5)
    assert tune_cli.main([str(bundle), "--engine", "kernels"]) == 2
    assert "target 'SM75': engines of kernels are built for SM80" in capsys.readouterr().err
    cuda.driver.devices = 0
    assert tune_cli.main([str(bundle), "--engine", "kernels"]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: tuning needs a GPU: the driver shows no GPU")


def test_candidates_begin_with_the_model_s_choice_and_differ() -> None:
    assert set(tune.ORDER) == set(tile_shapes.SOURCES)
    for kind in tune.ORDER:
        found = tune.candidates(named("L"), kind, (1, 8), TARGETS["SM90"], 6, 1)
        assert found[0] == getattr(tiles.choose(named("L"), (1, 8), TARGETS["SM90"])[1], kind)
        assert len(set(found)) == len(found) == 6
        held = [tile.held for tile in found if isinstance(tile, tile_shapes.ProductTile)]
        holds = kind != "head"  # whose panels are so large that none finds room beside its stages
        assert [count > 0 for count in held] == [False, holds, False, False, False, False][: len(held)]
        old = tune.candidates(named("L"), kind, (1, 8), TARGETS["SM80"], 6, 1)
        assert not any(tile.held for tile in old)
        keys = [tile.held > 0 for tile in found if isinstance(tile, tile_shapes.AttentionTile)]
        assert keys == [False, True, True, False, False, False][: len(keys)]


def test_shapes_of_quantised_products_are_tried(bundles: dict[str, Path], tmp_path: Path) -> None:
    """And an engine with one of them is planned with it; matrices that stay numbers keep the model's shapes."""
    source, how, card = Bundle.open(bundles["n16"]), {"weights": "int8", "group": 32}, TARGETS["SM90"]
    quantise = quantised_with("int8", 32, "float32", ("layers.0.w2",))
    path = write_bundle(source, tmp_path / "int8", quantise, how, say=lambda _: None, gate=False)
    contents = tune.Contents(Bundle.open(path), "fp16", "fp16")
    found = tune.candidates(contents.config, "w2", (1,), card, 6, 1, tile_shapes.Storage(8, 32))
    assert len(set(found)) == len(found) >= 4
    assert all(
        isinstance(tile, tile_shapes.ProductTile) and tile.storage == tile_shapes.Storage(8, 32) for tile in found
    )
    first, other = (
        [dict(spec.constants) for spec in tune.plan(contents, (1,), card, given=given).specs.values()]
        for given in ({}, {"w2": found[1]})
    )
    shapes = [
        {tuple(c[name] for name in ("BITS", "BN", "BK", "SPLIT")) for c in each if "SPLIT" in c and c["K"] == 256}
        for each in (first, other)
    ]
    assert len(shapes[0]) == len(shapes[1]) == 2
    assert shapes[0] & shapes[1] == {shape for shape in shapes[0] if shape[0] == 0}
    assert isinstance(found[1], tile_shapes.ProductTile)
    assert (8, found[1].BN, found[1].BK, found[1].split) in shapes[1]
