"""docs/evaluation.md: its lines of Python run, on a smaller bundle and with fewer images."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from par_calibration import heldout
from par_runtime import Pipeline
from par_runtime.bundle import Bundle

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    demo = Path(shutil.copytree(tiny, tmp_path / "models" / "demo"))
    made = Bundle.open(demo)
    with Pipeline.load(demo) as pipeline:
        tokens = pipeline.generate([i % 6 for i in range(60)], seed=1000, decode=False).tokens
        nats = -pipeline.score(tokens[:48], [i % 6 for i in range(48)]).mean()
    heldout.attach(made, tokens, [i % 6 for i in range(60)])
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    for i in range(3):
        Image.new("RGBA", (80, 100), (i, 2, 3, 255)).save(tmp_path / "pictures" / "red" / f"{i}.png")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    assert blocks[1].count("count=1000") == 1
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("count=1000", "count=60"), "docs/evaluation.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "60 60"
    assert [line.split()[0] for line in printed[:2]] == ["1.0", "1.5"]
    assert float(printed[0].split()[3]) == pytest.approx(nats, abs=1e-4)
    files = [*(f"{i:05d}.png" for i in range(50)), "python.npz", "real.npz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    with np.load("out/python.npz") as file, np.load("out/real.npz") as real:
        assert file["arr_1"].tolist() == [i % 6 for i in range(60)]
        assert np.array_equal(np.asarray(Image.open("out/00049.png")), file["arr_0"][49])
        assert (real["arr_0"].shape, real["arr_0"].dtype) == ((3, 64, 64, 3), np.uint8)
