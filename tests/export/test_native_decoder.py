"""The C decoder against ``decoder.onnx``: pixels within one grey level, for every form of tokenizer."""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruction_sets import OTHERS, decoded_by
from numpy.typing import NDArray
from planted import decoder_with

from par_export.random_bundle import VariedTensors, write_family
from par_model.config import PARConfig, VQConfig
from par_runtime import Bundle, Pipeline
from par_runtime.backends.native import decoding
from par_runtime.backends.native.decoder import KEPT_BYTES, buffer_sizes
from par_runtime.backends.native.decoding import NativeDecoder, open_decoder, why_not
from par_runtime.backends.ort.decoding import OrtDecoder
from par_runtime.backends.ort.sessions import session_options
from par_runtime.errors import BundleError, RequestError
from par_runtime.loaded import LoadedFiles
from par_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"
ONE_LEVEL = 1

needs_decoder = pytest.mark.skipif(decoding.decoder_file() is None, reason="no compiler at installation")


def tokens_of(bundle: Bundle, images: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, bundle.vocab_size, (images, bundle.n_tokens))


def ours(path: Path, images: int, threads: int = 2) -> NDArray[np.uint8]:
    decoder = NativeDecoder(LoadedFiles(Bundle.open(path)), threads)
    try:
        return decoder.run(tokens_of(Bundle.open(path), images))
    finally:
        decoder.close()


def graphs(path: Path, images: int) -> NDArray[np.uint8]:
    return OrtDecoder(LoadedFiles(Bundle.open(path)), session_options(1)).run(tokens_of(Bundle.open(path), images))


def compare(path: Path, images: int, threads: int = 2) -> int:
    """The largest difference to the graph, in grey levels."""
    wanted, got = graphs(path, images), ours(path, images, threads)
    assert wanted.std() > 3, "an image without a content proves nothing"
    return int(np.abs(wanted.astype(int) - got).max())


#: name -> (rows and columns of codes, tokenizer)
FORMS: dict[str, tuple[tuple[int, int], VQConfig]] = {
    "like VQ-16": ((6, 6), VQConfig(codebook_size=64, channels=32, z_channels=32, norm_groups=8)),
    "one level": ((7, 5), VQConfig(64, 4, 32, (1,), 1, 16, 4)),
    "odd sizes": ((3, 7), VQConfig(64, 3, 24, (1, 3, 2), 1, 5, 6)),
    "a group per channel, width 8": ((9, 2), VQConfig(64, 8, 8, (2, 1), 2, 40, 8)),
    "one group, wide": ((1, 2), VQConfig(64, 20, 80, (1, 2), 1, 64, 1)),
}


def make(folder: Path, form: str, precision: str = "fp32") -> Path:
    (rows, columns), vq = FORMS[form]
    config = PARConfig(64, 2, 2, 64, n_classes=3, grid=(1, rows, columns), group_size=1)
    return write_family(config, [1], folder, name="form", precision=precision, vq=vq, tensors=VariedTensors)[1]


