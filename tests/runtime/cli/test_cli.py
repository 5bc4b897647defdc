"""The command line: generate, redo, help, and wrong input of many kinds."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import child
from par_runtime import Pipeline, Result, __version__, system
from par_runtime.cli import bench, generate, options
from par_runtime.cli import dispatch as cli
from par_runtime.images import png


def run(*arguments: object) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_described_with_its_default(verb: str) -> None:
    parser = importlib.import_module(cli.VERBS[verb].module).parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        assert action.help, action
        has_default = action.default not in (None, [], (), argparse.SUPPRESS) and action.default is not False
        if action.option_strings and has_default and not action.required:
            assert "default" in formatter._format_action(action), action


def test_generate_writes_a_sheet_and_tokens(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tokens = tmp_path / "new" / "a.png", tmp_path / "t.npy"
    assert run("generate", tiny, "--label", "otter", "--count", 5, "--seed", 1, "--out", out, "--tokens", tokens) == 0
    with Image.open(out) as image:
        assert image.size == (3 * 16, 2 * 16)
    assert np.load(tokens).shape == (5, 64)
    assert "5 images" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "new", "t.npy"]


def test_twice_the_same_pixels_and_one_by_one_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(
            "generate",
            tiny,
            "--label",
            1,
            "--count",
            8,
            "--seed",
            1,
            "--out",
            tmp_path / f"{name}.png",
            "--tokens",
            tmp_path / f"{name}.npy",
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    batch = np.load(tmp_path / "a.npy")
    for i in range(8):
        run("generate", tiny, "--label", 1, "--seed", 1 + i, "--tokens", tmp_path / "one.npy")
        assert (np.load(tmp_path / "one.npy")[0] == batch[i]).all()


def test_redo_proves_a_png_and_notices_a_change(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    run(
        "generate",
        tiny,
        "--label",
        0,
        "--label",
        3,
        "--count",
        2,
        "--seed",
        9,
        "--guidance",
        1,
        3,
        "--top-k",
        20,
        "--out",
        out,
    )
    assert run("redo", out, "--bundle", tiny, "--out", tmp_path / "again.png") == 0
    assert "identical: 8 images" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    with Image.open(out) as image:
        image.load()
        chunk = image.text["parvis"]  # type: ignore[attr-defined]
        info = png.PngImagePlugin.PngInfo()
        info.add_itxt("parvis", chunk)
        image.putpixel((3, 3), (1, 2, 3))
        image.save(tmp_path / "touched.png", pnginfo=info)
    assert run("redo", tmp_path / "touched.png", "--bundle", tiny) == 1
    assert "the tokens are the same, the pixels are not (1 pixels" in capsys.readouterr().out


def test_redo_reports_the_first_other_token(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", tiny, "--label", 0, "--seed", 9, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        entry = json.loads(image.text["parvis"])  # type: ignore[attr-defined]
        entry["images"][0]["seed"] = 10
        info = png.PngImagePlugin.PngInfo()
        info.add_itxt("parvis", json.dumps(entry))
        image.save(tmp_path / "a.png", pnginfo=info)
    assert run("redo", tmp_path / "a.png", "--bundle", tiny) == 1
    assert "first differs at token 1: " in capsys.readouterr().out


def test_one_file_per_image_and_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("generate", tiny, "--label", "sea otter", "--count", 2, "--seed", 4, "--out-dir", tmp_path, "--json") == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert [Path(p).name for p in row["written"]] == ["sea-otter-4.png", "sea-otter-5.png"]
    assert row["seeds"] == [4, 5]
    for path in row["written"]:
        assert run("redo", path, "--bundle", tiny, "--quiet") == 0


def test_scales_that_are_nearly_the_same_have_files_of_their_own(tiny: Path, tmp_path: Path) -> None:
    assert (
        run("generate", tiny, "--label", 0, "--seed", 1, "--guidance", 1.5, 1.50000001, 2, "--out-dir", tmp_path) == 0
    )
    names = ["red-fox-1-g1.5.png", "red-fox-1-g1.50000001.png", "red-fox-1-g2.0.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_outputs_that_would_replace_each_other(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", tiny, "--label", 0, "--seed", 1, "--out-dir", tmp_path]
    assert run(*ask, "--guidance", 2, 1, 2) == 2
    assert (
        "--guidance: a scale is given twice, so two images would have one file name; give each scale once"
        in capsys.readouterr().err
    )
    assert run(*ask, "--out", tmp_path / ".." / tmp_path.name / "red-fox-1.png") == 2
    assert "red-fox-1.png: two outputs of this command have this name, so one would be lost" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "red-fox-2.png").mkdir()
    assert run(*ask, "--count", 2) == 2
    assert "red-fox-2.png is a folder, and the name of a file of this command; give another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["red-fox-2.png"]


def test_previews_fill_towards_the_image(tiny: Path, tmp_path: Path) -> None:
    run("generate", tiny, "--label", 0, "--seed", 1, "--preview-every", 6, "--out", tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-0006.png", "x-0012.png", "x-0018.png", "x.png"]


def test_all_labels(tiny: Path, tmp_path: Path) -> None:
    run("generate", tiny, "--label", "all", "--label", "otter", "--seed", 1, "--tokens", tmp_path / "t.npy")
    assert np.load(tmp_path / "t.npy").shape == (7, 64)


ERRORS = [
    (
        ["generate", "BUNDLE"],
        "the following arguments are required: --label; 'parvis generate --help' lists the options",
    ),
    (["generate", "BUNDLE", "--label", "0", "--count", "x"], "argument --count: invalid int value: 'x'"),
    (["generate", "BUNDLE", "--label", "0", "--columns", "0", "--out", "TMP/a.png"], "--columns 0: expected 1 or more"),
    (["generate", "BUNDLE", "--label", "0", "--out", "/dev/null"], "ends in .png"),
    (
        ["generate", "BUNDLE", "--label", "0", "--out", "TMP/plain.png/a.png"],
        "plain.png is a file where a folder is",
    ),
    (["generate", "BUNDLE", "--label", "0", "--out-dir", "TMP/plain.png"], "plain.png"),
    (["generate", "BUNDLE", "--label", "fux", "--out", "TMP/a.png"], "unknown label 'fux'"),
    (["generate", "BUNDLE", "--label", "7", "--out", "TMP/a.png"], "label 7: this model has classes 0..5"),
    (["generate", "BUNDLE", "--label", "0", "--out", "TMP/a.jpg"], "ends in .png"),
    (["generate", "BUNDLE", "--label", "0", "--out", "TMP"], "is a folder"),
    (["generate", "BUNDLE", "--label", "0", "--tokens", "TMP/a.txt"], "ends in .npy"),
    (["generate", "TMP/nope", "--label", "0", "--out", "TMP/a.png"], "no such folder"),
    (["generate", "BUNDLE", "--label", "0", "--count", "0", "--out", "TMP/a.png"], "--count 0"),
    (
        ["generate", "BUNDLE", "--label", "all", "--count", "100000000000", "--out", "TMP/a.png"],
        "at most 100000 in one",
    ),
    (["generate", "BUNDLE", "--label", "0", "--top-p", "2", "--out", "TMP/a.png"], "top_p 2.0: expected 0 to 1"),
    (["generate", "BUNDLE", "--label", "0", "--device", "cuda:0", "--out", "TMP/a.png"], "device 'cuda:0'"),
    (["generate", "BUNDLE", "--label", "0", "--threads", "0", "--out", "TMP/a.png"], "threads 0"),
    (
        ["generate", "BUNDLE", "--label", "0", "--preview-every", "2", "--tokens", "TMP/a.npy"],
        "--preview-every writes beside --out",
    ),
    (["redo", "TMP/none.png", "--bundle", "BUNDLE"], "none.png: no such file or folder"),
    (["redo", "TMP/plain.png", "--bundle", "BUNDLE"], "has no 'parvis' entry"),
    (["redo", "TMP/text.png", "--bundle", "BUNDLE"], "not an image that can be read"),
    (["redo", "TMP/cut.png", "--bundle", "BUNDLE"], "not an image that can be read"),
    (["redo", "TMP/damaged.png", "--bundle", "BUNDLE"], "its 'parvis' entry cannot be read"),
    (["redo", "TMP/infinite.png", "--bundle", "BUNDLE"], "its 'parvis' entry cannot be read"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:-30])
    infinite = '{"images": [], "bundle": {"name": "a", "hash": "b"}, "columns": Infinity}'
    for name, entry in (("damaged", '{"images": []}'), ("infinite", infinite)):
        damaged = png.PngImagePlugin.PngInfo()
        damaged.add_itxt("parvis", entry)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png", pnginfo=damaged)
    before = sorted(tmp_path.rglob("*"))
    filled = [a.replace("BUNDLE", str(tiny)).replace("TMP", str(tmp_path)) for a in arguments]
    assert run(*filled) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_another_bundle_cannot_redo(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from par_runtime.bundle import seal

    run("generate", tiny, "--label", 0, "--seed", 9, "--out", tmp_path / "a.png")
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(seal(manifest | {"name": "other"})))
    assert run("redo", tmp_path / "a.png", "--bundle", other) == 2
    assert "give --bundle with the one that made it" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("generate", tiny, "--label", 0, "--out", out) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_really_full_disk(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    part = tmp_path / "part"
    part.symlink_to("/dev/full")  # a link, so that a mistake in the clean-up cannot remove the device
    monkeypatch.setattr(system, "_part", lambda path: part)
    assert run("generate", tiny, "--label", 0, "--out", tmp_path / "a.png") == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_no_permission_is_an_error_before_any_work(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", denied)  # root, which runs CI in containers, may write anywhere
    monkeypatch.setattr("par_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("work was started"))
    for option, path in (
        ("--out", tmp_path / "a.png"),
        ("--out-dir", tmp_path / "d"),
        ("--tokens", tmp_path / "t.npy"),
    ):
        assert run("generate", tiny, "--label", 0, option, path) == 2
        assert "no permission for" in capsys.readouterr().err


def test_a_device_is_not_replaced(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert run("generate", tiny, "--label", 0, "--out", pipe) == 2
    assert "is a device or a pipe" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_without_an_output_the_sheet_is_named_after_what_it_shows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", tiny, "--label", "sea otter", "--count", 2, "--seed", 4) == 0
    assert capsys.readouterr().out.startswith("tiny-sea-otter-4.png: 2 images, seeds 4..5, in ")
    assert run("generate", tiny, "--label", "all", "--seed", 4, "--quiet") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-6-classes-4.png", "tiny-sea-otter-4.png"]


def test_a_sheet_whose_entry_is_larger_than_a_megabyte_can_be_read(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    pipeline = Pipeline.load(tiny, threads=1)
    r = pipeline.generate([0], seed=1)
    assert r.images is not None
    many = 4000
    big = Result(
        pipeline.bundle,
        np.repeat(r.images, many, 0),
        np.repeat(r.tokens, many, 0),
        r.labels * many,
        r.seeds * many,
        r.settings * many,
        {},
    )
    big.save(out, 80)
    recipe, pixels = png.read(out)
    assert recipe.tokens.shape == (many, 64)
    assert (pixels == png.sheet(big.images, 80)).all()  # type: ignore[arg-type]


def test_every_verb_of_the_runtime_is_a_module_with_parser_and_main() -> None:
    for name, verb in cli.VERBS.items():
        if verb.module.startswith("par_runtime."):
            module = importlib.import_module(verb.module)
            assert module.parser().prog == f"parvis {name}"
            assert callable(module.main)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for verb in ("generate", "redo", "export", "train", "train-tokenizer", "encode"):
        assert f"\n  {verb} " in text
    assert run() == 2
    assert run("frobnicate") == 2
    assert "unknown verb 'frobnicate'; 'parvis --help' lists the verbs" in capsys.readouterr().err
    for arguments in (("--version",), ("generate", "--version"), ("export", "--out", "x", "--version")):
        assert run(*arguments) == 0
        assert capsys.readouterr().out == f"parvis {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "unknown verb 'genrate'; did you mean 'generate'? "),
        (["gen", "x"], "unknown verb 'gen'; did you mean 'generate'? "),
        (["train-tokeniser"], "did you mean 'train-tokenizer'"),
        (["score", "x.png"], "unknown verb 'score': images are scored in Python, by Pipeline.score (README)"),
        (["serve"], "unknown verb 'serve': docs/service.md has a server"),
        (["generate", "x", "--lable", "0"], "unknown option --lable; did you mean --label?; 'parvis generate --help'"),
        (["export", "--checkpont=x.pt"], "unknown option --checkpont; did you mean --checkpoint?"),
        (["train", "--zzz"], "unknown option --zzz; 'parvis train --help' lists the options"),
        (["--json", "inspect", "x"], "options come after the verb: parvis VERB --json"),
    ],
)
def test_what_is_misspelt_is_named_with_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_shells_know_every_verb_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install '.[completion]'")
    for shell in ("bash", "zsh"):
        assert run("completion", shell) == 0
        script = capsys.readouterr().out
        for word in (*cli.VERBS, "--guidance-interval", "--encoder-for", "--cache-gb"):
            assert word in script, (shell, word)
    assert run("completion", "fish") == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install '.[completion]'")
    run("completion", "bash")
    (tmp_path / "script").write_text(capsys.readouterr().out)
    line = (
        "source ./script; COMP_WORDS=(parvis generate demo --guid); COMP_CWORD=3; _shtab_parvis parvis --guid demo; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--guidance", "--guidance-interval"]


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_the_description_of_a_verb_is_wrapped(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("help", verb) == 0
    before_options = re.split(r"\n(positional arguments|options):\n", capsys.readouterr().out)[0]
    assert max(map(len, before_options.splitlines())) <= 80


def test_help_is_a_verb_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("help") == 0
    assert "\nverbs:\n" in capsys.readouterr().out
    assert run("help", "labels") == 0
    assert "usage: parvis labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "labels", "scales"),
    [
        (["BUNDLE", "--label", "0", "3"], ["0", "3"], None),
        (["BUNDLE", "--label", "0", "--label", "3", "red fox"], ["0", "3", "red fox"], None),
        (["--label", "0", "3", "BUNDLE"], ["0", "3"], None),
        (["--label", "0", "BUNDLE", "--label", "3", "1"], ["0", "3", "1"], None),
        (["--label", "0", "--guidance", "1", "2", "BUNDLE"], ["0"], [1.0, 2.0]),
        (["--guidance", "1", "2", "--guidance", "-3", "--label", "0", "BUNDLE", "--quiet"], ["0"], [1.0, 2.0, -3.0]),
        (["--label", "0", "--", "BUNDLE"], ["0"], None),
        (["--label=0", "--label=3", "BUNDLE"], ["0", "3"], None),
        (["--lab", "0", "3", "BUNDLE"], ["0", "3"], None),
    ],
)
def test_lists_are_given_in_one_way_wherever_the_bundle_stands(
    tiny: Path, arguments: list[str], labels: list[str], scales: list[float] | None
) -> None:
    args = generate.parser().parse_args([str(tiny) if a == "BUNDLE" else a for a in arguments])
    assert (args.bundle, args.label, args.guidance) == (tiny, labels, scales)


def test_lists_of_numbers_and_names(tiny: Path) -> None:
    for given in (["--batches", "1", "4", "2"], ["--batches", "1,4", "--batches", "2"], ["--batches", "4,2", "1"]):
        for order in ([*given, str(tiny)], [str(tiny), *given]):
            args = bench.parser().parse_args([*order, "--against", "eager", "n1", "--sizes", "L,XL"])
            assert (args.batches, args.against, args.sizes) == ((1, 2, 4), ("eager", "n1"), ("PAR-L", "PAR-XL"))
            assert args.bundles == [tiny]
    assert bench.parser().parse_args([str(tiny)]).against == ()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_quietly_and_writes_nothing(tiny: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    out = tmp_path / "a.png"
    command = [
        sys.executable,
        "-m",
        "par_runtime",
        "generate",
        str(tiny),
        "--label",
        "0",
        "--count",
        "100000",
        "--batch",
        "4",
    ]
    with child([*command, "--preview-every", "1", "--out", str(out)], stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("a-*.png")) and time.monotonic() < until:  # until it is at work
            time.sleep(0.05)
        process.send_signal(sent)
        _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in error
    assert ("stopped; nothing was half-written" in error) == (sent == signal.SIGINT)
    left = {p.name for p in tmp_path.iterdir()}
    assert not out.exists()
    assert all(name.startswith("a-") for name in left), left


def test_ctrl_c_while_an_extension_module_is_imported_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extension modules turn the KeyboardInterrupt of their import into an ImportError."""

    def interrupted(cause: BaseException | None) -> None:
        raise ImportError("initialization failed") from cause

    monkeypatch.setattr(cli, "_call", lambda *_: interrupted(KeyboardInterrupt()))
    assert cli.main(["generate", "x"]) == 130
    assert capsys.readouterr().err.endswith("parvis: stopped; nothing was half-written\n")
    monkeypatch.setattr(cli, "_call", lambda *_: interrupted(None))
    with pytest.raises(ImportError, match="initialization failed"):
        cli.main(["generate", "x"])


def test_a_bundle_that_is_a_file_is_refused_as_one(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tiny / "manifest.json"), "--label", "0"]) == 2
    assert "manifest.json: is a file, not a folder; give the path of a bundle" in capsys.readouterr().err


def test_a_label_is_the_same_where_the_system_is_not_set_to_utf_8() -> None:
    assert options.text("füchse") == "füchse"
    assert options.text("f\udcc3\udcbcchse") == "füchse"  # what Python gives under LC_ALL=C
