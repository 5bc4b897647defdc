"""The C step in bf16 arithmetic, and with keys and values in bf16: what rounding costs, and what still fails."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from instruction_sets import EVERY
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from par_export.random_bundle import write_family
from par_model.config import PARConfig
from par_runtime import Bundle, BundleError, Pipeline, RequestError
from par_runtime.backends.base import BackendInfo
from par_runtime.backends.choose import choose
from par_runtime.backends.native.backend import TIE, NativeBackend
from par_runtime.backends.native.library import described, library
from par_runtime.bundle import Calibration
from par_runtime.cli import main
from par_runtime.cli.inputs import then_and_now
from par_runtime.dtypes import Rounding
from par_runtime.images import png
from par_runtime.images.recipe import MadeOn, Recipe
from par_runtime.request import Settings, image_settings
from par_runtime.schedule import Schedule

DEMO = Path(__file__).parents[2] / "models" / "demo"
pytestmark = pytest.mark.skipif(library() is None, reason="no compiler at installation, or an older CPU")


def logits(path: Path, arithmetic: str, cache: str, threads: int = 2) -> NDArray[np.float32]:
    """Guided logits of all calls of two images of random tokens, one call after the other: [calls' B*q,V]."""
    bundle = Bundle.open(path, "none")
    schedule = Schedule.of(bundle, [0, 1], image_settings(bundle, 2, guidance=2.0))
    tokens = np.random.default_rng(3).integers(0, bundle.vocab_size, (2, bundle.n_tokens))
    backend = NativeBackend(bundle, threads, arithmetic, cache)
    calls = [backend.logits(batch, ids, write) for _, batch, ids, write in schedule.walk(tokens)]
    backend.close()
    return np.concatenate([each.reshape(-1, bundle.vocab_size) for each in calls])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 100, padded to 104, which is no multiple of a panel; 9 tokens at a time, so pairs begin anywhere."""
    return _odd(tmp_path_factory, 9)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 36 tokens at a time, which are more rows than a tile has."""
    return _odd(tmp_path_factory, 36)


def _odd(folder: pytest.TempPathFactory, n: int) -> Path:
    config = PARConfig(dim=800, n_layers=2, n_heads=8, vocab_size=256, n_classes=10, grid=(1, 12, 12))
    return write_family(config, (n,), folder.mktemp("odd"), name="odd")[n]


@pytest.fixture(scope="module", params=["demo", "odd", "wide"])
def path(request: pytest.FixtureRequest, odd: Path, wide: Path) -> Path:
    return {"demo": DEMO, "odd": odd, "wide": wide}[request.param]


@pytest.fixture(scope="module")
def exact(path: Path) -> NDArray[np.float32]:
    return logits(path, "fp32", "fp32")


@pytest.mark.parametrize(("arithmetic", "cache"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_rounding_moves_logits_less_than_a_tie(
    path: Path, exact: NDArray[np.float32], arithmetic: str, cache: str
) -> None:
    moved = np.abs(logits(path, arithmetic, cache) - exact)
    assert 0 < moved.max() < TIE["bf16"] / 2 * np.abs(exact).max()
    assert np.sqrt(np.mean(moved**2)) < 3e-3 * np.abs(exact).max()


#: What ``logits`` needs; this file imports PyTorch too, which takes seconds.
PRELUDE = """
from __future__ import annotations
import sys
from pathlib import Path
import numpy as np
from par_runtime import Bundle
from par_runtime.backends.native.backend import NativeBackend
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule
"""


def written(requested: str, path: Path, out: Path) -> NDArray[np.float32]:
    """``logits`` with a bf16 cache in a process of its own: the instruction set is chosen at load."""
    code = f"{PRELUDE}{inspect.getsource(logits)}np.save(sys.argv[2], logits(Path(sys.argv[1]), 'bf16', 'bf16'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PARVIS_NATIVE": requested}
    done = subprocess.run([sys.executable, "-c", code, str(path), str(out)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made: NDArray[np.float32] = np.load(out)
    return made


@pytest.mark.parametrize("requested", EVERY[1:])
def test_instruction_sets_agree(requested: str, odd: Path, wide: Path, tmp_path: Path) -> None:
    """Products of the same rounded numbers differ by the order of fp32 sums. That turns a rounding here and there,
    which turns more of those behind it, so what two sets differ by is about what rounding costs, and not more.
    """
    for bundle, most in ((odd, 5e-3), (wide, 7e-3)):
        ours = logits(bundle, "bf16", "bf16")
        moved = np.abs(written(requested, bundle, tmp_path / "logits.npy") - ours)
        assert moved.max() < most * np.abs(ours).max()
        assert np.sqrt(np.mean(moved**2)) < 1.2e-3 * np.abs(ours).max()


def test_a_call_of_no_positions_gives_nothing() -> None:
    bundle = Bundle.open(DEMO, "none")
    batch = Schedule.of(bundle, [0], image_settings(bundle, 1)).batch
    backend = NativeBackend(bundle, 1, "bf16", "bf16")
    none = backend.logits(batch, np.zeros((batch.rows, 0), np.int64), np.zeros(batch.rows, np.int64))
    assert none.shape == (1, 0, bundle.vocab_size)
    backend.close()


@pytest.mark.two_cores
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_a_batch_and_its_images_alone_agree_in_a_bf16_cache(arithmetic: Literal["fp32", "bf16"]) -> None:
    """Also where an earlier image has left its keys, which are NaN here, behind those of a shorter one."""
    with Pipeline.load(DEMO, "cpu", threads=2, arithmetic=arithmetic, cache="bf16", selftest=False) as pipeline:
        alone = [pipeline.generate(label, seeds=[7 + label], decode=False).tokens[0] for label in range(3)]
        assert isinstance(pipeline.backend, NativeBackend)
        pipeline.backend._cache[:] = 0x7FC0
        batched = pipeline.generate([0, 1, 2], seeds=[7, 8, 9], decode=False).tokens
    assert (np.stack(alone) == batched).all()


def test_what_a_backend_says_of_itself() -> None:
    lib = library()
    assert lib is not None
    assert described(lib).startswith(lib.parvis_instructions().decode())
    bundle = Bundle.open(DEMO, "none")
    for arithmetic, cache, computes, exactness in [
        ("fp32", "fp32", "fp32", "fp32"), ("bf16", "fp32", "bf16", "bf16"), ("fp32", "bf16", "fp32", "bf16"),
        ("int8", "bf16", "bf16", "bf16"),  # no matrix of the demo is quantised
    ]:  # fmt: skip
        backend = NativeBackend(bundle, 1, arithmetic, cache)
        info = backend.info
        assert (info.computes, info.cache_bytes, info.least_exact) == (computes, 2 if cache == "bf16" else 4, exactness)
        assert backend.tie == TIE[exactness]
        assert ("bf16" in info.name, "bf16 cache" in info.name) == ("bf16" in (computes, cache), cache == "bf16")
        backend.close()


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_auto_is_what_the_calibration_has_proven(device: str) -> None:
    bundle = replace(Bundle.open(DEMO, "none"), calibration=None)
    proven = replace(bundle, calibration=Calibration("kept", 0, (), "bf16", "bf16", "", {}))
    for each, asked, computes, cache_bytes in [
        (bundle, ("auto", "auto"), "fp32", 4), (proven, ("auto", "auto"), "bf16", 2),
        (proven, ("fp32", "auto"), "fp32", 2), (proven, ("auto", "fp32"), "bf16", 4),
    ]:  # fmt: skip
        backend, _ = choose(each, device, threads=1, arithmetic=asked[0], cache=asked[1])
        assert (backend.info.computes, backend.info.cache_bytes) == (computes, cache_bytes)
        backend.close()


def test_a_self_test_finds_changed_weights_in_bf16_too(tmp_path: Path) -> None:
    path = tmp_path / "spoilt"
    shutil.copytree(DEMO, path)
    at = Bundle.open(path).weights["layers.1.w2"]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset)
        file.write(b"\0" * at.length)
    with pytest.raises(BundleError, match="self-test failed on native-cpu"):
        Pipeline.load(path, device="cpu", verify="none", arithmetic="bf16", cache="bf16", threads=1)
    Pipeline.load(DEMO, device="cpu", arithmetic="bf16", cache="bf16", threads=1).close()


@pytest.mark.parametrize("cache", ["fp32", "bf16"])
def test_weights_that_are_no_numbers_show_in_the_logits(cache: str, tmp_path: Path) -> None:
    """A NaN of all ones too, which becomes 0 where it is rounded to bf16 as a number is."""
    path = Path(shutil.copytree(DEMO, tmp_path / "spoilt"))
    at = Bundle.open(path).weights["layers.1.wqkv"]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset)
        file.write(b"\xff" * at.length)
    assert np.isnan(logits(path, "fp32", cache)[0]).all()


def test_what_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"^arithmetic 'fp8': expected auto, fp32, bf16 or int8$"):
        Pipeline.load(DEMO, arithmetic="fp8")
    with pytest.raises(RequestError, match=r"^cache 'int8': expected auto, fp32 or bf16$"):
        Pipeline.load(DEMO, cache="int8")
    assert main(["generate", str(DEMO), "--label", "0", "--cache", "fp8"]) == 2
    assert "argument --cache: invalid choice: 'fp8'" in capsys.readouterr().err


def test_the_command_line_verifies_the_arithmetic_that_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(DEMO), "--device", "cpu", "--threads", "1", "--images", "1", "--groups", "4", "--greedy"]
    assert main([*arguments, "--arithmetic", "bf16", "--cache", "bf16"]) == 0
    assert "bf16" in capsys.readouterr().out


