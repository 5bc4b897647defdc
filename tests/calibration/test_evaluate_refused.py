"""``parvis evaluate`` with bad input: one line that says what was given and how to mend it, and nothing is written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import MODELS, NAMES, TINY, changed, doctored, refused, samples, without_encoder
from recipe_scripts import full_disk, raw_folder

from par_calibration import heldout
from par_calibration.cli.evaluate import main
from par_calibration.evaluate import Request, evaluate
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError

LABELS = [i % 3 for i in range(18)]  #: the last three classes have no images


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def given(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real images in the raw form, ``codes.npz``, samples and other bundles; nothing is added to it."""
    folder = tmp_path_factory.mktemp("given")
    made = pipeline.generate(LABELS, seed=7).images
    assert made is not None
    raw_folder(folder / "raw", made, np.array(LABELS), NAMES)
    heldout.write(folder / "codes.npz", pipeline.encode(made), LABELS)
    whole = samples(pipeline, folder / "s.npz", 18, labels="balanced", seed=0)
    samples(pipeline, folder / "part.npz", 9, labels="balanced", part=(1, 3))  # of classes 0, 1 and 2, and too few
    samples(pipeline, folder / "resized.npz", 3, size=8)
    doctored(whole, folder / "classes.npz", classes=7)
    (folder / "cut.npz").write_bytes(whole.read_bytes()[:-40])
    doctored(whole, folder / "shape.npz", stop=8)
    (folder / "text.npz").write_text("hello")
    changed(folder / "renamed", lambda manifest: manifest.update(class_names=[*NAMES[:5], "toad"]))
    without_encoder(folder / "bare")
    (folder / "file").write_text("")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


