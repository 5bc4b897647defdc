"""``parvis calibrate``: the whole way on the tiny bundle, its exit codes, and what is left when it ends early."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_calibration.cli import calibrate as verb
from par_calibration.errors import CalibrationError
from par_calibration.quantise.choice import How
from par_calibration.quantise.layers import by_gptq
from par_calibration.record.record import RecordOptions, plan_of, record
from par_calibration.record.recording import Recording
from par_calibration.report import LIMITS, Options
from par_calibration.run import OverBudgetError, Request, calibrate
from par_model.training.files import InputError, alone_in
from par_runtime.backends.native.library import library
from par_runtime.bundle import Bundle, seal
from par_runtime.cli import main
from par_runtime.dtypes import Float
from par_runtime.quantised import Quantised

DEMO = Path(__file__).parents[2] / "models" / "demo"
SMALL = Path(__file__).parents[1] / "data" / "small"
#: Only w2 of the tiny bundle has whole groups of rows.
RECORD = ["--images", "2", "--samples", "60"]
TINY = ["--keep", "wqkv,wo,w13,head", *RECORD, "--held-out", "4", "--generated", "0"]
TIGHT = "layer=0.0001"
LONG = "/".join(["deep" * 20] * 4) + "/limits.json"  #: longer than the name of a file may be
WIDE = ",".join(f"{measure}=none" for measure in LIMITS)


def run(*arguments: object) -> int:
    return main(["calibrate", *map(str, arguments)])


def test_a_bundle_is_made_and_says_what_was_proven(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert run(tiny, "--weights", "int8", "--out", out, *TINY, "--budget", WIDE) == 0
    lines = capfd.readouterr().out
    assert "recorded 2 images, 60 rows of each matrix" in lines
    assert "within its budget; report:" in lines.splitlines()[-1]
    assert "peak memory" in lines.splitlines()[-1]
    made, source = Bundle.open(out), Bundle.open(tiny)
    assert made.quantised == "int8"
    assert (made.name, source.name) == ("small", "tiny")  # that of its folder, so that the two can be told apart
    assert made.calibration is not None
    assert made.calibration.source == source.hash
    assert made.calibration.group == 64
    assert {"layers.0.wqkv", "output"} <= set(made.calibration.kept)
    assert made.calibration.report["measures"]["top1"] > 0.9
    figures = json.loads((tmp_path / "small.json").read_text())
    assert {layer["phase"] for layer in figures["layers"]} == {"prefill", "sequential", "transition", "group"}
    assert (tmp_path / "small.html").read_text().startswith("<!doctype html>".upper()) or (
        "<html" in (tmp_path / "small.html").read_text()[:300]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.html", "small.json"]
    # A second time it is in the way, where its reports are not; and what is quantised is not quantised again.
    assert run(tiny, "--weights", "int8", "--out", out, *TINY) == 2
    assert "exists; give another --out, or --force" in capfd.readouterr().err
    assert run(out, "--weights", "int4", "--out", tmp_path / "again", *TINY) == 2
    assert "its weights are int8 already" in capfd.readouterr().err


def test_beyond_the_budget_there_is_a_report_and_no_bundle(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert run(tiny, "--weights", "int4", "--out", out, *TINY, "--budget", TIGHT) == 1
    err = capfd.readouterr().err
    assert "beyond the budget: worst layer" in err
    assert "no bundle was written; the report is" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tiny.calibration", "small.html", "small.json"]
    assert json.loads((tmp_path / "small.json").read_text())["exceeded"]
    assert run(tiny, "--weights", "int4", "--out", out, *TINY) == 2
    assert "holds 2 of its images already; --resume goes on" in capfd.readouterr().err
    assert run(tiny, "--weights", "int4", "--out", out, *TINY, "--budget", WIDE, "--resume") == 0
    assert "2 of the images were there" in capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.html", "small.json"]


def test_a_quantiser_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    """What it returns is what is published, and the report sees it."""
    request = Request(
        bundle=tiny,
        out=tmp_path / "out",
        keep=("wqkv", "wo", "w13", "head"),
        record=RecordOptions(2, 60),
        report=Options(images=4, samples=0),
        budget=WIDE,
    )

    def doubled(name: str, matrix: Float, rows: Float, how: How) -> Quantised:
        made = by_gptq(name, matrix, rows, how)
        return replace(made, scales=2 * made.scales) if name == "layers.1.w2" else made

    path, report = calibrate(request, quantiser=doubled)
    off = {layer.name: layer.relative_error for layer in report.layers}
    assert off["layers.1.w2"] == pytest.approx(1, abs=0.02)
    assert off["layers.0.w2"] < 0.02
    scale = Bundle.open(path).weights["layers.1.w2.scale"]
    stored = np.frombuffer((path / "weights.data").read_bytes(), np.float16, scale.length // 2, scale.offset)
    plain, _ = calibrate(replace(request, out=tmp_path / "plain"))
    scale = Bundle.open(plain).weights["layers.1.w2.scale"]
    before = np.frombuffer((plain / "weights.data").read_bytes(), np.float16, scale.length // 2, scale.offset)
    assert (stored == 2 * before).all()
    with pytest.raises(OverBudgetError, match="worst layer"):
        calibrate(
            replace(request, out=tmp_path / "no", budget=WIDE.replace("layer=none", "layer=0.05")), quantiser=doubled
        )
    assert not (tmp_path / "no").exists()


def test_a_killed_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle of recording the demo: images that were done are not made again."""
    arguments = [str(DEMO), "--ranges", "--work", str(tmp_path / "w"), "--images", "40", "--samples", "800"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "par_runtime.cli.dispatch", "calibrate", *arguments, "--quiet"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not list((tmp_path / "w").glob("image-*.npz")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("image-*.npz")}
    assert 1 <= len(there) < 40
    shorter = [str(DEMO), "--ranges", "--work", str(tmp_path / "w"), "--images", "4", "--samples", "80"]
    assert run(*shorter, "--resume") == 2
    assert "a recording of 40 images, not 4" in capfd.readouterr().err


def test_ranges_show_that_static_scales_lose(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What they are for: at the demo's w2 the class token is far from what codes are."""
    json_file = tmp_path / "ranges.json"
    options = ["--images", "4", "--samples", "400", "--work", tmp_path / "w", "--json", json_file]
    assert run(DEMO, "--ranges", *options) == 0
    assert "per row and group" in capfd.readouterr().out
    rows = {(row["matrix"], row["positions"]): row["errors"] for row in json.loads(json_file.read_text())}
    codes = rows["w2", "code"]
    assert codes["static"] > 1.5 * codes["static per class"] > 3 * codes["dynamic per row"]
    assert codes["dynamic per row"] > codes["dynamic per row and group"] > 0
    assert len(rows) == 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranges.json", "w"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--weights: what to do is missing"),
        (["--weights", "int8", "--keep", "w5"], "--keep 'w5': no such matrix"),
        (["--weights", "int8", "--group", "100"], "--group 100: expected one of 32, 64, 128"),
        (["--weights", "int8"], "does not divide the 16 rows"),
        (["--weights", "int8", "--activations", "fp8"], "fp8: no engine here computes in it"),
        (["--weights", "int8", "--arithmetic", "int4"], "expected fp32, bf16, int8, or none"),
        (["--weights", "keep"], "--weights keep: changes nothing by itself"),
        (["--weights", "keep", "--activations", "none"], "--weights keep: changes nothing by itself"),
        (["--weights", "keep", "--arithmetic", "bf16"], "they are the C step's, which cannot run this bundle here"),
        ([*TINY, "--weights", "int8", "--images", "0"], "--images 0"),
        ([*TINY, "--weights", "int8", "--samples", "3"], "expected at least 16"),
        ([*TINY, "--weights", "int8", "--label", "dragon"], "unknown label 'dragon'"),
        ([*TINY, "--weights", "int8", "--real", "nowhere"], "--real nowhere: no such file"),
        ([*TINY, "--weights", "int8", "--budget", "speed=1"], "--budget: unknown measure 'speed'"),
        ([*TINY, "--weights", "int8", "--html", "x", "--json", "x"], "name the same file"),
        ([*TINY, "--weights", "int8", "--html", "x", "--json", "x/y"], "x/y: lies in x, another output of this"),
        (
            [*TINY, "--weights", "int8", "--html", "x.html", "--out", "x.html/b"],
            "x.html/b.json: lies in x.html, another output",
        ),
        ([*TINY, "--weights", "int8", "--html", "x.html", "--work", "x.html"], "lies in x.html, another output"),
        ([*TINY, "--weights", "int8", "--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny, "--out", tmp_path / "out", *arguments) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "B"], "B: is the bundle that is read"),
        (["--out", "B", "--force"], "B: is the bundle that is read"),
        (["--out", "B/inside"], "lies in the bundle that is read"),
        (["--out", ".", "--force"], "names no new folder"),
        (["--out", "", "--force"], "argument --out: '' is empty"),
        (["--out", "bundle/inner"], "--out bundle/inner: lies in the bundle "),
        (["--out", "around", "--force"], "holds the bundle that is read"),
        (["--work", "B/inside"], "lies in the bundle that is read"),
        (["--work", "q"], "lies in --out"),
        (["--html", "q/page.html"], "lies in --out"),
        (["--json", "q"], "lies in --out"),
        (["--html", "B/manifest.json"], "is a file of the bundle or engine in B"),
        (["--json", "B/weights.data"], "is a file of the bundle or engine in B"),
        (["--json", "limits.json", "--budget", "limits.json"], "is read by this command"),
        (["--json", LONG, "--budget", LONG], "is read by this command"),
        (["--json", LONG, "--real", LONG], "is read by this command"),
        (["--out", "notes"], "notes.html: exists and is no report of 'parvis calibrate', and that of --out notes is"),
        (["--out", "notes", "--html", "page.html", "--force"], "notes.json: exists and is no report"),
        (["--show-images", "pairs.png"], "there will be no images, as --generated is 0"),
        (["--show-images", "pairs.jpg"], "expected a name that ends in .png"),
        (["--budget", " "], "--budget '': is empty"),
        (["--budget", "x" * 5000], "no file has such a name"),
        (["--budget", "top1=" + "9" * 5000], "expected a number from 0 to 1"),
        (["--held-out", "0"], "--held-out 0: expected 1 or more"),
        (["--real", "limits.json"], "limits.json: not a file of arrays"),
        (["--real", "pictures"], "otter/a.png: not an image that can be read"),
    ],
)
def test_nothing_is_lost_and_nothing_is_done_before_it_is_refused(
    arguments: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny, tmp_path / "around" / "B")
    monkeypatch.chdir(tmp_path)
    Path("around/manifest.json").write_text("{}")
    shutil.copytree("around/B", "bundle")
    Path("limits.json").write_text('{"top1": 0.5}')
    Path("pictures/otter").mkdir(parents=True)
    Path("pictures/otter/a.png").write_text("no picture")
    Path("notes.html").write_text("<!doctype html><title>Mine</title>")
    Path("notes.json").write_text('{"budget": 1}')
    Path(LONG).parent.mkdir(parents=True)
    Path(LONG).write_text('{"top1": 0.5}')
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    given = [word.replace("B/", "around/B/") if word != "B" else "around/B" for word in arguments]
    assert run("around/B", "--weights", "int8", "--out", "q", *TINY, *given) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert message.replace(" in B", " in around/B") in line
    assert len(line) < 600
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_more_threads_than_cores_are_reduced(tiny: Path, tmp_path: Path) -> None:
    request = Request(bundle=tiny, out=tmp_path / "q", keep=("wqkv", "wo", "w13", "head"), budget=WIDE, threads=100_000)
    with pytest.warns(UserWarning, match="threads 100000: reduced to"):
        calibrate(replace(request, record=RecordOptions(1, 60), report=Options(images=1, samples=0)))


def test_the_bundle_that_is_read_is_not_replaced(tiny_copy: Path) -> None:
    with pytest.raises(CalibrationError, match="is the bundle that is read"):
        calibrate(Request(bundle=tiny_copy, out=tiny_copy, keep=("wqkv", "wo", "w13", "head"), force=True))


def test_the_parser_needs_nothing_that_is_installed_with_the_extra() -> None:
    assert verb.parser().parse_args(["b", "--weights", "int4", "--keep", "head", "w2,wo"]).keep == ("head", "w2", "wo")
    assert verb.parser().parse_args(["b", "--activations", "none"]).arithmetic == "fp32"


@pytest.mark.skipif(library() is None, reason="the C step was not built")
def test_weights_that_are_no_numbers_are_named_with_their_bundle(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(SMALL, tmp_path / "small"))
    manifest = json.loads((path / "manifest.json").read_text())
    _, _, offset, length = manifest["weights"]["layers.0.attention_norm"]
    content = bytearray((path / "weights.data").read_bytes())
    content[offset : offset + length] = b"\xff" * length  # NaN in fp16
    (path / "weights.data").write_bytes(content)
    manifest["files"]["weights.data"]["sha256"] = hashlib.sha256(content).hexdigest()
    del manifest["hash"]
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
    options = ["--weights", "keep", "--arithmetic", "bf16", "--cache", "bf16", "--held-out", "4", "--generated", "0"]
    assert run(path, *options, "--out", tmp_path / "out", "--quiet") == 2
    assert capfd.readouterr().err == (
        f"parvis: error: {path}: layers.0.attention_norm.weight holds {length // 2} numbers that are NaN or infinite; "
        "give a checkpoint of a training that did not diverge\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--weights", "int8"), ("--keep", "head"), ("--refine", 3), ("--arithmetic", "int8"), ("--cache", "fp32"),
     ("--decoder-precision", "bf16"), ("--real", "."), ("--held-out", 2), ("--generated", 0), ("--budget", WIDE),
     ("--html", "a.html"), ("--show-images", "a.png")],
)  # fmt: skip
def test_what_ranges_have_no_use_for_is_refused(
    option: str, value: object, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny, "--ranges", option, value) == 2
    assert capfd.readouterr().err == (
        f"parvis: error: {option}: --ranges only measures what was recorded, and writes no bundle; leave it out, or "
        "this\n"
    )


