"""README's Python, and that of docs/service.md, run as they are written there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from par_runtime import Pipeline
from par_runtime.cli import dispatch

ROOT = Path(__file__).parents[2]


def application_of_the_page() -> str:
    """The application of docs/service.md that has ours as a part."""
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    _, code = re.findall(r"```python\n(.*?)```", page, re.S)
    return str(code)


def test_the_batcher_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.S)[0], "docs/service.md", "exec"), names)
    pipeline = names["batcher"].pipeline
    assert names["result"] == pipeline.generate("micah", seed=7)
    made = names["future"].result()
    assert made == pipeline.generate("dylan", guidance=2.0, seed=made.seeds[0])
    names["batcher"].close()


def fetch(url: str, until: float) -> bytes:
    """The content at ``url``; a server that is still starting is waited for."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("model", "labels"),
    [("demo", ("micah", "lorelei")), pytest.param("fashion", ("bag", "dress"), marks=pytest.mark.slow)],
)
def test_eight_threads_get_the_images_of_their_requests(model: str, labels: tuple[str, str], tmp_path: Path) -> None:
    code = application_of_the_page()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "8000" in code
    assert "models/demo" in code
    code = code.replace("8000", str(port)).replace("models/demo", f"models/{model}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        url, until = f"http://127.0.0.1:{port}/faces/v1/images", time.monotonic() + 60
        fetch(f"{url}?label={labels[0]}", until)
        asked = [(labels[0], 1), (labels[1], 2), ("3", 3), (labels[0], 4)] * 2
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda of: fetch(f"{url}?label={of[0]}&seed={of[1]}", until), asked))
        with pytest.raises(urllib.error.HTTPError) as error:
            fetch(f"{url}?label=nobody", until)
        with error.value:
            assert error.value.code == 400
            assert "unknown label 'nobody'" in error.value.read().decode()
    finally:
        server.kill()
        server.wait()
    with Pipeline.load(ROOT / "models" / model, threads=1) as pipeline:
        made = dict(zip(asked, answers, strict=True))
        assert answers == [made[request] for request in asked]  # each was asked for twice
        for (label, seed), answer in made.items():
            wanted = pipeline.generate(label, seed=seed)
            assert answer == wanted.to_bytes()
            path = tmp_path / f"answer{'.gif' if pipeline.bundle.video else '.png'}"
            path.write_bytes(answer)
            if not pipeline.bundle.video:
                assert (np.asarray(Image.open(path)) == wanted.images[0]).all()  # type: ignore[index]
    assert dispatch.main(["redo", str(path), "--bundle", str(ROOT / "models" / model)]) == 0


def test_the_python_of_the_readme_runs_block_after_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "out" / "three.png").is_file()
    assert len(names["results"]) == 8
    assert names["again"] == names["results"]
    for seed in (0, 7):
        assert (names["results"][seed].images == names["pipeline"].generate("micah", seed=seed).images).all()
