"""docs/diffusers.md and editing.md: every line of Python on them runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_runtime import Pipeline, RequestError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
EDITING = (ROOT / "docs" / "editing.md").read_text(encoding="utf-8")


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    mask = np.zeros((60, 80), np.uint8)
    mask[15:45, 20:60] = 255
    Image.fromarray(mask).save("mask.png")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/diffusers.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"models", "photo.jpg", "mask.png", "lorelei.png", "both.png"}
    assert len(names["variants"]) == 2  # type: ignore[arg-type]
    assert "badger" in names["answer"]["error"]  # type: ignore[index]
    # The right column of the table: whatever is not a command of the shell.
    rows = [line.split(" | ", 1)[1] for line in PAGE.splitlines() if line.startswith("| ") and "diffusers" not in line]
    code = [c for row in rows for c in re.findall(r"`([^`]+)`", row) if not c.startswith("parvis ")]
    assert len(code) >= 18
    for line in code:
        exec(compile(line, "docs/diffusers.md", "exec"), names)
    for block in re.findall(r"```python\n(.*?)```", EDITING, re.S):
        exec(compile(block, "docs/editing.md", "exec"), names)
    assert (tmp_path / "edit.png").is_file()
    assert isinstance(names["pipeline"], Pipeline)
    assert issubclass(names["RequestError"], RequestError)  # type: ignore[arg-type]


def test_its_links_lead_to_pages() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).is_file()
