"""The paper's tables: every row is there, in its place, marked; what does not fit is left out with the reason."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench.subjects import Scripted, one_row, subject_info

from par_runtime.bench import bounds
from par_runtime.bench.limits import Limits, Round
from par_runtime.bench.measure import Setting
from par_runtime.bench.report import paper as report
from par_runtime.bench.rows import Row
from par_runtime.bench.suites import paper, paper_run
from par_runtime.cli.dispatch import main

LIMITS = Limits(((2**30, 20.0),), 0.1, "measured: by hand")
#: The paper's tables 2 and 3 and its supplement: name -> steps, seconds.
WANTED = {
    "LlamaGen-L": (576, 12.58), "LlamaGen-XL": (576, 18.66), "LlamaGen-XXL": (576, 24.91), "LlamaGen-3B": (576, 12.41),
    "PAR-L-4x": (147, 3.38), "PAR-XL-4x": (147, 4.94), "PAR-XXL-4x": (147, 6.84), "PAR-3B-4x": (147, 3.46),
    "PAR-XXL-16x": (51, 2.28), "PAR-3B-16x": (51, 1.31),
    "PAR-1x video": (1280, 43.30), "PAR-4x video": (323, 11.27), "PAR-16x video": (95, 3.44),
    "AR-3B, vLLM": (576, 4.12), "PAR-3B-4x, compiled": (147, 1.15), "PAR-3B-16x, compiled": (51, 0.43),
}  # fmt: skip


def test_every_row_of_the_paper_is_there() -> None:
    found = {p.name: (p.steps, p.seconds) for p in paper.PUBLISHED if p.table != paper.OURS}
    assert found == WANTED


@pytest.mark.parametrize("published", paper.PUBLISHED, ids=lambda p: p.name)
def test_its_architecture_makes_as_many_calls(published: paper.Published) -> None:
    architecture = paper.architecture_of(published)
    assert architecture.calls == published.steps
    assert architecture.n_tokens == published.tokens


def image(label: str, n: int, ms: float, **changes: object) -> Row:
    return one_row([ms] * 5, label=label, n=n, **changes)


def test_rows_are_put_in_their_places() -> None:
    rows = [
        image("L n=1", 1, 50_000.0),
        image("L n=4", 4, 12_500.0),
        replace(
            image("L n=4 eager", 4, 60_000.0, backend="torch eager", pytorch=True),
            flags=("estimated: 20 of 147 calls were made",),
        ),
        replace(image("video", 4, 9_000.0), grid=(5, 16, 16), model="PAR-XL"),
        one_row([1.0] * 5, label="L n=4", phase="group"),
    ]
    placed = {
        row.published.name: row for row in paper.paper_rows(rows, {"PAR-3B": "memory: too large"}, LIMITS, "a CPU")
    }
    four = placed["PAR-L-4x"]
    assert (four.status, four.seconds, four.over_n1, four.over_eager) == ("measured", 12.5, 4.0, 4.8)
    assert (four.eager_s, four.eager_status) == (60.0, "estimated")
    assert placed["LlamaGen-L"].over_n1 is None
    assert placed["LlamaGen-L"].seconds == 50.0
    assert placed["PAR-4x video"].seconds == 9.0
    assert placed["PAR-XL-4x"].seconds is None  # the video model has XL's blocks, and is not XL
    left = placed["PAR-3B-16x"]
    assert (left.status, left.why, left.seconds) == ("left out", "memory: too large", None)
    # 16 calls of one position read 3.06 G parameters (heads padded) of 4 bytes at 20 GB/s; 35 calls of 16 positions in
    # two rows multiply them at 0.1 TFLOP/s, which takes longer.
    assert left.bound_s == pytest.approx(16 * 3.06 * 4 / 20 + 35 * 2 * 3.06 * 32 / 100, rel=0.03)
    assert placed["PAR-XXL-4x"].why == "not asked for"


def test_the_table_marks_every_row_and_never_divides_by_the_papers_seconds() -> None:
    placed = paper.paper_rows([image("L n=4", 4, 12_500.0)], {}, LIMITS, "a CPU")
    shown = report.paper_table(placed)
    lines = shown.splitlines()[1:]
    assert len(lines) == len(paper.PUBLISHED)
    assert all(re.search(r"\b(measured|estimated|left out)\b", line) for line in lines)
    assert f"{3380 / 12500:.2f}" not in shown
    assert any("The paper's seconds are another machine's" in note for note in report.notes(placed))
    for row in placed:
        assert json.loads(json.dumps(paper.as_dict(row)))["kind"] == "paper"


def test_predictions_of_every_model_are_marked() -> None:
    found = paper.predicted()
    shown = report.predicted_table(found)
    assert "predicted, not measured" in shown
    assert {(p.model, p.n) for p in found} >= {("PAR-3B", 1), ("PAR-3B", 4), ("PAR-3B", 16)}
    assert len(shown.splitlines()) == 2 + len({(p.model, p.n) for p in paper.PUBLISHED})


# -- planning ---------------------------------------------------------------------------------------------------------


def options(tmp_path: Path, **changes: object) -> paper_run.PaperOptions:
    known = {"minutes": 10.0, "sizes": paper.SIZES, "work": tmp_path}
    return paper_run.PaperOptions(**(known | changes))  # type: ignore[arg-type]


def test_what_does_not_fit_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paper_run.reason_to_leave_out("PAR-L", 600, LIMITS, options(tmp_path)) is None
    assert re.match(
        r"time: needs about \d+ minutes, 1\.0 were left",
        paper_run.reason_to_leave_out("PAR-XXL", 60, LIMITS, options(tmp_path)) or "",
    )
    monkeypatch.setattr(paper_run.system, "available_bytes", lambda: 8 * 10**9)
    assert re.match(
        r"memory: one process takes about 15 GB, 8 GB are free",
        paper_run.reason_to_leave_out("PAR-3B", 1e9, LIMITS, options(tmp_path)) or "",
    )
    monkeypatch.setattr(paper_run.system, "available_bytes", lambda: None)
    monkeypatch.setattr(paper_run.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 10**9}))
    assert re.match(
        r"disk: its weights take 2 GB, 1 GB are free",
        paper_run.reason_to_leave_out("PAR-L", 1e9, LIMITS, options(tmp_path)) or "",
    )


def test_weights_are_counted_with_embedding_and_decoder() -> None:
    assert paper_run.weight_bytes("PAR-L") == pytest.approx(4 * (342.9e6 + 42.5e6), rel=0.002)


def test_time_is_shared_so_that_short_images_are_whole() -> None:
    assert paper_run.share_time({"n1": 50.0, "n4": 12.0, "n16": 7.0}, 60.0) == {"n16": 7.0, "n4": 12.0, "n1": 41.0}
    assert paper_run.share_time({"a": 10.0, "b": 10.0}, 4.0) == {"a": 2.0, "b": 2.0}
    assert paper_run.share_time({"a": 1.0}, 100.0) == {"a": 1.0}
    assert paper_run.share_time({"a": 1.0}, -5.0) == {"a": 0.0}


def test_long_images_are_estimated_within_their_share() -> None:
    fast, slow = (
        Scripted(subject_info("fast", n=16)),
        Scripted(subject_info("slow", n=1), dict.fromkeys(("prefill", "transition", "group"), 5000.0)),
    )
    setting = Setting("paper", repetitions=5)
    rows = paper_run.measure_within([fast, slow], setting, 600.0, lambda _: None)  # type: ignore[list-item]
    images = {row.label: row for row in rows if row.phase == "image"}
    assert "estimated" not in images["fast"].marks  # (a busy machine may mark both)
    assert "estimated" in images["slow"].marks
    assert images["slow"].median_ms == pytest.approx(576 * 5000, rel=0.01)
    most = slow.made[-1][2]
    assert most is not None
    assert 16 < most < 30  # 120 s a repetition, nearly all of it for calls of 5 s


def test_subjects_are_grouped_as_memory_allows() -> None:
    variants = [(n, eager) for eager in (False, True) for n in (1, 4, 16)]
    assert (
        paper_run.group_variants(variants, 1e9, None)
        == paper_run.group_variants(variants, 1e9, 8 * 10**9)
        == [variants]
    )
    assert paper_run.group_variants(variants, 2e9, 8 * 10**9) == [variants[:3], variants[3:]]
    assert paper_run.group_variants(variants, 4e9, 8 * 10**9) == [[one] for one in variants]
    assert paper_run.group_variants(variants[:3], 4e9, 16 * 10**9) == [variants[:3]]


def test_models_are_tried_in_order_and_each_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, float]] = []

    def one(model, publish, folder, setting, options, infos, left_out, progress):  # type: ignore[no-untyped-def]
        tried.append((model, options.minutes))
        folder.mkdir()
        if model == "PAR-XL":
            raise MemoryError("killed")
        return [image(model, 4, 1.0)]

    monkeypatch.setattr(paper_run, "measure_model", one)
    monkeypatch.setattr(paper_run, "optional", lambda *_: None)
    monkeypatch.setattr(
        paper_run, "reason_to_leave_out", lambda model, *_: "time: too long" if model == "PAR-3B" else None
    )
    left_out: dict[str, str] = {}
    sizes = ("PAR-L", "PAR-XL", "PAR-3B")
    rows = paper_run.run(Setting("paper"), LIMITS, options(tmp_path, sizes=sizes), lambda _: None, {}, left_out)
    assert [model for model, _ in tried] == ["PAR-L", "PAR-XL"]
    assert tried[0][1] == pytest.approx(5.0, rel=0.01)
    assert [row.label for row in rows] == ["PAR-L"]
    assert left_out == {"PAR-XL": "memory: killed", "PAR-3B": "time: too long"}
    assert list(tmp_path.iterdir()) == []


def test_the_whole_suite_on_small_models(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is real but the sizes: bundles of random weights, processes, PyTorch's side, the page."""
    from par_export import random_bundle  # noqa: TID251, the suite needs bundles, and this is who makes them
    from par_model.config import PARConfig  # noqa: TID251

    small = PARConfig(dim=64, n_layers=2, n_heads=4, vocab_size=256, n_classes=10, grid=(1, 8, 8))

    def publish(model: str, sizes: tuple[int, ...], folder: Path, *, precision: str) -> dict[int, Path]:
        return random_bundle.write_family(small, sizes, folder, name=model, precision=precision)

    monkeypatch.setattr(random_bundle, "write_published", publish)
    monkeypatch.setattr(bounds, "measure_cpu", lambda *_: Round({2**30: {"by hand": 20.0}}, {"by hand": 0.1}))
    monkeypatch.setattr(bounds, "MORE_ROUNDS", 0)
    monkeypatch.setattr(paper, "name_of", lambda row: "PAR-L")
    monkeypatch.setattr(
        paper_run, "reason_to_leave_out", lambda *_: None
    )  # what a real PAR-L would take does not matter here
    page, jsonl = tmp_path / "page.html", tmp_path / "rows.jsonl"
    arguments = [
        "bench",
        "--suite",
        "paper",
        "--sizes",
        "L",
        "--minutes",
        "5",
        "--repetitions",
        "3",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--html", str(page), "--json", str(jsonl), "--work", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Table 2 +PAR-L-4x +4 +147 +3\.38 s +[\d.e-]+ s +measured", out)
    assert re.search(r"Table 2 +PAR-XL-4x +4 +147 +4\.94 s +left out .* not asked for", out)
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in ("measured", "paper", "predicted")}
    assert {(row["label"], row["n"]) for row in kinds["measured"]} == {
        (f"L n={n}{e}", n) for n in (1, 4, 16) for e in ("", " eager")
    }
    assert len(kinds["paper"]) == len(paper.PUBLISHED)
    assert kinds["predicted"]
    assert all(row["over_eager"] for row in kinds["paper"] if row["status"] == "measured")
    assert "Speed-up by parallel decoding" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "rows.jsonl"]
