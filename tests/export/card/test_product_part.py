"""Single products on the stand-in GPU: what is right is timed, what is not is said, and ready kernels are taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from double.driver import Driver
from double.twins import Twins
from product_part import CODED, SM90, SMALL, StandIn, here, of_products, two_layouts

from par_export.card import product_files, product_times
from par_export.card import products as card_products
from par_export.card.again import read_runs
from par_export.card.options import CardOptions
from par_export.card.plan import Model
from par_export.card.processes import Ended
from par_export.card.product_files import CUBINS, INDEX, ProductKernels
from par_export.card.products import trials_for
from par_export.card.table import markdown
from par_export.kernels import product_trials
from par_export.kernels.product_trials import KINDS, Trial
from par_export.kernels.targets import TARGETS
from par_runtime.backends.program import Kernel
from par_runtime.cli import dispatch as cli
from par_runtime.errors import RequestError


@pytest.fixture
def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """An SM90 that computes what :data:`StandIn` compiled, here; few launches, of two layouts of a product."""
    driver.capability, driver.fill = (9, 0), 0xFF
    driver.twin = Twins(driver)
    monkeypatch.setattr(StandIn, "compiled", [], raising=False)
    monkeypatch.setattr(product_files, "Compiler", StandIn)
    monkeypatch.setattr(product_trials, "products", two_layouts)
    for name, value in (("LAUNCHES", 2), ("REPEATS", 2), ("POOL_NUMBERS", 2**14)):
        monkeypatch.setattr(product_times, name, value)
    monkeypatch.setattr(card_products, "run_stage", here(driver))
    return driver


def own_trials() -> list[Trial]:
    return trials_for([SMALL], (1,), SM90)


def check_of(trial: Trial) -> str:
    return f"products: {trial}"


def test_all_products_are_checked_and_timed(card: Driver, tmp_path: Path) -> None:
    trials = own_trials()
    assert {each.tile.split for each in trials} > {1}
    assert {each.tile.parts for each in trials} > {1}
    assert {each.tile.ahead > 0 for each in trials} == {False, True}
    assert {(each.tile.held > 0, each.at_once) for each in trials} == {(False, False), (True, False), (True, True)}
    found = of_products(tmp_path)
    assert found.wrong == []
    lines = found.of("product")
    assert [line["name"] for line in lines] == [each.spec.name for each in trials] == StandIn.compiled
    for line, trial in zip(lines, trials, strict=True):
        tile = trial.tile
        shape = (tile.BN, tile.BK, tile.split, tile.warps, tile.stages, tile.parts, tile.ahead, tile.held)
        assert tuple(line[name] for name in ("BN", "BK", "split", "warps", "stages", "parts", "ahead", "held")) == shape
        assert line["at_once"] == trial.at_once
        assert (line["model"], line["kernel"], line["rows"]) == ("PAR-S", trial.product.kind, 8)
        assert line["model_us"] == trial.model_us
        assert line["chosen"] == (trial.layout == 0 and trial.planned)
        assert len(line["samples_us"]) == 2
        assert min(line["samples_us"]) > 0
        assert 0 < line["error"] < 1e-3
        assert (line["compiler"], line["registers"], line["shared"]) == ("stand-in 1", 32, 64 * 1024)
    checks = found.of("check")
    assert [line["name"] for line in checks] == [f"products: PAR-S {kind}, 8 rows" for kind in KINDS]
    for check in checks:
        errors = [line["error"] for line in lines if f"{line['kernel']}," in check["name"]]
        assert check["passed"]
        assert check["error"] == max(errors)
        assert check["text"] == f"shapes that are right: {len(errors)}"
    assert found.left_out == []
    assert found.of("note")[0]["text"].startswith(f"products: {len(trials)} kernels compiled here in ")
    # one launch to be checked, then a warm-up and two runs of two launches, of which the second may begin early
    assert len(card.launches) == len(trials) * 3
    assert sum(early for _, early in card.launches) == len(trials)
    assert "### Products, each alone" in markdown([found])


def test_products_of_many_rows_are_checked_and_timed(card: Driver, tmp_path: Path, monkeypatch: Any) -> None:
    """Two groups of 64 rows, or one of 128, whose panels lie as they do for few rows."""
    small = [replace(SMALL, group_sizes=(4,))]
    trials = trials_for(small, (16,), SM90)
    assert {each.product.rows for each in trials} == {128}
    blocks = {(each.tile.many is not None, each.block_rows) for each in trials}
    assert blocks == {(False, 64), (True, 64), (True, 128)}
    assert {each.tile.panels for each in trials} >= {1, 2, 4}
    wrong = next(each for each in trials if each.tile.many and each.product.residual)
    monkeypatch.setattr(card_products, "run_stage", here(card, {check_of(wrong): half("K")}))
    found = of_products(tmp_path, models=small, images=(16,))
    assert [line["name"] for line in found.wrong] == [check_of(wrong)]
    lines = found.of("product")
    assert [line["name"] for line in lines] == [each.spec.name for each in trials if each != wrong]
    assert max(line["error"] for line in lines) < 1e-3
    for line, trial in zip(lines, (each for each in trials if each != wrong), strict=True):
        many = trial.tile.many
        block = (many.columns, many.rows, many.depth, many.warps, many.stages) if many else (0, 0, 0)
        assert (
            tuple(line[name] for name in ("columns", "block_rows", "depth", "warps", "stages"))[: len(block)] == block
        )
        assert (line["rows"], line["parts"]) == (128, trial.tile.parts)
    # Which shape is the fastest on the stand-in is chance, so one of many rows is made it.
    fastest = next(line for line in lines if line.get("block_rows") == 128 and line["columns"] == 64)
    fastest["samples_us"] = [1e-6] * len(fastest["samples_us"])
    assert "columns 64, block_rows 128, depth" in markdown([found])


def test_products_of_codes_are_checked_and_timed(card: Driver, tmp_path: Path, monkeypatch: Any) -> None:
    trials = [each for each in trials_for([CODED], (1,), SM90) if each.product.bits]
    names = [f"PAR-C {dtype} group 32" for dtype in ("int8", "int4")]
    assert [*dict.fromkeys(each.product.model for each in trials)] == names
    assert {each.product.kind for each in trials} == set(KINDS)
    wrong = trials[1], trials[-1]
    monkeypatch.setattr(card_products, "run_stage", here(card, {check_of(each): half("D_MODEL") for each in wrong}))
    found = of_products(tmp_path, models=[CODED])
    assert [line["name"] for line in found.wrong] == [check_of(each) for each in wrong]
    lines = [line for line in found.of("product") if line["model"] in names]
    assert [line["name"] for line in lines] == [each.spec.name for each in trials if each not in wrong]
    assert max(line["error"] for line in lines) < 1e-3
    assert {line["chosen"] for line in lines} == {False, True}
    assert f"| {names[1]} | w2 | 8 |" in markdown([found])


def half(name: str) -> Callable[[Kernel], Kernel]:
    """A kernel that reads half of its matrix."""
    return lambda kernel: replace(kernel, constants=dict(kernel.constants) | {name: kernel.constants[name] // 2})


def test_a_wrong_product_is_a_failed_check_and_not_timed(card: Driver, tmp_path: Path, monkeypatch: Any) -> None:
    trials = own_trials()
    gates, w2 = (next(each for each in trials if each.product.kind == kind) for kind in ("gates", "w2"))
    planted = {check_of(gates): half("D_MODEL"), check_of(w2): half("K")}
    monkeypatch.setattr(card_products, "run_stage", here(card, planted))
    found = of_products(tmp_path)
    wrong = {line["name"]: line for line in found.wrong}
    assert wrong.keys() == planted.keys()
    for line in wrong.values():
        assert 0.3 < line["error"] < 2
        assert line["text"] == f"error {line['error']:.2g}, allowed 0.002; 0 counters are not zero afterwards"
    names = [line["name"] for line in found.of("product")]
    assert names == [each.spec.name for each in trials if check_of(each) not in planted]
    assert found.left_out == []
    assert f"| {check_of(gates)} | WRONG |" in markdown([found])


@pytest.mark.parametrize(("kind", "output", "value"), [("gates", "g", 0xFF), ("wo", "h", 0xFF), ("w2", "counters", 1)])
def test_no_number_and_a_counter_that_stays_are_wrong(
    card: Driver, tmp_path: Path, kind: str, output: str, value: int
) -> None:
    """NaN compares with nothing, and a counter that is not zero spoils the next launch alone."""
    trials = [each for each in own_trials() if each.product.kind == kind]
    right, spoilt = card.twin, list[bool]()

    def spoils(kernel: Kernel, grid: Any, arguments: list[Any], at: int) -> None:
        right(kernel, grid, arguments, at)  # type: ignore[misc]
        names = [name for name, _ in kernel.parameters]
        depth = kernel.constants.get("K", kernel.constants["D_MODEL"])
        if output in names and depth == trials[0].product.depth:
            card.span(int(arguments[names.index(output)]), 2, "the test")[:] = value
            spoilt.append(True)

    card.twin = type("Spoils", (), {"__call__": staticmethod(spoils), "done": staticmethod(right.done)})()  # type: ignore[union-attr]
    found = of_products(tmp_path)
    wrong = {line["name"]: line for line in found.wrong}
    assert {check_of(each) for each in trials} <= wrong.keys()
    assert len(spoilt) >= len(trials)
    for each in trials:
        line = wrong[check_of(each)]
        assert (line["error"] is None) == (output != "counters")
        assert ("0 counters" in line["text"]) == (output != "counters")
    assert not any(line["kernel"] == kind for line in found.of("product"))


def test_a_kernel_that_two_numbers_of_rows_have_in_common_counts_for_those_that_were_timed(
    card: Driver, tmp_path: Path, monkeypatch: Any
) -> None:
    """A block of 64 rows of wo is the same kernel for 64 and for 128."""
    small = [replace(SMALL, group_sizes=(4,))]
    trials = trials_for(small, (8, 16), SM90)
    of_64 = [trial for trial in trials if trial.product.rows == 64]
    names = {trial.spec.name for trial in of_64}
    assert any(trial.spec.name in names for trial in trials if trial not in of_64)
    products_of_64 = len({trial.product for trial in of_64})
    looks = iter([0.0] * (len(of_64) + products_of_64))  # one before each product, and one before each trial
    monkeypatch.setattr(product_times, "time", SimpleNamespace(monotonic=lambda: next(looks, float("inf"))))
    found = of_products(tmp_path, models=small, images=(8, 16))
    assert {line["rows"] for line in found.of("product")} == {64}
    assert found.left_out == [
        f"products of PAR-S, 128 rows, {len(trials) - len(of_64)} of {len(trials) - len(of_64)} kernels: time"
    ]


def test_what_there_is_no_time_for_is_left_out_and_said(
    card: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = own_trials()
    first = sum(each.product.kind == "gates" for each in trials)
    looks = iter([0.0] * (1 + first + 1 + 1))  # at a product and at each of its shapes; one shape of the second product
    monkeypatch.setattr(product_times, "time", SimpleNamespace(monotonic=lambda: next(looks, float("inf"))))
    found = of_products(tmp_path)
    assert [line["name"] for line in found.of("product")] == [each.spec.name for each in trials[: first + 1]]
    left = len(trials) - first - 1
    assert found.left_out == [f"products of PAR-S, 8 rows, {left} of {len(trials)} kernels: time"]
    assert [line["text"] for line in found.of("check")] == [f"shapes that are right: {count}" for count in (first, 1)]
    assert found.wrong == []


def test_what_there_is_no_time_to_compile_is_left_out_and_said(
    card: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_files, "AT_A_TIME", 2)
    monkeypatch.setattr(product_files, "available_cores", lambda: 2)
    looks = iter([0.0])
    monkeypatch.setattr(product_files, "time", SimpleNamespace(monotonic=lambda: next(looks, float("inf"))))
    trials = own_trials()
    found = of_products(tmp_path)
    assert [line["name"] for line in found.of("product")] == StandIn.compiled == [e.spec.name for e in trials[:4]]
    left = f"products of PAR-S, 8 rows, {len(trials) - 4} of {len(trials)} kernels: time to compile them"
    assert found.left_out == [left]


def test_a_kernel_that_ends_its_process_ends_no_other(
    card: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, run, asked = own_trials(), here(card), list[int]()

    def ends(name: str, spec: Mapping[str, Any], until: float) -> Ended:
        entries = json.loads(Path(spec["plan"]).read_text())
        asked.append(len(entries))
        if len(asked) == 1:
            return Ended(why="its process was ended by SIGKILL", during=entries[3]["check"])
        return run(name, spec, until)

    monkeypatch.setattr(card_products, "run_stage", ends)
    found = of_products(tmp_path)
    assert asked == [len(trials), len(trials) - 4]
    assert {line["name"]: line["text"] for line in found.wrong} == {
        check_of(trials[3]): "its process was ended by SIGKILL"
    }
    assert [line["name"] for line in found.of("product")] == [each.spec.name for each in trials[4:]]
    assert found.left_out == [f"products of PAR-S, 8 rows, 3 of {len(trials)} kernels: time"]


def test_what_spills_or_does_not_compile_is_left_out_and_the_choice_is_the_next(
    card: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = own_trials()
    gates = [each for each in trials if each.product.kind == "gates"]
    other = trials[-1].spec.name
    monkeypatch.setattr(StandIn, "spills", staticmethod(lambda spec: 8 * (spec.name == gates[0].spec.name)))
    monkeypatch.setattr(StandIn, "refuse", staticmethod(lambda spec: "no" if spec.name == other else ""))
    found = of_products(tmp_path)
    gone = {gates[0].spec.name, other}
    lines = found.of("product")
    assert [line["name"] for line in lines] == [each.spec.name for each in trials if each.spec.name not in gone]
    chosen = [line["name"] for line in lines if line["chosen"] and line["kernel"] == "gates"]
    assert chosen == [next(each.spec.name for each in gates if each.planned and each.layout == 1)]
    assert f"products: 2 of {len(trials)} kernels keep registers in memory, or do not compile" in [
        line["text"] for line in found.of("note")
    ]
    assert found.left_out == []
    assert found.wrong == []


# -- built ahead ------------------------------------------------------------------------------------------------------


def ahead(folder: Path, images: Sequence[int] = (1,), models: Sequence[Model] = (SMALL,)) -> list[str]:
    """Build them by the command; returns what it says."""
    from par_export.card.ahead import build_ahead

    said: list[str] = []
    wanted: dict[str, Any] = {"checked": (), "samples": (), "codes": (), "models": models, "images": images}
    assert build_ahead(folder, "SM90", parts=("products",), say=said.append, **wanted) == []
    return said


def test_ready_kernels_are_taken_and_what_is_not_there_is_left_out(card: Driver, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    said = ahead(ready)
    count = len(own_trials())
    assert said[-1].startswith(f"products: {count} kernels, there after ")
    assert {file.name for file in ready.rglob("*") if file.is_file()} == {"sources", INDEX, CUBINS}
    StandIn.compiled.clear()
    found = of_products(tmp_path, engines=ready, images=(1, 2))
    assert StandIn.compiled == []
    assert len(found.of("product")) == count
    (left,) = found.left_out
    more = len(trials_for([SMALL], (2,), SM90))
    assert left.startswith(f"products of PAR-S, 16 rows, {more} of {more} kernels: not in {ready / 'products'}: parvis")


def test_a_build_goes_on_where_it_was(card: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    refuse = own_trials()[0].spec.name
    monkeypatch.setattr(StandIn, "refuse", staticmethod(lambda spec: "no" if spec.name == refuse else ""))
    assert ", without 1 that cannot run well, there" in ahead(ready)[-1]
    first = ProductKernels.read(ready / "products")
    with (ready / "products" / CUBINS).open("ab") as file:
        file.write(b"of a build that was ended")
    StandIn.compiled.clear()
    ahead(ready, (1, 2))
    assert set(StandIn.compiled) == {each.spec.name for each in trials_for([SMALL], (2,), SM90)}
    second = ProductKernels.read(ready / "products")
    assert first.kernels.items() < second.kernels.items()
    for name in second.kernels:
        assert second.cubin(name) == f"stand-in for {name} on SM90".encode()
    assert list(second.refused) == [refuse]
    StandIn.compiled.clear()
    monkeypatch.setattr(StandIn, "version", "stand-in 2")
    ahead(ready, (1, 2, 4))  # one is missing, so all are made by the compiler that there is now
    assert set(StandIn.compiled) == {each.spec.name for each in trials_for([SMALL], (1, 2, 4), SM90)}
    assert ProductKernels.read(ready / "products").compiler == "stand-in 2"


def test_kernels_of_other_sources_or_for_another_gpu_are_refused(
    card: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "ready"
    ahead(ready)
    index = ready / "products" / INDEX
    good = index.read_text()
    card.capability = (8, 0)
    (line,) = of_products(tmp_path, engines=ready).wrong
    assert line["name"] == "products"
    assert "kernels for SM90; this GPU needs those for SM80: parvis bench" in line["text"]
    card.capability = (9, 0)
    for old, new, said in (
        (json.loads(good)["sources"], "0" * 64, "built by other sources than this checkout's"),
        ('"warps":4', '"warps":"4"', "no index of kernels (kernels."),
        ("{", "", "not valid JSON"),
    ):
        index.write_text(good.replace(old, new, 1))
        found = of_products(tmp_path, engines=ready)
        assert said in found.wrong[0]["text"]
        assert found.of("product") == []
    index.write_text(good)
    (ready / "products" / CUBINS).write_bytes(b"x" * (ready / "products" / CUBINS).stat().st_size)
    with pytest.raises(Exception, match="damaged at kernel gates-"):
        ProductKernels.read(ready / "products").cubin(own_trials()[0].spec.name)
    (ready / "sources").write_text("0" * 64)
    with pytest.raises(RequestError, match="--engines FOLDER --parts kernels products"):
        of_products(tmp_path, engines=ready)
    ahead(ready, models=())
    assert not (ready / "products").exists()


@pytest.mark.slow
def test_a_whole_part_from_real_cubins_to_its_page(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled by Triton, and computed in a process of its own; both by their commands."""
    monkeypatch.setattr(product_trials, "LAYOUTS", 1)
    monkeypatch.setattr("par_export.card.plan.MODELS", [SMALL])
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "children"))
    monkeypatch.setenv("PARVIS_TEST_STAND_IN", "1")
    driver.capability = (8, 0)
    ready, file = tmp_path / "ready", tmp_path / "rows.jsonl"
    command = ["bench", "--suite", "gpu", "--parts", "products", "--engines", str(ready), "--batches", "1"]
    assert cli.main([*command, "--build-for", "SM80"]) == 0
    kernels = ProductKernels.read(ready / "products")
    trials = trials_for([SMALL], (1,), TARGETS["SM80"])
    assert list(kernels.kernels) == [each.spec.name for each in trials]
    assert len(trials) == 5  # one of each kind: nothing is fetched ahead there
    assert kernels.cubin(next(iter(kernels.kernels)))[:4] == b"\x7fELF"
    monkeypatch.setattr(
        "par_export.card.report.CardOptions",
        lambda **given: CardOptions(**(given | {"torch": "cpu", "cold_bytes": 1})),  # type: ignore[arg-type]
    )
    assert cli.main([*command, "--json", str(file), "--work", str(tmp_path), "--minutes", "2"]) == 0
    page = capsys.readouterr().out
    assert page.count("| PAR-S | ") == 5
    (found,) = read_runs([file])
    assert len(found.of("product")) == len(kernels.kernels)
    assert cli.main(["bench", "--suite", "gpu", "--from", str(file)]) == 0
    again = capsys.readouterr().out
    assert again.partition("### Products")[2] == page.partition("\n\nwritten")[0].partition("### Products")[2] + "\n"
