"""A GPU's report with engines that were built ahead."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from small_report import SAMPLE, SMALL, build, of_parts

from par_export.card import prepare
from par_export.card.ahead import wanted
from par_export.card.plan import BATCHES
from par_export.kernels.plan import Planner
from par_export.kernels.plan import plan as plan_kernels
from par_export.quantised import Codes
from par_runtime.bench import gpu
from par_runtime.errors import RequestError


@pytest.mark.slow
def test_ready_engines_are_named_and_those_of_other_sources_refused(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    family = prepare.family_of(SMALL, None, tmp_path / "family")
    build(family[1], (1,))
    shutil.copytree(family[1] / "engines", ready / "PAR-L-n1" / "engines")
    _, page, _ = of_parts(tmp_path, tiny, stand_in, "kernels", engines=ready, checked=(), twins=False)
    assert "- engines ready: PAR-L-n1\n- engines built here: PAR-L-n4, PAR-L-int8-g32-n4\n" in page
    (ready / "sources").write_text("0" * 64)
    with pytest.raises(RequestError, match="built by other sources than this checkout's; build them again"):
        of_parts(tmp_path, tiny, stand_in, "kernels", engines=ready)


@pytest.mark.slow
def test_a_report_of_one_batch_takes_engines_that_have_more(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    ready, model = tmp_path / "ready", replace(SMALL, codes=())
    for n, path in prepare.family_of(model, None, tmp_path / "family").items():
        build(path, (1, 2))
        shutil.copytree(path / "engines", ready / f"PAR-L-n{n}" / "engines")
    settings = {"models": [model], "engines": ready, "checked": (), "twins": False, "images": (2,)}
    rows, page, lines = of_parts(tmp_path, tiny, stand_in, "kernels", **settings)
    assert "- engines ready: PAR-L-n4, PAR-L-n1\n" in page
    assert "engines built here" not in page
    assert {(row.label, row.images) for row in rows} == {("PAR-L n=1", 2), ("PAR-L n=4", 2)}
    assert {line["images"] for line in lines if line["kind"] == "kernel"} == {2}
    assert "| PAR-L n=4 | 2 |" in page


@pytest.mark.slow
def test_what_is_built_ahead_is_all_that_a_report_wants(stand_in: gpu.Gpu, tiny: Path, tmp_path: Path) -> None:
    """By name and by batches: whatever one of both does not know would be compiled on the machine that is measured."""
    ready = tmp_path / "ready"
    codes = (Codes("int8", 32),)
    wanted_here = {"checked": [tiny], "samples": (SAMPLE,), "codes": codes, "models": [SMALL]}
    for each in wanted(tmp_path / "ahead", **wanted_here):  # type: ignore[arg-type]
        path = each.write()
        assert path.name == each.name
        build(path, each.images)
        shutil.copytree(path / "engines", ready / each.name / "engines")
    built: dict[str, tuple[int, ...]] = {}

    def build_here(path: Path, images: Sequence[int], *, planner: Planner = plan_kernels) -> None:
        built[path.name] = tuple(images)

    wanted_here |= {"engines": ready, "build": build_here, "images": BATCHES, "twins": False, "minutes": 1.0}
    _, page, _ = of_parts(tmp_path, tiny, stand_in, "kernels", **wanted_here)
    assert built == {}
    named = page.partition("- engines ready: ")[2].partition("\n")[0].split(", ")
    assert sorted(named) == sorted(path.name for path in ready.iterdir())
