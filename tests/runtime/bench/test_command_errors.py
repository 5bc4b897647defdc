"""What ``parvis bench`` refuses before anything is measured, and how it says it: one line, and no file is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.by_hand import limits_by_hand, lines

from par_runtime.bench import journal
from par_runtime.bench.journal import Journal
from par_runtime.cli.dispatch import main
from par_runtime.system import available_cores


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure; ``test_limits.py`` measures them."""
    limits_by_hand(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no bundle was given; expected one or more folders made by 'parvis export', --suite paper or gpu"),
        (["--from", "x"], "--from is for --suite gpu, and means nothing to phases"),
        (["nothing-here"], "nothing-here: no such folder; give the path of a bundle"),
        (["TINY", "--images", "0"], "--images 0: expected 1 or more"),
        (["TINY", "--repetitions", "0"], "--repetitions 0: expected 1 or more"),
        (["TINY", "--suite", "serve", "--minutes", "0"], "--minutes 0: expected a finite number above 0"),
        (["TINY", "--suite", "serve", "--requests", "1000001"], "--requests 1000001: expected at most 1000000"),
        (["TINY", "--suite", "serve", "--batches", "5000"], "5000 images at once (--images, --batches): onnx"),
        (
            ["TINY", "--suite", "http", "--batches", "1", "257"],
            "--batches 257: expected at most 256 clients, as many as",
        ),
        (["TINY", "--suite", "http", "--requests", "0"], "--requests 0: expected 1 or more"),
        (["TINY", "--suite", "http", "--whole"], "--whole is for --suite phases or batch, and means nothing to http"),
        (["nothing-here", "--suite", "http"], "nothing-here: no such folder; give the path of a bundle"),
        (["TINY", "--minutes", "1"], "--minutes is for --suite serve or http or paper or gpu, and means nothing to ph"),
        (
            ["TINY", "--suite", "start", "--requests", "4"],
            "--requests is for --suite serve or http, and means nothing to start",
        ),
        (["TINY", "--suite", "decoder", "--whole"], "--whole is for --suite phases or batch, and means nothing to dec"),
        (
            ["TINY", "--suite", "batch", "--batches", "5000"],
            "5000 images at once (--images, --batches): onnx",
        ),
        (["TINY", "--threads", "-1"], "--threads -1: expected 1 or more"),
        (["TINY", "--json", "a.txt", "--csv", "a.txt"], "--json, --csv, --html and --svg name one file twice"),
        (["TINY", "--json", "a.jsonl", "--csv", "x/../a.jsonl"], "name one file twice; give each its own"),
        (["TINY", "--json", "a.jsonl", "--csv", "a.jsonl/b"], "a.jsonl/b: lies in a.jsonl, another output"),
        (["TINY", "--suite", "fast"], "argument --suite: invalid choice: 'fast'"),
        (
            ["TINY", "--against", "eager,vllm"],
            "argument --against: 'vllm': expected one or more of eager, compiled, n1, ort",
        ),
        (["TINY", "--batches", "1,x"], "argument --batches: '1,x': expected numbers of images from 1 on"),
        (["TINY", "--batches", "-1,2"], "argument --batches: '-1,2': expected numbers of images from 1 on"),
        (["TINY", "--suite", "serve", "--minutes", "-1e3"], "--minutes -1000: expected a finite number above 0"),
        (["--suite", "paper", "--sizes", "L,XS"], "'PAR-XS': expected one or more of PAR-L, PAR-XL"),
        (
            ["TINY", "--json", "-", "--csv", "-"],
            "'-' is standard output, and takes one of --json, --csv, --html and --svg",
        ),
        (["TINY", "--compare", "missing.jsonl"], "missing.jsonl: missing; expected JSON lines"),
        (["new.jsonl", "--compare", "missing.jsonl"], "missing.jsonl: missing; expected JSON lines"),
        (["TINY", "--batches", "4"], "--batches is for --suite batch or decoder or serve or http or gpu, and means no"),
        (
            ["TINY", "--suite", "start", "--batches", "4"],
            "--batches is for --suite batch or decoder or serve or http or gpu, and means",
        ),
        (["TINY", "--sizes", "L"], "--sizes is for --suite paper or gpu, and means nothing to phases"),
        (["TINY", "--engines", "."], "--engines is for --suite gpu, and means nothing to phases"),
        (["--suite", "gpu", "--engines", "/nowhere"], "--engines /nowhere: no such folder"),
        (["--suite", "gpu", "--against", "n1"], "--against is for --suite phases or batch or decoder or serve"),
        (["--suite", "gpu", "--batches", "0"], "argument --batches: '0': expected numbers of images from 1 on"),
        (["--suite", "gpu", "--batches", "1", "257"], "--batches 257: expected at most 256, the largest batch that"),
        (["--suite", "gpu", "--batches", "256"], "--suite gpu needs an NVIDIA GPU: "),
        (["--suite", "gpu", "--minutes", "0"], "--minutes 0: expected a finite number above 0"),
        (["--suite", "gpu", "--device", "cpu"], "--suite gpu needs an NVIDIA GPU: "),
        (["--suite", "gpu"], "--suite gpu needs an NVIDIA GPU: "),
        (["TINY", "--no-eager"], "--no-eager is for --suite paper or gpu, and means nothing to phases"),
        (["--suite", "paper", "--against", "n1"], "--against is for --suite phases or batch or decoder or serve"),
        (["TINY", "--fail-above", "1.1"], "--fail-above 1.1: expected a ratio above 0, and --compare OLD.jsonl"),
        (["TINY", "--device", "tpu"], "device 'tpu': expected auto, cpu, cuda"),
        (["TINY", "--device", "cuda"], "device 'cuda' cannot run"),
        (["--suite", "paper", "TINY"], "is in no row of the paper's tables; expected one of PAR-L, PAR-XL"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny) if word == "TINY" else word for word in arguments]
    try:
        code = main(["bench", *given])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    printed = capsys.readouterr().err
    assert code == 2
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_helps_where_memory_ends_is_what_this_verb_has(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError("4 GB")

    monkeypatch.setattr("par_runtime.bench.opening.open_bundle", full)
    assert main(["bench", str(tiny), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "parvis: error: not enough memory (4 GB); free some, or give less at once (--images, --batches)\n"
    )


def test_more_threads_than_cores_are_reduced_with_a_warning(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(tiny), "--threads", "100000", "--repetitions", "1", "--json", "-", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert {row["threads"] for row in lines(printed.out)} == {available_cores()}
    assert printed.err == (
        f"parvis: --threads 100000: reduced to {available_cores()}, the cores that this process may use\n"
    )


def test_a_path_that_cannot_be_written_is_an_error_before_anything_is_measured(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny), "--json", str(tmp_path)]) == 2
    assert "is a folder; give a file name" in capsys.readouterr().err


def test_the_error_names_the_package_that_a_baseline_misses(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from par_runtime.bench.subjects import baselines

    real = baselines.importlib.import_module

    def missing(name: str) -> object:
        if name.startswith("par_export"):
            raise ModuleNotFoundError("no", name="torch")
        return real(name)

    monkeypatch.setattr(baselines.importlib, "import_module", missing)
    assert main(["bench", str(tiny), "--device", "cpu", "--against", "n1", "--quiet"]) == 2
    assert (
        "the n1 baseline needs torch, which is not installed; pip install 'onnxruntime>=1.23' 'torch>=2.9' "
        in capsys.readouterr().err
    )


def test_rows_that_are_read_are_not_written_over(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, link = tmp_path / "old.jsonl", tmp_path / "new.jsonl", tmp_path / "link.html"
    assert main(["bench", str(tiny), "--device", "cpu", "--repetitions", "1", "--no-limits", "--json", str(old)]) == 0
    new.write_bytes(old.read_bytes())
    link.symlink_to(old)
    before = old.read_bytes()
    two = ["bench", str(new), "--compare", str(old)]
    measure = ["bench", str(tiny), "--device", "cpu", "--repetitions", "1", "--compare", str(old)]
    capsys.readouterr()
    for command, option, path, what in (
        (two, "--csv", new, "the rows to compare"),
        (two, "--html", link, "--compare"),
        (two, "--json", old, "--compare"),
        (measure, "--csv", old, "--compare"),
    ):
        assert main([*command, option, str(path)]) == 2
        error = capsys.readouterr().err
        assert error == f"parvis: error: {path} is a file of {what}, and would be lost; give another name\n"
        assert old.read_bytes() == new.read_bytes() == before


def test_a_batch_that_nothing_could_hold_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny), "--images", "99999999"]) == 2
    assert capsys.readouterr().err == (
        "parvis: error: --images 99999999: expected at most 100000, which are made at once\n"
    )


