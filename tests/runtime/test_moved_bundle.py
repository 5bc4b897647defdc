"""What was loaded stays loaded: whatever happens to the names of a bundle's files, images are of what was loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from double.fixtures import Make
from sharing import KINDS, ON_A_CPU, SMALL, TINY, params

from par_runtime import Bundle, BundleError, Pipeline
from par_runtime.backends.native import backend, library
from par_runtime.loaded import LoadedFiles
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule
from par_runtime.tokenizer import Tokenizer

Change = Callable[[Path], None]


def rename(path: Path) -> None:
    path.rename(path.parent / "elsewhere")


def switch_link(path: Path) -> None:
    """``path`` leads to another version, whose decoder is made of zeros."""
    other = path.parent / "next"
    shutil.copytree(path, other)
    weights = other / "weights.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    (path.parent / "link").unlink()
    (path.parent / "link").symlink_to(other)
    path.rename(path.parent / "old")


def replace_files(path: Path) -> None:
    """Another version takes the place of each file, by renaming."""
    for file in [each for each in path.iterdir() if each.is_file()]:
        new = path / "new"
        new.write_bytes(bytes(file.stat().st_size))
        new.rename(file)


CHANGES: dict[str, Change] = {
    "removed": shutil.rmtree,
    "renamed": rename,
    "another version": switch_link,
    "files replaced": replace_files,
}


def made(pipeline: Pipeline) -> list[Any]:
    r = pipeline.generate([1, 2], seed=5, guidance=2.0)
    return [r.tokens.tolist(), r.images.tolist(), pipeline.encode(r.images).tolist()]  # type: ignore[union-attr]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a bundle behind a symbolic link; returns the link."""

    def make(source: Path) -> Path:
        shutil.copytree(source, tmp_path / "version1")
        (tmp_path / "link").symlink_to(tmp_path / "version1")
        return tmp_path / "link"

    return make


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", params(*ON_A_CPU, "ONNX Runtime, GPU"))
def test_what_was_loaded_stays_loaded(
    kind: str, change: str, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, shared_pipelines: Any
) -> None:
    source, load = KINDS[kind]
    link = copy_of(source)
    monkeypatch.chdir(link.parent)
    pipeline = load(Path("link"))  # a relative path: the working directory changes too
    monkeypatch.chdir(link.parent.parent)
    CHANGES[change](link.resolve())
    with pipeline:  # decoder and encoder are opened now
        assert made(pipeline) == made(shared_pipelines(kind))
        pipeline.selftest(seconds=0)


@pytest.mark.parametrize("change", CHANGES)
def test_plans_and_encoder_beside_them_stay_loaded(change: str, load: Make) -> None:
    pipeline = load()
    wanted = made(pipeline)
    other = load()
    path = other.bundle.path
    (path.parent / "link").symlink_to(path)
    CHANGES[change](path)
    assert made(other) == wanted


