"""Shapes of tiles that are tried on a card: the sets, the numbers that all of them compute on, and the whole part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import bare, kernels
from double.driver import Driver
from double.twins import Twins

from par_export.card import ahead as card_ahead
from par_export.card import shapes as card_shapes
from par_export.card.again import read_runs
from par_export.card.ahead import build_ahead
from par_export.card.findings import Findings
from par_export.card.options import CardOptions
from par_export.card.plan import Model
from par_export.card.prepare import tokens_family
from par_export.card.report import report
from par_export.card.session import GRACE_S
from par_export.card.shape_table import ALL, calls_table, shapes_table
from par_export.card.shapes import ALLOWED, MOST_OFF, difference, kind_of
from par_export.card.subject import EngineSubject
from par_export.card.table import markdown
from par_export.errors import BuildError
from par_export.kernels.plan import Planner, plan
from par_export.kernels.shape_sets import AGAIN, ShapeSet, contents_of, is_of, sets_of, tiles_of
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_shapes import SOURCES
from par_export.kernels.tune import ORDER
from par_export.quantised import Codes
from par_model.config import PARConfig
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.backends.program import Kernel
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.machine import describe
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli

CONFIG = PARConfig(dim=128, n_layers=2, n_heads=4, vocab_size=64, n_classes=10, grid=(1, 4, 4))
SMALL = Model("PAR-S", CONFIG, None, group_sizes=(1, 4), codes=(Codes("int8", 32),))


def build(path: Path, images: Sequence[int], *, planner: Planner = plan, target: str = "SM80") -> None:
    """The engine that ``planner`` plans, with stand-in cubins."""
    planned = planner(contents_of(path), images, TARGETS[target])
    kernels.write_engine(Bundle.open(path), planned, "fp16", "fp16", target)


@pytest.fixture(
    scope="module", params=[None, *(pytest.param(codes, marks=pytest.mark.slow) for codes in SMALL.codes)], ids=str
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of n = 4, with numbers and with codes."""
    return tokens_family(SMALL, request.param, tmp_path_factory.mktemp("family"))[4]


def computed(driver: Driver, path: Path, images: Sequence[int], into: Path) -> dict[int, np.ndarray]:
    """The logits of the engine in ``path`` by batch, computed on the stand-in."""
    driver.fill = 0
    driver.capability = (8, 0)
    (folder,) = (path / ENGINES).iterdir()
    bare.register(driver, folder)
    twins = driver.twin = Twins(driver)
    out = {}
    with closing(EngineSubject(path, "x", "cuda:0", filled=False)) as subject:
        twins.parts = kernels.Parts(subject.pipeline.backend)  # type: ignore[arg-type]
        for batch in images:
            assert subject.logits(batch, into) == 0
            out[batch] = np.load(into)
    return out


def far(one: np.ndarray, other: np.ndarray) -> float:
    """In parts of what is allowed."""
    relative, most = difference(other, one)
    assert relative is not None
    return max(relative / ALLOWED, most / MOST_OFF)


def test_all_sets_compute_the_same_numbers_in_whatever_order_they_pack(
    driver: Driver, family: Path, tmp_path: Path
) -> None:
    """And the numbers are worth a comparison: they depend on the tokens, the keys and every matrix."""
    sets = sets_of(contents_of(family), (1, 2), TARGETS["SM80"])
    engines, found = family / ENGINES, []
    for one in sets[:3:2]:
        build(family, (1, 2), planner=one)
        found.append(computed(driver, family, (1, 2), tmp_path / "x.npy"))
        (folder,) = engines.iterdir()
        folder.rename(tmp_path / str(one.number))
    first = found[0]
    assert first[1].shape == (4, 64)
    assert first[2].shape == (8, 64)
    assert np.isfinite(first[2]).all()
    assert first[1].std(0).mean() > 0.1 * first[1].std()  # no two positions are alike
    for other in found[1:]:
        for batch in (1, 2):
            assert 0 < far(first[batch], other[batch]) < 0.1


