"""The recipe's last step: from trained weights to bundles that ship, and a sheet of all of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_scripts import scripts

from conftest import golden_config, golden_weights
from par_model.transformer import PAR
from par_runtime.bundle import Bundle

CLASSES = 4
MODELS = Path(__file__).parents[2] / "models"
LOOSE = "--refine 4 --budget top1=0.5,kl=none,kl_p95=none,kl_inputs=none,likelihood=none,layer=none"
OPTIONS = "--group 32 --generated 0 --images 4 --samples 512 --budget top1=0.9 --quiet"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``bundles.py``."""
    with scripts("bundles") as (module,):
        yield module


@pytest.fixture
def results(golden: dict[str, dict[str, Any]], small_vq: Any, tmp_path: Path) -> Path:
    """What ``gpu.py`` leaves: three small models in halves with golden weights, their tokenizer, held-out codes."""
    folder = tmp_path / "results"
    folder.mkdir()
    for n in (1, 4, 16):
        config = replace(golden_config(golden["par_n4_grid8"]), group_size=n, n_classes=CLASSES)
        state = {key: value.half() for key, value in golden_weights(PAR(config)).state_dict().items()}
        names = [f"class {i}" for i in range(CLASSES)]
        content = {"model": state, "config": asdict(config) | {"kind": "par"}, "class_names": names}
        torch.save(content, folder / f"model-n{n}.pt")
    vq = {"model": small_vq.state_dict(), "config": asdict(small_vq.config) | {"kind": "vq"}}
    torch.save(vq, folder / "tokenizer.pt")
    codes = np.random.default_rng(0).integers(0, 512, (8, 8, 8)).astype(np.uint16)
    np.savez(
        folder / "val.npz",
        codes=codes,
        labels=np.arange(8, dtype=np.uint8) % CLASSES,
        class_names=np.array([f"class {i}" for i in range(CLASSES)]),
    )
    return folder