@needs_decoder
@pytest.mark.parametrize("images", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tokenizer(tmp_path: Path, form: str, images: int) -> None:
    assert compare(make(tmp_path, form), images) <= ONE_LEVEL


@needs_decoder
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_stored_in_half_precision(tmp_path: Path, precision: str) -> None:
    assert compare(make(tmp_path, "like VQ-16", precision), 1) <= ONE_LEVEL


@needs_decoder
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_demo_with_any_number_of_threads(threads: int) -> None:
    assert compare(DEMO, 5, threads) <= ONE_LEVEL
    assert (ours(DEMO, 5, threads) == ours(DEMO, 5, 1)).all()


@needs_decoder
def test_an_image_is_the_same_alone_and_in_a_batch(tiny: Path) -> None:
    for path in (tiny, DEMO):
        bundle = Bundle.open(path)
        decoder = NativeDecoder(LoadedFiles(bundle), 2)
        tokens = tokens_of(bundle, 5)
        batch = decoder.run(tokens)
        for i in (3, 0):
            assert (decoder.run(tokens[i : i + 1])[0] == batch[i]).all()
        decoder.close()


@needs_decoder
@pytest.mark.parametrize("instructions", OTHERS)
def test_all_instruction_sets_make_the_same_pixels(tmp_path: Path, instructions: str) -> None:
    path = make(tmp_path, "like VQ-16")
    pixels = decoded_by(instructions, path, tokens_of(Bundle.open(path), 2), tmp_path)
    assert (pixels == ours(path, 2)).all()


@needs_decoder
def test_weights_that_are_transformed_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ours(DEMO, 2)
    for kept in (0, KEPT_BYTES // 50):
        monkeypatch.setattr("par_runtime.backends.native.decoder.KEPT_BYTES", kept)
        assert (ours(DEMO, 2) == wanted).all()


def swapped(first: str, second: str) -> Bundle:
    """The demo, with two tensors of its decoder exchanged."""
    bundle = Bundle.open(DEMO)
    table = dict(bundle.decoder_weights)
    table[first], table[second] = table[second], table[first]
    return replace(bundle, decoder_weights=table)


@needs_decoder
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("decoder.mid.0.conv1.weight", "decoder.mid.0.conv2.weight"),
        ("decoder.mid.1.q.weight", "decoder.mid.1.v.weight"),
        ("decoder.norm_out.weight", "decoder.norm_out.bias"),
        ("decoder.conv_blocks.1.res.0.conv2.bias", "decoder.conv_blocks.1.res.0.nin_shortcut.bias"),
    ],
)
def test_a_tensor_in_the_place_of_another_is_seen(first: str, second: str) -> None:
    """The comparison cannot pass with a part of the network wrong. Biases that are added up may change places."""
    bundle = swapped(first, second)
    decoder = NativeDecoder(LoadedFiles(bundle), 1)
    off = np.abs(decoder.run(tokens_of(bundle, 1)).astype(int) - graphs(DEMO, 1)).max()
    decoder.close()
    assert off <= ONE_LEVEL if "nin_shortcut" in second else off > ONE_LEVEL


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@needs_decoder
@pytest.mark.parametrize(
    ("line", "bug"),
    [
        ("#define VANISHING 2", "#define VANISHING 1"),
        ("value, tile + i + j == 0);", "value, i + j == 0);"),
    ],
)
def test_a_planted_bug_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, bug: str) -> None:
    library = decoder_with(tmp_path, line, bug)
    monkeypatch.setattr(decoding, "decoder_file", lambda: library)
    assert compare(DEMO, 1) > ONE_LEVEL


@needs_decoder
def test_an_older_bundle_decodes_on_onnx_runtime(caplog: pytest.LogCaptureFixture) -> None:
    bundle = replace(Bundle.open(DEMO), decoder_weights={})
    assert why_not(bundle) == decoding.OLDER
    with caplog.at_level(logging.DEBUG):
        decoder = open_decoder(LoadedFiles(bundle), 1)
    assert isinstance(decoder, OrtDecoder)
    assert "no C decoder: the manifest has no table of the decoder's weights" in caplog.text
    assert (decoder.run(tokens_of(bundle, 1)) == graphs(DEMO, 1)).all()


def test_no_compiler_at_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decoder_file", lambda: None)
    with Pipeline.load(DEMO, "cpu") as pipeline:
        result = pipeline.generate([0], seed=1)
        assert pipeline.backend.info.decoder.startswith("onnxruntime-cpu")
    assert result.images is not None


@needs_decoder
def test_every_decoder_says_its_name() -> None:
    for device, name in (("cpu", "native-cpu"), ("cpu-ort", "onnxruntime-cpu")):
        with Pipeline.load(DEMO, device) as pipeline:
            assert pipeline.backend.info.decoder.startswith(name)


@needs_decoder
def test_a_step_on_onnx_runtime_with_the_decoder_in_c(tiny: Path) -> None:
    """The widths of this model are too small for the C step; its decoder takes any."""
    with Pipeline.load(tiny, "cpu") as ours, Pipeline.load(tiny, "cpu-ort") as ort:
        assert ours.backend.info.runtime == "onnxruntime-cpu"
        assert ours.backend.info.decoder.startswith("native-cpu")
        results = [pipeline.generate([0, 1, 2], seed=1) for pipeline in (ours, ort)]
    assert (results[0].tokens == results[1].tokens).all()
    images = [result.images.astype(int) for result in results if result.images is not None]
    assert np.abs(images[0] - images[1]).max() <= ONE_LEVEL


