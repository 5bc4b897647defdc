"""The C decoder of clips against ``decoder_first.onnx`` and ``decoder_next.onnx``: pixels within one grey level, for
every form of tokenizer, in one call and in several."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruction_sets import OTHERS, decoded_by
from numpy.typing import NDArray
from planted import decoder_with

from par_export.random_bundle import VariedTensors, write_family
from par_model.config import PARConfig, VideoTokenizerConfig
from par_runtime import Bundle, Pipeline
from par_runtime.backends.native import clips, decoding
from par_runtime.backends.native.decoder import buffer_sizes
from par_runtime.backends.native.decoding import NativeDecoder, open_decoder, why_not
from par_runtime.backends.ort.decoding import OrtVideoDecoder
from par_runtime.backends.ort.sessions import session_options
from par_runtime.bundle import seal
from par_runtime.errors import BundleError, RequestError
from par_runtime.loaded import LoadedFiles

ROOT = Path(__file__).parents[2]
ONE_LEVEL = 1

pytestmark = pytest.mark.skipif(decoding.decoder_file() is None, reason="no compiler at installation")

BOTH, SPACE = (2, 2, 2), (1, 2, 2)
#: name -> (grid, levels, widths, strides, residual units, of the last level, groups)
FORMS = {
    "like the published one": ((4, 6, 6), (8, 5), (16, 32, 32, 64), (SPACE, BOTH, BOTH), 2, 3, 16),
    "one level": ((3, 7, 5), (4, 3), (16,), (), 1, 1, 4),
    "odd sizes": ((3, 3, 7), (4, 3, 2), (5, 15, 20), (BOTH, SPACE), 1, 2, 5),
    "a group per channel": ((2, 9, 2), (7, 2), (8, 24), (BOTH,), 1, 1, 8),
    "one group, wide": ((2, 1, 2), (5, 5), (40, 80), (SPACE,), 1, 1, 1),
    "no time": ((3, 4, 4), (5, 2), (16, 16), (SPACE,), 2, 1, 2),
}


def make(folder: Path, form: str, precision: str = "fp32") -> Path:
    grid, levels, widths, strides, blocks, last, groups = FORMS[form]
    tokenizer = VideoTokenizerConfig(levels, widths, strides, blocks, last, groups)
    config = PARConfig(64, 1, 2, tokenizer.codebook_size, n_classes=3, grid=grid, group_size=1)
    made = write_family(config, [1], folder, name="form", precision=precision, vq=tokenizer, tensors=VariedTensors)
    return made[1]


def tokens_of(bundle: Bundle, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, bundle.vocab_size, (count, bundle.n_tokens))


def graphs(bundle: Bundle, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
    decoder = OrtVideoDecoder(LoadedFiles(bundle), session_options(1))
    try:
        return decoder.run(tokens)
    finally:
        decoder.close()


def ours(bundle: Bundle, tokens: NDArray[np.int64], threads: int = 2) -> NDArray[np.uint8]:
    decoder = NativeDecoder(LoadedFiles(bundle), threads)
    try:
        return decoder.run(tokens)
    finally:
        decoder.close()


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tokenizer(tmp_path: Path, form: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(make(tmp_path, form))
    tokens = tokens_of(bundle, count)
    wanted, got = graphs(bundle, tokens), ours(bundle, tokens)
    assert wanted.std() > 3, "a clip without a content proves nothing"
    assert got.shape == wanted.shape == (count, bundle.frames, *bundle.image_size, 3)  # type: ignore[misc]
    assert np.abs(wanted.astype(int) - got).max() <= ONE_LEVEL
    for latent in range(1, bundle.latent_frames):  # the beginning of a clip is that of the whole clip
        begun = ours(bundle, tokens[:, : latent * bundle.frame_tokens])
        np.testing.assert_array_equal(begun, got[:, : bundle.frames_of(latent)])
    for at_once in (1, 2):  # in calls of one or two latent frames: the same bits
        monkeypatch.setattr(clips, "CALL_PIXELS", at_once * count * bundle.time_downsampling * got[0, 0, :, :, 0].size)
        np.testing.assert_array_equal(ours(bundle, tokens), got)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_stored_in_half_precision(tmp_path: Path, precision: str) -> None:
    bundle = Bundle.open(make(tmp_path, "like the published one", precision))
    tokens = tokens_of(bundle, 1)
    assert np.abs(graphs(bundle, tokens).astype(int) - ours(bundle, tokens)).max() <= ONE_LEVEL


def test_any_number_of_threads_and_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(ROOT / "models/fashion")
    tokens = tokens_of(bundle, 3)
    wanted = ours(bundle, tokens, 1)
    assert np.abs(graphs(bundle, tokens).astype(int) - wanted).max() <= ONE_LEVEL
    for threads in (2, 7):
        np.testing.assert_array_equal(ours(bundle, tokens, threads), wanted)
    decoder = NativeDecoder(LoadedFiles(bundle), 2)
    for part in (slice(2, 3), slice(0, 3), slice(1, 3)):  # buffers grow and stay
        np.testing.assert_array_equal(decoder.run(tokens[part]), wanted[part])
        np.testing.assert_array_equal(decoder.run(tokens[part, :128]), wanted[part, :5])
    with monkeypatch.context() as patch:  # what fits into the buffers that there are allocates none
        patch.setattr(decoding, "Buffers", lambda *_: pytest.fail("the buffers were made again"))
        for count, latent in ((1, 5), (3, 5), (2, 1), (2, 3)):
            given = tokens[:count, : 64 * latent]
            np.testing.assert_array_equal(decoder.run(given), wanted[:count, : bundle.frames_of(latent)])
    decoder.close()
    with pytest.raises(RequestError, match="was closed"):
        decoder.run(tokens)


@pytest.mark.parametrize("form", ["like the published one", "odd sizes"])
@pytest.mark.parametrize("instructions", OTHERS)
def test_the_other_instruction_set_gives_the_same_bits(tmp_path: Path, form: str, instructions: str) -> None:
    bundle = Bundle.open(make(tmp_path / "b", form))
    tokens = tokens_of(bundle, 2)
    pixels = decoded_by(instructions, bundle.path, tokens, tmp_path)
    np.testing.assert_array_equal(pixels, ours(bundle, tokens))


def test_numbers_far_from_zero_keep_their_digits(tmp_path: Path) -> None:
    """The sums of a norm are of distances: a large mean would otherwise cost what the norm is made of."""
    path = make(tmp_path, "like the published one")
    at = Bundle.open(path).decoder_weights["decoder_layers.0.conv.bias"]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset)
        file.write(np.full(at.shape, 300.0, np.float32).tobytes())
    bundle = Bundle.open(path, verify="none")
    tokens = tokens_of(bundle, 1)
    assert np.abs(graphs(bundle, tokens).astype(int) - ours(bundle, tokens)).max() <= ONE_LEVEL


@pytest.mark.parametrize("form", ["odd sizes", "a group per channel"])
def test_memory_that_holds_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Neither channels that only fill vectors nor frames that no call has seen are read as they are found."""
    bundle, made = Bundle.open(make(tmp_path, form)), np.empty
    tokens = tokens_of(bundle, 2)
    wanted = ours(bundle, tokens)

    def no_numbers(shape: Any, dtype: Any = float) -> NDArray[Any]:
        array = made(shape, dtype)
        if array.dtype in (np.float32, np.uint8):
            array.reshape(-1).view(np.uint8)[:] = 255  # of floats: NaN
        return array

    monkeypatch.setattr(np, "empty", no_numbers)
    np.testing.assert_array_equal(ours(bundle, tokens), wanted)
    monkeypatch.setattr(clips, "CALL_PIXELS", 1)
    np.testing.assert_array_equal(ours(bundle, tokens), wanted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("decoder_layers.1.fn.2.conv.weight", "decoder_layers.1.fn.5.conv.weight"),
        ("decoder_layers.1.fn.1.beta", "decoder_layers.1.fn.0.bias"),
        ("decoder_layers.1.fn.0.weight", "decoder_layers.1.fn.3.weight"),
        ("decoder_layers.0.conv.bias", "decoder_layers.1.fn.2.conv.bias"),
    ],
)
def test_a_tensor_in_the_place_of_another_is_seen(first: str, second: str) -> None:
    bundle = Bundle.open(ROOT / "models/fashion")
    table = dict(bundle.decoder_weights)
    assert table[first].shape == table[second].shape
    table[first], table[second] = table[second], table[first]
    tokens = tokens_of(bundle, 1)
    off = np.abs(ours(replace(bundle, decoder_weights=table), tokens).astype(int) - graphs(bundle, tokens)).max()
    assert off > ONE_LEVEL


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("line", "bug"),
    [
        ("item = clip * frames + (frame < 0 ? 0 : frame);", "item = clip * frames + (frame < 0 ? 1 : frame);"),
        ("Frame frame = frame_of(w, item, op->frames - 1 - seen);", "Frame frame = frame_of(w, item, seen);"),
        ("(call->first ? op->stride_t - 1 : 0)", "0"),
        ("FRAMES_BEFORE - 1 - i)", "0)"),
        ("vec_set1(0.0f) - beta * x", "vec_set1(0.0f) - x"),
        ("if (edge) x = x < 0 ? 0 : x < width ? x : width - 1;", ""),
        ("if (edge) y = y < 0 ? 0 : y < height ? y : height - 1;", ""),
    ],
)
def test_a_planted_bug_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, bug: str) -> None:
    library = decoder_with(tmp_path, line, bug)
    monkeypatch.setattr(decoding, "decoder_file", lambda: library)
    bundle = Bundle.open(make(tmp_path / "b", "like the published one"))
    tokens = tokens_of(bundle, 1)
    monkeypatch.setattr(clips, "CALL_PIXELS", 1)
    assert np.abs(graphs(bundle, tokens).astype(int) - ours(bundle, tokens)).max() > ONE_LEVEL


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["decoder_layers.1.fn.1.beta", "decoder_layers.1.fn.2.conv.weight"])
def test_weights_that_are_no_numbers_make_no_picture(tmp_path: Path, name: str, bad: float) -> None:
    path = make(tmp_path, "one level")
    at = Bundle.open(path).decoder_weights[name]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset + 8)
        file.write(np.float32(bad).tobytes())
    bundle = Bundle.open(path, verify="none")
    wanted = f"weights.data: the decoder's {name} holds numbers that are not finite; copy the bundle again"
    with pytest.raises(BundleError, match=wanted):
        ours(bundle, tokens_of(bundle, 1))


