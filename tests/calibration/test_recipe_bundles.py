"""The recipe's last step: from trained weights to bundles that ship, and a sheet of all of them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
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
from par_model.training.files import alone_in
from par_model.transformer import PAR
from par_runtime.bundle import Bundle, seal

CLASSES = 4
SHARE = "expected 0 to 1, the share of the weights after"
DATA = "expected subset, fresh or train-40000"
MODELS = Path(__file__).parents[2] / "models"
ANY = "--budget top1=0.5,kl=none,kl_p95=none,kl_inputs=none,likelihood=none,layer=none"
FEW = "--generated 0 --images 4 --samples 512 --quiet"
OPTIONS = f"--group 32 --budget top1=0.9 {FEW}"


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
        assert (bundle.defaults.guidance, bundle.defaults.top_p) == (1.5, 0.8)
        assert f"| n = {n} | {calls} | " in printed
    with Image.open(out / "siblings.png") as sheet:
        assert sheet.size == (2 * CLASSES * 16, 2 * (3 * (12 + 2 * 16 + 8) - 8))
    assert recipe.main([*command, "--calibrate-options", OPTIONS, "--most-mb", "0.01"]) == 1
    assert "--most-mb 0.01 allows less" in capsys.readouterr().err


@pytest.mark.slow
def test_siblings_of_a_bundle_that_is_there(
    recipe: ModuleType,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bundle keeps every byte, and they hold its held-out images, each in its own order."""
    monkeypatch.setattr(recipe, "FOUND_AGAIN", 0.0)  # the small tokenizer was never trained
    work = ["--work", str(tmp_path / "work")]
    first = [str(results), *work, "--out", str(tmp_path / "first"), "--calibrate-options", OPTIONS]
    assert recipe.main(first) == 0, capsys.readouterr()
    there = tmp_path / "first" / "demo"
    before = {file: file.read_bytes() for file in there.iterdir()}
    four = torch.load(results / "model-n4.pt", weights_only=True)
    for name in ("model-n4.pt", "val.npz"):
        (results / name).unlink()
    again = [str(results), *work, "--out", str(tmp_path / "out"), "--calibrate-options", OPTIONS]
    again += ["--take", str(there), "--sheet", str(tmp_path / "sheet.png")]
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

    small = [
        *again,
        "--out",
        str(tmp_path / "small"),
        "--compact",
        "1",
        "--calibrate-options",
        f"{OPTIONS} --refine 4 {ANY}",
    ]
    assert recipe.main(small) == 0, capsys.readouterr()
    n1, n16 = (Bundle.open(tmp_path / "small" / name) for name in ("demo-n1", "demo-n16"))
    assert (n1.quantised, n16.quantised) == ("int4", "int8")
    assert ("encoder" in n1.graphs, "encoder" in n16.graphs) == (False, True)

    def refused(text: str, *more: str) -> None:
        assert recipe.main([*again, *more]) == 2
        assert text in capsys.readouterr().err
        assert {file: file.read_bytes() for file in there.iterdir()} == before

    shutil.copytree(there, tmp_path / "odd" / "demo-n16")  # n = 4, by a name that is given to another
    refused("would replace", "--take", str(tmp_path / "odd" / "demo-n16"), "--out", str(tmp_path / "odd"))
    refused("is the folder of the bundle of --take", "--out", str(there))
    refused(f"--take {there}: has n = 4, as {there} has", "--take", str(there), str(there))
    everything = [str(there), *(str(tmp_path / "out" / name) for name in ("demo-n1", "demo-n16"))]
    refused("leaves no bundle to make", "--take", *everything)
    refused("would write", "--sheet", str(there / "sheet.png"))
    refused("ends in .png", "--sheet", str(there / "weights.data"))
    vq = torch.load(results / "tokenizer.pt", weights_only=True)
    good = (results / "tokenizer.pt").read_bytes()
    vq["model"]["decoder.conv_out.bias"] += 0.2
    torch.save(vq, results / "tokenizer.pt")
    refused(f"tokenizer.pt: is not the tokenizer of {there}, the same tokens give other images")
    (results / "tokenizer.pt").write_bytes(good)

    torch.save(four, results / "model-n4.pt")
    (results / "model-n1.pt").unlink()
    n1 = tmp_path / "out" / "demo-n1"
    other = [*again, "--take", str(n1), "--out", str(tmp_path / "whole"), "--fp16", "4"]
    assert recipe.main([*other, "--calibrate-options", f"{FEW} {ANY}"]) == 0, capsys.readouterr()
    made = {name: Bundle.open(tmp_path / "whole" / name, verify="full") for name in ("demo", "demo-n16")}
    assert [(bundle.quantised, bundle.precision) for bundle in made.values()] == [(None, "fp16"), ("int8", "fp16")]
    proof = made["demo"].calibration
    assert proof is not None
    assert (proof.weights, proof.arithmetic, proof.cache) == ("kept", "bf16", "bf16")
    for bundle in made.values():
        with np.load(bundle.path / "heldout.npz") as stored:
            raster = np.empty_like(stored["tokens"])
            raster[:, list(bundle.order)] = stored["tokens"]
            assert (raster.tolist(), stored["labels"].tolist()) == images[0]


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
        ("--calibrate-options", "--out zz", "has --out, which bundles.py sets itself; leave it out"),
        ("--calibrate-options", "--html zz", "has --html, which bundles.py sets itself"),
        ("--calibrate-options", "--json zz", "has --json, which bundles.py sets itself"),
        ("--calibrate-options", "--weights keep", "has --weights, which bundles.py sets itself"),
        ("--sheet", f"{out}/demo/a.png", "a.png: is in the folder of a bundle that is made; give another name"),
        ("--sheet", f"{work}/demo-n1/a.png", "a.png: is in the folder of a bundle that is made"),
        ("--sheet", f"{results}/val.npz/a.png", "val.npz is a file where a folder is expected; choose"),
    ):
        refused(text, results, work, out, f"{option}={value}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "demo-n1.json").write_text("{}")
    refused("full/demo-n1.json, no report of parvis calibrate; give another", results, tmp_path / "full", out)
    refused("x.png, another output of this", results, work, out / "x.png", "--sheet", str(out / "x.png"))
    refused("one is in the other; give two folders side by side", results, work, work)
    refused("one is in the other", results, work, work / "demo")
    refused("one is in the other", results, out / "work", out)
    refused("is the folder of the results", results, work, results)
    refused("is the folder of the results", results, results, out)
    refused("--out", results, work, tmp_path / "file")
    refused("expected a file's name that ends in .png", results, work, out, "--sheet", str(tmp_path))
    whole = str(MODELS / "demo")
    refused("is not the tokenizer of", results, work, out, "--take", whole)
    with scripts("from_bundle") as (from_bundle,):
        assert from_bundle.main([str(MODELS / "demo-n1"), "--out", str(tmp_path / "restored")]) == 0
    assert "holds no encoder; that of tokenizer.pt is random" in capfd.readouterr().out
    for n in (1, 4, 16):
        shutil.copy(results / f"model-n{n}.pt", tmp_path / "restored")
    refused("tokenizer.pt: its encoder gives 0 % of the tokens", tmp_path / "restored", work, out, "--take", whole)
    shutil.copytree(MODELS / "demo-n16", tmp_path / "n16")
    entries = json.loads((tmp_path / "n16" / "manifest.json").read_text())
    entries["class_names"] = entries["class_names"][::-1]
    (tmp_path / "n16" / "manifest.json").write_text(json.dumps(seal(entries)))
    names = f"{tmp_path / 'n16'}: class 0 is 'thumbs', not 'adventurer' as in {whole}; give bundles of the same classes"
    refused(f"--take {names}", results, work, out, "--take", whole, str(tmp_path / "n16"))
    fashion = str(MODELS / "fashion")
    refused("fashion: expected a bundle of n = 1, 4 or 16 (it has", results, work, out, "--take", fashion)
    for option in ("--compact", "--fp16"):
        refused(f"{option} 4: ", results, work, out, "--take", whole, option, "4", "16")
        refused("stays as it is; give of 1, 16", results, work, out, "--take", whole, option, "4")
    refused("one says int4, the other fp16", results, work, out, "--compact", "1", "16", "--fp16", "16")
    refused("none: no such folder; give the path of a bundle", results, work, out, "--take", str(tmp_path / "none"))
    (tmp_path / "demo").mkdir()
    results.rename(tmp_path / "demo" / "inner")
    refused("would replace", tmp_path / "demo" / "inner", tmp_path, tmp_path.parent / "elsewhere")
    (tmp_path / "demo" / "inner").rename(results)
    for name in ("model-n1.pt", "tokenizer.pt", "val.npz"):
        whole = (results / name).read_bytes()
        (results / name).write_bytes(whole[: len(whole) // 2])
        refused(f"{name}: not a ", results, work, out)
        (results / name).write_bytes(whole)
    turned = torch.load(results / "model-n16.pt", weights_only=True)
    turned["class_names"][:2] = ["class 1", "class 0"]
    torch.save(turned, results / "model-n16.pt")
    other = "model-n16.pt: class 0 is 'class 1', not 'class 0' as in tokenizer.pt and val.npz; give what was trained"
    refused(other, results, work, out)
    (results / "model-n1.pt").write_bytes((results / "model-n4.pt").read_bytes())
    refused("model-n1.pt: has n, codes, classes and grid (4, ", results, work, out)


@pytest.mark.parametrize("option", ["--work", "--out"])
def test_a_second_one_beside_it_makes_nothing(
    recipe: ModuleType, results: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    folders = {"--work": tmp_path / "work", "--out": tmp_path / "out"}
    with alone_in(option, folders[option]):
        assert recipe.main([str(results), *(f"{name}={path}" for name, path in folders.items())]) == 2
    text = f"bundles.py: error: {option} {folders[option]}: another process writes into it now; wait"
    assert capsys.readouterr().err.startswith(text)
    assert not [each for path in folders.values() if path.exists() for each in path.iterdir()]


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
    ("target", "starts", "options"),
    [
        ("siblings", {1: "siblings/model.pt", 16: "siblings/model.pt"}, "--take ../demo --compact 1"),
        (
            "further-siblings",
            {1: "further-siblings/from-n1/model.pt", 16: "further-siblings/from-n16/model.pt"},
            "--take ../demo --compact 1",
        ),
        (
            "further-siblings MORE_N=16\\ 4 MORE_DATA=subset",
            {16: "further-siblings/from-n16/model.pt", 4: "further-siblings/from-n4/model.pt"},
            "--take ../demo-n1 --fp16 4",
        ),
        (
            "further-siblings MORE_N=4\\ 16 MORE_DATA=fresh TRAIN_MORE='--muon-lr 0.01 --seed 2'",
            {16: "further-siblings/from-n16/model.pt", 4: "further-siblings/from-n4/model.pt"},
            "--take ../demo-n1 --fp16 4",
        ),
        (
            "further-siblings MORE_N=4",
            {4: "further-siblings/from-n4/model.pt"},
            "--take ../demo-n1 ../demo-n16 --fp16 4",
        ),
    ],
)
def test_make_trains_each_from_the_right_weights(
    target: str, starts: dict[int, str], options: str, tmp_path: Path
) -> None:
    planned = plan(tmp_path, *shlex.split(target))
    trainings = [line.split() for line in planned.stdout.splitlines() if "parvis train " in line]
    folder = f"{tmp_path}/further-siblings"
    if target != "siblings":
        for n, start in starts.items():
            averaged = f"average.py {tmp_path}/{start} {folder}/n{n}/model.pt --share 0.5 --out {folder}/model-n{n}.pt "
            assert averaged in planned.stdout
    trained = [(int(value(words, "--group-size")), value(words, "--init")) for words in trainings]
    assert sorted(trained) == sorted((n, f"{tmp_path}/{start}") for n, start in starts.items())
    codes = next((name for name in ("subset", "fresh") if name in target), "train-40000")
    if codes == "fresh":
        assert all(words[-4:] == ["--muon-lr", "0.01", "--seed", "2"] for words in trainings)
        assert f"subset.py --data {tmp_path}/train-140000 --without {tmp_path}/val --out" in planned.stdout
    assert {value(words, "--codes") for words in trainings} == {f"{tmp_path}/siblings/{codes}.npz"}
    for n, bundle in ((1, "../demo-n1"), (4, "../demo"), (16, "../demo-n16")):
        restored = f"from_bundle.py {bundle} --out {tmp_path}/further-siblings/from-n{n}" in planned.stdout
        assert restored == (n in starts and target != "siblings")
    (made,) = [line.split() for line in planned.stdout.splitlines() if " bundles.py " in line]
    command = f"{tmp_path}/{target.split()[0]} --work {tmp_path}/bundles --out {tmp_path}/shipped {options}".split()
    assert sorted(made[2:]) == sorted(command)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("given", ["", "4 5", "1 4 16", "4,16"])
def test_make_trains_one_or_two_of_the_three(given: str, tmp_path: Path) -> None:
    command = ["make", "-C", str(MODELS / "recipe"), f"WORK={tmp_path}", "PYTHON=true", "further-siblings"]
    done = subprocess.run([*command, f"MORE_N={given}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"MORE_N={given}: expected one or two of 1, 4 and 16" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        *(pytest.param(f"SHARE={share}", SHARE, marks=pytest.mark.slow) for share in ("nan", "2", "-0.1", "x")),
        *(pytest.param(f"MORE_DATA={name}", DATA, marks=pytest.mark.slow) for name in ("", "nope", "subset val")),
    ],
)
def test_make_says_what_it_cannot_use_before_it_trains(given: str, text: str, tmp_path: Path) -> None:
    command = ["make", "-C", str(MODELS / "recipe"), f"WORK={tmp_path}", f"PYTHON={sys.executable}", "MORE_N=4"]
    done = subprocess.run([*command, "further-siblings", given], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{given}: {text}" in done.stderr
    assert not list(tmp_path.iterdir())


def plan(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What ``make`` would do in the recipe's folder."""
    command = ["make", "-n", "-C", str(MODELS / "recipe"), f"WORK={work}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def value(words: list[str], option: str) -> str:
    """What a command gives for an option, which it has once."""
    assert words.count(option) == 1
    return words[words.index(option) + 1]
