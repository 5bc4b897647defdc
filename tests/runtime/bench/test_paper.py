"""The paper's tables: every row is there, in its place, marked; what does not fit is left out with the reason."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.subjects import Scripted, one_row, subject_info

from par_runtime.bench import bounds
from par_runtime.bench.limits import Limits, Round
from par_runtime.bench.measure import Setting, rows_in_turns
from par_runtime.bench.report import paper as report
from par_runtime.bench.report.output import Outcome, tables
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import OutOfTimeError
from par_runtime.bench.subjects.process import open_bundle
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
    assert placed["PAR-XL-4x"].seconds is None  # a video model is told by its grid
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


BUSY = "busy: in 3 of 3, other processes took 60 % of the CPU time"
ESTIMATED = "estimated: 20 of 147 calls were made"


@pytest.mark.parametrize(
    ("ours", "eager", "flags", "ratio", "doubt"),
    [
        ([12_500.0] * 5, [60_000.0] * 5, (), 4.8, ""),
        ([12_500.0] * 5, [60_000.0] * 5, (ESTIMATED,), 4.8, ""),
        ([12_500.0] * 5, [60_000.0] * 5, (BUSY,), 4.8, ""),  # whole images in turns were disturbed alike
        ([12_500.0] * 5, [60_000.0] * 5, (ESTIMATED, BUSY), None, "busy"),
        ([12_500.0] * 5, [60_000.0] * 5, (ESTIMATED, "throttled: x"), None, "throttled"),
        ([9_000.0, 11_000.0, 13_000.0], [12_000.0] * 3, (), None, "spread"),  # 2 s of spread, 1 s of difference
        ([10_000.0, 21_000.0, 42_600.0], [562_000.0] * 3, (), None, "spread"),  # 16.3 s of 21 s
    ],
)
def test_a_ratio_that_the_samples_do_not_carry_is_not_printed(
    ours: list[float], eager: list[float], flags: tuple[str, ...], ratio: float | None, doubt: str
) -> None:
    row = replace(one_row(ours, label="L n=4"), flags=())
    other = replace(one_row(eager, label="L n=4 eager", backend="torch eager", pytorch=True), flags=flags)
    placed = paper.paper_rows([row, other], {}, LIMITS, "a CPU")
    (four,) = (p for p in placed if p.published.name == "PAR-L-4x")
    assert (four.over_eager, four.over_eager_doubt) == (ratio, doubt)
    (line,) = (line for line in report.paper_table(placed).splitlines() if " PAR-L-4x " in line)
    assert ("4.80 x" in line) is (ratio is not None)
    assert (f"in doubt: {doubt}" in line) is (ratio is None)
    assert ("eager busy" in line) is (BUSY in flags)
    assert json.loads(json.dumps(paper.as_dict(four)))["over_eager_doubt"] == doubt


def test_the_printed_tables_have_the_marks_and_no_exponent() -> None:
    rows = [
        replace(one_row([12_500.0] * 5, label="L n=4"), flags=(BUSY,)),
        replace(one_row([1_600_000.0] * 5, label="L n=4 eager", pytorch=True), flags=(ESTIMATED,)),
    ]
    shown = tables(Outcome(rows, paper.predicted(), paper.paper_rows(rows, {}, LIMITS, "a CPU")))
    assert re.search(r"PAR-L-4x +4 +147 +3\.38 s +12\.5 s +measured .* 1600 s est\. .* busy$", shown, re.MULTILINE)
    assert f"marked    L n=4: {BUSY}" in shown
    assert f"marked    L n=4 eager: {ESTIMATED}" in shown


def test_an_eager_side_that_was_left_out_says_why() -> None:
    row = one_row([12_500.0] * 5, label="L n=4")
    placed = paper.paper_rows([row], {"PAR-L n=4 eager": "time: needs about 90 s, 20 s were left"}, LIMITS, "a CPU")
    (line,) = (line for line in report.paper_table(placed).splitlines() if " PAR-L-4x " in line)
    assert line.endswith("eager: time: needs about 90 s, 20 s were left")


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


def test_images_of_all_sizes_come_before_video(tmp_path: Path) -> None:
    assert paper.SIZES[-1] == paper.VIDEO
    given = options(tmp_path)
    least = {model: paper_run.least_seconds(model, LIMITS, False, given.pace) for model in paper.SIZES}
    both = paper_run.least_seconds("PAR-L", LIMITS, True, given.pace) + least["PAR-XL"]  # XL without PyTorch's side
    planned, out = paper_run.plan(paper.SIZES, both + 1, LIMITS, given)
    assert list(planned) == ["PAR-L", "PAR-XL"]
    assert out[paper.VIDEO].startswith("time: needs about")
    # Video needs less time than XL, because its decoder is not there: it does not take the place of XL's images.
    assert least[paper.VIDEO] < least["PAR-XL"]
    planned, out = paper_run.plan(paper.SIZES, both - 1, LIMITS, given)
    assert list(planned) == ["PAR-L"]
    assert out[paper.VIDEO] == "time: PAR-XL, whose images come first, did not fit either"


def test_what_fits_is_judged_by_what_the_same_work_took_before(tmp_path: Path) -> None:
    given = options(tmp_path)
    before = paper_run.least_seconds("PAR-XL", LIMITS, False, given.pace)
    assert paper_run.reason_to_leave_out("PAR-XL", 2 * before, LIMITS, given) is None
    given.pace.learn(False, 40.0, 10.0)  # a busy neighbour: four times as long as guessed, PyTorch's too
    given.pace.writing = 4.0
    assert paper_run.least_seconds("PAR-XL", LIMITS, False, given.pace) == pytest.approx(4 * before)
    assert (paper_run.reason_to_leave_out("PAR-XL", 2 * before, LIMITS, given) or "").startswith("time: needs about")
    given.pace.learn(True, 10.0, 10.0)
    assert (given.pace.of(False), given.pace.of(True)) == (4.0, 1.0)


class Slow(Scripted):
    """Each batch takes real time."""

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Any:
        time.sleep(0.2)
        return super().run(images, guided, most_calls)


def test_no_turn_is_begun_that_would_end_too_late() -> None:
    subjects = [Slow(subject_info("a")), Slow(subject_info("b"))]
    setting = Setting("paper", repetitions=50, until=time.monotonic() + 1.0)
    rows = rows_in_turns(subjects, setting, lambda _: None)
    made = len(subjects[0].made)
    assert 1 <= made <= 2  # the third turn would end after 1.2 s
    assert {len(row.samples_ms) for row in rows} <= {made, len(subjects[1].made)}
    assert all("incomplete" in row.marks for row in rows)
    late = Setting("paper", repetitions=5, until=time.monotonic() - 1.0)
    assert rows_in_turns([Scripted(subject_info("c"))], late, lambda _: None) == []


def test_a_subject_that_is_at_work_when_the_time_has_passed_is_ended(bundles: dict[str, Path]) -> None:
    subject = open_bundle(bundles["fp32"], threads=1, selftest=False, end=time.monotonic() + 3600)
    try:
        assert subject.run(1, True, 8).image_ms > 0
        subject._end = time.monotonic() + 0.05
        with pytest.raises(OutOfTimeError, match="parvis was still at work when the time had passed"):
            subject.run(1000, True)
    finally:
        subject.close()


def test_rows_stay_when_a_subject_is_ended() -> None:
    class Ended(Scripted):
        def run(self, images: int, guided: bool, most_calls: int | None = None) -> Any:
            if len(self.made) == 1:
                raise OutOfTimeError("b was still at work")
            return super().run(images, guided, most_calls)

    setting = Setting("paper", repetitions=5)
    rows = rows_in_turns([Scripted(subject_info("a")), Ended(subject_info("b"))], setting, lambda _: None)
    assert {(row.label, len(row.samples_ms)) for row in rows} == {("a", 2), ("b", 1)}
    assert setting.failed == {}  # no fault of the subject


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
    subjects: Any = [fast, slow]
    first: Any = {s.info.label: paper_run.warm_up(s, subjects, setting, lambda _: None) for s in subjects}
    rows = paper_run.measure_within(subjects, setting, 600.0, lambda _: None, first)
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
    rows = paper_run.run(
        Setting("paper"), LIMITS, options(tmp_path, sizes=sizes, minutes=30), lambda _: None, {}, left_out
    )
    assert [model for model, _ in tried] == ["PAR-L", "PAR-XL"]
    least = {model: paper_run.least_seconds(model, LIMITS, True, paper_run.Pace()) for model in sizes[:2]}
    surplus = 1800 - sum(least.values())
    assert surplus > 0
    assert 60 * tried[0][1] == pytest.approx(least["PAR-L"] + surplus / 2, rel=0.01)  # XL keeps what it needs
    assert 60 * tried[1][1] == pytest.approx(1800, rel=0.01)  # the last one gets all that is left
    assert [row.label for row in rows] == ["PAR-L"]
    assert left_out == {"PAR-XL": "memory: killed", "PAR-3B": "time: too long"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
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
    assert all(row["over_eager"] or row["over_eager_doubt"] for row in kinds["paper"] if row["status"] == "measured")
    few = {flag for row in kinds["measured"] for flag in row["flags"] if flag.startswith("few repetitions")}
    assert few
    assert all(f": {flag}" in out for flag in few)
    assert "Speed-up by parallel decoding" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "rows.jsonl"]
