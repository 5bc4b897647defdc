"""Engine folders as an enemy made them, their hash recomputed: one clear line each, or an engine that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from double import kernels, tensorrt
from double.hand_made import hand_made

from par_runtime.backends.engines import ENGINE_JSON, Engine, list_engines
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError
from par_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.mark.parametrize("kind", ["plans", "kernels"])
def test_every_entry_of_an_engine(bundle: Path, kind: str) -> None:
    opened = Bundle.open(bundle)
    path = tensorrt.write_engine(opened) if kind == "plans" else kernels.write_engine(opened, hand_made(opened))
    entry = json.loads((path / ENGINE_JSON).read_text())
    refused = 0
    for what, changed in hostile.mutations(entry, 700, seed=2):
        (path / ENGINE_JSON).write_text(json.dumps(changed))
        try:
            engine = Engine.open(path, opened)
            _ = engine.capability, engine.rebuild, engine.serving("group"), engine.files, engine.measured_ms
        except EngineError as error:
            hostile.check_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    assert refused > 400


def test_a_name_that_stands_twice_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    path = tensorrt.write_engine(opened)
    text = (path / ENGINE_JSON).read_text()
    at = text.rindex('"phases"')  # of a plan
    (path / ENGINE_JSON).write_text(f'{text[:at]}"phases": [], {text[at:]}')
    with pytest.raises(EngineError, match=r"engine\.json: .* has the name 'phases' twice; give it once.*; build it"):
        Engine.open(path, opened)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make", hostile.NO_FILES)
@pytest.mark.parametrize("name", [ENGINE_JSON, "step.plan"])
def test_an_engine_of_what_is_no_file(bundle: Path, name: str, make: Callable[[Path], None]) -> None:
    opened = Bundle.open(bundle)
    path = tensorrt.write_engine(opened)
    (path / name).unlink()
    make(path / name)
    with pytest.raises(EngineError, match=rf"{name}: is a \w+, not a file"):
        Engine.open(path, opened, verify="none")


def test_a_folder_of_engines_with_a_name_for_terminals(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    tensorrt.write_engine(opened)
    (bundle / "engines" / "\x1b[2J").mkdir()
    engines, bad = list_engines(opened)
    assert len(engines) == 1
    assert len(bad) == 1
    assert bad[0].isprintable()


def test_many_bad_engines_are_a_short_line(bundle: Path) -> None:
    for i in range(100):
        (bundle / "engines" / f"{i:03}").mkdir(parents=True)
        (bundle / "engines" / f"{i:03}" / ENGINE_JSON).write_text("[" * 10_000)
    with Pipeline.load(bundle, "auto") as pipeline:
        assert pipeline.note.endswith("and 61 more")
        assert len(pipeline.note) < 2000
    _, bad = list_engines(Bundle.open(bundle))
    assert bad[-1] == f"{bundle / 'engines'}: holds 100 folders, of which the first 64 are read; remove some"


def test_engines_that_take_long_to_read_are_not_all_read(bundle: Path) -> None:
    for i in range(8):
        (bundle / "engines" / f"{i:03}").mkdir(parents=True)
        (bundle / "engines" / f"{i:03}" / ENGINE_JSON).write_text(" " * 3_900_000 + "[]")
    _, bad = list_engines(Bundle.open(bundle))
    assert len(bad) == 5
    assert "more than 16777216 bytes of engine.json; remove engines" in bad[-1]
