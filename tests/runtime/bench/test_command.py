"""The command ``parvis bench``: real bundles in processes of their own, files, comparison."""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bench.by_hand import limits_by_hand, lines
from bench.subjects import one_row
from instruction_sets import IN_BF16, needs_bf16

from par_runtime.bench.opening import short_names
from par_runtime.bench.report.compare import compare
from par_runtime.bench.rows import read, to_json
from par_runtime.bench.subjects.base import PHASES
from par_runtime.bundle import Bundle
from par_runtime.cli.dispatch import main
from par_runtime.cli.inspect import describe

QUANTISED = Path(__file__).parents[3] / "models" / "demo-n16"


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure; ``test_limits.py`` measures them."""
    limits_by_hand(monkeypatch)


def test_json_lines_on_standard_output_and_nothing_else(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny), "--suite", "phases", "--json", "-", "--device", "cpu", "--repetitions", "3"]) == 0
    rows = lines(capsys.readouterr().out)
    by = {row["phase"]: row for row in rows}
    for i, whole in enumerate(by["image"]["samples_ms"]):
        assert sum(by[p]["samples_ms"][i] for p in PHASES if p in by) == pytest.approx(whole, rel=0.05)
    assert all(row["kind"] == "measured" for row in rows)
    assert by["image"]["bound_ms"] > 0
    assert by["image"]["peak_bytes"] > 10**7
    assert by["image"]["guided"]


def test_every_file_at_once_and_a_comparison(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    arguments = ["bench", str(tiny), "--device", "cpu", "--repetitions", "2"]
    assert main([*arguments, *(word for name, path in files.items() for word in (f"--{name}", str(path)))]) == 0
    out = capsys.readouterr().out
    assert "machine   " in out
    assert f"written: {files['html']}" in out
    assert len(read(files["json"])) == len(files["csv"].read_text().splitlines()) - 1
    assert files["html"].read_text().startswith("<!doctype html>")
    assert main([*arguments, "--compare", str(files["json"]), "--json", str(files["json"])]) == 0
    out = capsys.readouterr().out
    assert "below 1 is faster" in out
    assert "only old" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())


def test_baselines_in_the_same_run(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(bundles["fp32"]), "--device", "cpu", "--against", "eager,n1", "--repetitions", "1"]
    assert main([*arguments, "--json", "-", "--work", str(tmp_path), "--threads", "1"]) == 0
    images = {row["label"]: row for row in lines(capsys.readouterr().out) if row["phase"] == "image"}
    assert [(label, row["n"], row["calls"]) for label, row in images.items()] == [
        ("parvis", 4, 19),
        ("eager", 4, 19),
        ("n1", 1, 64),
    ]
    assert images["eager"]["backend"] == "torch eager"
    assert images["n1"]["backend"] == images["parvis"]["backend"]
    assert images["n1"]["parameters"] < images["parvis"]["parameters"]  # three learnable tokens less
    assert all(row["threads"] == 1 for row in images.values())
    assert list(tmp_path.iterdir()) == []  # the bundle of random weights is gone


def test_two_bundles_have_different_labels(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "fp32"
    other.symlink_to(bundles["n16"])
    arguments = ["bench", str(bundles["fp16"]), str(bundles["n1"]), "--device", "cpu", "--repetitions", "1"]
    assert main([*arguments, "--suite", "batch", "--batches", "1,3", "--json", "-"]) == 0
    rows = lines(capsys.readouterr().out)
    assert [(row["label"], row["images"], row["phase"]) for row in rows] == [
        (label, b, "throughput") for b in (1, 3) for label in ("fp16", "n1")
    ]


def test_equal_names_are_told_apart_by_what_differs(bundles: dict[str, Path]) -> None:
    opened = {name: Bundle.open(path, "none") for name, path in bundles.items()}
    fp32, fp16, n1 = opened["fp32"], opened["fp16"], opened["n1"]
    other = replace(fp16, hash="0123456789abcdef")
    x, y = Path("a/x"), Path("y")
    assert short_names([x], [fp32]) == ["parvis"]
    assert short_names([x, x, y], [fp32, fp16, fp16]) == ["x fp32", "x fp16", "y"]
    assert short_names([x, x], [fp32, n1]) == ["x n=4", "x n=1"]
    assert short_names([x, x, x], [fp32, fp16, other]) == ["x fp32", f"x fp16 {fp16.hash[:8]}", "x fp16 01234567"]
    assert short_names([x, x], [fp32, fp32]) == ["x (1)", "x (2)"]
    quantised = Bundle.open(QUANTISED, "none")
    assert short_names([x, x], [fp16, quantised]) == ["x fp16", f"x {quantised.quantised}"]


@needs_bf16
def test_rows_of_a_decoder_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--against", "n1", "--repetitions", "1", "--json", "-"]
    assert main(["bench", str(QUANTISED), *arguments, "--decoder-precision", "bf16"]) == 0
    rows = [row for row in lines(capsys.readouterr().out) if row.get("phase") == "decoder"]
    assert [(row["label"], row["computes"]) for row in rows] == [("parvis", "bf16"), ("n1", "bf16")]
    assert all(row["version"].endswith(IN_BF16) for row in rows)


def test_rows_say_what_quantised_matrices_are_stored_in(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--against", "n1", "--repetitions", "1", "--json", "-"]
    assert main(["bench", str(QUANTISED), *arguments]) == 0
    bundle = Bundle.open(QUANTISED, "none")
    assert bundle.quantised in ("int8", "int4")
    assert bundle.calibration is not None
    assert (bundle.calibration.arithmetic, bundle.calibration.cache) == ("bf16", "bf16")
    rows = lines(capsys.readouterr().out)
    made = [row for row in rows if row["kind"] == "measured"]
    assert {(row["label"], row["precision"], row["weights"]) for row in made} == {
        ("parvis", "fp16", bundle.quantised),
        ("n1", "fp16", ""),
    }
    groups = [row for row in made if row["phase"] == "group"]
    assert [(row["label"], row["computes"]) for row in groups] == [("parvis", "bf16"), ("n1", "bf16")]  # as it rounds
    assert all("bf16 cache" in row["version"] for row in groups)


def test_predictions_are_of_the_weights_as_stored(capsys: pytest.CaptureFixture[str]) -> None:
    """As ``parvis inspect`` has them: a call reads int8."""
    assert main(["bench", str(QUANTISED), "--device", "cpu", "--repetitions", "1"]) == 0
    table = capsys.readouterr().out.partition("By data sheet, weights as they are stored")[2]
    bundle = Bundle.open(QUANTISED, "none")
    assert bundle.weight_bytes < 1.2  # not the two of fp16
    bounds_ms = describe(bundle)["bound_ms"]
    assert len(bounds_ms) > 3
    for gpu, least in bounds_ms.items():
        (line,) = [line for line in table.splitlines() if f"  {gpu} " in line]
        assert f"  {least:.3g} ms  bandwidth, not measured" in line


def test_two_bundles_of_one_name_are_told_apart_everywhere(bundles: dict[str, Path], tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        (tmp_path / precision).mkdir()
        (tmp_path / precision / "demo").symlink_to(bundles[precision])
    given = [str(tmp_path / "fp32" / "demo"), str(tmp_path / "fp16" / "demo")]
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    arguments = ["bench", *given, "--device", "cpu", "--repetitions", "1"]
    assert main([*arguments, *(word for name, path in files.items() for word in (f"--{name}", str(path)))]) == 0
    rows = read(files["json"])
    assert {(row.label, row.precision) for row in rows} == {("demo fp32", "fp32"), ("demo fp16", "fp16")}
    assert {line["label"] for line in csv.DictReader(files["csv"].read_text().splitlines())} == {
        "demo fp32",
        "demo fp16",
    }
    page = files["html"].read_text()
    assert all(f"<td class=left>demo {p}</td><td class=left>image</td>" in page for p in ("fp32", "fp16"))
    assert all(f'text-anchor="end">demo {p}</text>' in page for p in ("fp32", "fp16"))  # the bars
    found = compare(rows, rows)
    assert all(pair.old.label == pair.new.label and pair.ratio == 1 for pair in found.pairs)


def test_serve_and_decoder_from_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(tiny), "--device", "cpu", "--json", "-", "--repetitions", "2"]
    assert main([*arguments, "--suite", "decoder", "--batches", "2"]) == 0
    assert [(row["phase"], row["images"]) for row in lines(capsys.readouterr().out)] == [("decoder", 2)]
    assert main([*arguments, "--suite", "serve", "--batches", "2", "--requests", "4"]) == 0
    assert [(row["phase"], len(row["samples_ms"])) for row in lines(capsys.readouterr().out)] == [("serve", 4)] * 3


def test_two_files_are_compared_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(to_json(one_row([100.0, 101.0, 99.0, 100.0, 100.0])) + "\n")
    new.write_text(to_json(one_row([120.0, 121.0, 119.0, 120.0, 120.0])) + "\n")
    assert main(["bench", "--compare", str(old), str(new)]) == 0
    assert "1.200" in capsys.readouterr().out
    assert main(["bench", "--compare", str(old), str(new), "--fail-above", "1.1"]) == 1
    assert "slower than --fail-above 1.1: phases parvis image, 1 image, L-n4 fp32 n = 4, " in capsys.readouterr().err
    assert main(["bench", "--compare", str(old), str(new), "--fail-above", "1.5", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_fail_above_fails_without_any_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(to_json(one_row([100.0] * 5)) + "\n")
    new.write_text(to_json(one_row([100.0] * 5, label="renamed")) + "\n")
    assert main(["bench", "--compare", str(old), str(new), "--fail-above", "1.1"]) == 1
    assert "no row has its pair in the other file" in capsys.readouterr().err


def test_fail_above_passes_a_row_of_one_sample(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(to_json(one_row([100.0], phase="load")) + "\n")
    new.write_text(to_json(one_row([300.0], phase="load")) + "\n")
    assert main(["bench", "--compare", str(old), str(new), "--fail-above", "1.1"]) == 0


def test_fail_above_says_which_rows_it_could_not_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    quiet = one_row([100.0] * 5, phase="group")
    old.write_text(to_json(one_row([100.0] * 5)) + "\n" + to_json(quiet) + "\n")
    busy = replace(one_row([935.0] * 5), flags=("busy: in 5 of 5, other processes took 40 % of the CPU time",))
    new.write_text(to_json(busy) + "\n" + to_json(quiet) + "\n")
    assert main(["bench", "--compare", str(old), str(new), "--fail-above", "1.1"]) == 0
    assert "--fail-above: no verdict on 1 of 2 rows (busy); measure both sides again" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_escaped_in_every_file(tiny: Path, tmp_path: Path) -> None:
    """A folder's name may be any bytes; Latin-1 of an old disk, for instance."""
    named = [Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/b\xe4r", b"/b\xe5r")]
    for path in named:
        shutil.copytree(tiny, path)
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    arguments = [
        "--suite",
        "decoder",
        "--batches",
        "1",
        "--device",
        "cpu",
        "--repetitions",
        "1",
        "--no-limits",
        "--quiet",
    ]
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["bench", *map(str, named), *arguments, *outputs]) == 0
    assert [row.label for row in read(files["json"])] == ["b\\xe4r", "b\\xe5r"]
    for name in ("csv", "html"):
        text = files[name].read_text(encoding="utf-8")
        assert all(label in text for label in ("b\\xe4r", "b\\xe5r"))
