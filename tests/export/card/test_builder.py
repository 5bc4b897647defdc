"""Engines for the report's models, really compiled: what they have in common is compiled once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from double.driver import Driver

from par_export.card.prepare import Builder, copy_engines
from par_export.card.samples import Sample
from par_export.kernels.compiler import Compiler
from par_model.config import PARConfig
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError

SMALL = PARConfig(dim=64, n_layers=1, n_heads=2, vocab_size=64, n_classes=3, grid=(1, 8, 8))


@pytest.mark.slow
def test_what_engines_have_in_common_is_compiled_once(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.capability = (9, 0)
    made: list[int] = []
    real = Compiler._job

    def counted(self: Compiler, *arguments: object) -> object:
        made.append(1)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Compiler, "_job", counted)
    with Builder(0, time.monotonic() + 300) as build:
        paths = [Sample(name, SMALL, None, 4).write(tmp_path / name) for name in ("a", "b")]
        build(paths[0], (1,))
        first = len(made)
        build(paths[1], (1,))
    assert len(made) == first > 5
    for path in paths:
        (folder,) = (path / ENGINES).iterdir()
        assert folder.name.endswith("sm90-fp16")
        assert Engine.open(folder, Bundle.open(path)).images == (1,)


def test_nothing_is_built_when_the_time_is_over(tmp_path: Path) -> None:
    with Builder(0, time.monotonic() - 1) as build, pytest.raises(EngineError, match="x: there was no time"):
        build(tmp_path / "x", (1,))


def test_ready_engines_are_taken_by_the_name_of_the_bundle(tmp_path: Path) -> None:
    ready, path = tmp_path / "ready", tmp_path / "PAR-L-n4"
    (ready / "PAR-L-n4" / ENGINES / "kernels-1").mkdir(parents=True)
    path.mkdir()
    assert not copy_engines(ready, tmp_path / "PAR-L-n1")
    assert copy_engines(ready, path)
    assert (path / ENGINES / "kernels-1").is_dir()
