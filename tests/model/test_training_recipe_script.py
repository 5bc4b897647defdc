"""How the scripts of the recipe end: by what they cannot use, by Ctrl-C, by SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from recipe_scripts import RECIPE, scripts

from par_model.training.files import InputError, written_beside

DEMO = RECIPE.parent / "demo-n16"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """``script.py``."""
    with scripts("script") as (module,):
        yield module


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("--x 3: expected\n4"), "x.py: error: --x 3: expected\\n4"),
        (
            FileNotFoundError(2, "No such file", "a\x1b"),
            "x.py: error: a\\x1b: no such file or folder; check the name, or choose another place",
        ),
        (KeyError("of mine"), "x.py: error: 'of mine'"),
        (MemoryError(), "x.py: error: not enough memory; close other programs, or give it less to do"),
    ],
)
def test_an_expected_error_is_one_line(
    script: ModuleType, error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert script.run("x.py", work, KeyError) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_others_are_not_hidden(script: ModuleType) -> None:
    def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script.run("x.py", work, KeyError)
    assert script.run("x.py", lambda: 1) == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPE.rglob("*.py") if "def main(" in path.read_text()))
def test_an_option_that_a_script_does_not_know_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripts(name) as (module,):
        with pytest.raises(SystemExit) as ended:
            module.main(["a", "--seed", "1\n2", "--nix"])
        assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    program = printed.partition(": error: ")[0]  # of the tests
    assert printed.endswith(f"; '{program} --help' lists the options\n")


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_that_is_stopped_removes_its_unfinished_file(
    script: ModuleType, sent: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        with written_beside(tmp_path / "out") as part:
            part.write_text("half")
            os.kill(os.getpid(), sent)
            time.sleep(10)  # the signal ends it
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert script.run("x.py", work) == code
    assert capsys.readouterr().err == "\nx.py: stopped; nothing was half-written\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def catches_sigterm(process: list[str]) -> bool:
    """Whether there is such a process, which can remove its files by now."""
    if not process:
        return False
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process[0]}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the command in /proc")
def test_the_command_that_bundles_runs_is_stopped_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    words = ["generate", str(DEMO), "--label", "micah", "--count", "20000", "--out", str(out)]
    program = f"import sys, bundles, script; sys.exit(script.run('x', lambda: bundles.parvis(*{words})))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=RECIPE, stderr=subprocess.PIPE, text=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        child: list[str] = []
        try:
            until = time.monotonic() + 60
            while not catches_sigterm(child) and time.monotonic() < until:
                time.sleep(0.05)
                child = children.read_text().split()
            parent.terminate()
            assert parent.wait(60) == 143
            assert parent.stderr is not None
            assert "x: stopped; nothing was half-written" in parent.stderr.read()
        finally:
            for each in (*child, parent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(each), signal.SIGKILL)
    assert not Path(f"/proc/{child[0]}").exists()
    assert not list(tmp_path.iterdir())
