"""The guidance interval: which calls are guided, which rows run, and where its number comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.driver import Driver
from double.fixtures import Make
from test_schedule import BACKENDS, EACH_BACKEND

from par_runtime.backends.base import Batch
from par_runtime.bundle import Bundle, seal
from par_runtime.cli.dispatch import main
from par_runtime.images import png
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings, image_settings
from par_runtime.schedule import Schedule

MIXED = [
    Settings(guidance=3.0, guidance_interval=2, top_k=20),
    Settings(guidance=1.5),
    Settings(guidance_interval=4),  # unguided, so its interval has no meaning
    Settings(guidance=2.0, guidance_interval=0, greedy=True),
    Settings(guidance=2.5, guidance_interval=10_000),  # beyond the end
]


def walked(bundle: Bundle, settings: list[Settings], cache_row: Any = None) -> list[Batch]:
    """The batch of every call of images with these settings."""
    schedule = Schedule.of(bundle, [0] * len(settings), settings, cache_row=cache_row)
    return [batch for _, batch, _, _ in schedule.walk(np.zeros((len(settings), bundle.n_tokens), np.int64))]


@pytest.mark.parametrize(
    ("name", "interval", "guided"),
    [
        # n = 4: the prefill, three sequential calls, then the transition and 14 group calls
        ("fp32", 0, [0, 1, 4]),
        ("fp32", 1, [0, 1, 2, 4, 5]),
        ("fp32", 13, list(range(18))),
        ("n1", 0, [0, 1]),  # one loop, as in LlamaGen
        ("n1", 5, [0, 1, 2, 3, 4, 5, 6]),
        ("n16", 1, [0, 1, 2, 16, 17]),  # all of its group calls
        ("n16", 13, [*range(15), 16, 17, 18]),  # all but the last sequential call
    ],
)
def test_the_calls_that_are_guided(bundles: dict[str, Path], name: str, interval: int, guided: list[int]) -> None:
    bundle = Bundle.open(bundles[name])
    batches = walked(bundle, [Settings(guidance=2.0, guidance_interval=interval)])
    last = {"fp32": 18, "n1": 63, "n16": 18}[name]
    assert len(batches) == last + 1
    assert [i for i, batch in enumerate(batches) if batch.uncond_row.tolist() == [1]] == guided
    # Until the last guided call, the row without class runs, because that call needs its keys; then it does not.
    assert [batch.rows for batch in batches] == [2] * (guided[-1] + 1) + [1] * (last - guided[-1])
    for batch in batches:
        assert batch.guidance.tolist() == ([2.0] if batch.uncond_row[0] == 1 else [1.0])
        assert batch.cache_row.tolist() == list(range(batch.rows))


@pytest.mark.parametrize("interval", [-1, 14, 10_000])
def test_without_an_end_every_call_has_the_same_batch(tiny: Path, interval: int) -> None:
    bundle = Bundle.open(tiny)
    batches = walked(bundle, [Settings(guidance=2.0, guidance_interval=interval), Settings(guidance_interval=3)])
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].rows == 3


def test_equal_rows_are_the_same_object(tiny: Path) -> None:
    batches = walked(Bundle.open(tiny), MIXED)
    first = [next(i for i, other in enumerate(batches) if other is batch) for batch in batches]
    # Image 3 is guided in the first call of each stage, image 0 up to index 2.
    assert first == [0, 0, 2, 2, 0, 5, 5, *[7] * 12]


def test_rows_of_a_mixed_batch(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    begin, end = walked(bundle, MIXED)[0], walked(bundle, MIXED)[-1]
    assert (begin.rows, begin.uncond_row.tolist()) == (9, [5, 6, 2, 7, 8])
    # The rows that end first are the last ones, so that a graph need not run rows that nobody names.
    assert begin.cache_row.tolist() == [0, 1, 2, 3, 4, 7, 5, 8, 6]
    assert (end.rows, end.uncond_row.tolist(), end.cache_rows) == (7, [0, 5, 2, 3, 6], 7)
    assert end.image_of_row.tolist() == [0, 1, 2, 3, 4, 1, 4]
    assert end.guidance.tolist() == [1.0, 1.5, 1.0, 1.0, 2.5]
    given = walked(bundle, MIXED, np.array([8, 7, 6, 5, 4, 3, 2, 1, 0]))[-1]
    assert given.cache_row.tolist() == [8, 7, 6, 5, 4, 2, 0]


@pytest.mark.parametrize("name", ["fp32", "n16"])
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_a_mixed_batch_gives_each_image_its_own_tokens(backend: str, name: str, bundles: dict[str, Path]) -> None:
    labels, seeds = [0, 3, 5, 1, 4], [11, 12, 13, 14, 15]
    with BACKENDS[backend](bundles[name]) as pipeline:
        together = pipeline.generate(labels, MIXED, seeds=seeds, decode=False).tokens
        for i, settings in enumerate(MIXED):
            alone = pipeline.generate([labels[i]], settings, seeds=[seeds[i]], decode=False).tokens[0]
            np.testing.assert_array_equal(alone, together[i])
        free = [Settings(s.guidance, s.temperature, s.top_k, s.top_p, s.greedy) for s in MIXED]
        changed = (pipeline.generate(labels, free, seeds=seeds, decode=False).tokens != together).any(1)
        assert changed.tolist() == [True, False, False, True, False]


def test_whole_images_on_the_stand_in_gpu(load: Make, tiny: Path, driver: Driver) -> None:
    gpu, cpu = load(), Pipeline.load(tiny, device="cpu-ort", selftest=False)
    for settings in (MIXED[:3], [MIXED[3]], MIXED[1:3]):
        before = driver.counts.get("launch", 0)
        labels = [0, 3, 5][: len(settings)]
        got, wanted = (p.generate(labels, settings, seed=11) for p in (gpu, cpu))
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.images, wanted.images)
        assert driver.counts.get("launch", 0) - before == (settings == MIXED[1:3])  # one graph, or call by call
    parts = [p.generate([0, 3, 5], MIXED[1:4], seed=5, max_batch=2) for p in (gpu, cpu)]  # at once, then call by call
    np.testing.assert_array_equal(parts[0].tokens, parts[1].tokens)
    np.testing.assert_array_equal(parts[0].images, parts[1].images)


@pytest.fixture
def ending_early(tiny: Path, tmp_path: Path) -> Path:
    """The tiny bundle, whose default guidance ends after index 2."""
    path = shutil.copytree(tiny, tmp_path / "early")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["defaults"] |= {"guidance": 3.0, "guidance_interval": 2}
    (path / "manifest.json").write_text(json.dumps(seal({k: v for k, v in manifest.items() if k != "hash"})))
    return path


def test_a_bundles_default(tiny: Path, ending_early: Path) -> None:
    assert Bundle.open(tiny).defaults.guidance_interval == -1
    with Pipeline.load(ending_early) as early, Pipeline.load(tiny) as plain:  # both pass the same self-test
        made = early.generate([0, 1], seed=4)
        assert [s.guidance_interval for s in made.settings] == [2, 2]
        given = plain.generate([0, 1], guidance=3.0, guidance_interval=2, seed=4)
        np.testing.assert_array_equal(made.tokens, given.tokens)
        whole = early.generate([0, 1], guidance_interval=-1, seed=4)
        np.testing.assert_array_equal(whole.tokens, plain.generate([0, 1], guidance=3.0, seed=4).tokens)
        assert (whole.tokens != made.tokens).any(1).all()
        np.testing.assert_array_equal(early.score(made.tokens, [0, 1]), plain.score(made.tokens, [0, 1]))


@pytest.mark.parametrize("value", [np.int64(2), np.int32(2), 2.0, [2, 2], np.array([2, 2]), (2, np.int8(2))])
def test_whole_numbers_of_every_kind(tiny: Path, value: Any) -> None:
    each = image_settings(Bundle.open(tiny), 2, guidance_interval=value)
    assert [s.guidance_interval for s in each] == [2, 2]
    assert all(type(s.guidance_interval) is int for s in each)


def test_a_png_holds_it_only_where_there_is_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plain, again = tmp_path / "a.png", tmp_path / "plain.png", tmp_path / "again.png"
    command = ["generate", str(tiny), "--label", "otter", "--guidance", "3", "--seed", "5", "--quiet", "--out"]
    assert main([*command, str(plain), "--guidance-interval", "-1"]) == 0
    assert main([*command, str(again)]) == 0
    assert plain.read_bytes() == again.read_bytes()
    assert b"guidance_interval" not in plain.read_bytes()
    assert png.read(plain)[0].settings[0].guidance_interval == -1
    assert main([*command, str(out), "--guidance-interval", "1"]) == 0
    assert png.read(out)[0].settings[0] == Settings(guidance=3.0, guidance_interval=1)
    assert (png.read(out)[0].tokens != png.read(plain)[0].tokens).any()
    assert main(["redo", str(out), "--bundle", str(tiny)]) == 0
    assert "identical" in capsys.readouterr().out


def test_edits_take_it_and_can_be_redone(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", str(tiny), "--label", "1", "--seed", "5", "--quiet", "--out", str(source)]) == 0
    edit = ["edit", str(source), "--bundle", str(tiny), "--keep", "left", "--seed", "1", "--guidance", "4", "--quiet"]
    assert main([*edit, "--guidance-interval", "0", "--out", str(out)]) == 0
    assert png.read(out)[0].settings[0].guidance_interval == 0
    assert main(["redo", str(out), "--bundle", str(tiny), "--quiet"]) == 0


def test_verify_compares_with_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(tiny), "--guidance", "3", "--guidance-interval", "1", "--images", "2"]
    assert main(arguments) == 0
    assert "guidance interval 1" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["-2", "1.5", "x"])
def test_bad_numbers_on_the_command_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    out = tmp_path / "a.png"
    arguments = ["generate", str(tiny), "--label", "0", "--out", str(out), "--guidance-interval", value]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert ("guidance_interval -2: expected a whole number, -1" if value == "-2" else repr(value)) in error
    assert error.count("\n") == 1
    assert not out.exists()


def run(arguments: list[str]) -> int:
    """The exit code of the command; argparse ends it by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
