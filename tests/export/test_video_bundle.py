"""Bundles of video: their graphs against the oracle, whole and by latent frame, and decoding on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from double.fixtures import Make
from video_bundles import tiny_model, tiny_tokenizer, write_checkpoints, write_tiny_video

from par_export.bundle import ExportRequest, export
from par_export.errors import ExportError
from par_export.gate.runner import session
from par_export.quantised import quantised_with, write_bundle
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.ordering import token_order
from par_model.transformer import PAR
from par_model.video import VideoTokenizer
from par_model.vq import VQModel
from par_runtime import Bundle, BundleError, Pipeline, RequestError
from par_runtime.backends.ort.decoding import OrtVideoDecoder
from par_runtime.backends.ort.gpu import OrtCudaBackend
from par_runtime.backends.ort.sessions import session_options
from par_runtime.bundle import seal
from par_runtime.cost.decoder import count_video_decoder
from par_runtime.errors import CudaError
from par_runtime.loaded import LoadedFiles
from par_runtime.system import peak_bytes
from par_runtime.tokenizer import Tokenizer
from par_runtime.video_shapes import decoder_shapes, past_shapes


@pytest.fixture
def bundle(tiny_video: Path) -> Path:
    return tiny_video


def tokens_of(clips: int) -> np.ndarray:
    config = tiny_model()
    return np.random.default_rng(5).integers(0, config.vocab_size, (clips, config.n_tokens))


@torch.no_grad()
def oracle(tokens: np.ndarray) -> np.ndarray:
    raster = np.empty_like(tokens)
    raster[:, token_order(tiny_model())] = tokens
    clips = tiny_tokenizer().decode(torch.from_numpy(raster).view(-1, *tiny_model().grid))
    return (clips.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def difference(got: np.ndarray, wanted: np.ndarray) -> int:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == np.uint8
    return int(np.abs(got.astype(int) - wanted).max())


def test_the_whole_decoder_and_the_one_by_latent_frame_give_the_oracles_clips(bundle: Path) -> None:
    tokens = tokens_of(2)
    wanted = oracle(tokens)
    assert wanted.shape == (2, 5, 16, 16, 3)
    assert len(np.unique(wanted)) > 100
    assert len(np.unique(wanted[:, 0] != wanted[:, 4])) == 2  # frames differ
    whole = session(bundle / "decoder.onnx").run(None, {"tokens": tokens})[0]
    assert difference(whole, wanted) <= 1
    with Tokenizer_of(bundle) as tokenizer:
        assert difference(tokenizer.decode(tokens), wanted) <= 1
        for latent, frames in ((1, 1), (2, 3)):
            first = tokenizer.decode(tokens[:, : 64 * latent])
            assert difference(first, wanted[:, :frames]) <= 1
        np.testing.assert_array_equal(tokenizer.decode(tokens[1]), tokenizer.decode(tokens)[1:])


class Tokenizer_of(Tokenizer):  # noqa: N801
    """A tokenizer of a path, closed at the end of a ``with``."""

    def __init__(self, path: Path) -> None:
        super().__init__(Bundle.open(path), 1)

    def __enter__(self) -> Tokenizer_of:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("device", ["cpu", "cpu-ort"])
def test_a_pipeline_generates_clips_and_decodes_their_beginning(bundle: Path, device: str) -> None:
    with Pipeline.load(bundle, device=device, threads=1) as pipeline:
        name = "native-cpu" if device == "cpu" else "onnxruntime-cpu"
        assert pipeline.backend.info.decoder.startswith(name)
        result = pipeline.generate([0, 2], seed=1)
        assert result.images is not None
        assert result.images.shape == (2, 5, 16, 16, 3)
        assert difference(result.images, oracle(result.tokens)) <= 1
        begun = pipeline.decode(result.tokens[:, :128])
        np.testing.assert_array_equal(begun, result.images[:, :3])
        again = pipeline.encode(result.images)
        assert again.shape == (2, 192)
        with pytest.raises(RequestError, match=r"tokens have shape \(2, 100\); expected \[B,192\]"):
            pipeline.decode(result.tokens[:, :100])
        with pytest.raises(RequestError, match=r"expected uint8 \[5,16,16,3\]"):
            pipeline.encode(result.images[:, :3])


@torch.no_grad()
def test_the_encoder_gives_the_oracles_tokens_in_sequence_order(bundle: Path) -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (2, 5, 4, 4, 3), np.uint8)
    clips = coarse.repeat(4, 2).repeat(4, 3)
    with Tokenizer_of(bundle) as tokenizer:
        got = tokenizer.encode(clips)
        np.testing.assert_array_equal(tokenizer.encode(clips[0]), got[:1])
    ids = tiny_tokenizer().encode(torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255)
    np.testing.assert_array_equal(got, ids.reshape(2, -1).numpy()[:, token_order(tiny_model())])
    assert len(np.unique(got)) > 2


def test_the_manifest_says_what_the_bundle_makes(bundle: Path) -> None:
    opened = Bundle.open(bundle, "full")
    assert (opened.video, opened.frames, opened.latent_frames, opened.frame_tokens) == (True, 5, 3, 64)
    assert [opened.frames_of(latent) for latent in range(4)] == [0, 1, 3, 5]
    manifest = json.loads((bundle / "manifest.json").read_text())
    weights = manifest["tokenizer"].pop("weights")
    assert {name: tuple(at[1]) for name, at in weights.items()} == decoder_shapes(manifest["tokenizer"]["config"])
    assert manifest["tokenizer"] == {
        "kind": "video",
        "downsampling": 2,
        "time_downsampling": 2,
        "frames": 5,
        "image_size": [16, 16],
        "codebook_size": 12,
        "config": {
            "levels": [4, 3],
            "widths": [8, 16],
            "strides": [[2, 2, 2]],
            "res_blocks": 1,
            "last_blocks": 1,
            "norm_groups": 4,
        },
    }
    assert {"decoder", "decoder_fp16", "decoder_first", "decoder_next", "encoder"} <= manifest["graphs"].keys()
    assert manifest["parity"]["encoder"]["tokens"] == 192
    inputs = session(bundle / "decoder_next.onnx").get_inputs()
    assert [tuple(each.shape[1:]) for each in inputs[1:]] == past_shapes(manifest["tokenizer"]["config"], 8, 8)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("kind",), "film", "tokenizer.kind is 'film'; expected one of video"),
        (("frames",), 6, "tokenizer.frames is 6; expected 5"),
        (("time_downsampling",), 1, "tokenizer.time_downsampling is 1; expected 2"),
        (("image_size",), [16, 32], r"image_size is \[16, 32\]; expected \[16, 16\]"),
        (("codebook_size",), 13, "codebook_size is 13; expected 12"),
        (("config", "levels"), [4, 4], "expected levels whose product is the number of codes, 12"),
        (("config", "widths"), [8, 18], "expected multiples of norm_groups, 4"),
        (("config", "widths"), [8, 2**14], "a decoder of at most"),
        (("config", "strides"), [[3, 2, 2]], "a whole number from 1 to 2"),
        (("config", "strides"), [[1, 1, 2]], r"expected \[1, 2, 2\] or \[2, 2, 2\]"),
        (("config", "res_blocks"), 0, "a whole number from 1 to 256"),
    ],
)
def test_a_manifest_whose_numbers_do_not_fit_is_refused(
    bundle: Path, tmp_path: Path, place: tuple[str, ...], value: object, says: str
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = manifest["tokenizer"]
    for name in place[:-1]:
        entry = entry[name]
    entry[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(BundleError, match=says):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_checked_against_rounded_weights(tmp_path: Path, precision: str) -> None:
    path = write_tiny_video(tmp_path / "b", precision=precision, encoder=precision == "fp16")
    parity = json.loads((path / "manifest.json").read_text())["parity"]
    assert parity["decoder"]["max_pixel_error"] <= 1
    assert parity["decoder_next"]["max_pixel_error"] <= 1
    assert ("encoder" in parity) == (precision == "fp16")
    assert parity["decoder_fp16"]["psnr_db"] > 40


def test_tokenizers_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    model, tokenizer = write_checkpoints(tmp_path)
    images, vq = tmp_path / "images.pt", tmp_path / "vq.pt"
    state = torch.load(model, weights_only=True)
    torch.save(state | {"config": state["config"] | {"grid": (1, 8, 8)}}, images)
    config = VQConfig(
        codebook_size=12, codebook_dim=4, channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8,
        norm_groups=4,
    )  # fmt: skip
    torch.save({"model": VQModel(config).state_dict(), "config": asdict(config)}, vq)
    for one, other, says in (
        (images, tokenizer, "is a video tokenizer, and grid 1x8x8 has one frame"),
        (model, vq, "is an image tokenizer, and grid 3x8x8 is of video"),
    ):
        with pytest.raises(ExportError, match=says):
            export(ExportRequest(one, other, tmp_path / "b"), say=lambda _: None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("runtime", ["tensorrt", pytest.param("kernels", marks=pytest.mark.slow)])
def test_a_gpu_makes_clips_and_the_frames_of_their_beginning(
    bundle: Path, load: Make, load_kernels: Make, runtime: str
) -> None:
    """TensorRT's plan decodes whole clips; where our kernels make the tokens, the CPU decodes."""
    pipeline = (load if runtime == "tensorrt" else load_kernels)(bundle, images=(1, 2))
    decodes = pipeline.backend.info.decoder
    assert decodes == "" if runtime == "tensorrt" else decodes.startswith(("native-cpu", "onnxruntime-cpu"))
    with Pipeline.load(bundle, device="cpu-ort", threads=1) as cpu:
        wanted = cpu.generate([0, 2], seed=1)
    result = pipeline.generate([0, 2], seed=1)
    assert result.images is not None
    assert wanted.images is not None
    np.testing.assert_array_equal(result.tokens, wanted.tokens)
    assert difference(result.images, wanted.images) <= 1
    for latent, frames in ((1, 1), (2, 3)):
        begun = pipeline.decode(result.tokens[:1, : 64 * latent])
        assert difference(begun, wanted.images[:1, :frames]) <= 1
    pipeline.close()
    with pytest.raises((RequestError, CudaError)):
        pipeline.decode(result.tokens)