RAW = "{given}/raw"
ROWS = " ".join(map(str, range(1, 101)))
CASES = {
    # what is no number, or out of range
    "TINY --held-out 0": "--held-out 0: expected 1 or more",
    "TINY --shown 0": "--shown 0: expected 1 to 1000",
    "TINY --batch 0": "--batch 0: expected 1 or more",
    "TINY --batch 5000": "--batch 5000: expected 1 to 4096",
    "TINY --threads -1": "--threads -1: expected 1 or more",
    "TINY --generated -1": "--generated -1: expected 0 to 100000",
    "TINY --generated 15": "--generated 15: expected 16 or more, which a distance takes, or 0",
    "TINY --seed -1": "seed -1: expected a whole number 0 .. 2**64-1",
    "TINY --seed 18446744073709551616": "seed 18446744073709551616: expected a whole number 0 .. 2**64-1",
    "TINY --guidance 1,x": "argument --guidance: invalid number value: '1,x'; 'parvis evaluate --help' lists",
    "TINY --top-k 0.5": "argument --top-k: invalid whole number value: '0.5'; 'parvis evaluate --help' lists",
    "TINY --guidance 1 -2": "guidance -2.0: expected 0 or more",
    "TINY --temperature nan": "temperature nan: expected 0 or more, within fp32",
    "TINY --top-k -1": "top_k -1: expected a whole number, 0 (all codes) or more",
    "TINY --top-p 0.5 1.5": "top_p 1.5: expected 0 to 1",
    # settings that go beyond what can be done, or do nothing
    f"TINY TINY --guidance {' '.join(map(str, range(33)))}": "33 settings of 2 bundles: expected at most 64 together; "
    "give fewer values",
    f"TINY --guidance {ROWS} --temperature {ROWS} --top-k {ROWS} --top-p 0.{ROWS.replace(' ', ' 0.')}": (
        "90000000 settings of 1 bundles: expected at most 64 together"  # 0.1, 0.10 and 0.100 are one number
    ),
    "TINY --generated 0 --guidance 2 --top-p 1": "--guidance, --top-p: no images are generated, so there is nothing to "
    "set; leave it out, or give --generated N",
    "TINY --samples {given}/s.npz --top-k 2": "--top-k: no images are generated, so there is nothing to set",
    "TINY --generated 0 --sheet {new}": "--sheet {new}: no images are compared; leave it out, or give --generated N or "
    "--samples",
    "TINY --generated 0 --features-of TINY": "--features-of TINY: no images are compared; leave it out",
    # bundles
    "": "the following arguments are required: BUNDLE",
    "{given}/none": "{given}/none: no such folder; give the path of a bundle",
    "TINY {given}/raw": "{given}/raw: holds no manifest.json, so it is not a bundle; make one",
    "TINY {demo}": "{demo}: is of other images than TINY (classes: 12, there 6); give bundles of the same classes and "
    "sizes",
    "TINY {given}/renamed": "{given}/renamed: is of other images than TINY (class names: others); give bundles",
    "TINY --features-of {demo}": "{demo}: is of other images than TINY (classes: 12, there 6)",
    "{demo} --features-of {demo}-n1": "--features-of {demo}-n1: has no encoder, whose features are compared; give a "
    "bundle that was exported with its encoder",
    "TINY --features-of {given}/none": "{given}/none: no such folder; give the path of a bundle",
    "TINY --device gpu": "device 'gpu': expected auto, cpu, cuda",
    # real images; those of folders are in test_pictures.py
    "TINY --real {given}/none": "{given}/none: missing; expected a folder with one folder of pictures for each class",
    "TINY --real {given}/text.npz": "{given}/text.npz: not a file of arrays (File is not a zip file); expected a",
    "TINY --real {given}/bare": "--real {given}/bare: holds no folders; expected a folder with one folder of pictures",
    "{fashion} --real {given}/raw": "--real {given}/raw: holds images, {fashion} makes clips; give clips",
    "{demo} --real {given}/codes.npz": "{given}/codes.npz: its tokens have shape (18, 64); expected [M,256]",
    "TINY --label foxes": "unknown label 'foxes'; this model has 6 classes: red fox, arctic fox,",
    "TINY --real {given}/raw --label 5 3": "--real {given}/raw: holds none of these classes; give others with --label",
    "TINY --real {given}/codes.npz --label 5": "{given}/codes.npz: holds no images of these classes; give others with",
    # samples
    "TINY --samples {given}/none.npz": "{given}/none.npz: no such file or folder; check the name",
    "TINY --samples {given}/s.npz {given}/text.npz": "{given}/text.npz: is no file of 'parvis sample', or is damaged;",
    "TINY --samples {given}/cut.npz": "{given}/cut.npz: is no file of 'parvis sample', or is damaged; give one that it",
    "TINY --samples {given}/shape.npz": "{given}/shape.npz: is no file of 'parvis sample', or is damaged; give one",
    "TINY --samples {given}/codes.npz": "{given}/codes.npz: is no file of 'parvis sample', or is damaged; give one",
    "TINY --samples {given}/resized.npz": "--samples {given}/resized.npz: images of shape [8, 8, 3]; TINY makes "
    "[16, 16, 3]: give files that were made without --size",
    "TINY --samples {given}/classes.npz": "--samples {given}/classes.npz: of a bundle of 7 classes; TINY has 6: give "
    "files of bundles like it",
    "TINY --samples {given}/part.npz": "--samples {given}/part.npz: holds 3 images; expected 16 or more, which a "
    "distance takes",
    "TINY --generated 100001": "--generated 100001: expected 0 to 100000",
    "{given}/bare --sheet {given}/bare/new.png": "--sheet: would write {given}/bare/new.png, in the folder of "
    "--bundle {given}/bare",
    "TINY --samples {given}/part.npz --label 5": "--samples {given}/part.npz: holds no images of these classes; give "
    "others with --label",
    # the sheet
    "TINY --real {given}/codes.npz --sheet {given}/bare/../codes.npz": "--sheet: would write {given}/bare/../codes.npz"
    ", which is --real {given}/codes.npz; give another place, outside of the inputs",
    "TINY --real {given}/raw --sheet {given}/raw/a/b.png": "--sheet: would write {given}/raw/a/b.png, in the folder of "
    "--real {given}/raw; give another place",
    "TINY --samples {given}/part.npz {given}/s.npz --sheet {given}/s.npz": "--sheet: would write {given}/s.npz, which "
    "is --samples {given}/s.npz",
    "TINY --sheet {given}": "{given} is a folder; give a file name",
    "TINY --sheet {given}/bare/manifest.json": "{given}/bare/manifest.json is a file of the bundle or engine in "
    "{given}/bare; give another name",
    "TINY --sheet {given}/file/a.png": "{given}/file is a file where a folder is expected; choose another place",
    "TINY --sheet /proc/none/a.png": "/proc/none/a.png: no such file or folder; check the name, or choose another",
}  # fmt: skip


