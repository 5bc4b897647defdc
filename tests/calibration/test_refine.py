"""``parvis calibrate --refine``: gradients; that it learns, goes on where it stopped, and says what it cannot do."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from par_calibration.errors import CalibrationError
from par_calibration.quantise.choice import How, kept_names
from par_calibration.record.arrays import read_arrays
from par_calibration.refine import state as on_disk
from par_calibration.refine import train
from par_calibration.refine.images import images
from par_calibration.refine.latent import Latent
from par_calibration.refine.loss import distance
from par_calibration.refine.plan import BATCH, Plan
from par_calibration.refine.train import refine
from par_export.quantised import nearest, stored_scales
from par_export.restored import read_weights, restored_model
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.cli import main
from par_runtime.quantised import Quantised

STEPS = 60


class Case:
    """The w2 of the tiny bundle at int4: all of its matrices with whole groups."""

    def __init__(self, path: Path) -> None:
        self.bundle = Bundle.open(path)
        self.kept = kept_names(self.bundle, ["wqkv", "wo", "w13", "head"])
        self.names = [name for name in matrix_names(self.bundle) if name not in self.kept]
        self.weights = read_weights(self.bundle)
        self.start = {name: nearest(self.weights[name].float().numpy(), "int4", 64) for name in self.names}
        self.shapes = {name: tuple(self.weights[name].shape) for name in self.names}

    def plan(self, steps: int = STEPS, seed: int = 0) -> Plan:
        return Plan.of(self.bundle, How("int4", 64, "float16"), self.kept, steps, seed, "here", threads=1)

    def refine(self, folder: Path, plan: Plan, **more: object) -> Mapping[str, Quantised]:
        return refine(self.bundle, plan, lambda: self.start, self.shapes, folder, **more).matrices  # type: ignore[arg-type]

    def distance(self, matrices: Mapping[str, Quantised]) -> float:
        """The loss on tokens that nobody has learned from."""
        small = {name: torch.from_numpy(m.dequantised()) for name, m in matrices.items()}
        drawn = np.random.default_rng(5).integers(0, self.bundle.vocab_size, (8, self.bundle.n_tokens))
        tokens = torch.from_numpy(drawn)
        labels = torch.arange(8) % self.bundle.n_classes
        rows = (tokens.repeat(2, 1), torch.cat([labels, torch.full_like(labels, self.bundle.n_classes)]))
        with torch.no_grad():
            both = [
                restored_model(self.bundle, self.weights | own, torch.float32, torch.device("cpu"))(*rows)
                for own in ({}, small)
            ]
        return float(distance(both[0], both[1], 1.5))


@pytest.fixture
def case(tiny: Path) -> Case:
    return Case(tiny)


def test_the_gradients_are_those_that_pytorch_finds() -> None:
    """Rounding passes gradients on as they are, numbers beyond the codes get none."""
    torch.manual_seed(0)
    matrix = torch.randn(64, 6)
    latent = Latent.of(nearest(matrix.numpy(), "int4", 32), matrix)
    latent.numbers[0, :3] = torch.tensor([9.0, -8.4, 6.6])[:, None]
    of_matrix = torch.randn(64, 6)
    numbers, log_scales = (x.clone().requires_grad_() for x in latent.trained)
    inside = numbers.clamp(-8, 7)
    codes = inside + (inside.round() - inside).detach()
    twin = (codes * log_scales.exp()).flatten(0, 1)
    assert torch.equal(twin.detach(), latent.matrix())
    twin.backward(of_matrix)
    got = latent.gradients(of_matrix)
    assert numbers.grad is not None
    assert log_scales.grad is not None
    torch.testing.assert_close(got[0], numbers.grad)
    torch.testing.assert_close(got[1], log_scales.grad)
    assert not got[0][0, :2].any()  # 9 and -8.4 are beyond the codes
    assert got[0][0, 2].all()


def test_a_training_begins_at_its_codes() -> None:
    matrix = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    for dtype in ("int4", "int8"):
        start = nearest(matrix, dtype, 32)
        moved = replace(start, codes=np.clip(start.codes + 1, -8, 7).astype(np.int8))  # as GPTQ moves some
        latent = Latent.of(moved, torch.from_numpy(matrix))
        assert (latent.quantised("float16").codes == moved.codes).all()
        np.testing.assert_allclose(latent.quantised("float16").scales, start.scales, rtol=1e-3)
        # Towards the original's numbers, and never as far as another code's.
        away = matrix / np.repeat(start.scales, 32, 0) - moved.codes
        towards = (latent.numbers.flatten(0, 1).numpy() - moved.codes) * away
        assert (towards >= 0).all()


def test_it_learns_and_a_stopped_training_ends_the_same(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "RATE", 0.03)  # for few steps
    lines: list[str] = []
    whole = case.refine(tmp_path / "whole", case.plan(), say=lines.append)
    before, after = case.distance(case.start), case.distance(whole)
    assert after < 0.8 * before
    assert f"training: {STEPS} of {STEPS} steps" in lines[-1]
    for name, matrix in whole.items():
        assert (matrix.codes != case.start[name].codes).any()
        assert (stored_scales(matrix.scales, "float16") == matrix.scales).all()

    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 7:
            raise StopError

    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    with pytest.raises(StopError):
        case.refine(tmp_path / "parts", case.plan(), on_step=stop)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("tokens-*")}
    monkeypatch.setattr(train, "SAVE_SECONDS", 60.0)
    lines.clear()
    again = case.refine(tmp_path / "parts", case.plan(), say=lines.append)
    assert lines[0] == f"training: 7 of {STEPS} steps were there"
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for name, matrix in whole.items():
        assert (again[name].codes == matrix.codes).all()
        assert (again[name].scales == matrix.scales).all()


def test_what_is_no_state_of_this_training_is_refused(case: Case, tmp_path: Path) -> None:
    case.refine(tmp_path, case.plan(1))
    file = tmp_path / on_disk.FILE
    with pytest.raises(CalibrationError, match=r"refine\.npz: is a training of another bundle, or with other --refine"):
        case.refine(tmp_path, case.plan(2))
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"no training"):
        file.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"refine\.npz: cannot be read as a training; remove it"):
            case.refine(tmp_path, case.plan(1))
    file.unlink()
    part = tmp_path / "tokens-000000.npz"
    part.write_bytes(part.read_bytes()[:-8])  # images that are damaged are made again
    case.refine(tmp_path, case.plan(1))
    with np.load(part) as arrays:
        assert arrays["tokens"].shape == (BATCH, case.bundle.n_tokens)


def test_a_hostile_state_is_refused_and_nothing_in_it_is_run(case: Case, tmp_path: Path) -> None:
    """Whole files whose numbers are none of a training: a shape is compared before anything is allocated."""
    case.refine(tmp_path, case.plan(2))
    file = tmp_path / on_disk.FILE
    with np.load(file) as arrays:
        good = dict(arrays)
    name = f"{case.names[0]}.numbers"
    numbers = good[name]
    changes: list[dict[str, object]] = [
        {name: np.full_like(numbers, np.nan)},
        {name: np.full_like(numbers, 1e9)},
        {name: numbers[:, :32]},
        {name: numbers.astype(np.float64)},
        {name: np.array([print], object)},
        {f"{name}.exp_avg": np.full_like(numbers, np.inf)},
        {f"{name}.exp_avg_sq": np.full_like(numbers, -1)},
        {f"{name}.exp_avg_sq": numbers[:1, :1]},
        {f"{case.names[0]}.log_scales": np.full_like(numbers[:, :1], 200)},
        {"step": np.array([3])},
        {"step": np.array([-1]), "losses": np.zeros(0)},
        {"losses": np.array([0.1])},
        {"losses": np.array([0.1, np.nan])},
    ]
    for change in changes:
        np.savez(file, **good | change)
        with pytest.raises(CalibrationError, match=r"refine\.npz: cannot be read as a training; remove it"):
            case.refine(tmp_path, case.plan(2))
    np.savez_compressed(file, **good)
    with pytest.raises(CalibrationError, match="cannot be read as a training"):
        case.refine(tmp_path, case.plan(2))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CalibrationError, match="cannot be read as a training"):
        case.refine(tmp_path, case.plan(2))


def test_a_full_disk_is_known_before_images_are_made(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the file twice (each number and its two moments), and for the tokens."""
    needed = 2 * 12 * sum(k * n for k, n in case.shapes.values()) + 8 * case.bundle.n_tokens * 8
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(CalibrationError, match=r"a training of 0 million codes needs 0\.\d MB"):
        case.refine(tmp_path, case.plan(2))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    case.refine(tmp_path, case.plan(2))