def test_ort_on_a_gpu_decodes_clips_and_their_beginning(bundle: Path) -> None:
    backend = OrtCudaBackend(Bundle.open(bundle), provider="CPUExecutionProvider", kind="cpu")
    tokens = tokens_of(2)
    assert difference(backend.decode(tokens), oracle(tokens)) <= 1
    assert difference(backend.decode(tokens[:, :128]), oracle(tokens)[:, :3]) <= 1
    backend.close()


def test_quantising_leaves_the_tokenizer_as_it_is(bundle: Path, tmp_path: Path) -> None:
    source = Bundle.open(bundle)
    out = write_bundle(
        source, tmp_path / "q", quantised_with("int8", 32, "float32"), {"weights": "int8", "group": 32},
        say=lambda _: None,
    )  # fmt: skip
    tokens = tokens_of(1)
    with Tokenizer_of(bundle) as before, Tokenizer_of(out) as after:
        np.testing.assert_array_equal(before.decode(tokens), after.decode(tokens))
        np.testing.assert_array_equal(before.encode(oracle(tokens)), after.encode(oracle(tokens)))
    assert {"decoder_first", "decoder_next"} <= Bundle.open(out).parity.keys()


def test_the_published_decoder_has_as_many_operations_as_it_needs() -> None:
    """Of 5x16x16 codes; the parameters are those of the oracle's module."""
    parameters, operations = count_video_decoder(asdict(VideoTokenizerConfig()), (5, 16, 16))
    with torch.device("meta"):
        decoder = VideoTokenizer(VideoTokenizerConfig()).decoder_layers
    assert parameters == sum(tensor.numel() for tensor in decoder.parameters()) == 225_485_315
    assert operations == pytest.approx(5.89e12, rel=1e-3)


