"""Engines for the report's models, really compiled: what they have in common is compiled once."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from double.driver import Driver

from par_export.card.ahead import build_ahead, is_of_these_sources, wanted, wanted_sets
from par_export.card.plan import Model
from par_export.card.prepare import Builder, family_of, ready_engine
from par_export.card.samples import Sample
from par_export.errors import BuildError
from par_export.kernels.compiler import Compiler
from par_export.quantised import Codes
from par_model.config import PARConfig
from par_runtime.backends.engines import ENGINE_JSON, ENGINES, Engine
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
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
    with Builder(end=time.monotonic() + 300) as build:
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
    with Builder(end=time.monotonic() - 1) as build, pytest.raises(EngineError, match="x: there was no time"):
        build(tmp_path / "x", (1,))


SAMPLE = Sample("odd", SMALL, None, 4, images=(1,))
MODEL = Model("PAR-S", SMALL, None, group_sizes=(4,), codes=(Codes("int8", 32),))


def ahead(folder: Path, **changes: Any) -> tuple[list[str], list[str]]:
    """What failed, and what was said, of a small report's engines."""
    said: list[str] = []
    wanted: dict[str, Any] = {"checked": (), "samples": (SAMPLE,), "codes": (), "models": (MODEL,)}
    return build_ahead(folder, "SM90", say=said.append, **(wanted | changes)), said


Ahead = tuple[Path, list[str], list[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ahead:
    """The folder of a sample's engine, which took its place after one that cannot be built; what failed, was said."""
    folder = tmp_path_factory.mktemp("ahead") / "ready"
    return folder, *ahead(folder, models=(), samples=(replace(SAMPLE, name="bad", precision="fp32"), SAMPLE))


@pytest.fixture
def ready(made: Ahead, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(made[0], tmp_path / "ready")


@pytest.mark.slow
def test_engines_are_built_without_a_gpu_and_are_those_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "ready"
    failed, said = ahead(folder)
    assert failed == []
    names = ["PAR-S-n4", "PAR-S-int8-g32-n4", "odd-n4"]
    assert [line.partition(":")[0] for line in said] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "sources"])
    sample, families = SAMPLE.write(tmp_path / "s"), tmp_path / "m"
    paths = [sample, *(family_of(MODEL, codes, families)[4] for codes in (None, *MODEL.codes))]
    for path, images in zip(paths, [(1,), (1, 8), (1, 8)], strict=True):
        ready = ready_engine(folder, path, images)
        assert ready is not None
        engine = Engine.open(ready, Bundle.open(path))
        assert (engine.target, engine.images) == ("SM90", images)
    # What is there is kept; what an ended build left, or damaged, is made again.
    file = folder / "PAR-S-n4" / ENGINES
    (engine_folder,) = file.iterdir()
    before = (engine_folder / ENGINE_JSON).stat().st_mtime_ns
    other = next((folder / "odd-n4" / ENGINES).iterdir())
    (other / ENGINE_JSON).write_text("{}")
    (other.parent / f".{other.name}.part").mkdir()
    assert ahead(folder)[0] == []
    assert (engine_folder / ENGINE_JSON).stat().st_mtime_ns == before
    assert [path.name for path in other.parent.iterdir()] == [other.name]
    assert ready_engine(folder, paths[0], (1,)) is not None
    assert ready_engine(folder, paths[1], (1, 8)) is not None
    assert ready_engine(folder, paths[1], (8,)) is not None  # a report of fewer batches takes it
    assert ready_engine(folder, paths[1], (1, 4)) is None
    # Those of another bundle of that name are not taken.
    assert ready_engine(folder, replace(SAMPLE, precision="bf16").write(tmp_path / "b"), (1,)) is None
    assert ready_engine(folder, replace(SAMPLE, name="other").write(tmp_path / "o"), (1,)) is None


def test_rows_of_other_batches_have_engines_of_these(tmp_path: Path) -> None:
    """Checks have batches of their own."""
    given = {"checked": [tmp_path / "tiny"], "samples": (SAMPLE,), "codes": (), "models": (MODEL,)}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "weights.data").touch()
    for images in ((1,), (1, 8)):
        every = {each.name: each.images for each in wanted(tmp_path, **given, images=images)}
        assert every == {"tiny": (1, 2, 4), "PAR-S-n4": images, "PAR-S-int8-g32-n4": images, "odd-n4": (1,)}
        sets = list(wanted_sets(tmp_path, [MODEL], "SM90", images))
        assert {(each.name, each.images) for each in sets} == {(name, images) for name in list(every)[1:3]}


