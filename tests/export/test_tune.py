"""``parvis tune`` on the stand-in GPU: every form is timed, the fastest is kept, nothing else is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from double import tensorrt
from double.driver import Driver

from par_export.cli import tune as tune_cli
from par_export.engines import tune
from par_export.engines.request import BuildRequest
from par_export.errors import BuildError
from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINES, Engine
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle
from par_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny bundle; builds give stand-in plans, of which one form is much faster than the others."""
    stand_in = Driver()
    monkeypatch.setattr(cuda, "driver", stand_in)
    monkeypatch.setattr(trt_module, "load", lambda name=None: tensorrt.make(stand_in))
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)

    def build(request: BuildRequest, say: object) -> Path:
        if request.grouped and not request.lengths:
            raise BuildError("no fused attention kernel")
        slow = 0.0 if (request.grouped, request.lengths, request.norm_after) == (False, True, True) else 2e-3
        folder = tensorrt.write_engine(Bundle.open(request.bundle), request.images, request.mode, slow=slow)
        return folder.rename(folder.with_name(f"{folder.name}-{request.label}"))

    monkeypatch.setattr(tune, "build", build)
    return path


@pytest.mark.slow
def test_the_fastest_form_is_kept_and_loaded(bundle: Path) -> None:
    lines: list[str] = []
    folder = tune.tune(BuildRequest(bundle, "local", images=(1, 2)), images=2, repeats=1, rounds=2, say=lines.append)
    assert [path.name for path in (bundle / ENGINES).iterdir()] == [folder.name]
    tuned = Engine.open(folder, Bundle.open(bundle)).tuned
    chosen = min((row for row in tuned["rows"] if row["images"] == 2), key=lambda row: row["ms_per_image"])
    assert chosen["form"] == {"grouped": False, "lengths": True, "norm_after": True}
    assert len({json.dumps(row["form"]) for row in tuned["rows"]}) == 5  # of six, one could not be built
    assert tuned["capture"] == chosen["capture"]
    assert all(len(row["samples_ms"]) == 2 for row in tuned["rows"])
    assert {row["capture"] for row in tuned["rows"]} == {"image", "call", "none"}
    assert any("grouped mask before: left out: no fused attention kernel" in line for line in lines)
    assert sum("<- chosen" in line for line in lines) == 1
    pipeline = Pipeline.load(bundle)
    assert pipeline.backend.capture == tuned["capture"]  # type: ignore[attr-defined]
    pipeline.close()


@pytest.mark.slow
def test_the_command_prints_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_cli.main([str(bundle), "--max-images", "1", "--repeats", "1", "--rounds", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["chosen"] is True
    assert Path(row["engine"]).is_dir()


def test_tuning_without_a_gpu_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda.driver.devices = 0
    assert tune_cli.main([str(bundle)]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: tuning needs a GPU: the driver shows no GPU")
    assert not (bundle / ENGINES).exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repeats", "0"], "argument --repeats: '0': expected a number from 1 to 256"),
        (["--rounds", "x"], "argument --rounds: 'x': expected a number from 1 to 256"),
        (["--images", "0"], "argument --images: '0': expected a number of images from 1 to 256"),
        (["--sizes", "1", "--max-images", "8"], "argument --max-images: not allowed with argument --sizes"),
    ],
)
def test_bad_numbers_are_called_what_they_are(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune_cli.parser().parse_args(["bundle", *arguments])
    assert text in capsys.readouterr().err


def test_a_batch_size_that_is_not_built_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_cli.main([str(bundle), "--sizes", "1,2", "--images", "4"]) == 2
    assert "images 4: the engine is built for (1, 2)" in capsys.readouterr().err
