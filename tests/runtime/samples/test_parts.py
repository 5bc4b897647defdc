"""Samples of several processes: joined, they are those of one; what is damaged or missing is not joined."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped_samples import Stopped, stop_at

from par_runtime import Pipeline, RequestError
from par_runtime.bundle import Bundle
from par_runtime.samples import Plan, join_samples, make_samples, open_images
from par_runtime.samples.reading import read_about

COUNT = 11


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


def make(pipeline: Pipeline, path: Path, index: int = 1, of: int = 1, **more: Any) -> Path:
    given: dict[str, Any] = {"count": COUNT, "seed": 4} | more
    make_samples(pipeline, Plan.of(pipeline.bundle, part=(index, of), **given), path)
    return path


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(pipeline, tmp_path_factory.mktemp("whole") / "whole.npz")


@pytest.fixture(scope="module")
def parts(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images 0 to 2, 3 to 6 and 7 to 10."""
    folder = tmp_path_factory.mktemp("parts")
    return [make(pipeline, folder / f"{i}.npz", i, 3) for i in (1, 2, 3)]


def test_parts_are_joined_to_the_file_of_one_run(
    pipeline: Pipeline, parts: list[Path], whole: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "all.npz"
    given = [str(parts[1]), parts[2], parts[0]]
    about = join_samples(given, str(out), bundle=pipeline.bundle, on_images=lambda *now: seen.append(now))
    assert about == read_about(whole)
    assert out.read_bytes() == whole.read_bytes()
    assert seen == [(0, COUNT), (3, COUNT), (7, COUNT), (COUNT, COUNT)]


@pytest.mark.parametrize("block", [1, 700, 2000])
@pytest.mark.parametrize("done", [1, 3, 4, 10, COUNT])
def test_a_join_goes_on_where_it_was_stopped(
    parts: list[Path], whole: Path, tmp_path: Path, done: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``block``: bytes that are read at once; an image has 768."""
    monkeypatch.setattr("par_runtime.samples.reading.BLOCK", block)
    out = tmp_path / "all.npz"
    with pytest.raises(Stopped):
        join_samples(parts, out, on_images=stop_at(done))
    seen: list[int] = []
    join_samples(parts, out, on_images=lambda now, _: seen.append(now))
    assert done <= seen[0] <= done + 2
    assert seen == sorted(seen)
    assert seen[-1] == COUNT
    assert out.read_bytes() == whole.read_bytes()


def test_a_join_goes_on_with_other_parts_of_the_same_images(
    pipeline: Pipeline, parts: list[Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("par_runtime.samples.reading.BLOCK", 1)
    others = [make(pipeline, tmp_path / f"{i}.npz", i, 2) for i in (1, 2)]
    for out in (tmp_path / "joined.npz", tmp_path / "made.npz"):
        with pytest.raises(Stopped):
            join_samples(parts, out, on_images=stop_at(4))
    join_samples(others, tmp_path / "joined.npz")
    make(pipeline, tmp_path / "made.npz")
    for name in ("joined", "made"):
        assert (tmp_path / f"{name}.npz").read_bytes() == whole.read_bytes()


def test_parts_of_several_backends_say_so(pipeline: Pipeline, tiny: Path, parts: list[Path], tmp_path: Path) -> None:
    with Pipeline.load(tiny, "cpu-ort", threads=1, selftest=False) as other:
        more = [make(other, tmp_path / f"{i}.npz", i, 3) for i in (2, 3)]
    about = join_samples([parts[0], *more], tmp_path / "all.npz")
    first, second = (read_about(path)["made_on"] for path in (parts[0], more[0]))
    assert first != second
    assert about["made_on"] == {"several": [first, second]}


def test_images_are_read_from_the_disk(whole: Path, parts: list[Path]) -> None:
    with np.load(whole) as file:
        expected = file["arr_0"]
    images = open_images(str(whole))
    assert isinstance(images, np.memmap)
    assert np.array_equal(images, expected)
    assert np.array_equal(open_images(parts[1]), expected[3:7])
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def flip(path: Path, to: Path, where: float) -> Path:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    to.write_bytes(data)
    return to


def again(path: Path, to: Path, compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> Path:
    """The zip file ``path`` with other members, by names without their ending."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            content = members.get(name.split(".")[0], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return to


def about_with(path: Path, to: Path, **changes: Any) -> Path:
    return again(path, to, about=json.dumps(read_about(path) | changes).encode())


def test_what_cannot_be_joined(pipeline: Pipeline, parts: list[Path], whole: Path, tmp_path: Path) -> None:
    out, first, last = tmp_path / "all.npz", parts[0], parts[2]

    def refused(text: str, *given: Path, bundle: Bundle | None = None) -> None:
        with pytest.raises((RequestError, OSError), match=text):
            join_samples(given, out, bundle=bundle)
        assert not out.exists()
        assert not (tmp_path / "all.npz.part").exists()

    refused(r"3\.npz: begins at image 7, and image 3 is missing; give every part once", first, last)
    refused(r"2\.npz: ends before image 7 of 11; give the parts behind it too", first, parts[1])
    refused(r"2\.npz: begins at image 3, and image 0 is missing", parts[1], last)
    refused(r"2\.npz: begins at image 3, and image 3 is there already", first, parts[1], parts[1], last)
    other = make(pipeline, tmp_path / "other.npz", 2, 3, seed=1)
    refused(
        r"other\.npz: is of other images than .*1\.npz \(seed 1, there 4\); give the parts of one", first, other, last
    )
    elsewhere = replace(pipeline.bundle, hash="0" * 64)
    refused(r"1\.npz: was not made by .*; give the bundle that made it", *parts, bundle=elsewhere)
    refused(r"none\.npz", first, tmp_path / "none.npz", last)
    ours = "is no file of 'parvis sample', or is damaged; give one that it finished"
    (tmp_path / "text.npz").write_text("no zip")
    refused(rf"text\.npz: {ours} \(File is not a zip file\)", first, tmp_path / "text.npz")
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    refused(rf"plain\.npz: {ours} \(.*about.json", tmp_path / "plain.npz")
    (tmp_path / "short.npz").write_bytes(parts[1].read_bytes()[:-500])
    refused(rf"short\.npz: {ours}", first, tmp_path / "short.npz", last)
    (tmp_path / "end.npz").write_bytes(parts[1].read_bytes()[:-6] + b"\xff" + parts[1].read_bytes()[-5:])
    refused(rf"end\.npz: {ours}", first, tmp_path / "end.npz", last)
    for where in (0.3, 0.5, 0.7):  # a label or a pixel: nothing of the good parts is copied before
        damaged = flip(parts[1], tmp_path / "bad.npz", where)
        refused(rf"bad\.npz: {ours} \(Bad CRC-32", first, damaged, last)
    join_samples(parts, out)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stop": 0}, "start, stop, count, seed or classes cannot be so"),
        ({"start": -1}, "start, stop, count, seed or classes cannot be so"),
        ({"start": False}, "start, stop, count, seed or classes is no whole number"),
        ({"count": 10**9, "stop": 10**9}, "start, stop, count, seed or classes cannot be so"),
        ({"seed": 2**64}, "start, stop, count, seed or classes cannot be so"),
        ({"classes": 0}, "start, stop, count, seed or classes cannot be so"),
        ({"shape": [65536, 65536, 65537]}, "shape cannot be so"),
        ({"shape": [16, 3]}, "shape cannot be so"),
        ({"shape": "16"}, "shape cannot be so"),
        ({"shape": [65536] * 4}, "arr_0.npy is not |u1 of shape (11, 65536, 65536, 65536, 65536)"),
        ({"labels": "odd"}, "labels cannot be so"),
        ({"labels": ["random"]}, "labels cannot be so"),
        ({"labels": "balanced"}, "its labels are not those of its seeds"),
        ({"seed": 5}, "its labels are not those of its seeds"),
        ({"text": "x" * 2**20}, "about.json is larger than 1048576 bytes"),
    ],
)
def test_what_a_part_says_is_not_believed(whole: Path, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    bad = about_with(whole, tmp_path / "bad.npz", **changes)
    with pytest.raises(RequestError) as error:
        join_samples([bad], tmp_path / "all.npz")
    assert str(error.value).startswith(
        f"{bad}: is no file of 'parvis sample', or is damaged; give one that it finished"
    )
    assert text in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_members_that_are_made_by_hand(pipeline: Pipeline, parts: list[Path], tmp_path: Path) -> None:
    out, bad = tmp_path / "all.npz", tmp_path / "bad.npz"
    with zipfile.ZipFile(parts[1]) as archive:
        labels, images = archive.read("arr_1.npy"), archive.read("arr_0.npy")

    def refused(part: Path, text: str) -> None:
        with pytest.raises(RequestError, match=rf"bad\.npz: is no file .*{text}"):
            join_samples([parts[0], part, parts[2]], out)
        assert not out.exists()
        assert not (tmp_path / "all.npz.part").exists()

    refused(again(parts[1], bad, arr_1=labels[:-8]), "arr_1.npy is not <i8 of shape")
    refused(again(parts[1], bad, arr_1=labels[:-8] + b"\xff" * 8), "its labels are not those of its seeds")
    refused(again(parts[1], bad, arr_0=images[:-1]), "arr_0.npy is not .u1 of shape")
    refused(again(parts[1], bad, arr_0=None), "arr_0.npy")
    refused(again(parts[1], bad, about=b"[" * 10**5), "not valid JSON")
    refused(again(parts[1], bad, about=b"[]"), "about.json is no object")
    # Compressed members are zip files too, and whole; but their images cannot be read from where they lie.
    join_samples([parts[0], again(parts[1], bad, zipfile.ZIP_DEFLATED), parts[2]], out)
    with pytest.raises(RequestError, match=r"arr_0\.npy is not uint8 of shape"):
        open_images(bad)


def test_a_fault_of_the_caller_is_the_callers(parts: list[Path], tmp_path: Path) -> None:
    def fails(*_: int) -> None:
        raise KeyError("my own bug")

    with pytest.raises(KeyError, match="my own bug"):
        join_samples(parts, tmp_path / "all.npz", on_images=fails)
    for given, text in (
        ([], "no parts were given; give the file of each"),
        ([4], "parts 4: expected the name of a file, as str or Path"),
        (None, "parts None: expected a list of the files of all parts"),
        (str(parts[0]), "parts '.*1.npz': expected a list of the files of all parts"),
        (parts[0], "parts .*1.npz.*: expected a list of the files of all parts"),
    ):
        with pytest.raises(RequestError, match=text):
            join_samples(given, tmp_path / "all.npz")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bundle: expected a Bundle, not a str"):
        join_samples(parts, tmp_path / "x.npz", bundle="tiny")  # type: ignore[arg-type]
