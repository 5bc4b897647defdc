"""``parvis sample``: what it prints, what it refuses, and that the same command goes on after a stop."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tqdm
from command_line import run

from par_runtime import CudaError, Pipeline
from par_runtime.cli import sample
from par_runtime.samples import file as sample_file
from par_runtime.samples.reading import read_about
from par_runtime.system import naming


def test_images_of_the_seeds_in_one_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "a.npz"
    options = ["--count", 5, "--seed", 3, "--size", 8, "--labels", "balanced", "--top-k", 9, "--threads", 1]
    assert run("sample", tiny, "--out", out, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    words = "balanced labels, guidance 1.5, temperature 1, top-k 9, top-p 1"
    assert lines[0] == f"{out}: 5 images of 8x8, {words}"
    assert re.fullmatch(r"5 made now in \d s, onnxruntime-cpu .*", lines[1])
    with np.load(out) as file, Pipeline.load(tiny, "cpu", threads=1, selftest=False) as pipeline:
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4]
        assert file["arr_0"].shape == (5, 8, 8, 3)
        expected = pipeline.generate(list(range(5)), top_k=9, seed=3).images
    assert expected is not None
    mean = expected.mean((1, 2))
    assert np.abs(file_mean(out) - mean).max() < 3  # the same images, smaller


def file_mean(path: Path) -> np.ndarray:
    with np.load(path) as file:
        mean: np.ndarray = file["arr_0"].mean((1, 2))
        return mean


def test_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.npz"
    assert run("sample", tiny, "--out", out, "--count", 3, "--part", "2/2", "--greedy", "--threads", 1, "--json") == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert printed.err == ""
    assert row.pop("seconds") > 0
    assert row.pop("bundle")["name"] == "tiny"
    assert row.pop("backend").startswith("onnxruntime-cpu")
    assert row.pop("decoder")
    settings = row.pop("settings")
    assert (settings["greedy"], settings["guidance"]) == (True, 1.5)
    assert row == {
        "written": str(out),
        "images": 2,
        "made_now": 2,
        "shape": [16, 16, 3],
        "first": 1,
        "count": 3,
        "seed": 0,
        "labels": "random",
    }


def test_parts_are_joined(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sample", tiny, "--count", 5, "--threads", 1, "--quiet"]
    assert run(*options, "--out", tmp_path / "whole.npz") == 0
    parts = [tmp_path / f"{i}.npz" for i in (1, 2)]
    for i, path in enumerate(parts, 1):
        assert run(*options, "--part", f"{i}/2", "--out", path) == 0
    assert capsys.readouterr().out == ""
    assert run("sample", tiny, "--join", *parts, "--out", tmp_path / "all.npz") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'all.npz'}: 5 images of 16x16, of 2 files\n"
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert run("sample", "--out", tmp_path / "two.npz", "--join", *parts, tiny) == 0  # the bundle last
    assert run("sample", tiny, "--join", *parts, "--out", tmp_path / "x.npz", "--seed", 0) == 2
    why = "--join makes no images, and takes the rest from the parts; leave it out"
    assert capsys.readouterr().err == f"parvis: error: --seed: {why}\n"
    for option in (["--greedy"], ["--device", "cpu"], ["--no-selftest"], ["--threads", 1], ["--cache", "bf16"]):
        assert run("sample", tiny, "--join", *parts, "--out", tmp_path / "x.npz", *option) == 2
        assert capsys.readouterr().err == f"parvis: error: {option[0]}: {why}\n"
    assert run("sample", tiny, "--join", parts[0], "--out", tmp_path / "x.npz") == 2
    error = f"parvis: error: {parts[0]}: ends before image 2 of 5; give the parts behind it too\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("", "the following arguments are required: --out"),
        ("--out .", ".: expected a name that ends in .npz, for instance samples.npz"),
        ("--out /", "/: expected a name that ends in .npz"),
        ("--out TMP/.npz", ".npz: expected a name that ends in .npz, for instance samples.npz"),
        ("--out TMP/a.png", "a.png: expected a name that ends in .npz"),
        ("--out TMP/there.npz", "there.npz: is there already; give another name, or remove it"),
        ("--out TMP/there.npz/a.npz", "there.npz is a file where a folder is expected"),
        ("--out TMP/a.npz --count 0", "count 0: expected 1 to 10000000 images"),
        ("--out TMP/a.npz --part 1", "--part 1: expected I/K, for instance 2/8, the second of eight parts"),
        ("--out TMP/a.npz --part 3/2", "part: the first number 3: expected 1 to 2, the part to make"),
        ("--out TMP/a.npz --part 2/x", "--part 2/x: expected I/K"),
        ("--out TMP/a.npz --batch 0", "--batch 0: expected 1 or more"),
        ("--out TMP/a.npz --batch 999999", "--batch 999999: expected 1 to"),
        ("--out TMP/a.npz --size 5000", "size 5000: expected 1 to 4096 pixels of a side"),
        ("--out TMP/a.npz --labels all", "argument --labels: invalid choice: 'all'"),
        ("--out TMP/a.npz --top-p 2", "top_p 2.0: expected 0 to 1"),
        ("--out TMP/a.npz --seed -1", "seed -1: expected 0 to 18446744073709551615"),
        ("--out TMP/a.npz --device gpu", "device 'gpu': expected auto, cpu, cuda"),
        ("--out TMP/a.npz --join", "argument --join: expected at least one argument"),
        ("--out TMP/a.npz --join TMP/none.npz", "none.npz: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(
    tiny: Path, tmp_path: Path, options: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.npz").write_text("hours of work")
    assert run("sample", tiny, *options.replace("TMP", str(tmp_path)).split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("parvis: error: ")
    assert text in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_text() == "hours of work"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_made_and_the_same_command_goes_on(
    tiny: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "a.npz", tmp_path / "a.npz.part"
    options = ["sample", str(tiny), "--out", str(out), "--count", "400", "--batch", "2", "--threads", "1"]
    code = "import sys; from par_runtime.cli import dispatch; sys.exit(dispatch.main(sys.argv[1:]))"
    places = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | places, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with child:
        end = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 8000):
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    kept = rf"images are in {re.escape(str(part))}, and the same command goes on\n"
    there = re.fullmatch(rf"parvis: stopped; (\d+) of 400 {kept}", said)
    assert there, said
    assert not out.exists()
    assert run(*options) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("parvis: ")
    assert printed.err.endswith(" of 400 images are there already\n")
    now = int(printed.err.split()[1])
    assert int(there[1]) <= now <= int(there[1]) + 2  # a batch that was written when the signal came
    assert f"{400 - now} made now in" in printed.out
    assert read_about(out)["count"] == 400
    with np.load(out) as file:
        assert file["arr_0"].shape == (400, 16, 16, 3)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left for PART; free some: KEPT"),
        (
            OSError(errno.EFBIG, "large"),
            "PART is larger than this system or its limit (ulimit -f) allows; choose another place: KEPT",
        ),
        (
            OSError(errno.EIO, "broken"),
            "PART: the disk reports an error (EIO); check the disk, or choose another place: KEPT",
        ),
        (MemoryError("many"), "not enough memory (many); free some, or give a smaller --batch: KEPT"),
        (CudaError("the GPU has failed"), "the GPU has failed: KEPT"),
    ],
)
def test_whatever_ends_a_run_what_is_made_stays(
    tiny: Path,
    tmp_path: Path,
    error: Exception,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, part = tmp_path / "a.npz", tmp_path / "a.npz.part"
    options = ["sample", tiny, "--out", out, "--count", 6, "--batch", 2, "--threads", 1]
    real = sample_file.SampleFile.append

    def append(self: sample_file.SampleFile, images: np.ndarray) -> None:
        if self.done == 4:
            with naming(part):
                raise error
        real(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(sample_file.SampleFile, "append", append)
        assert run(*options) == 2
    kept = f"4 of 6 images are in {part}, and the same command goes on"
    wanted = text.replace("PART", str(part)).replace("KEPT", kept)
    assert capsys.readouterr().err == f"parvis: error: {wanted}\n"
    assert run(*options) == 0
    assert capsys.readouterr().err == "parvis: 4 of 6 images are there already\n"
    with np.load(out) as file:
        assert file["arr_0"].shape == (6, 16, 16, 3)


def test_a_bar_goes_on_with_the_time_of_this_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bars: list[dict[str, object]] = []
    real = tqdm.tqdm

    def made(**options: object) -> tqdm.tqdm:  # type: ignore[type-arg]
        bars.append(options)
        return real(**options)

    monkeypatch.setattr("tqdm.tqdm", made)
    out = tmp_path / "a.npz"
    options = ["sample", tiny, "--out", out, "--count", 6, "--batch", 2, "--threads", 1]
    with monkeypatch.context() as patch:
        patch.setattr(sample_file.SampleFile, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options)
    with (tmp_path / "a.npz.part").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    assert run(*options) == 0
    assert [(bar["initial"], bar["total"], bar["unit"]) for bar in bars if bar["unit"] == "image"] == [
        (0, 6, "image"),
        (5, 6, "image"),
    ]


def test_where_no_terminal_is_a_line_says_how_long_it_takes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "LINES_S", 0)
    options = ["sample", tiny, "--count", 6, "--batch", 2, "--threads", 1]
    assert run(*options, "--out", tmp_path / "a.npz") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+ s", "T", line) for line in lines] == [f"parvis: {i} of 6 images, T more" for i in (2, 4)]
    assert run(*options, "--out", tmp_path / "b.npz", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (119.6, "2 min"), (3599, "1 h 0 min"), (59 * 60, "59 min"), (3 * 3600 + 1230, "3 h 20 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert sample.duration(seconds) == text
