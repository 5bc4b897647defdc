"""Video models as wholes: the paper's size, the same tokens on every engine of a CPU, and calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from video_bundles import write_tiny_video

from par_calibration.cli import calibrate
from par_calibration.errors import CalibrationError
from par_calibration.heldout import find, read
from par_model.baseline import Baseline
from par_model.config import named
from par_model.generation import generate as reference
from par_model.ordering import phases
from par_model.transformer import PAR
from par_runtime import Pipeline
from par_runtime.bench.suites.paper import PUBLISHED, VIDEO, architecture_of
from par_runtime.clips.files import write_frames
from par_runtime.cost.architecture import phases_of
from par_runtime.errors import RequestError

FASHION = Path(__file__).parents[2] / "models/fashion"


def test_the_calls_and_the_size_of_the_papers_video_model() -> None:
    published = {row.n: row for row in PUBLISHED if row.model == VIDEO}
    for n, calls in ((1, 1280), (4, 323), (16, 95)):
        config = named("video", group_size=n)
        for of in (phases(config), phases_of(n, config.n_tokens)):
            assert sum(phase.repeat for phase in of) == calls
        assert calls == published[n].steps
        ours = architecture_of(published[n])
        assert (ours.dim, ours.n_layers, ours.n_heads, ours.head_dim) == (1536, 21, 24, config.head_dim)
        assert (ours.ffn_dim, ours.vocab_size, ours.calls) == (config.ffn_dim, 64000, calls)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PAR(named("video", group_size=1)).parameters())
    assert round(parameters / 1e6, 1) == 791.4  # "792 M" in the paper


@pytest.mark.parametrize(
    ("n", "calls"),
    [pytest.param(1, 192, marks=pytest.mark.slow), (4, 51), pytest.param(16, 27, marks=pytest.mark.slow)],
)
def test_greedy_tokens_are_the_same_on_every_engine_of_a_cpu(n: int, calls: int, tmp_path: Path) -> None:
    """The oracle, the baseline with its static caches, the C step, and ONNX Runtime; and the baseline's clips."""
    bundle = write_tiny_video(tmp_path / "b", n, dim=32)
    checkpoints = tmp_path / ".b-checkpoints"
    baseline = Baseline(bundle, checkpoint=checkpoints / "model.pt", tokenizer=checkpoints / "video.pt")
    baseline.run(2, 2.0, greedy=True)
    model = PAR(baseline.config).eval()
    model.load_state_dict(torch.load(checkpoints / "model.pt", weights_only=True)["model"])
    wanted = reference(model, [0, 1], guidance=2.0, greedy=True).numpy()
    assert len(np.unique(wanted)) > 5
    assert (baseline.tokens.numpy() == wanted).all()
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(bundle, device, threads=1) as pipeline:
            assert pipeline.bundle.calls == calls
            assert ("native" in pipeline.backend.info.runtime) == (device == "cpu")
            made = pipeline.generate([0, 1], guidance=2.0, greedy=True)
        np.testing.assert_array_equal(made.tokens, wanted, device)
        assert made.images is not None
        assert np.abs(baseline.images.numpy().astype(int) - made.images).max() <= 1


def test_the_shipped_model_has_the_same_tokens_on_every_engine_of_a_cpu() -> None:
    made = []
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(FASHION, device) as pipeline:
            made.append(pipeline.generate(["bag", "dress"], seed=3, decode=False).tokens)
    assert (made[0] == made[1]).all()
    assert len(np.unique(made[0])) > 50


@pytest.mark.slow
def test_a_video_bundle_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With clips as held-out data, from files and from codes in raster order; the report has a distance and frames."""
    bundle = write_tiny_video(tmp_path / "b", dim=32)
    real = tmp_path / "real"
    with Pipeline.load(bundle) as pipeline:
        made = pipeline.generate([0, 1, 2, 2], seed=1)
        for i, label in enumerate(made.labels):
            made.save(real / str(label) / f"{i}.webp", indices=i)
        order = list(pipeline.bundle.order)
        assert made.images is not None
        wanted = pipeline.encode(made.images)
        made.save(tmp_path / "both" / "0" / "two.webp", indices=[0, 1])
    found = find(pipeline.bundle, real, 10)
    assert found is not None
    assert found.labels == (0, 1, 2, 2)
    np.testing.assert_array_equal(found.tokens, wanted)
    raster = np.empty_like(wanted)
    raster[:, order] = wanted
    codes = tmp_path / "codes.npz"
    np.savez(codes, codes=raster.reshape(-1, 3, 8, 8).astype(np.uint16), labels=np.array(made.labels, np.uint8))
    np.testing.assert_array_equal(read(pipeline.bundle, codes, "codes").tokens, wanted)
    np.savez(codes, codes=raster.reshape(-1, 24, 8).astype(np.uint16), labels=np.array(made.labels, np.uint8))
    with pytest.raises(CalibrationError, match=r"shape \(4, 24, 8\); this bundle's clips have 3x8x8 codes"):
        read(pipeline.bundle, codes, "codes")
    np.savez(codes, codes=np.zeros((0, 3, 8, 8), np.uint16), labels=np.zeros(0, np.uint8))
    with pytest.raises(CalibrationError, match=r"expected \[M,192\] with M of 1 or more"):
        read(pipeline.bundle, codes, "codes")
    write_frames(tmp_path / "short" / "0" / "a.gif", made.images[0, :2], 8)
    with pytest.raises(RequestError, match=r"a.gif: has 2 frames; expected a clip of 5 or more"):
        find(pipeline.bundle, tmp_path / "short", 10)
    with pytest.raises(CalibrationError, match=r"two.webp: holds 2 clips; give a file for each \(--out-dir\)"):
        find(pipeline.bundle, tmp_path / "both", 10)
    for option in ("--html", "--json"):
        inside = real / "2" / "3.webp"
        before = inside.read_bytes()
        given = [str(bundle), "--weights", "int8", "--group", "32", "--real", str(real)]
        given += ["--out", str(tmp_path / "x"), option]
        assert calibrate.main([*given, str(inside)]) == 2
        assert "which is read by this command; write the report to another folder" in capsys.readouterr().err
        (tmp_path / "mine.txt").write_text("mine")
        assert calibrate.main([*given, str(tmp_path / "mine.txt")]) == 2
        assert f"{option} {tmp_path / 'mine.txt'}: exists and has another ending than ." in capsys.readouterr().err
        (tmp_path / f"link.{option[2:]}").symlink_to(inside)
        assert calibrate.main([*given, str(tmp_path / f"link.{option[2:]}")]) == 2
        assert inside.read_bytes() == before
    out, report = tmp_path / "int8", tmp_path / "report.json"
    command = [str(bundle), "--weights", "int8", "--group", "32", "--out", str(out), "--json", str(report)]
    command += ["--real", str(real), "--generated", "12", "--images", "4", "--show-images", str(tmp_path / "p.png")]
    code = calibrate.main(command)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "clip of 5 frames" in printed.out
    entry = json.loads(report.read_text())
    assert "latent frame" in entry["frechet"]["features"]
    with Pipeline.load(out) as pipeline:
        again = pipeline.generate([0], seed=1)
    assert again.images is not None
    assert again.images.shape == (1, 5, 16, 16, 3)