def test_what_is_kept_until_the_run_ends_has_a_name_that_nothing_else_has(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FILE.part beside FILE, or where that is taken, by rows that are read or a file of the user, FILE.part2."""
    monkeypatch.chdir(tmp_path)
    measure = ["bench", str(tiny), "--device", "cpu", "--repetitions", "1", "--no-limits"]
    for command, message in (
        ([*measure, "--json", "new", "--csv", "new.part"], "--csv new.part is where rows for --json are kept until"),
        ([*measure, "--html", "new", "--json", "new.part"], "--json new.part is where rows for --html are kept until"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    assert main([*measure, "--json", "rows.part"]) == 0
    rows = Path("rows.part").read_bytes()
    Path("rows.csv.part").write_bytes(b"notes")
    Path("rows.csv").write_bytes(b"old")
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    real = Journal.keep

    def stops(self: Journal, key: object, make: journal.MakeRows) -> None:
        real(self, key, make)
        if make():
            assert json.loads(Path("rows.part2").read_text().splitlines()[0])["kind"] == "measured"
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", stops)
        assert main([*measure, "--compare", "rows.part", "--json", "rows", "--csv", "rows.csv"]) == 130
    assert "they are in rows, rows.csv.part2" in capsys.readouterr().err
    assert main([*measure, "--json", "rows"]) == 0
    assert [Path(name).read_bytes() for name in ("rows.part", "rows.csv.part", "rows.csv")] == [rows, b"notes", b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows", "rows.csv", "rows.csv.part", "rows.csv.part2", "rows.part",
    ]  # fmt: skip
