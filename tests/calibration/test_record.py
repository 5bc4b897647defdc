"""What is recorded: the right rows, of both ways of recording, and a folder that survives being stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from par_calibration.cli import calibrate
from par_calibration.errors import CalibrationError
from par_calibration.record.native_rows import NativeRows
from par_calibration.record.onnx_rows import OnnxRows
from par_calibration.record.record import RecordOptions, plan_of, record
from par_calibration.record.recording import Recording
from par_calibration.record.rows import KINDS, Positions, choose, compact, widened
from par_export.restored import model_state, read_weights
from par_model.manifest import config_from_manifest, read_manifest
from par_model.transformer import PAR
from par_runtime.backends.native.library import why_not
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.pipeline import Pipeline

DEMO = Path(__file__).parents[2] / "models" / "demo"


def recorded(bundle: Bundle, folder: Path, resume: bool = False, **options: object) -> Recording:
    recording = Recording(folder, plan_of(bundle, RecordOptions(**options)), bundle)  # type: ignore[arg-type]
    recording.begin(resume)
    record(recording, lambda: OnnxRows(bundle, 1))
    return recording


def test_both_ways_record_the_same_numbers(tmp_path: Path) -> None:
    bundle = Bundle.open(DEMO)
    if why_not(bundle):
        pytest.skip(str(why_not(bundle)))
    plan = plan_of(bundle, RecordOptions(images=1, samples=64))
    made = []
    for way in (OnnxRows, NativeRows):
        recording = Recording(tmp_path / way.__name__, plan, bundle)
        recording.begin(False)
        record(recording, lambda way=way: way(bundle, 2))
        made.append(recording)
    for name in matrix_names(bundle):
        one, other = (recording.rows(name) for recording in made)
        assert one.shape == (64, bundle.weights[name].shape[0])
        np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(one).max())
        assert np.abs(one).max() > 0.5  # they are not both empty


def test_what_is_recorded_is_what_pytorch_multiplies(tiny: Path, tmp_path: Path) -> None:
    """Every recorded row with the class against the oracle, so that no names, rows or positions are exchanged."""
    import torch

    bundle = Bundle.open(tiny)
    recording = recorded(bundle, tmp_path / "r", images=1, samples=128, seed=3)
    label, seed = recording.plan.labels[0], recording.plan.seeds[0]
    with Pipeline.load(tiny, "cpu-ort", threads=1, selftest=False) as pipeline:
        made = pipeline.generate(label, guidance=recording.plan.guidance, seed=seed, decode=False)
    config = config_from_manifest(read_manifest(tiny))
    model = PAR(config).eval()
    model.load_state_dict(model_state(config, read_weights(bundle)))
    seen: dict[str, torch.Tensor] = {}
    modules = {"output": model.output}
    for i, layer in enumerate(model.layers):
        modules |= {f"layers.{i}.wqkv": layer.attention.wqkv, f"layers.{i}.wo": layer.attention.wo}
        modules |= {f"layers.{i}.w13": layer.feed_forward.w1, f"layers.{i}.w2": layer.feed_forward.w2}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        model(torch.from_numpy(made.tokens), torch.tensor([label]))
    with_class = recording.about.row == 0
    position = recording.about.position[with_class]
    assert set(seen) == set(matrix_names(bundle))
    assert position.tolist() == list(range(64))
    for name, value in seen.items():
        ours = recording.rows(name)[with_class]
        np.testing.assert_allclose(ours, value[0].numpy()[position], atol=2e-3 * float(value.abs().max()))


def test_sinks_and_short_phases_are_always_kept(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    positions = Positions.of(bundle)
    kept = choose(positions, 2, 40, (1, 2))
    assert len(kept.row) == 40
    pairs = set(zip(kept.row.tolist(), kept.position.tolist(), strict=True))
    assert len(pairs) == 40
    for position in [0, 5, 6, 7]:  # the class, and the learnable tokens of the transition
        assert {(0, position), (1, position)} <= pairs
    assert [KINDS[k] for k in positions.kind[:8]] == ["class", *["code"] * 4, *["learnable"] * 3]
    assert {(0, 1), (1, 3)} <= pairs  # the sequential calls are few
    assert len({p for _, p in pairs if p >= 8}) > 10
    again, other = choose(positions, 2, 40, (1, 2)), choose(positions, 2, 40, (1, 3))
    assert (again.position == kept.position).all()
    assert (other.position != kept.position).any()
    with pytest.raises(CalibrationError, match="7 samples of an image; expected at least 8"):
        choose(positions, 2, 7, (1,))
    part, place = kept.of_call(4, 4)
    assert (kept.position[part] == 4 + place % 4).all()
    assert (kept.row[part] == place // 4).all()


def test_rows_beyond_half_precision_keep_their_numbers() -> None:
    rows = np.array([[1e7, 3.0, -2e-3], [0, 0, 0], [1e-30, 0, -5e-31]], np.float32)
    back = widened(*compact(rows))
    np.testing.assert_allclose(back, rows, rtol=2**-10, atol=2e-3)
    np.testing.assert_allclose(back[2], rows[2], rtol=2**-10, atol=0)


def test_a_recording_goes_on_after_a_stop(tiny: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny)
    whole = recorded(bundle, tmp_path / "whole", images=3, samples=60)
    stopped = Recording(tmp_path / "stopped", whole.plan, bundle)
    stopped.begin(False)

    def stop(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(stopped, lambda: OnnxRows(bundle, 1), stop)
    assert stopped.done() == [0]
    stopped.file(1).write_bytes(whole.file(1).read_bytes()[:-500])  # as a disk leaves it when the power goes
    seen: list[int] = []
    stopped.begin(True)
    assert record(stopped, lambda: OnnxRows(bundle, 1), lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    for name in matrix_names(bundle):
        assert (stopped.rows(name) == whole.rows(name)).all()
    assert record(stopped, lambda: pytest.fail("nothing is missing")) == []
    assert whole.about.image.tolist() == [0] * 20 + [1] * 20 + [2] * 20


def test_a_damaged_file_of_a_recording_is_made_again(tiny: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny)
    recording = recorded(bundle, tmp_path / "r", images=1, samples=20)
    good = dict(np.load(recording.file(0)))
    name = matrix_names(bundle)[0]
    changes = {
        "as it was": {},
        "no file of arrays": None,
        "a matrix is missing": {name: None},
        "rows are missing": {name: good[name][:3]},
        "a width is another": {name: good[name][:, :3]},
        "a type is another": {name: good[name].astype(np.float32)},
        "text": {"row": np.array(["x"] * 20)},
        "not a number": {f"{name}.scale": good[f"{name}.scale"] * np.float32(np.nan)},
        "a phase that is none": {"phase": good["phase"] + 90},
        "a position that is none": {"position": good["position"] + 1000},
        "a row that is none": {"row": good["row"] + 2},
    }
    for what, change in changes.items():
        if change is None:
            recording.file(0).write_bytes(b"x" * 100)
        else:
            np.savez(recording.file(0), **{key: v for key, v in (good | change).items() if v is not None})
        assert recording.is_whole(0) == (what == "as it was"), what
    assert record(recording, lambda: OnnxRows(bundle, 1))
    assert recording.is_whole(0)
    assert (recording.rows(name) == widened(good[name], good[f"{name}.scale"])).all()


def test_a_recording_of_no_image_is_begun_anew(tiny: Path, tmp_path: Path) -> None:
    """A disk without room, for instance, was refused after ``recording.json`` was written."""
    bundle = Bundle.open(tiny)
    for samples in (20, 24):
        recording = Recording(tmp_path / "r", plan_of(bundle, RecordOptions(images=1, samples=samples)), bundle)
        recording.begin(False)
    assert json.loads((tmp_path / "r" / "recording.json").read_text())["rows_per_image"] == 24


def test_a_folder_of_another_recording_is_refused(tiny: Path, tmp_path: Path, no_waiting: None) -> None:
    bundle = Bundle.open(tiny)
    recording = recorded(bundle, tmp_path / "r", images=1, samples=20)
    for options, what in (
        ({"seed": 5}, "another seed"),
        ({"labels": ["otter"]}, "other labels"),
        ({"images": 2}, "1 images, not 2, and another number of rows per image"),
        ({"samples": 24}, "another number of rows per image"),
    ):
        other = Recording(
            recording.folder, plan_of(bundle, RecordOptions(**{"images": 1, "samples": 20} | options)), bundle
        )
        with pytest.raises(CalibrationError, match=f"holds a recording of {what}; give the same settings"):
            other.begin(True)
    with pytest.raises(CalibrationError, match="holds 1 of its images already; --resume goes on"):
        recording.begin(False)
    about = json.loads((recording.folder / "recording.json").read_text())
    (recording.folder / "recording.json").write_text(json.dumps(about | {"bundle": "0" * 64}))
    with pytest.raises(CalibrationError, match="another bundle"):
        recording.begin(True)
    other.begin(False, again=True)
    assert other.done() == []
    other.remove()
    assert not other.folder.exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="holds other files; give a new or empty folder"):
        Recording(tmp_path / "x", recording.plan, bundle).begin(True)
    (tmp_path / "x" / "recording.json").write_text("{")
    with pytest.raises(CalibrationError, match="give another --work"):
        Recording(tmp_path / "x", recording.plan, bundle).begin(True, again=True)
    assert (tmp_path / "x" / "mine.txt").read_text() == "mine"
    (tmp_path / "x" / "recording.json").unlink()
    os.mkfifo(tmp_path / "x" / "recording.json")
    with pytest.raises(CalibrationError, match=r"recording\.json: is a pipe, not a file; give another --work"):
        Recording(tmp_path / "x", recording.plan, bundle).begin(True)


def test_what_cannot_be_recorded_is_said_before(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    with pytest.raises(CalibrationError, match="--images 0: expected a number from 1"):
        plan_of(bundle, RecordOptions(images=0))
    with pytest.raises(CalibrationError, match="expected at least 80: the 8 rows"):
        plan_of(bundle, RecordOptions(images=10, samples=50))
    with pytest.raises(CalibrationError, match="no labels"):
        plan_of(bundle, RecordOptions(labels=[]))
    assert plan_of(bundle, RecordOptions(images=1, samples=10**6)).rows_per_image == 128
    assert sorted(plan_of(bundle, RecordOptions(images=6)).labels) == list(range(6))


@pytest.mark.parametrize("named", [False, True])
def test_a_recording_that_does_not_fit_says_how_much_it_needs_and_leaves_no_folder(
    named: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    work = tmp_path / ("work" if named else ".tiny.calibration")
    options = ["--images", "2", "--samples", "60", "--keep", "wqkv,wo,w13,head", "--out", str(tmp_path / "q")]
    given = [*options, "--weights", "int8", *(["--work", str(work)] if named else [])]
    (tmp_path / "tiny").symlink_to(tiny)
    assert calibrate.main([str(tmp_path / "tiny"), *given]) == 2
    error = capfd.readouterr().err
    assert re.search(rf"{work}: a recording of 2 images needs [0-9]+ kB more, the disk has 4 kB; give fewer", error)
    assert work.exists() == named  # what nobody named, nobody looks for
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["tiny", *(["work"] if named else [])])