def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path: Path) -> None:
    bundle = Bundle.open(make(tmp_path, "like the published one"))
    decoder = NativeDecoder(LoadedFiles(bundle), 2)
    decoder.run(tokens_of(bundle, 1))
    assert decoder._operations is not None
    found = {}
    for latent in (100, 10_000):
        at_once = clips.most_latent(latent, 48 * 48, 4, 1)
        found[latent] = buffer_sizes(decoder._lib, decoder._operations, 1, 2, at_once)
        assert at_once == 56
    assert found[100] == found[10_000]
    one = buffer_sizes(decoder._lib, decoder._operations, 1, 2, 1)
    assert sum(one) < sum(found[100]) / 10
    decoder.close()


def test_an_older_bundle_is_decoded_by_onnx_runtime(tiny_video: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_video / "manifest.json").read_text())
    del manifest["tokenizer"]["weights"], manifest["hash"]
    older = tmp_path / "older"
    older.mkdir()
    for file in tiny_video.iterdir():
        if file.is_file():
            (older / file.name).symlink_to(file)
    (older / "manifest.json").unlink()
    (older / "manifest.json").write_text(json.dumps(seal(manifest)))
    new, old = Bundle.open(tiny_video), Bundle.open(older)
    assert why_not(new) is None
    assert why_not(old) == decoding.OLDER
    tokens = tokens_of(new, 2)
    decoders = [open_decoder(LoadedFiles(bundle), 1) for bundle in (new, old)]
    assert [type(decoder) for decoder in decoders] == [NativeDecoder, OrtVideoDecoder]
    one, other = (decoder.run(tokens).astype(int) for decoder in decoders)
    assert np.abs(one - other).max() <= ONE_LEVEL
    with Pipeline.load(older) as pipeline:
        assert pipeline.generate([0], seed=1).images is not None
