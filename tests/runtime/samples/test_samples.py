"""The images of an evaluation: which they are, that they are the same however they are made, and after any stop."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recipe_scripts import full_disk
from stopped_samples import Stopped, stop_at

from par_runtime import Pipeline, RequestError, Settings
from par_runtime.samples import Plan, make_samples, open_images
from par_runtime.samples import file as sample_file
from par_runtime.samples.plan import _mixed
from par_runtime.samples.reading import read_about
from par_runtime.samples.resize import bicubic

COUNT, SEED = 11, 2**64 - 4  # the seeds go on with 0


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images, made in one run."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert make_samples(pipeline, plan(pipeline), path) == COUNT
    return path


def plan(pipeline: Pipeline, part: tuple[int, int] = (1, 1), **more: Any) -> Plan:
    return Plan.of(pipeline.bundle, **{"count": COUNT, "seed": SEED, "part": part} | more)


def test_a_file_holds_the_images_and_classes_that_suites_expect(pipeline: Pipeline, whole: Path) -> None:
    seeds = [(SEED + i) % 2**64 for i in range(COUNT)]
    with np.load(whole) as file:  # allow_pickle is off
        assert file.files == ["about.json", "arr_1", "arr_0"]
        images, classes = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape, classes.dtype) == (np.uint8, (COUNT, 16, 16, 3), np.int64)
    expected = pipeline.generate(classes.tolist(), seeds=seeds)
    assert np.array_equal(images, expected.images)
    with zipfile.ZipFile(whole) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    about = read_about(whole)
    assert about["settings"] == vars(pipeline.bundle.defaults) | {"greedy": False}
    assert about["bundle"] == {"name": pipeline.bundle.name, "hash": pipeline.bundle.hash}
    assert about["made_on"]["backend"] == pipeline.backend.info.name
    assert sorted(path.name for path in whole.parent.iterdir()) == ["whole.npz"]


def test_labels_never_change(pipeline: Pipeline) -> None:
    """A figure is compared with one of another year only if its images have the same classes."""
    assert _mixed(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 with seed 0
    assert Plan.of(pipeline.bundle, 12, seed=0).classes(range(12)) == [5, 3, 3, 0, 2, 2, 4, 2, 3, 4, 0, 1]
    assert Plan.of(pipeline.bundle, 12, seed=2**63).classes(range(3)) == [1, 5, 5]
    assert Plan.of(pipeline.bundle, 12, labels="balanced").classes(range(4, 10)) == [4, 5, 0, 1, 2, 3]


def test_random_labels_are_uniform(pipeline: Pipeline) -> None:
    published = SimpleNamespace(n_classes=1000)
    labels = replace(plan(pipeline, count=50_000), bundle=published, seed=0).all_classes()  # type: ignore[arg-type]
    counts = np.bincount(labels, minlength=1000)
    assert len(counts) == 1000
    chi_square = ((counts - 50) ** 2 / 50).sum()  # mean 999, standard deviation 44.7
    assert abs(chi_square - 999) < 4 * 44.7
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 4 / 50_000**0.5


@pytest.mark.parametrize("batch", [1, 3, COUNT])
def test_any_batch_gives_the_same_file(pipeline: Pipeline, whole: Path, tmp_path: Path, batch: int) -> None:
    make_samples(pipeline, plan(pipeline), tmp_path / "again.npz", max_batch=batch)
    assert (tmp_path / "again.npz").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 16 * 16 * 3 - 1])
def test_a_run_goes_on_where_it_was_stopped(pipeline: Pipeline, whole: Path, tmp_path: Path, cut: int) -> None:
    """``cut``: bytes of the image that was written when the process was killed."""
    path, part = tmp_path / "a.npz", tmp_path / "a.npz.part"
    with pytest.raises(Stopped):
        make_samples(pipeline, plan(pipeline), path, max_batch=2, on_images=stop_at(6))
    assert not path.exists()
    with part.open("ab") as file:
        file.write(bytes(cut))
    seen: list[tuple[int, int]] = []
    made = make_samples(pipeline, plan(pipeline), str(path), max_batch=3, on_images=lambda *now: seen.append(now))
    assert made == COUNT - 6
    assert seen == [(6, COUNT), (9, COUNT), (COUNT, COUNT)]
    assert path.read_bytes() == whole.read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("size", [0, 5, 200, 400, 700])
def test_a_beginning_that_was_cut_off_is_written_again(
    pipeline: Pipeline, whole: Path, tmp_path: Path, size: int
) -> None:
    """As a computer leaves it that is switched off at once."""
    path = tmp_path / "a.npz"
    (tmp_path / "a.npz.part").write_bytes(whole.read_bytes()[:size])
    assert make_samples(pipeline, plan(pipeline), path) == COUNT
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("writes", range(9))
def test_a_kill_while_the_directory_is_written_loses_nothing(
    pipeline: Pipeline, whole: Path, tmp_path: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count = tmp_path / "a.npz", 0
    real = sample_file._InPlace.write

    def write(self: sample_file._InPlace, data: bytes) -> int:
        nonlocal count
        count += 1
        if count > writes:
            raise Stopped
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(sample_file._InPlace, "write", write)
        with suppress(Stopped):
            make_samples(pipeline, plan(pipeline), path)
    assert not path.exists()
    assert make_samples(pipeline, plan(pipeline), path) == 0
    assert path.read_bytes() == whole.read_bytes()


def test_a_full_disk_keeps_what_is_there(pipeline: Pipeline, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with full_disk(5000), pytest.raises(OSError, match="too large") as error:
        make_samples(pipeline, plan(pipeline), path, max_batch=2)
    assert error.value.filename == str(tmp_path / "a.npz.part")
    assert make_samples(pipeline, plan(pipeline), path) < COUNT
    assert path.read_bytes() == whole.read_bytes()


def test_a_disk_that_is_too_small_is_said_before_the_work(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:4], 1, *real(path)[5:]]))
    big = plan(pipeline, count=50_000, size=256)
    with pytest.raises(
        RequestError, match=r"a\.npz: takes 9\.83 GB more, and 0\.00 GB are free on its disk; free some"
    ):
        make_samples(pipeline, big, tmp_path / "new" / "folder" / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"seed": 1}, r"seed 18446744073709551612 then, 1 now"),
        ({"count": 12}, r"count 11 then, 12 now; stop 11 then, 12 now"),
        ({"labels": "balanced"}, "labels 'random' then, 'balanced' now"),
        ({"size": 8}, r"shape \[16, 16, 3\] then, \[8, 8, 3\] now"),
        ({"guidance": 2}, "settings guidance 1.5 then, 2.0 now"),
        ({"part": (1, 2)}, "stop 11 then, 5 now"),
    ],
)
def test_what_was_begun_otherwise_is_kept(pipeline: Pipeline, tmp_path: Path, more: dict[str, Any], text: str) -> None:
    path, part = tmp_path / "a.npz", tmp_path / "a.npz.part"
    with pytest.raises(Stopped):
        make_samples(pipeline, plan(pipeline), path, max_batch=2, on_images=stop_at(2))
    before = part.read_bytes()
    with pytest.raises(RequestError, match=rf"a\.npz\.part: was begun otherwise \({text}.*\); give what it was begun"):
        make_samples(pipeline, plan(pipeline, **more), path)
    assert part.read_bytes() == before
    assert not path.exists()


@pytest.mark.parametrize("content", [b"P", b"PK\3\4", b"my own notes" * 100, b"PK\3\4" + bytes(2000)])
def test_a_file_of_somebody_else_is_kept(pipeline: Pipeline, tmp_path: Path, content: bytes) -> None:
    part = tmp_path / "a.npz.part"
    part.write_bytes(content)
    if content in (b"P", b"PK\3\4"):  # as ours begins too: a beginning that was cut off
        assert make_samples(pipeline, plan(pipeline), tmp_path / "a.npz") == COUNT
        return
    with pytest.raises(RequestError, match=r"a\.npz\.part: is no file that 'parvis sample' began; give another --out"):
        make_samples(pipeline, plan(pipeline), tmp_path / "a.npz")
    assert part.read_bytes() == content


def test_a_finished_file_is_not_written_over(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("hours of work")
    with pytest.raises(RequestError, match=r"a\.npz: is there already; give another name, or remove it"):
        make_samples(pipeline, plan(pipeline), path)
    assert path.read_text() == "hours of work"
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_that_appears_meanwhile_is_kept_and_so_are_the_images(
    pipeline: Pipeline, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, part = tmp_path / "a.npz", tmp_path / "a.npz.part"

    def appears(done: int, total: int) -> None:
        if done == total:
            path.write_text("hours of other work")

    for has_links in (True, False):
        if not has_links:
            monkeypatch.setattr(os, "link", no_links)
        with pytest.raises(
            RequestError, match=r"a\.npz: another program has made it meanwhile; all images are in .*part"
        ):
            make_samples(pipeline, plan(pipeline), path, on_images=appears)
        assert path.read_text() == "hours of other work"
        path.unlink()
        assert part.stat().st_size == whole.stat().st_size
    assert make_samples(pipeline, plan(pipeline), path) == 0
    assert path.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_a_kill_between_the_two_names_of_a_finished_file(
    pipeline: Pipeline, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has both names then; somebody may take the one away, and the same command must not write into it."""
    path, part, moved = tmp_path / "a.npz", tmp_path / "a.npz.part", tmp_path / "moved.npz"

    link = os.link

    def killed(*names: Any) -> None:
        if len(names) == 2 and names[1] == path:
            link(*names)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(Stopped):
            make_samples(pipeline, plan(pipeline), path)
    assert path.read_bytes() == part.read_bytes() == whole.read_bytes()
    path.rename(moved)
    with monkeypatch.context() as patch:
        patch.setattr("par_runtime.samples.file._write", killed)
        assert make_samples(pipeline, plan(pipeline), path) == 0
    assert path.read_bytes() == moved.read_bytes() == whole.read_bytes()
    assert not part.exists()