@pytest.mark.parametrize("command", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        places = {"given": given, "new": tmp_path / "a.png", "demo": MODELS / "demo", "fashion": MODELS / "fashion"}
        return text.format(**places).replace("TINY", str(TINY))

    before = contents(given)
    error = refused(capsys, *map(filled, command.split()))
    assert error.startswith(filled(CASES[command]))
    assert contents(given) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["TINY --real {given}/raw", "TINY --real {given}/none", "TINY --label x"])
def test_bad_input_is_said_before_a_bundle_is_loaded(
    command: str, given: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading one takes minutes where it is large."""
    loaded: list[object] = []
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: loaded.append(1) or pytest.fail("is loaded"))
    more = ["--samples", str(given / "resized.npz")] if command.endswith("raw") else []
    refused(capsys, *(word.format(given=given).replace("TINY", str(TINY)) for word in command.split()), *more)
    assert not loaded


def test_a_bundle_that_holds_none_of_the_classes_is_refused_before_any_other_is_measured(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.zeros((2, 64), np.int64)
    bundles = [shutil.copytree(TINY, tmp_path / name) for name in ("a", "b")]
    for bundle, labels in zip(bundles, ([0, 1], [0, 0]), strict=True):
        heldout.attach(Bundle.open(bundle), tokens, labels)
    error = refused(capsys, *bundles, "--label", "1")
    assert error == f"{bundles[1]}/heldout.npz: holds no images of these classes; give others with --label"


def test_a_sheet_that_cannot_be_written_does_not_lose_the_figures(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(TINY), "--real", str(given / "raw"), "--generated", "16", "--sheet", str(tmp_path / "a.png")]
    command += ["--threads", "1"]
    with full_disk(1000):
        assert main(command) == 2
    printed = capsys.readouterr()
    assert "Images beside the held-out ones" in printed.out
    assert printed.err.startswith(f"parvis: error: {tmp_path}/a.png is larger than")
    assert printed.err.count("\n") == 1
    monkeypatch.setattr("par_runtime.images.png.MOST_PIXELS", 2 * 12 * 16 * 16 - 1)
    assert main([*command, "--quiet"]) == 2
    assert capsys.readouterr() == (
        "",
        f"parvis: error: --sheet {tmp_path}/a.png: 2 rows of 12 images of 16x16 pixels are more than other programs "
        "open; give fewer than --shown 12\n",
    )
    assert main([*command, "--quiet", "--shown", "11"]) == 0
    bare = [str(given / "bare"), "--real", str(given / "codes.npz"), "--sheet", str(tmp_path / "b.png")]
    assert main(bare) == 2
    printed = capsys.readouterr()
    assert "note: No images are compared: no bundle has an encoder" in printed.out
    assert printed.err == (
        f"parvis: error: --sheet {tmp_path}/b.png: no images were compared, so there are none to show; see the notes\n"
    )
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundles": [7]}, "bundles 7: expected the name of a file, as str or Path"),
        ({"real": b"x"}, "real b'x': expected the name of a file"),
        ({"held_out": 0}, "held_out 0: expected"),
        ({"generated": -1}, "generated -1: expected"),
        ({"batch": 1.5}, "batch 1.5: expected"),
        ({"seed": -1}, "seed -1: expected"),
        ({"guidance": "x"}, "guidance 'x': expected"),
        ({"bundles": None}, "bundles None: expected the name"),
        ({"samples": object()}, "samples: expected one value or a list, not a object"),
        ({"on_image": 3}, "on_image"),
        ({"say": None}, "say: expected a function"),
        ({"load": [1]}, "say: expected a function, and load: a dict"),
        ({"shown": 1001}, "shown 1001: expected 1 to 1000"),
        ({"labels": ["unicorn"]}, "unknown label 'unicorn'"),
    ],
)
def test_a_request_in_python_says_what_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        evaluate(Request(**{"bundles": str(TINY), "generated": 0, **given}))
