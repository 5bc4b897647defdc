"""The Python API on the committed bundle, without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GOLDEN
from par_runtime import BundleError, Pipeline, RequestError
from par_runtime.backends.base import Batch
from par_runtime.request import Settings, class_index
from par_runtime.schedule import uniforms


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return Pipeline.load(tiny, threads=1)


def test_generate_gives_images_tokens_and_what_made_them(pipeline: Pipeline) -> None:
    steps: list[tuple[int, int]] = []
    r = pipeline.generate(["otter", 0], seed=5, guidance=2.0, on_step=lambda done, total: steps.append((done, total)))
    assert r.images is not None
    assert r.images.shape == (2, 16, 16, 3)
    assert r.images.dtype == np.uint8
    assert r.tokens.shape == (2, 64)
    assert (r.labels, r.seeds) == ([2, 0], [5, 6])
    assert steps == [(i, 19) for i in range(1, 20)]
    assert set(r.timings) == {"prefill", "sequential", "transition", "group", "decode", "total", "calls"}
    assert r.timings["total"] >= r.timings["group"] > 0


def test_same_seed_same_pixels_another_seed_others(pipeline: Pipeline) -> None:
    a, b, c = (pipeline.generate("otter", seed=s) for s in (1, 1, 2))
    assert (a.images == b.images).all()
    assert (a.tokens != c.tokens).any()


def test_an_image_is_the_same_alone_and_in_any_batch(pipeline: Pipeline) -> None:
    labels = [0, 1, 2, 3, 4, 5, 0, 1]
    together = pipeline.generate(labels, seed=10).tokens
    for size in (1, 3, 8):
        assert (pipeline.generate(labels, seed=10, max_batch=size).tokens == together).all()
    for i in (0, 3, 7):
        assert (pipeline.generate(labels[i], seeds=[10 + i]).tokens == together[i]).all()


def test_one_batch_may_mix_settings_and_guided_with_unguided(pipeline: Pipeline) -> None:
    guidance, temperature = [1.0, 3.0, 0.0, 1.5], [1.0, 0.5, 1.0, 2.0]
    top_k, top_p = [0, 5, 64, 1], [1.0, 0.9, 0.5, 0.0]
    mixed = pipeline.generate(
        [0, 1, 2, 3], seed=3, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p
    )
    for i in range(4):
        alone = pipeline.generate(
            i, seeds=[3 + i], guidance=guidance[i], temperature=temperature[i], top_k=top_k[i], top_p=top_p[i]
        )
        assert (alone.tokens[0] == mixed.tokens[i]).all(), i


def test_greedy_ignores_seed_and_sampling(pipeline: Pipeline) -> None:
    a = pipeline.generate(3, seed=1, greedy=True, temperature=2.0, top_p=0.1)
    b = pipeline.generate(3, seed=2, greedy=True)
    assert (a.tokens == b.tokens).all()
    test = pipeline.bundle.selftest
    again = pipeline.generate(test["labels"], guidance=test["guidance"], greedy=True).tokens
    assert (again == np.array(test["tokens"])).all()


def test_one_batch_may_mix_greedy_with_sampled(pipeline: Pipeline) -> None:
    mixed = pipeline.generate([0, 0], seeds=[7, 7], greedy=[True, False]).tokens
    assert (mixed[0] == pipeline.generate(0, greedy=True).tokens[0]).all()
    assert (mixed[1] == pipeline.generate(0, seed=7).tokens[0]).all()


def test_without_a_seed_a_new_one_is_drawn_and_told(pipeline: Pipeline) -> None:
    a = pipeline.generate(0)
    b = pipeline.generate(0)
    assert a.seeds != b.seeds
    assert (pipeline.generate(0, seeds=a.seeds).tokens == a.tokens).all()


def test_tokens_go_back_to_their_places(pipeline: Pipeline) -> None:
    tokens = np.arange(64)[None] % 64
    raster = pipeline.grid_tokens(tokens)
    assert raster.shape == (1, 8, 8)
    # n=4 on 8x8: the first group lies in the upper left corners of four 4x4 regions.
    assert [raster[0, 0, 0], raster[0, 0, 4], raster[0, 4, 0], raster[0, 4, 4], raster[0, 0, 1]] == [0, 1, 2, 3, 4]


def test_preview_repeats_the_latest_token_of_each_region(pipeline: Pipeline) -> None:
    shown: list[int] = []
    r = pipeline.generate(
        1, seed=2, preview_every=5, on_preview=lambda images, done, total: shown.append(images.shape[0] * done)
    )
    assert shown == [5, 10, 15]
    full = pipeline.preview(r.tokens, 64)
    assert r.images is not None
    assert (full == r.images).all()
    filled = r.tokens.copy()
    filled[:, 32:] = np.tile(r.tokens[:, 28:32], 8)
    assert (pipeline.preview(r.tokens, 32) == pipeline.decode(filled)).all()
    assert pipeline.preview(r.tokens, 2).shape == (1, 16, 16, 3)


def test_the_graph_for_older_runtimes_gives_the_same_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    monkeypatch.setattr("par_runtime.backends.ort.cpu.OPSET24_SINCE", (99, 0))
    older = Pipeline.load(tiny, threads=1)
    assert (older.generate([0, 1, 2], seed=4).tokens == pipeline.generate([0, 1, 2], seed=4).tokens).all()


def test_logits_of_a_step_do_not_disturb_generation(pipeline: Pipeline) -> None:
    before = pipeline.generate(2, seed=1).tokens
    one = np.ones(1, np.float32)
    batch = Batch(1, np.zeros(1, np.int64), one, one, np.zeros(1, np.int64), one)
    logits = pipeline.backend.logits(batch, np.array([[pipeline.bundle.class_base]]), np.zeros(1, np.int64))
    assert logits.shape == (1, 1, 64)
    assert (pipeline.generate(2, seed=1).tokens == before).all()


def test_settings_are_the_keywords_in_one_value(pipeline: Pipeline) -> None:
    one = Settings(guidance=2.0, top_k=20, top_p=0.9)
    wanted = pipeline.generate([0, 3], guidance=2.0, temperature=1.0, top_k=20, top_p=0.9, seed=5)
    assert wanted.settings == [one, one]
    assert (pipeline.generate([0, 3], one, seed=5).tokens == wanted.tokens).all()
    assert (pipeline.generate([0, 3], wanted.settings, seed=5).tokens == wanted.tokens).all()
    mixed = [Settings(guidance=3.0), Settings(greedy=True)]
    each = pipeline.generate([0, 3], mixed, seed=5)
    assert each.settings == mixed
    keywords = pipeline.generate(
        [0, 3], guidance=[3.0, 1.0], greedy=[False, True], temperature=1.0, top_k=0, top_p=1.0, seed=5
    )
    assert (each.tokens == keywords.tokens).all()


@pytest.mark.parametrize(
    ("settings", "keywords", "message"),
    [
        (Settings(), {"guidance": 2.0}, "both settings and guidance were given; give one of them"),
        (Settings(), {"greedy": True}, "both settings and greedy were given"),
        ([Settings()], {}, "1 settings for 2 images; give one Settings, or a list of one per image"),
        ([], {}, "0 settings for 2 images"),
        ("warm", {}, "settings 'warm': expected a Settings, or a list of one Settings per image"),
        ([Settings(), 1.5], {}, "expected a Settings, or a list"),
        (1.5, {}, "settings 1.5: expected a Settings"),
        (Settings(guidance=float("nan")), {}, "guidance nan: expected 0 or more"),
        ([Settings(), Settings(top_p=1.5)], {}, "top_p 1.5: expected 0 to 1"),
        (Settings(top_k=2.5), {}, "top_k 2.5: expected a whole number"),  # type: ignore[arg-type]
        (Settings(guidance_interval=-2), {}, "guidance_interval -2: expected a whole number, -1 (every call"),
        (Settings(), {"guidance_interval": -1}, "both settings and guidance_interval were given"),
    ],
)
def test_bad_settings_are_one_error(pipeline: Pipeline, settings: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        pipeline.generate([0, 1], settings, seed=1, **keywords)


def test_noise_is_the_golden_noise() -> None:
    golden = json.loads((GOLDEN / "noise.json").read_text())
    for seed, numerators in golden["times_2**24"].items():
        assert (uniforms(int(seed), 64)[: len(numerators)] * 2**24).tolist() == numerators


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"labels": 6}, r"label 6: this model has classes 0\.\.5"),
        ({"labels": -1}, "classes 0..5"),
        ({"labels": "oter"}, "unknown label 'oter'; did you mean otter"),
        ({"labels": "zzz"}, "this model has 6 classes: red fox, arctic fox, otter"),
        ({"labels": []}, "no labels were given"),
        ({"labels": 1.5}, "expected a class index or name, not a float|not iterable"),
        ({"labels": [None]}, "not a NoneType"),
        ({"labels": 0, "guidance": -1}, "guidance -1: expected 0 or more"),
        ({"labels": 0, "guidance": float("nan")}, "guidance nan"),
        ({"labels": [0, 1], "guidance": [1, 2, 3]}, "3 values for 2 images"),
        ({"labels": 0, "top_k": -1}, "top_k -1"),
        ({"labels": 0, "guidance_interval": -2}, "guidance_interval -2: expected a whole number, -1 "),
        ({"labels": 0, "guidance_interval": 0.5}, "guidance_interval 0.5: expected a whole number"),
        ({"labels": 0, "guidance_interval": float("inf")}, "guidance_interval inf: expected a whole number"),
        ({"labels": 0, "guidance_interval": "all"}, "guidance_interval 'all': expected a whole number"),
        ({"labels": [0, 1], "guidance_interval": [1, 2, 3]}, "guidance_interval: 3 values for 2 images"),
        ({"labels": 0, "top_k": 2.5}, "whole number"),
        ({"labels": 0, "top_p": 1.1}, "top_p 1.1: expected 0 to 1"),
        ({"labels": 0, "temperature": "hot"}, "temperature"),
        ({"labels": 0, "seed": -1}, r"seed -1: expected a whole number 0 \.\. 2\*\*64-1"),
        ({"labels": 0, "seed": 2**64}, "seed 18446744073709551616"),
        ({"labels": 0, "seed": 1, "seeds": [1]}, "give one of them"),
        ({"labels": [0, 1], "seeds": [1]}, "1 seeds for 2 images"),
        ({"labels": 0, "max_batch": -1}, "max_batch -1"),
        ({"labels": 0, "max_batch": 0}, "max_batch 0"),
        ({"labels": 0, "greedy": 2}, "greedy 2: expected True or False"),
        ({"labels": 0, "preview_every": 3}, "preview_every needs"),
        ({"labels": 0, "guidance": 1e39}, r"guidance 1e\+39: expected 0 or more .*up to 1e\+20"),
        ({"labels": 0, "top_k": 10**400}, "top_k an integer of about 401 digits: expected a whole number"),
        ({"labels": 0, "seeds": 5}, "seeds 5: expected one per image"),
        ({"labels": 0, "max_batch": 1.5}, "max_batch 1.5: expected 1 to"),
        ({"labels": 0, "settings": 5}, "settings 5: expected a Settings, or a list"),
        (
            {"labels": 0, "settings": [Settings(), Settings()]},
            "2 settings for 1 images; give one Settings",
        ),
        (
            {"labels": 0, "settings": np.array([Settings()] * 2)},
            "^2 settings for 1 images; give one Settings",
        ),
        ({"labels": 0, "settings": Settings(), "top_k": 0}, "both settings and top_k were given"),
        ({"labels": 0, "settings": Settings(temperature=float("nan"))}, "temperature nan: expected 0 or more"),
    ],
)
def test_bad_requests_are_refused_before_any_work(pipeline: Pipeline, kwargs: dict[str, object], text: str) -> None:
    with pytest.raises((RequestError, TypeError), match=text) as caught:
        pipeline.generate(on_step=lambda *_: pytest.fail("work was started"), **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(pipeline: Pipeline) -> None:
    wanted = pipeline.generate([1, 2], guidance=2.0, top_k=5, seed=3, decode=False).tokens
    given: dict[str, Any] = {"guidance": np.array(2.0), "top_k": np.array([5, 5]), "seed": np.uint64(3)}
    assert (pipeline.generate([1, 2], **given, decode=False).tokens == wanted).all()
    given = {"guidance": np.float32(2), "top_k": np.int8(5), "seeds": np.array([3, 4], np.uint64)}
    assert (pipeline.generate([1, 2], **given, decode=False).tokens == wanted).all()


def test_names_match_without_regard_to_case_and_spelling(pipeline: Pipeline) -> None:
    for name in ("sea otter", "Sea Otter", "sea_otter", "SEA-OTTER", "3"):
        assert pipeline.generate(name, seed=1).labels == [3]


def test_a_name_of_two_classes_is_refused(pipeline: Pipeline) -> None:
    twice = replace(pipeline.bundle, class_names=("crane", "otter", "Crane", "a", "b", "c"))
    assert class_index(twice, "otter") == 1
    with pytest.raises(RequestError, match=r"label 'crane' names classes 0 \(crane\) and 2 \(Crane\); give the index"):
        class_index(twice, "crane")


def test_bad_tokens_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"expected \[B,64\] in sequence order"):
        pipeline.decode(np.zeros((1, 63), np.int64))
    with pytest.raises(RequestError, match=r"expected 0\.\.63"):
        pipeline.decode(np.full((1, 64), 64))


def test_unknown_devices_are_refused(tiny: Path) -> None:
    for device in ("gpu", "cuda:x", "cuda:-1", "CPU"):
        with pytest.raises(RequestError, match=f"device '{device}': expected auto, cpu, cuda"):
            Pipeline.load(tiny, device=device)
    # There is no driver here, so an engine could not be built either.
    with pytest.raises(BundleError, match=r"device 'cuda:0' cannot run .*: no NVIDIA driver"):
        Pipeline.load(tiny, device="cuda:0")


def test_importing_the_runtime_loads_neither_torch_nor_onnx(tiny: Path) -> None:
    code = (
        "import sys, par_runtime; from par_runtime import Pipeline;"
        f"Pipeline.load({str(tiny)!r}).generate(0, seed=1); import par_runtime.cli.generate;"
        "bad = {'torch', 'onnx', 'par_model', 'par_export'} & {m.split('.')[0] for m in sys.modules}; assert not bad, "
        "bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_par_runtime_alone_is_cheap() -> None:
    code = "import sys, par_runtime; assert not {'numpy', 'onnxruntime', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