@needs_decoder
def test_libraries_of_other_sources(tmp_path: Path) -> None:
    step = Path(decoding.decoder_file() or "").with_name(
        (decoding.decoder_file() or Path()).name.replace("_decoder", "_step")
    )
    for file, message in (
        (None, "were not built"),
        (tmp_path / "none.so", "cannot be loaded"),
        (step, "other sources"),
    ):
        with pytest.raises(decoding.KernelError, match=message):
            decoding.open_decoder_library(file)


@needs_decoder
def test_tokens_that_are_none() -> None:
    decoder = NativeDecoder(LoadedFiles(Bundle.open(DEMO)), 1)
    tokens = tokens_of(Bundle.open(DEMO), 1)
    for bad in (-1, 1024, 2**62):
        wrong = tokens.copy()
        wrong[0, 200] = bad
        with pytest.raises(RequestError, match=r"expected ids 0\.\.1023"):
            decoder.run(wrong)
    decoder.close()
    decoder.close()
    with pytest.raises(RequestError, match="was closed"):
        decoder.run(tokens)


@needs_decoder
def test_weights_that_were_overwritten(tmp_path: Path) -> None:
    path = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    decoder = NativeDecoder(LoadedFiles(Bundle.open(path)), 1)
    with (path / "weights.data").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BundleError, match="was overwritten after it was loaded"):
        decoder.run(tokens_of(Bundle.open(path, verify="none"), 1))


@needs_decoder
def test_weights_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("par_runtime.loaded.available_bytes", lambda: 10**6)
    decoder = NativeDecoder(LoadedFiles(Bundle.open(DEMO)), 1)
    with pytest.raises(BundleError, match=r"its weights take 0\.0\d GB, 0\.00 GB of memory are free"):
        decoder.run(tokens_of(Bundle.open(DEMO), 1))


@pytest.mark.two_cores
@needs_decoder
def test_threads_share_a_tokenizer() -> None:
    tokenizer = Tokenizer(Bundle.open(DEMO), 2)
    tokens = tokens_of(tokenizer.bundle, 4)
    wanted = tokenizer.decode(tokens)
    wrong: list[int] = []

    def work(image: int) -> None:
        for _ in range(5):
            if (tokenizer.decode(tokens[image]) != wanted[image]).any():
                wrong.append(image)

    threads = [threading.Thread(target=work, args=(image,)) for image in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokenizer.close()
    assert not wrong
    with pytest.raises(RequestError, match="closed"):
        tokenizer.decode(tokens)


@needs_decoder
def test_buffers_of_many_images_hold_any_smaller_number(tmp_path: Path) -> None:
    """With one image threads share its blocks, and with many they do not: they need other buffers."""
    bundle = Bundle.open(make(tmp_path, "one level"))
    decoder = NativeDecoder(LoadedFiles(bundle), 2)
    decoder.run(tokens_of(bundle, 1))
    operations = decoder._operations
    assert operations is not None
    sizes = [buffer_sizes(decoder._lib, operations, images, 2) for images in range(1, 20)]
    for smaller, larger in pairwise(sizes):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    assert sizes[-1][-2] > 0
    decoder.close()


@needs_decoder
@pytest.mark.parametrize("form", ["odd sizes", "a group per channel, width 8"])
def test_memory_that_holds_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Channels that only fill vectors are multiplied by 0, which does not help against what is not a number."""
    path, made = make(tmp_path, form), np.empty

    def no_numbers(shape: Any, dtype: Any = float) -> NDArray[Any]:
        array = made(shape, dtype)
        if array.dtype == np.float32:
            array.fill(np.nan)
        return array

    monkeypatch.setattr(np, "empty", no_numbers)
    assert compare(path, 1) <= ONE_LEVEL