@pytest.mark.slow
def test_three_bundles_and_a_sheet(
    recipe: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(results), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert recipe.main([*command, "--calibrate-options", OPTIONS]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    for n, name, calls in ((4, "demo", 19), (1, "demo-n1", 64), (16, "demo-n16", 19)):
        bundle = Bundle.open(out / name, verify="full")
        assert (bundle.name, bundle.quantised) == (name, "int8")
        assert "heldout.npz" in bundle.files
        assert (bundle.defaults.guidance, bundle.defaults.top_p) == (1.5, 0.85)
        assert f"| n = {n} | {calls} | " in printed
    with Image.open(out / "siblings.png") as sheet:
        assert sheet.size == (2 * CLASSES * 16, 2 * (3 * (12 + 2 * 16 + 8) - 8))
    assert recipe.main([*command, "--calibrate-options", OPTIONS, "--most-mb", "0.01"]) == 1
    assert "--most-mb 0.01 allows less" in capsys.readouterr().err


@pytest.mark.slow
def test_siblings_of_a_bundle_that_is_there(
    recipe: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle keeps every byte, and they hold its held-out images, each in its own order."""
    work = ["--work", str(tmp_path / "work")]
    first = [str(results), *work, "--out", str(tmp_path / "first"), "--calibrate-options", OPTIONS]
    assert recipe.main(first) == 0, capsys.readouterr()
    there = tmp_path / "first" / "demo"
    before = {file: file.read_bytes() for file in there.iterdir()}
    for name in ("model-n4.pt", "val.npz"):
        (results / name).unlink()
    again = [str(results), *work, "--out", str(tmp_path / "out"), "--calibrate-options", OPTIONS]
    again += ["--n4", str(there), "--sheet", str(tmp_path / "sheet.png")]
    assert recipe.main(again) == 0, capsys.readouterr()
    assert {file: file.read_bytes() for file in there.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo-n1", "demo-n16"]
    assert capsys.readouterr().out.index("| n = 1 | 64 | ") > 0
    images = []
    for path in (there, tmp_path / "out" / "demo-n1", tmp_path / "out" / "demo-n16"):
        bundle = Bundle.open(path)
        with np.load(path / "heldout.npz") as stored:
            raster = np.empty_like(stored["tokens"])
            raster[:, list(bundle.order)] = stored["tokens"]
            images.append((raster.tolist(), stored["labels"].tolist()))
    assert images[0] == images[1] == images[2]
    assert images[0][1] == [0, 1, 2, 3, 0, 1, 2, 3]
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "first" / "siblings.png") as theirs:
        np.testing.assert_array_equal(np.asarray(sheet), np.asarray(theirs))

    small = [*again, "--out", str(tmp_path / "small"), "--compact", "1", "--calibrate-options", f"{OPTIONS} {LOOSE}"]
    assert recipe.main(small) == 0, capsys.readouterr()
    n1, n16 = (Bundle.open(tmp_path / "small" / name) for name in ("demo-n1", "demo-n16"))
    assert (n1.quantised, n16.quantised) == ("int4", "int8")
    assert ("encoder" in n1.graphs, "encoder" in n16.graphs) == (False, True)

    def refused(text: str, *more: str) -> None:
        assert recipe.main([*again, *more]) == 2
        assert text in capsys.readouterr().err
        assert {file: file.read_bytes() for file in there.iterdir()} == before

    refused("would replace", "--n4", str(tmp_path / "out" / "demo-n1"))
    refused("is the folder of the bundle of --n4", "--out", str(there))
    refused("would write", "--sheet", str(there / "sheet.png"))
    refused("ends in .png", "--sheet", str(there / "weights.data"))
    vq = torch.load(results / "tokenizer.pt", weights_only=True)
    vq["model"]["decoder.conv_out.bias"] += 0.2
    torch.save(vq, results / "tokenizer.pt")
    refused(f"tokenizer.pt: is not the tokenizer of {there}, the same tokens give other images")


def test_what_it_cannot_use_is_one_line_before_anything_is_made(
    recipe: ModuleType, results: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    def refused(text: str, given: Path, work: Path, out: Path, *more: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert recipe.main([str(given), "--work", str(work), "--out", str(out), *more]) == 2, text
        printed = capfd.readouterr()
        assert text in printed.err
        assert printed.err.startswith("bundles.py: error: ")
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    work, out = tmp_path / "work", tmp_path / "out"
    refused("has no tokenizer.pt, model-n4.pt, model-n1.pt, model-n16.pt, val.npz; expected", tmp_path, work, out)
    refused("none: no such folder; expected trained weights, as gpu.py", tmp_path / "none", work, out)
    for option, value, text in (
        ("--most-mb", "nan", "--most-mb nan: expected a number above 0"),
        ("--guidance", "-1", "--guidance -1.0: expected 0 to 1000"),
        ("--top-p", "2", "--top-p 2.0: expected a number above 0, at most 1"),
        ("--seed", "-1", "--seed -1: expected 0 to"),
        ("--calibrate-options", "--nix 3", "--calibrate-options: unrecognized arguments: --nix 3"),
        ("--calibrate-options", "'", '--calibrate-options "\'": no closing quotation'),
    ):
        refused(text, results, work, out, f"{option}={value}")
    refused("one is in the other; give two folders side by side", results, work, work)
    refused("one is in the other", results, work, work / "demo")
    refused("one is in the other", results, out / "work", out)
    refused("is the folder of the results", results, work, results)
    refused("is the folder of the results", results, results, out)
    refused("--out", results, work, tmp_path / "file")
    refused("expected a file's name that ends in .png", results, work, out, "--sheet", str(tmp_path))
    refused("is not the tokenizer of", results, work, out, "--n4", str(MODELS / "demo"))
    refused("expected a bundle of n = 4 (it has n = 16)", results, work, out, "--n4", str(MODELS / "demo-n16"))
    whole = str(MODELS / "demo")
    refused("--compact 4: ", results, work, out, "--n4", whole, "--compact", "4", "16")
    refused("stays as it is; give of 1, 16", results, work, out, "--n4", whole, "--compact", "4")
    refused("none: no such folder; give the path of a bundle", results, work, out, "--n4", str(tmp_path / "none"))
    (tmp_path / "demo").mkdir()
    results.rename(tmp_path / "demo" / "inner")
    refused("would replace", tmp_path / "demo" / "inner", tmp_path, tmp_path.parent / "elsewhere")
    (tmp_path / "demo" / "inner").rename(results)
    for name in ("model-n1.pt", "tokenizer.pt", "val.npz"):
        whole = (results / name).read_bytes()
        (results / name).write_bytes(whole[: len(whole) // 2])
        refused(f"{name}: not a ", results, work, out)
        (results / name).write_bytes(whole)
    (results / "model-n1.pt").write_bytes((results / "model-n4.pt").read_bytes())
    refused("model-n1.pt: has n, codes, classes and grid (4, ", results, work, out)


def test_a_report_is_named_only_where_there_is_one(recipe: ModuleType, tmp_path: Path) -> None:
    assert recipe.why(tmp_path, ["demo", "demo-n1"]) == "what is printed above says why"
    (tmp_path / "demo-n1.html").touch()
    assert recipe.why(tmp_path, ["demo", "demo-n1"]) == f"see {tmp_path / 'demo-n1.html'}"


def test_short_times_are_said_in_milliseconds(recipe: ModuleType) -> None:
    assert [recipe.duration(seconds) for seconds in (2.345, 0.234, 0.0123, 0.0042)] == [
        "2.35 s",
        "234 ms",
        "12 ms",
        "4.2 ms",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "starts"),
    [
        ("siblings", ["siblings/model.pt", "siblings/model.pt"]),
        ("further-siblings", ["further-siblings/from-n1/model.pt", "further-siblings/from-n16/model.pt"]),
    ],
)
def test_make_trains_both_siblings_from_the_right_weights(target: str, starts: list[str], tmp_path: Path) -> None:
    command = ["make", "-n", "-C", str(MODELS / "recipe"), f"WORK={tmp_path}", target]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    trainings = [line.split() for line in planned.splitlines() if "parvis train " in line]
    assert [words[words.index("--init") + 1] for words in trainings] == [f"{tmp_path}/{start}" for start in starts]
    assert [words[words.index("--group-size") + 1] for words in trainings] == ["1", "16"]
    assert {words[words.index("--codes") + 1] for words in trainings} == {f"{tmp_path}/siblings/train-40000.npz"}
    assert ("from_bundle.py ../demo-n16 " in planned) == (target == "further-siblings")
    assert f"bundles.py {tmp_path}/{target} --n4 ../demo " in planned