def test_redo_with_another_arithmetic_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(tmp_path / "one.png")
    here, rounding = ["--device", "cpu", "--threads", "1", "--quiet"], ["--arithmetic", "bf16", "--cache", "bf16"]
    assert main(["generate", str(DEMO), "--label", "0", "--seed", "1", "--out", image, *here, *rounding]) == 0
    assert main(["redo", image, "--bundle", str(DEMO), *here, *rounding]) == 0
    capsys.readouterr()
    assert main(["redo", image, "--bundle", str(DEMO), *here, "--arithmetic", "fp32", "--cache", "fp32"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"tokens differ \(then on native-cpu .+ bf16, bf16 cache\), now on native-cpu \S+ \(\w+\); ", out)
    assert out.endswith("; arithmetic bf16 then, fp32 now, cache bf16 then, fp32 now)\n")
    older = without_made_on(Path(image))
    assert main(["redo", older, "--bundle", str(DEMO), *here]) == 0  # the demo's own rounding is this one
    assert main(["redo", older, "--bundle", str(DEMO), *here, "--arithmetic", "fp32", "--cache", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "tokens differ (now on native-cpu " in out
    assert "another --device, --arithmetic or --cache rounds otherwise: give those it was made with)" in out


def without_made_on(path: Path) -> str:
    """The PNG at ``path`` as an earlier version wrote it."""
    out = path.with_name("older.png")
    with Image.open(path) as image:
        image.load()
        entry = json.loads(image.text["parvis"])  # type: ignore[attr-defined]
        del entry["made_on"]
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parvis", json.dumps(entry))
        image.save(out, pnginfo=info)
    return str(out)


def test_redo_computes_as_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp32 the demo draws other tokens than by default, in bf16; nobody has to know what it was made with."""
    image, older = str(tmp_path / "one.png"), ["--arithmetic", "fp32", "--cache", "fp32"]
    here = ["--device", "cpu", "--threads", "1", "--quiet"]
    assert main(["generate", str(DEMO), "--label", "0", "--seed", "1", "--out", image, *here, *older]) == 0
    capsys.readouterr()
    for device in ("cpu", "auto", "cpu-ort"):
        assert main(["redo", image, "--bundle", str(DEMO), "--device", device, "--quiet"]) == 0
        assert "identical: 1 image, 256 tokens" in capsys.readouterr().out
    assert main(["redo", without_made_on(Path(image)), "--bundle", str(DEMO), *here]) == 1
    assert main(["redo", image, "--bundle", str(DEMO), *here, "--arithmetic", "bf16"]) == 1  # what is given counts
    made_on = png.read(Path(image))[0].made_on
    with Pipeline.load(DEMO, "cpu", threads=1, selftest=False, arithmetic="fp32", cache="fp32") as pipeline:
        info = pipeline.backend.info
        assert made_on == pipeline.generate(0).made_on == MadeOn(info.name, info.decoder, Rounding()._asdict())


def test_redo_says_why_tokens_may_come_out_otherwise() -> None:
    """By what is known of both sides."""

    def said(then: MadeOn | None, now: BackendInfo) -> str:
        none = np.zeros((1, 4), np.int64)
        return then_and_now(Recipe("b", "0", 1, [0], [None], [0], [Settings()], none, made_on=then), now)

    here = BackendInfo("native-cpu", "0.1.0 (avx2, bf16)", "cpu", "bf16", 2.0, 4.0, "native-cpu 0.1.0 (avx2)")
    assert here.rounding == {"arithmetic": "bf16", "cache": "fp32", "decoder_precision": "fp32"}
    gpu = BackendInfo("kernels", "0.1.0", "a GPU", "fp16", 2.0, 2.0)
    assert (gpu.rounding, replace(gpu, decoder="native-cpu 0.1.0").rounding) == ({}, {"decoder_precision": "fp32"})
    assert said(None, here).startswith(f"now on {here.name}; another --device, ")
    assert said(MadeOn(here.name, "", here.rounding), here) == (
        f"on {here.name} then and now; another CPU or GPU may round otherwise, or the file's entry was changed"
    )
    other = MadeOn("native-cpu 0.1.0 (avx512, bf16)", "", here.rounding)
    assert said(other, here) == (
        f"then on {other.backend}, now on {here.name}; in the same precisions another backend or CPU rounds otherwise"
    )
    both = MadeOn(here.name, "", {"arithmetic": "fp32", "cache": "bf16"})
    assert said(both, here) == f"on {here.name} then and now; arithmetic fp32 then, bf16 now, cache bf16 then, fp32 now"
    options = "another --device, --arithmetic or --cache rounds otherwise"
    assert said(MadeOn(gpu.name, gpu.name), here) == f"then on {gpu.name}, now on {here.name}; {options}"
    clips = replace(gpu, version="0.2.0", decoder="native-cpu 0.1.0")  # whose decoder alone is a CPU's
    then = MadeOn("kernels 0.1.0", "native-cpu 0.1.0", clips.rounding)
    assert said(then, clips) == f"then on {then.backend}, now on {clips.name}; {options}"