@pytest.mark.slow
def test_engines_of_more_batches_take_the_place_of_those_of_fewer(tmp_path: Path) -> None:
    folder, said = tmp_path / "ready", list[str]()
    model = replace(MODEL, codes=())
    failed = build_ahead(folder, "SM90", checked=(), samples=(), codes=(), models=[model], images=(1,), say=said.append)
    assert failed == []
    assert [line.partition(":")[0] for line in said] == ["PAR-S-n4"]
    path = family_of(model, None, tmp_path / "m")[4]
    ready = ready_engine(folder, path, (1,))
    assert ready is not None
    assert Engine.open(ready, Bundle.open(path)).images == (1,)
    assert ready_engine(folder, path, (1, 8)) is None  # a report of both builds it
    assert ahead(folder, models=[model], samples=())[0] == []
    assert ready_engine(folder, path, (1, 8)) is not None  # in its place
    assert len(list((folder / "PAR-S-n4" / ENGINES).iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "images"), [([], None), (["--batches", "1"], (1,)), (["--batches", "4,2"], (2, 4))]
)
def test_the_batches_of_the_command_reach_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], images: tuple[int, ...] | None
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("par_export.card.ahead.build_ahead", lambda *_, **named: given.append(named) or [])
    command = ["bench", "--suite", "gpu", "--build-for", "SM90", "--engines", str(tmp_path / "ready"), *options]
    assert cli.main(command) == 0
    assert given[0].get("images") == images


@pytest.mark.slow
def test_engines_of_other_sources_are_built_again(ready: Path) -> None:
    folder = ready
    assert is_of_these_sources(folder)
    (folder / "sources").write_text("0" * 64)
    assert not is_of_these_sources(folder)
    file = next((folder / "odd-n4" / ENGINES).iterdir()) / ENGINE_JSON
    before = file.stat().st_mtime_ns
    assert ahead(folder, models=())[0] == []
    assert file.stat().st_mtime_ns > before
    assert is_of_these_sources(folder)


@pytest.mark.slow
def test_what_cannot_be_built_ahead_is_said_and_the_others_are(made: Ahead) -> None:
    folder, failed, said = made
    assert [path.parent.name for path in folder.glob(f"*/{ENGINES}")] == ["odd-n4"]
    assert len(failed) == 1
    assert failed[0].startswith("bad-n4: ")
    assert "fp32" in failed[0]
    assert said[0] == failed[0]
    assert said[1].startswith("odd-n4: there after ")


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("SM12", [], "--build-for: target 'SM12': engines of kernels are built for SM80"),
        ("SM90", ["--sizes", "9B"], "PAR-9B': expected one or more of"),
    ],
)
def test_bad_requests_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, options: list[str], words: str
) -> None:
    folder = tmp_path / "ready"
    command = ["bench", "--suite", "gpu", "--build-for", target, "--engines", str(folder), *options]
    with suppress(SystemExit):
        assert cli.main(command) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_of_other_things_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("mine")
    assert cli.main(["bench", "--suite", "gpu", "--build-for", "SM90", "--engines", str(tmp_path)]) == 2
    assert (
        "holds other things than engines that were built ahead; give a new or empty folder" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_build_for_needs_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--suite", "gpu", "--build-for", "SM90"]) == 2
    assert "--build-for SM90: give the folder that engines are built into, --engines FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--json", "a.jsonl"], ["--svg", "a.svg"], ["--minutes", "3"], ["--no-eager"]],
    ids=lambda options: options[0],
)
def test_what_only_a_measurement_takes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--suite", "gpu", "--build-for", "SM90", "--engines", "ready", *options]
    assert cli.main(command) == 2
    said = f"--build-for builds engines and measures nothing, so {options[0]} means nothing to it; leave it out"
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_build_into_one_folder_waits_for_nobody(ready: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = ready
    before = sorted(folder.rglob("*"))
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            BuildError, match="another build is at work there; wait for its end, or give another folder"
        ):
            ahead(folder)
    (folder / ".lock").unlink()
    assert sorted(folder.rglob("*")) == before
    assert ahead(folder, models=())[0] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_what_ends_a_build_leaves_no_part_of_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder, written = tmp_path / "ready", []

    def fails(self: object, part: Path, **_: object) -> None:
        written.append(part)
        (part / "a.cubin").write_bytes(b"x")
        raise error

    monkeypatch.setattr("par_export.kernels.build.Build.write", fails)
    with pytest.raises(type(error)) as caught:
        ahead(folder)
    assert len(written) == 1  # nothing else is begun
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["sources"]
    assert not list(folder.rglob("*.part"))
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(folder / "PAR-S-n4")