def forgets_a_block(planned: Any) -> None:
    """The last product of a layer reads all but the last rows of its matrix."""
    for name, spec in list(planned.specs.items()):
        constants = dict(spec.constants)
        if spec.source == "step.residual" and constants["K"] == CONFIG.ffn_dim:
            changed = constants | {"K": CONFIG.ffn_dim - 32}
            planned.specs[name] = replace(spec, constants=tuple(changed.items()))


def another_scale(planned: Any) -> None:
    """Attention weighs keys differently."""
    for name, spec in list(planned.specs.items()):
        if spec.source == "step.qkv":
            constants = dict(spec.constants)
            planned.specs[name] = replace(
                spec, constants=tuple((constants | {"SCALE": constants["SCALE"] * 1.5}).items())
            )


@pytest.mark.parametrize("bug", [forgets_a_block, pytest.param(another_scale, marks=pytest.mark.slow)])
def test_a_wrong_kernel_computes_others(driver: Driver, tmp_path: Path, bug: Callable[[Any], None]) -> None:
    path = tokens_family(SMALL, None, tmp_path / "family")[4]
    found = []
    for change in (lambda _: None, bug):
        planned = plan(contents_of(path), (1,), TARGETS["SM80"])
        change(planned)
        folder = kernels.write_engine(Bundle.open(path), planned, "fp16", "fp16", "SM80")
        found.append(computed(driver, path, (1,), tmp_path / "x.npy")[1])
        folder.rename(tmp_path / f"done-{len(found)}")
    assert far(*found) > 1.2


def test_a_race_is_seen_as_other_bits(driver: Driver, tmp_path: Path) -> None:
    path = tokens_family(replace(SMALL, codes=()), None, tmp_path / "family")[4]
    build(path, (1,))
    driver.fill, driver.capability = 0, (8, 0)
    bare.register(driver, next((path / ENGINES).iterdir()))
    twins, heads = Twins(driver), list[int]()

    def computes(kernel: Kernel, grid: Any, arguments: list[Any], at: int) -> None:
        twins(kernel, grid, arguments, at)
        if kernel.source == "step.head":
            place = [name for name, _ in kernel.parameters].index("logits")
            logits = driver.span(int(arguments[place]), 4 * 64, "the test").view(np.float32)
            logits[5] += np.float32(1e-3) * len(heads)
            heads.append(1)

    driver.twin = type("Racing", (), {"__call__": staticmethod(computes), "done": staticmethod(twins.done)})()
    with closing(EngineSubject(path, "x", "cuda:0", filled=False)) as subject:
        twins.parts = kernels.Parts(subject.pipeline.backend)  # type: ignore[arg-type]
        assert subject.logits(1, tmp_path / "x.npy") == 2


