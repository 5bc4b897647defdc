"""The command line as a whole: help, options in any order, what is misspelt, completion, and being stopped."""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run

from conftest import child
from par_runtime import __version__
from par_runtime.cli import bench, generate, options
from par_runtime.cli import dispatch as cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_described_with_its_default(verb: str) -> None:
    parser = importlib.import_module(cli.VERBS[verb].module).parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        assert action.help, action
        has_default = action.default not in (None, [], (), argparse.SUPPRESS) and action.default is not False
        if action.option_strings and has_default and not action.required:
            assert "default" in formatter._format_action(action), action


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
        (
            ["score", "x.png"],
            "unknown verb 'score': 'parvis evaluate' scores held-out images, and Pipeline.score any",
        ),
        (["server"], "unknown verb 'server'; did you mean 'serve'?"),
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


def test_a_label_is_the_same_where_the_system_is_not_set_to_utf_8() -> None:
    assert options.text("füchse") == "füchse"
    assert options.text("f\udcc3\udcbcchse") == "füchse"  # what Python gives under LC_ALL=C