@pytest.mark.parametrize("what", [["--weights", "int8", "--force"], ["--weights", "int4", "--resume"], ["--ranges"]])
@pytest.mark.parametrize("named", [True, False])
def test_two_at_once_do_not_share_a_recording(
    tiny: Path, tmp_path: Path, what: list[str], named: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that ends removes it, and one with --force drops it: the other would lose what it has recorded."""
    pytest.importorskip("fcntl")
    work = tmp_path / ("w" if named else f".{tiny.name}.calibration")
    few = RECORD if what == ["--ranges"] else TINY
    options = [*what, *few, "--out", tmp_path / "out", *(["--work", work] if named else [])]
    with alone_in("--work", work):
        (work / "image-000000.npz").write_text("of the other one")
        assert run(tiny, *options, "--quiet") == 2
        assert [path.name for path in work.iterdir()] == ["image-000000.npz"]
    assert capfd.readouterr().err == (
        f"parvis: error: --work {work}: another process writes into it now; wait until that one has ended, or give "
        "another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [work.name]


def test_a_recording_that_is_begun_again_stays_locked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is the folder's: where it were removed and made again, a second process could enter."""
    pytest.importorskip("fcntl")
    work, seen = tmp_path / "work", list[str]()
    work.mkdir()

    def begun(recording: Recording, *rest: Any) -> Any:
        seen.extend(path.name for path in work.iterdir())
        with pytest.raises(InputError, match="another process writes into it now"), alone_in("--work", work):
            pass
        return record(recording, *rest)

    plan = plan_of(Bundle.open(tiny), RecordOptions(images=2, samples=60, seed=1))
    Recording(work, plan, Bundle.open(tiny)).begin(resume=False)
    (work / "image-000000.npz").write_text("of another seed")
    monkeypatch.setattr("par_calibration.run.record", begun)
    options = ["--weights", "int8", *TINY, "--out", tmp_path / "out", "--work", work, "--budget", WIDE, "--quiet"]
    assert run(tiny, *options, "--force") == 0
    assert seen == ["recording.json"]


def test_a_file_is_no_folder_for_a_recording(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    options = ["--weights", "int8", *TINY, "--out", tmp_path / "out", "--work", tmp_path / "file", "--quiet"]
    assert run(tiny, *options) == 2
    assert f"--work {tmp_path / 'file'}: is a file; expected a folder, which may be new" in capfd.readouterr().err


def test_links_that_lead_in_a_circle_are_one_line(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for option in ("--out", "--html", "--work", "--real"):
        others = [] if option == "--out" else ["--out", tmp_path / "out"]
        assert run(tiny, "--weights", "int8", *TINY, *others, option, loop, "--quiet") == 2
        error = capfd.readouterr().err
        assert error.startswith("parvis: error: ")
        assert str(loop) in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