def test_a_graph_that_is_not_the_manifests_is_refused_before_it_runs(bundle: Path, tmp_path: Path) -> None:
    """The first latent frame's graph in the place of the next ones': it takes no past. The C decoder reads no graph."""
    for file in bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"]["decoder_next"]["file"] = "decoder_first.onnx"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(seal(manifest)))
    with closing(OrtVideoDecoder(LoadedFiles(Bundle.open(tmp_path)), session_options(1))) as decoder:
        assert decoder.run(tokens_of(1)[:, :64]).shape == (1, 1, 16, 16, 3)
        with pytest.raises(BundleError, match=r"its input 'past\.0' is none; the manifest's model needs float32"):
            decoder.run(tokens_of(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_decodes_clips_as_before(bundle: Path) -> None:
    code = """
import os, sys, warnings
import numpy as np
from par_runtime import Bundle
from par_runtime.tokenizer import Tokenizer
warnings.simplefilter("ignore", DeprecationWarning)
tokenizer = Tokenizer(Bundle.open(sys.argv[1]), 2)
tokens = np.arange(192)[None] % 12
wanted = tokenizer.decode(tokens)
pid = os.fork()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os._exit(0 if np.array_equal(tokenizer.decode(tokens), wanted) else 1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_published_tokenizer_exports_and_decodes(tmp_path: Path) -> None:
    """370 M random parameters and a grid of 5x16x16: minutes, 8 GB."""
    config = PARConfig(
        dim=64, n_layers=1, n_heads=2, vocab_size=64000, n_classes=101, grid=(5, 16, 16), group_size=16
    )  # fmt: skip
    state = VideoTokenizer(VideoTokenizerConfig()).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 370_372_105
    torch.save({"model": state, "config": asdict(VideoTokenizerConfig())}, tmp_path / "video.pt")
    del state
    torch.save({"model": PAR(config).state_dict(), "config": asdict(config)}, tmp_path / "model.pt")
    out = export(ExportRequest(tmp_path / "model.pt", tmp_path / "video.pt", tmp_path / "b", "fp16"))
    assert peak_bytes() is None or peak_bytes() < 12e9  # type: ignore[operator]
    tokens = np.random.default_rng(0).integers(0, 64000, (1, 1280))
    with Tokenizer_of(out) as tokenizer:
        begun = tokenizer.decode(tokens[:, :512])
        assert begun.shape == (1, 5, 128, 128, 3)
        np.testing.assert_array_equal(begun[:, :1], tokenizer.decode(tokens[:, :256]))