# -- the part ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> gpu.Gpu:
    """In this process and in those that it starts, which compute."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "children"))
    monkeypatch.setenv("PARVIS_TEST_STAND_IN", "1")
    monkeypatch.setenv("PARVIS_TEST_COMPUTES", "1")
    return gpu.describe(0)


LEAST = replace(SMALL, config=replace(CONFIG, dim=64, n_layers=1, n_heads=2), codes=())


def of_shapes(
    tmp_path: Path, stand_in: gpu.Gpu, make: Callable[..., None], **changes: Any
) -> tuple[Findings, list[dict[str, Any]]]:
    """What a report of this part finds, read back from its file, and the lines of shapes."""
    limits = {"copy_bytes": 2**20, "launches": 9, "side": 64}
    settings: dict[str, Any] = {"minutes": 3.0, "models": [LEAST], "images": (1,), "limits": limits, "build": make}
    options = CardOptions(parts=("shapes",), torch="cpu", work=tmp_path, **(settings | changes))
    journal = Journal(None, lambda _: None)
    assert report(options, stand_in, lambda _: None, journal) == []
    file = tmp_path / "rows.jsonl"
    lines = journal.finish([]).others
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (found,) = read_runs([file])
    return found, found.of("shape")


@pytest.mark.slow
def test_the_whole_part_times_what_is_right_and_says_what_is_not(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_shapes, "sets_of", lambda *given: [*sets_of(*given)[:4], ShapeSet(4, {}, AGAIN)])

    def make(path: Path, images: Sequence[int], *, planner: Any) -> None:
        if planner.number == 2:
            raise BuildError("no registers")
        if planner.number == 3:
            planner = partial(_with, another_scale, planner)
        build(path, images, planner=planner)

    found, lines = of_shapes(tmp_path, stand_in, make)
    assert {line["set"] for line in lines} == {0, 1, 4}
    kinds = ["qkv", "attention", "wo", "gates", "w2", "head"]
    all_of_them = ["step.embed", *kinds, "draw.resident", "call"]
    for number, words, kernels_of in ((0, "as built", all_of_them), (1, "", [*kinds, "call"]), (4, AGAIN, all_of_them)):
        own = [line for line in lines if line["set"] == number]
        assert [line["kernel"] for line in own] == kernels_of
        assert {line["words"] for line in own} == {words}
    assert {line["label"] for line in lines} == {"PAR-S n=4"}
    for line in lines:
        assert (line["images"], line["compiler"], len(line["samples_us"])) == (1, "stand-in 1", 1)
        assert (line["kernel"] in kinds) == bool(line["tile"]) == (line.get("model_us", 0) > 0)
        assert (line["kernel"] in ("qkv", "wo", "gates", "w2", "head")) == (line["bytes"] > 0)
        assert (line["kernel"] in ("step.embed", "qkv", "gates", "head")) == (line.get("squares", 0) > 0)
    checks = {line["name"]: line["passed"] for line in found.of("check")}
    same = "shapes of PAR-S n=4: set {}, the same bits in every call (batch 1)"
    near = "shapes of PAR-S n=4: set {}, the logits of set 0 (batch 1)"
    assert checks == {same.format(i): True for i in (0, 1, 3, 4)} | {near.format(i): i != 3 for i in (0, 1, 3, 4)}
    assert found.left_out == ["shapes of PAR-S n=4: set 2: no registers"]
    page = markdown([found])
    table = page.partition("### Kernels in other shapes")[2].partition("###")[0]
    assert table.count("| PAR-S n=4 |") == 7
    assert f"| PAR-S n=4 | {ALL} |" in table
    assert "| PAR-S n=4 | 1 |" in page.partition("### Kernels one after the other")[2]
    assert not list(tmp_path.glob("parvis-gpu-*"))


def _with(bug: Callable[[Any], None], planner: Planner, *given: Any) -> Any:
    planned = planner(*given)
    bug(planned)
    return planned


@pytest.mark.slow
def test_without_a_right_first_set_nothing_says_what_is_right(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(path: Path, images: Sequence[int], *, planner: Any) -> None:
        raise BuildError(f"not set {planner.number}")

    found, lines = of_shapes(tmp_path, stand_in, make)
    assert lines == []
    assert found.left_out == ["shapes of PAR-S n=4: set 0: not set 0"]
    monkeypatch.delenv("PARVIS_TEST_COMPUTES")
    found, lines = of_shapes(tmp_path, stand_in, build)
    assert lines == []
    said = {line["name"]: line["text"] for line in found.of("check") if not line["passed"]}
    assert said == {"shapes of PAR-S n=4: set 0, the logits of set 0 (batch 1)": "not all are numbers, or all are zero"}
    found, _ = of_shapes(tmp_path, stand_in, make, minutes=0.02)
    assert found.left_out[-1] == "shapes of PAR-S n=4: time"


@pytest.mark.slow
def test_a_set_that_never_ends_costs_its_own_time_alone(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_shapes, "SET_S", 0.5 - GRACE_S)
    found, lines = of_shapes(tmp_path, stand_in, build)
    assert lines == []
    (said,) = found.left_out
    assert said == "shapes of PAR-S n=4: set 0: PAR-S n=4 was still at work when the time had passed"
    assert found.minutes < 1.5  # of three that the part has


def shape(kernel: str, number: int, images: int, us: float, **tile: int) -> dict[str, Any]:
    return {
        "kind": "shape",
        "label": "PAR-L n=4",
        "images": images,
        "set": number,
        "kernel": kernel,
        "tile": {"BN": 64, "BK": 128, "split": 1, "warps": 4, "stages": 6, "ahead": 0, "bits": 0, "group": 0} | tile,
        "words": "" if number else "as built",
        "compiler": "triton 3.9.0",
        "registers": 100,
        "shared": 1024,
        "count": 24 if kernel != "head" else 1,
        "bytes": 8 * 2**20,
        "samples_us": [us, 9 * us, us / 2],
    }


def test_the_fastest_shape_is_shown_beside_the_chosen_one() -> None:
    limit = {"kind": "limit", "name": "copy bandwidth", "unit": "GB/s", "value": 3000.0, "spread": 0.0, "how": "x"}
    lines = [
        shape("gates", 0, 1, 5.0),
        shape("gates", 1, 1, 4.0, BN=32, held=2),
        shape("gates", 2, 1, 4.5, BN=16),
        shape("gates", 0, 8, 6.0),
        shape("gates", 1, 8, 8.0, BN=32, held=2),
        shape("head", 0, 1, 50.0),
        shape("head", 1, 1, 60.0, BN=32),
        shape("head", 0, 8, 80.0),
        shape("head", 1, 8, 70.0, BN=32),
    ]
    found = Findings(describe(None), "c", "d", lines=[limit, *lines])
    table = shapes_table([found]).splitlines()
    bound = 100 * 8 * 2**20 / 3000e3 / 4.0
    of = f"{bound:.0f} %"
    tile = "BN {}, BK 128, split 1, warps 4, stages 6"
    assert table[2] == f"| PAR-L n=4 | gates | 3 | 5 | 4 | 1.25 x | 0.75 x | {of} | {tile.format(32)}, held 2 |"
    assert table[3] == f"| PAR-L n=4 | head | 2 | 50 | 50 | 1.00 x | 1.00 x | 6 % | {tile.format(64)} |"
    assert table[4] == f"| PAR-L n=4 | {ALL} |  | 170 | 146 | 1.16 x | {224 / 272:.2f} x |  |  |"
    assert len(table) == 5
    later = Findings(describe(None), "c", "e", lines=[shape("gates", 0, 1, 7.0)])
    assert shapes_table([found, later]).splitlines()[2].startswith("| PAR-L n=4 | gates | 1 | 7 | 7 | 1.00 x |  |  |")


def test_a_whole_call_is_shown_beside_its_kernels_and_other_ways_to_launch_them() -> None:
    lines = [
        shape("gates", 0, 1, 5.0),
        shape("head", 0, 1, 50.0),
        shape("call", 0, 1, 150.0) | {"count": 1},
        shape("call", 1, 1, 140.0) | {"count": 1},
        shape("call", 9, 1, 225.0) | {"count": 1, "words": "no kernel is launched early"},
        shape("gates", 9, 1, 1.0) | {"words": "no kernel is launched early"},
        shape("call", 0, 8, 300.0) | {"count": 1},
    ]
    found = [Findings(describe(None), "c", "d", lines=lines)]
    assert calls_table(found).splitlines() == [
        "| model | batch | us of a call | of its kernels alone | in the best set of other shapes | no kernel is "
        "launched early |",
        "| --- | --- | --- | --- | --- | --- |",
        "| PAR-L n=4 | 1 | 150 | 170 | 140 (0.93 x) | 225 (1.50 x) |",
        "| PAR-L n=4 | 8 | 300 | 0 |  |  |",
    ]
    assert "| gates | 1 | 5 | 5 |" in shapes_table(found)


def test_a_column_that_is_wrong_alone_is_seen() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 16384)).astype(np.float32)
    wrong = logits.copy()
    wrong[:, 7] *= -1
    relative, most = difference(wrong, logits)
    assert relative is not None
    assert relative < ALLOWED
    assert most > MOST_OFF
    assert difference(logits, logits) == (0.0, 0.0)
    wrong[0, 0] = np.nan
    assert difference(wrong, logits)[0] is None
    assert difference(np.zeros_like(logits), np.zeros_like(logits))[0] is None


@pytest.mark.slow
def test_a_set_that_is_not_ready_beside_others_is_left_out(stand_in: gpu.Gpu, tmp_path: Path) -> None:
    """It would be compiled by another Triton than the sets that it is compared with."""
    ready = tmp_path / "ready"
    (ready / "shapes").mkdir(parents=True)
    found, _ = of_shapes(tmp_path, stand_in, build, engines=ready)
    (said,) = found.left_out
    assert said == (
        f"shapes of PAR-S n=4: set 0: no engine of it is in {ready / 'shapes' / '0'}: --build-for, --parts shapes"
    )


@pytest.mark.slow
def test_of_ready_sets_for_more_batches_some_are_timed(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set for fewer batches may have other shapes than that of its number that was built."""
    planned: list[Sequence[int]] = []

    def two(contents: Any, images: Sequence[int], card: Any) -> list[ShapeSet]:
        planned.append(tuple(images))
        return sets_of(contents, images, card)[:2]

    def make(path: Path, images: Sequence[int], *, planner: Any) -> None:
        build(path, images, planner=planner)
        shutil.copytree(path / ENGINES, tmp_path / "ready" / "shapes" / str(planner.number) / path.name / ENGINES)

    def refuse(*_: object, **__: object) -> None:
        raise BuildError("it is ready")

    monkeypatch.setattr(card_shapes, "sets_of", two)
    _, both = of_shapes(tmp_path, stand_in, make, images=(1, 2))
    found, second = of_shapes(tmp_path, stand_in, refuse, engines=tmp_path / "ready", images=(2,))
    assert planned == [(1, 2), (1, 2)]
    assert found.left_out == []
    assert {line["images"] for line in second} == {2}

    def facts(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(line["set"], line["kernel"], line["tile"], line["count"]) for line in lines if line["images"] == 2]

    assert facts(second) == facts(both)
    assert {line["set"] for line in second} == {0, 1}
    found, _ = of_shapes(tmp_path, stand_in, refuse, engines=tmp_path / "ready", images=(1, 4))
    assert planned[-1] == (1, 4)
    assert "set 0: no engine of it is in " in found.left_out[0]


