"""docs/diffusers.md and editing.md: every line of Python on them runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from par_runtime import Pipeline, RequestError
from par_runtime.cli import dispatch as cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
EDITING = (ROOT / "docs" / "editing.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/diffusers.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"models", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lorelei.png", "both.png"}
    assert len(names["variants"]) == 2  # type: ignore[arg-type]
    assert "badger" in names["answer"]["error"]  # type: ignore[index]
    # The right column of the table: whatever is not a command of the shell.
    rows = [line.split(" | ", 1)[1] for line in PAGE.splitlines() if line.startswith("| ") and "diffusers" not in line]
    code = [c for row in rows for c in re.findall(r"`([^`]+)`", row) if not c.startswith("parvis ")]
    assert len(code) >= 18
    for line in code:
        exec(compile(line, "docs/diffusers.md", "exec"), names)
    assert isinstance(names["pipeline"], Pipeline)
    assert issubclass(names["RequestError"], RequestError)  # type: ignore[arg-type]


def test_the_page_on_editing_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", EDITING, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/editing.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"models", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"edit.png", "pasted.png", "placed.png"}
    edit, pasted = (np.asarray(Image.open(f"out/{name}.png")) for name in ("edit", "pasted"))
    assert (pasted[16:48, 16:48] == edit[16:48, 16:48]).all()  # made anew
    around = np.ones((64, 64), bool)
    around[16:48, 16:48] = False
    assert (pasted[around] == np.asarray(names["fitted"])[around]).all()  # the photo's own
    assert (pasted[around] != edit[around]).any()
    assert (names["inside"].sum(), names["keep"].sum()) == (64, 192)
    for name in ("edit", "pasted", "placed"):
        assert cli.main(["redo", f"out/{name}.png", "--bundle", "models/demo", "--quiet"]) == 0
        assert "identical: 1 image, " in capsys.readouterr().out


def test_its_links_lead_to_pages() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).is_file()
