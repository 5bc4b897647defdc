"""docs/evaluation.md: its lines of Python run, on a smaller bundle and with fewer images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(tiny)
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    for i in range(3):
        Image.new("RGBA", (80, 100), (i, 2, 3, 255)).save(tmp_path / "pictures" / "red" / f"{i}.png")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    assert blocks[0].count("count=1000") == 1
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("count=1000", "count=60"), "docs/evaluation.md", "exec"), names)
    assert capsys.readouterr().out.endswith("60 60\n")
    made = [*(f"{i:05d}.png" for i in range(50)), "python.npz", "real.npz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made
    with np.load("out/python.npz") as file, np.load("out/real.npz") as real:
        assert file["arr_1"].tolist() == [i % 6 for i in range(60)]
        assert np.array_equal(np.asarray(Image.open("out/00049.png")), file["arr_0"][49])
        assert (real["arr_0"].shape, real["arr_0"].dtype) == ((3, 64, 64, 3), np.uint8)