def no_links(*_: object) -> None:
    """As a disk without links."""
    raise OSError(errno.EPERM, "no links")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_stands_where_the_images_are_collected(
    pipeline: Pipeline, tmp_path: Path, make: Callable[[Path], None], no_waiting: None
) -> None:
    make(tmp_path / "a.npz.part")
    with pytest.raises(RequestError, match=r"a\.npz\.part: is no file, but the images would be collected there; give"):
        make_samples(pipeline, plan(pipeline), tmp_path / "a.npz")


def test_an_opening_beside_the_end_of_another_process_leaves_nothing(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.npz", os.open

    def opened(name: Any, flags: int, *given: Any) -> int:
        if str(name).endswith("a.npz.part"):
            path.write_text("finished by another process")
        return real(name, flags, *given)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(RequestError, match=r"a\.npz: is there already"):
        make_samples(pipeline, plan(pipeline), path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


def test_large_images_of_a_large_batch_are_made_in_blocks(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spied(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        sizes.append(len(images))
        return bicubic(images, size)

    monkeypatch.setattr("par_runtime.samples.run.bicubic", spied)
    monkeypatch.setattr("par_runtime.samples.run.BLOCK", 2 * 40 * 40 * 3 + 100)
    large = plan(pipeline, size=40)
    make_samples(pipeline, large, tmp_path / "a.npz")
    assert sizes == [2, 2, 2, 2, 2, 1]
    expected = pipeline.generate(large.classes(range(COUNT)), seeds=large.seeds(range(COUNT))).images
    assert expected is not None
    assert np.array_equal(open_images(tmp_path / "a.npz"), bicubic(expected, (40, 40)))


def test_wrong_arguments_of_python_are_one_line_and_leave_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    async def later(*_: int) -> None:
        pass

    def make(out: Any = tmp_path / "a.npz", on_images: Any = None) -> None:
        make_samples(pipeline, plan(pipeline), out, on_images=on_images)

    made: Any = make_samples
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: made(None, plan(pipeline), tmp_path / "a.npz"), "pipeline: expected a Pipeline, not a NoneType"),
        (lambda: made(pipeline, {}, tmp_path / "a.npz"), "plan: expected a Plan, not a dict"),
        (lambda: Plan.of(pipeline), "bundle: expected a Bundle, as that of a pipeline, not a Pipeline"),  # type: ignore[arg-type]
        (lambda: open_images(None), "path None: expected the name of a file, as str or Path"),  # type: ignore[arg-type]
        (lambda: make(3), "out 3: expected the name of a file"),
        (lambda: make("a\0.npz"), "out 'a.*npz': expected the name of a file"),
        (lambda: make(on_images=3), "on_images 3: expected a function"),
        (lambda: make(on_images=later), "on_images"),
    ]
    for work, text in wrong:
        with pytest.raises(RequestError, match=text):
            work()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"of\(\) got an unexpected keyword argument 'guidence'"):
        plan(pipeline, guidence=2)


def test_two_processes_do_not_write_into_one_file(pipeline: Pipeline, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    tried = []

    def on_images(*_: int) -> None:  # another file descriptor: the lock is of the opened file, not of the process
        with pytest.raises(RequestError, match=r"a\.npz\.part: another process writes into it now; wait until"):
            make_samples(pipeline, plan(pipeline), path)
        tried.append(1)

    make_samples(pipeline, plan(pipeline), path, on_images=on_images)
    assert tried
    assert path.read_bytes() == whole.read_bytes()


def test_another_bundle_or_none_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    other = replace(pipeline.bundle, hash="0" * 64)
    with pytest.raises(RequestError, match=r"the plan is of .*, the pipeline of .*; give one bundle"):
        make_samples(pipeline, Plan.of(other, 2), tmp_path / "a.npz")
    with pytest.raises(RequestError, match="this bundle ends at tokens and makes no images; give one with a decoder"):
        Plan.of(replace(pipeline.bundle, image_size=None), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"count": 0}, "count 0: expected 1 to 10000000 images, a whole number"),
        ({"count": 10**8}, "count 100000000: expected 1 to 10000000 images"),
        ({"count": 1.5}, "count 1.5: expected 1 to 10000000 images"),
        ({"seed": -1}, "seed -1: expected 0 to 18446744073709551615"),
        ({"labels": "all"}, "labels 'all': expected random or balanced"),
        ({"size": 0}, "size 0: expected 1 to 4096 pixels of a side"),
        ({"part": (3, 2)}, "part: the first number 3: expected 1 to 2, the part to make"),
        ({"part": (0, 2)}, "part: the first number 0: expected 1 to 2"),
        ({"part": 2}, "part 2: expected two numbers, (2, 8) for the second of eight parts"),
        ({"part": "1/2"}, "part '1/2': expected two numbers"),
        ({"part": (1,)}, "part (1): expected two numbers"),
        ({"part": (1, 12)}, "part: the second number 12: expected 1 to 11, the number of parts"),
        ({"top_p": 2}, "top_p 2: expected 0 to 1"),
    ],
)
def test_wrong_plans(pipeline: Pipeline, more: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as error:
        plan(pipeline, **more)
    assert str(error.value).startswith(text)


def test_images_that_are_no_squares_keep_their_size(pipeline: Pipeline) -> None:
    wide = replace(pipeline.bundle, image_size=(8, 16))
    with pytest.raises(RequestError, match="size 8: makes squares, and the images are 16x8; leave it out"):
        Plan.of(wide, 2, size=8)
    assert Plan.of(wide, 2).image_shape == (8, 16, 3)


def test_settings_and_size_reach_the_images(pipeline: Pipeline, tmp_path: Path) -> None:
    made = plan(pipeline, labels="balanced", size=8, guidance=1, temperature=0.5, top_k=3, greedy=False)
    assert made.settings == Settings(1.0, 0.5, 3, 1.0)
    make_samples(pipeline, made, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        images, classes = file["arr_0"], file["arr_1"]
    assert classes.tolist() == [i % 6 for i in range(COUNT)]
    expected = pipeline.generate(classes.tolist(), made.settings, seeds=made.seeds(range(COUNT)))
    assert np.array_equal(images, bicubic(expected.images, (8, 8)))


def test_clips_are_arrays_of_five_dimensions(tiny_video: Path, tmp_path: Path) -> None:
    with Pipeline.load(tiny_video, "cpu", threads=1, selftest=False) as pipeline:
        make_samples(pipeline, Plan.of(pipeline.bundle, 3, size=8), tmp_path / "clips.npz")
        with np.load(tmp_path / "clips.npz") as file:
            assert file["arr_0"].shape == (3, 5, 8, 8, 3)