def test_a_runtime_cache_is_not_written_where_the_bundle_was(load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load()
    path = pipeline.bundle.path
    shutil.rmtree(path)
    made(pipeline)
    assert not path.exists()


@pytest.mark.parametrize("kind", params(*ON_A_CPU))
def test_weights_that_are_overwritten_are_one_error_before_and_after_the_first_image(
    kind: str, copy_of: Callable[[Path], Path]
) -> None:
    source, load = KINDS[kind]
    link = copy_of(source)
    used, unused = load(link), load(link)
    tokens = used.generate(1, seed=1).tokens
    weights = link / "weights.data"
    content = weights.read_bytes()
    wanted = used.decode(tokens)
    os.utime(weights, ns=(0, 0))  # only its time is another one
    assert (used.decode(tokens) == wanted).all()
    assert (unused.decode(tokens) == wanted).all()
    with weights.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes(len(content) // 2))
    os.utime(weights, ns=(0, 10**9))
    for pipeline in (used, unused):
        for use in (lambda p=pipeline: p.decode(tokens), lambda p=pipeline: p.encode(wanted)):
            for _ in range(2):
                with pytest.raises(BundleError, match=r"weights\.data: was overwritten after it was loaded; load"):
                    use()
    with pytest.raises(BundleError, match="was overwritten"):
        used.generate(1, seed=1)


def test_a_tokenizer_alone_stays_loaded(copy_of: Callable[[Path], Path]) -> None:
    link = copy_of(TINY)
    tokenizer = Tokenizer(Bundle.open(link))
    shutil.rmtree(link.resolve())
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tokens = tokenizer.encode(image)
    assert (tokens == Tokenizer(Bundle.open(TINY)).encode(image)).all()
    assert (tokenizer.decode(tokens) == Tokenizer(Bundle.open(TINY)).decode(tokens)).all()


def test_an_onnx_runtime_that_opens_only_paths_says_so(
    copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.24 it takes no weights from memory."""

    class Older(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name == "add_external_initializers_from_files_in_memory":
                raise AttributeError(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Older)
    link = copy_of(TINY)
    pipeline = Pipeline.load(link, device="cpu-ort")
    shutil.rmtree(link.resolve())
    with pytest.raises(BundleError, match=r"decoder\.onnx: was moved or replaced after it was loaded, and onnxruntime"):
        pipeline.generate(0, seed=1)


def test_files_that_cannot_be_read_are_one_error(copy_of: Callable[[Path], Path]) -> None:
    link = copy_of(TINY)
    bundle = Bundle.open(link)
    (link / "weights.data").unlink()
    with pytest.raises(BundleError, match=r"weights\.data: cannot be read \(No such file or directory\); copy"):
        LoadedFiles(bundle)
    with pytest.raises(BundleError, match=r"weights\.data"):
        Pipeline.load(link, device="cpu", verify="none")


@pytest.mark.parametrize("name", ["weights.data", "step.onnx", "encoder.onnx"])
@pytest.mark.parametrize("verify", ["auto", "none"])
def test_files_of_two_versions_are_never_loaded_together(
    name: str, verify: Any, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was replaced by the next version's between the check and the load: a manifest of another bundle."""
    link = copy_of(TINY)
    opened = Bundle.open

    def open_then_replace(path: Path, verify: Any) -> Bundle:
        bundle = opened(path, verify)
        (link / "new").write_bytes((link / name).read_bytes())  # as large, and for ONNX Runtime as good
        os.utime(link / "new", ns=(0, 1))
        (link / "new").rename(link / name)
        return bundle

    monkeypatch.setattr(Bundle, "open", staticmethod(open_then_replace))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with pytest.raises(BundleError, match=rf"{name}: was replaced after its manifest was read; load the bundle again"):
        Pipeline.load(link, "cpu-ort", threads=1, verify=verify)
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)
    monkeypatch.undo()
    assert Pipeline.load(link, "cpu-ort", threads=1).generate(0, seed=1).tokens.shape == (1, 64)


@pytest.mark.parametrize("name", ["weights.data", "step.onnx", "decoder.onnx"])
@pytest.mark.parametrize("device", ["cpu", "cpu-ort"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    name: str, device: str, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    """It takes that place once the bundle has been checked."""
    link = copy_of(TINY)
    opened = Bundle.open

    def open_then_replace(path: Path, verify: Any) -> Bundle:
        bundle = opened(path, verify)
        (link / name).unlink()
        os.mkfifo(link / name)
        return bundle

    monkeypatch.setattr(Bundle, "open", staticmethod(open_then_replace))
    with pytest.raises(BundleError, match=rf"{name}: cannot be read \(is a pipe, not a file\); copy the bundle again"):
        Pipeline.load(link, device, threads=1)


def test_a_pipe_that_comes_later_changes_nothing(copy_of: Callable[[Path], Path], no_waiting: None) -> None:
    link = copy_of(TINY)
    with Pipeline.load(link, device="cpu", threads=1) as pipeline:
        wanted = made(Pipeline.load(TINY, device="cpu", threads=1))
        for name in ("encoder.onnx", "decoder.onnx"):  # opened at their first use
            (link / name).unlink()
            os.mkfifo(link / name)
        assert made(pipeline) == wanted


def test_the_c_kernels_pack_the_weights_that_were_checked(
    copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of another version that has their name by then."""
    if library.library() is None:
        pytest.skip("no C kernels")
    link, opened = copy_of(SMALL), backend.open_decoder

    def replace_then_open(files: LoadedFiles, *how: Any) -> Any:
        (link / "new").write_bytes(bytes((link / "weights.data").stat().st_size))
        (link / "new").rename(link / "weights.data")
        return opened(files, *how)

    def tokens_of(path: Path) -> Any:
        bundle = Bundle.open(path)
        schedule = Schedule.of(bundle, [1], image_settings(bundle, 1), [5])
        tokens = np.zeros((1, bundle.n_tokens), np.int64)
        with closing(backend.NativeBackend(bundle, 1)) as kernels:
            for call, batch, ids, write in schedule.walk(tokens):
                tokens[:, call.positions] = kernels.step(batch, ids, write, schedule.noise[:, call.positions])
        return tokens

    wanted = tokens_of(SMALL)
    monkeypatch.setattr(backend, "open_decoder", replace_then_open)
    np.testing.assert_array_equal(tokens_of(link), wanted)
