"""Machines as they are: no home folder, a current folder that was removed, a user's cache that stays empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from par_runtime.backends.ort import sessions
from par_runtime.pipeline import Pipeline

copied = sessions._copied
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("HOME", "ORT_DISABLE_TELEMETRY")}


def run(arguments: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "par_runtime", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_nothing_is_sent_or_kept_about_the_user(tiny: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    done = run(["generate", tiny, "--label", "0", "--out", "a.png", "--quiet"], tmp_path, **home)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]  # ONNX Runtime would make the home folder


@pytest.mark.skipif(sys.platform != "linux", reason="removes the current folder")
def test_the_current_folder_was_removed(tiny: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd '{gone}' && rmdir '{gone}' && '{sys.executable}' -c 'from par_runtime.cli.dispatch import main; "
    for verb, code, error in (
        ("labels", 0, ""),
        ("bench", 2, "parvis: error: the current folder was removed, where 'parvis bench' cannot run; "),
        ("export", 2, "parvis: error: the current folder was removed, where 'parvis export' cannot run; "),
    ):
        gone.mkdir(exist_ok=True)
        line = f'{script} raise SystemExit(main(["{verb}", "{tiny}"]))\''
        done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stderr == (f"{error}change to another one (cd)\n" if error else "")


def test_a_system_without_proc_loads_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.32 opens no weights by name where /proc is missing; it is given their content."""
    options = sessions.session_options(1)
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        pytest.skip("this ONNX Runtime opens files only by name")
    with Pipeline.load(tiny, "cpu-ort") as pipeline:
        wanted = pipeline.generate([0], seed=1)
    monkeypatch.setattr(sessions, "OPEN_FILES", tmp_path / "proc")
    opened = []
    monkeypatch.setattr(sessions, "_copied", lambda given: opened.append(given) or copied(given))
    with Pipeline.load(tiny, "cpu-ort") as pipeline:
        assert pipeline.generate([0], seed=1) == wanted
    assert len(opened) == 2  # step and decoder
