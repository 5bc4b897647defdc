"""The commands that the documents show: they can be typed as they stand."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from par_runtime.cli import dispatch
from par_runtime.cli.common import unknown_option

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").rglob("*.md")]


def commands(document: Path, section: str = "") -> list[list[str]]:
    """The commands of ``parvis`` in the fenced blocks of a document, or of one of its sections: verb and arguments."""
    text = document.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)  # in pairs: a fence that ends a block starts none
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\S*/)?parvis ", line)]
    return [command for command in found if not any(word in ("...", "VERB") for word in command)]


def test_documents_have_commands() -> None:
    assert len([command for document in DOCUMENTS for command in commands(document)]) > 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_has_the_options_that_it_names(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, *arguments in commands(document):
        parser = importlib.import_module(dispatch.VERBS[verb].module).parser()
        assert unknown_option(parser, arguments) == "", (verb, arguments)
        try:
            parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"parvis {verb} {shlex.join(arguments)}: {capsys.readouterr().err}")


def test_the_commands_for_trying_it_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("models", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    tried = commands(ROOT / "README.md", "Try it")
    siblings = [command for command in tried if "models/demo-n" in " ".join(command)]
    for command in siblings:  # 24 images each, of which two will do
        command[command.index("--label") + 1] = "lorelei"
    assert len(siblings) == 2
    for command in tried:
        if "models/fashion" in command:  # ten clips, of which one will do
            command[command.index("--label") + 1] = "bag"
    assert {"generate", "redo", "edit", "reconstruct", "doctor", "labels"} <= {command[0] for command in tried}
    for command in tried:
        assert dispatch.main(command) == 0, (command, capsys.readouterr().err)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "lorelei.png",
        "guidance.png",
        "edit.png",
        "photo.png",
        "n1.png",
        "n16.png",
        "clip.gif",
    }


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_video_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for MP4, which needs an extra, and the calibration, which has a test of its own."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    Image.new("L", (50, 40), 90).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    tried = [command for command in commands(ROOT / "docs/video.md") if "models/fashion" in command]
    tried = [command for command in tried if command[0] != "calibrate" and not command[-1].endswith(".mp4")]
    assert [command[0] for command in tried] == ["generate", "redo", "edit", "edit", "edit", "reconstruct"]
    for command in tried:
        assert dispatch.main(command) == 0, (command, capsys.readouterr().err)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/video.md").read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "video.md", "exec"), names)
    assert (names["first"] == names["result"].images[:, :1]).all()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("clips.gif", "next.webp", "left.apng", "moves.gif", "kept.gif", "two.gif"),
    }


def test_the_rooms_in_the_design_are_those_that_the_linter_holds() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    held = {c["containers"][0].split(".")[-1]: c["layers"] for c in contracts if c["type"] == "layers"}
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(par_runtime .*?)^```$", text, re.S | re.M)
    described, package = dict[str, list[str]](), ""
    for line in block.splitlines():
        if not line[:20].isspace() and (name := re.match(r"(\w*) +", line)) is not None:
            rooms = line[name.end() :]
            package = name[1] or package
            if ">" in rooms:
                described[package] = rooms.split(" > ")
            else:  # a room a line, with what it is
                described.setdefault(package, []).append(re.split("  +", rooms)[0])
    assert described == held


SOURCES = [
    *(ROOT / "cmake").iterdir(),
    *(
        path
        for folder in ("runtime", "export", "par_model", "calibration", "models/recipe")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c", ".h", ".tsv") or path.name == "Makefile"
    ),
]
#: Of the package by its name, with options of pip before it, also where the source puts a command together.
FROM_AN_INDEX = re.compile(r"(?:pip3?|pip_command\(\)\}) install(?:\s+-\S+)*\s+[\"']?parvis(?![\w/-]|\.whl)")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install parvis", True),
        ("pip install 'parvis[cpu]'", True),
        ("upgrade with pip install --upgrade parvis", True),
        ('f"{pip_command()} install -U parvis"', True),
        ('"give it: pip install --user "\n    "parvis[cpu,export]"', True),
        ("pip install '.[cpu]' in a clone of parvis", False),
        ("pip install './parvis-0.1.0-py3-none-any.whl[cpu]'", False),
        ("pip install -r parvis/constraints.txt", False),
    ],
)
def test_what_counts_as_an_installation_from_an_index(text: str, wrong: bool) -> None:
    assert bool(FROM_AN_INDEX.search(joined(text))) == wrong


def joined(text: str) -> str:
    """Source in which strings that follow each other are one."""
    return re.sub(r"""(["'])\s*\n\s*[rf]*\1""", "", text)


def test_nothing_names_a_package_that_is_on_no_index() -> None:
    assert len(SOURCES) > 200
    for path in [*DOCUMENTS, *SOURCES]:
        found = FROM_AN_INDEX.search(joined(path.read_text(encoding="utf-8")))
        assert not found, (path, found)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("folder", ["", "models/recipe", "models/recipe/video"])
def test_make_help_lists_every_target_that_is_a_command(folder: str) -> None:
    text = (ROOT / folder / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT / folder, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {target for _, target, _ in lines} == {name for name in phony.split() if not name.startswith("has-")}
    assert "$(" not in done.stdout