def test_a_header_is_not_believed(tmp_path: Path) -> None:
    """What numpy's own reader answers with gigabytes, or with the errors of a parser."""
    file = tmp_path / "x.npz"
    for header in ("{'descr': '<i8', 'fortran_order': False, 'shape': (2000000000000,)}", "(" * 900, "{'descr': ("):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        with pytest.raises(ValueError, match=r"header that cannot|another shape"):
            read_arrays(file, {"a": ("int64", (4,))})
    np.savez(file, a=np.arange(4))
    assert read_arrays(file, {"a": ("int64", (None,))})["a"].tolist() == [0, 1, 2, 3]
    content = bytearray(file.read_bytes())
    content[content.index(b"\x02\0\0\0\0\0\0\0\x03")] = 7
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a file of arrays: Bad CRC"):
        read_arrays(file, {"a": ("int64", (4,))})


def test_images_of_another_training_are_made_again(case: Case, tmp_path: Path) -> None:
    """12 steps learn from other classes than 6, and as many images lie in the first file."""
    first, second = case.plan(6), case.plan(12)
    assert first.labels != second.labels[:24]
    images(case.bundle, first, tmp_path)
    reused = images(case.bundle, second, tmp_path)
    assert (reused == images(case.bundle, second, tmp_path / "fresh")).all()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*")}
    assert (images(case.bundle, second, tmp_path) == reused).all()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*")}