def test_kinds_of_kernels() -> None:
    assert kind_of("step.qkv", "layers.{i}.wqkv") == "qkv"
    assert kind_of("step.residual", "layers.3.w2") == "w2"
    assert kind_of("step.head", "output") == "head"
    assert kind_of("attention.attend", "") == "attention"
    assert kind_of("step.embed", "") is None
    assert kind_of("pack.panels", "layers.{i}.cos") is None


# -- built ahead ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_their_engines_are_built_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_ahead, "SETS", 2)
    monkeypatch.setattr(card_ahead, "CHANGES", {})
    folder, said = tmp_path / "ready", list[str]()
    wanted: dict[str, Any] = {"checked": (), "samples": (), "codes": (), "models": [LEAST], "parts": ("shapes",)}
    assert build_ahead(folder, "SM90", say=said.append, **wanted) == []
    assert [line.partition(":")[0] for line in said] == ["PAR-S-n4 shapes/0", "PAR-S-n4 shapes/1"]
    path = tokens_family(LEAST, None, tmp_path / "again")[4]
    sets = sets_of(contents_of(path), (1, 8), TARGETS["SM90"])
    for number in range(2):
        (ready,) = (folder / "shapes" / str(number) / "PAR-S-n4" / ENGINES).iterdir()
        engine = Engine.open(ready, Bundle.open(path))
        assert (engine.target, engine.images) == ("SM90", (1, 8))
        assert engine.kernels is not None
        tiles = tiles_of(contents_of(path), (1, 8), TARGETS["SM90"], sets[number], engine.kernels.kernels)
        for kind in ORDER:
            assert any(is_of(getattr(tiles[1], kind), k) for k in engine.kernels.kernels.values() if _of(kind, k)), kind
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("engine.json")}
    assert build_ahead(folder, "SM90", say=said.append, **wanted) == []
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("engine.json")} == before
    (folder / "sources").write_text("0" * 64)
    build_ahead(folder, "SM90", say=said.append, **(wanted | {"models": []}))
    assert not list(folder.rglob("engine.json"))  # of other sources


def _of(kind: str, kernel: Kernel) -> bool:
    return kernel.source == SOURCES[kind]


def test_parts_without_engines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--suite", "gpu", "--build-for", "SM90", "--engines", "x", "--parts"]
    assert cli.main([*command, "baselines", "shapes"]) == 2
    assert "--parts baselines: it needs no engine of our kernels; --build-for builds those of the parts kernels, " in (
        capsys.readouterr().err
    )