def test_images_are_of_the_classes_that_are_asked_for(case: Case) -> None:
    how = How("int4", 64, "float16")
    assert set(Plan.of(case.bundle, how, case.kept, 2, 0, "", [1]).labels) == {1}
    two = Plan.of(case.bundle, how, case.kept, 2, 0, "", [0, 2])
    assert sorted(two.labels) == [0] * 4 + [2] * 4
    assert two.text() != Plan.of(case.bundle, how, case.kept, 2, 0, "").text()


def test_every_image_is_seen_before_one_is_seen_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("par_calibration.refine.plan.MOST_IMAGES", 12)
    plan = case.plan(6)
    assert plan.images == 12
    seen = np.concatenate([plan.batch(step) for step in range(6)])
    for half in (seen[:12], seen[12:]):
        assert sorted(half) == list(range(12))
    assert (seen[:12] != seen[12:]).any()
    assert {plan.labels.count(label) for label in range(3)} == {12 // case.bundle.n_classes}


def test_the_verb_says_what_it_did_and_what_it_cannot_do(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, out = case.bundle.path, tmp_path / "small"
    how = ["--keep", "wqkv,wo,w13,head", "--images", "2", "--samples", "60", "--held-out", "4", "--generated", "0"]

    def run(*arguments: object) -> int:
        return main(["calibrate", str(tiny), "--out", str(out), *how, *map(str, arguments)])

    limits = "top1=none,kl=none,kl_p95=none,kl_inputs=none,likelihood=none,layer=none,frechet=none"
    assert run("--weights", "int4", "--refine", 3, "--budget", limits) == 0
    lines = capfd.readouterr().out
    assert "refined in 3 steps" in lines
    made = Bundle.open(out).calibration
    assert made is not None
    assert made.report["refined_steps"] == 3
    assert not list(tmp_path.glob(".*"))  # what it learned from is removed with the recording
    for arguments, message in (
        (["--weights", "int4", "--refine", 0], "--refine 0: expected 1 or more"),
        ([*how, "--weights", "int4", "--refine", 10**6, "--force"], "--refine 1000000: expected a number of steps"),
        (["--weights", "keep", "--arithmetic", "bf16", "--refine", 5, "--force"], "--refine: no matrix is quantised"),
    ):
        assert main(["calibrate", str(tiny), "--out", str(out), *map(str, arguments)]) == 2
        assert message in capfd.readouterr().err
    monkeypatch.setattr(train, "available_bytes", lambda: 10**5)
    assert run("--weights", "int4", "--refine", 3, "--force", "--work", tmp_path / "w") == 2
    assert "GB of memory, 0.0 GB are free; leave --refine out" in capfd.readouterr().err
    assert not (tmp_path / "w").exists()  # known before anything is recorded
    assert run("--ranges", "--refine", 3) == 2
    said = capfd.readouterr().err
    assert "--refine" in said.partition(": --ranges only measures")[0]
    assert said.endswith("and writes no bundle; leave it out, or these\n")
    assert Bundle.open(out, verify="full").calibration == made  # nothing is lost
