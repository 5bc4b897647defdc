"""The accuracy report: every measure against what it is by definition, and the forms in which it is shown."""

from __future__ import annotations

import html.parser
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_calibration.errors import CalibrationError
from par_calibration.heldout import find
from par_calibration.report import Budget, LayerError, Options, Report, compare
from par_calibration.report.budget import LIMITS
from par_calibration.report.forced import Forced, Stream, compare_logits, divergence, forced_logits, positions_of
from par_calibration.report.frechet import distance, floor
from par_calibration.report.layers import outliers, worst_kind
from par_calibration.report.measures import agreement, drawn, interval, likelihood
from par_export.quantised import quantised_with, write_bundle
from par_runtime.bundle import Bundle
from par_runtime.metrics import log_softmax
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule, rows_of

ROOT = Path(__file__).parents[2]
DEMO, TINY = ROOT / "models" / "demo", ROOT / "tests" / "data" / "tiny"
FEW = Options(images=6, samples=12, threads=1, show=4)


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture(scope="module")
def small(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with int4 weights."""
    out = tmp_path_factory.mktemp("report") / "int4"
    entries = {"weights": "int4", "group": 32}
    write_bundle(tiny, out, quantised_with("int4", 32, "float16"), entries, gate=False, say=lambda _: None)
    return Bundle.open(out)


@pytest.fixture(scope="module")
def report(tiny: Bundle, small: Bundle) -> Report:
    layers = [LayerError("layers.0.wqkv", "group", 0.01), LayerError("output", "prefill", 0.02)]
    return compare(tiny, small, FEW, layers)


def test_a_bundle_against_itself_has_no_error(tiny: Bundle) -> None:
    found = compare(tiny, tiny, FEW)
    assert found.measures()["top1"] == 1
    assert found.measures()["kl"] == found.measures()["likelihood"] == 0
    assert found.drawn is not None
    assert found.frechet is not None
    assert found.drawn.identical == 12
    assert found.frechet.same_seeds == pytest.approx(0, abs=1e-6)
    assert found.frechet.distance == pytest.approx(found.frechet.other_seeds)
    assert found.exceeded(Budget({"top1": 1.0, "kl": 0.0, "likelihood": 0.0})) == []


def test_given_tokens_have_the_likelihood_of_score_and_the_guided_logits_of_the_backend() -> None:
    bundle = Bundle.open(DEMO)
    held = find(bundle, None, 3)
    assert held is not None
    with Pipeline.load(DEMO, "cpu", threads=1, selftest=False) as pipeline:
        both = {call.write: logits for _, call, logits in forced_logits(pipeline, held)}
        scored = pipeline.score(held.tokens, list(held.labels))
        schedule = Schedule.of(bundle, held.labels, image_settings(bundle, 3, guidance=2.5))
        with rows_of(pipeline.backend, schedule):
            for call, batch, ids, write in schedule.walk(held.tokens):
                with_class, without = both[call.write]
                guided = without + np.float32(2.5) * (with_class - without)
                np.testing.assert_allclose(pipeline.backend.logits(batch, ids, write), guided, atol=2e-4)
                own = np.take_along_axis(log_softmax(with_class), held.tokens[:, call.positions][..., None], -1)
                np.testing.assert_allclose(scored[:, call.positions], own[..., 0], atol=2e-4)
                if call.phase.name == "group" and call.write > 20:
                    break


def test_the_divergence_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 4, (3, 5, 64)).astype(np.float32)
    second = first + rng.normal(0, 0.1, first.shape).astype(np.float32)
    log_first, log_second = log_softmax(first), log_softmax(second)
    kl, normal, other = divergence(first, second)
    np.testing.assert_allclose(kl, (np.exp(log_first) * (log_first - log_second)).sum(-1), atol=1e-7)
    np.testing.assert_allclose(first - normal[..., None], log_first, atol=1e-6)
    np.testing.assert_allclose(second - other[..., None], log_second, atol=1e-6)
    assert not divergence(first, first)[0].any()
    second[0, 0, 0] = np.nan
    assert np.isnan(divergence(first, second)[0][0, 0])


def test_every_position_is_of_one_phase_and_of_one_kind_of_input() -> None:
    where = positions_of(Bundle.open(DEMO))
    assert where["class"].tolist() == where["prefill"].tolist() == [0]
    assert where["learnable"].tolist() == [5, 6, 7]
    assert where["transition"].tolist() == [4, 5, 6, 7]
    for names in (("prefill", "sequential", "transition", "group"), ("class", "learnable", "code")):
        assert sorted(np.concatenate([where[name] for name in names]).tolist()) == list(range(256))


def test_the_frechet_distance_is_that_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    variance = np.trace(np.cov(x, rowvar=False))
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    assert distance(x, x + 3) == pytest.approx(5 * 9)
    centred = x - x.mean(0)
    assert distance(centred, 3 * centred) == pytest.approx(4 * variance)  # tr(C + 9C - 2 * 3C)
    assert math.isnan(distance(x, np.full_like(x, np.nan)))
    labels = [0, 1] * 20
    apart = x + 100 * np.array(labels)[:, None]  # classes far apart, the same number of each in both halves
    mean, p95 = floor(apart, apart, labels, 0)
    assert 0 < mean < p95 < 20


def test_tokens_until_the_first_that_differs() -> None:
    original = np.zeros((3, 8), np.int64)
    candidate = original.copy()
    candidate[1, 5] = candidate[1, 7] = candidate[2, 0] = 1
    found = drawn(original, candidate)
    assert (found.first, found.identical, found.median) == ((8, 5, 0), 1, 5)
    assert dict(found.survival()) == {t: (1 + (t <= 5) + (t <= 0)) / 3 for t in range(9)}


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.5, 2, 400)
    low, high = interval(values, 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.02), pytest.approx(values.mean() + half, abs=0.02))


def test_without_real_images_drawn_tokens_stand_in_and_the_report_says_so(report: Report, small: Bundle) -> None:
    assert not report.real
    assert any("No real images" in note for note in report.notes)
    assert "none of them real" in "\n".join(report.table())
    assert report.candidate.weights == small.quantised == "int4"


def test_what_is_beyond_the_budget_says_by_how_much_and_what_to_try(report: Report) -> None:
    lines = report.exceeded(Budget({"top1": 0.9999, "kl": 1e-9, "frechet": 1e9}))
    assert [line.split(":")[0] for line in lines] == ["top-1 agreement", "mean KL divergence"]
    assert "points too low" in lines[0]
    assert "times as much" in lines[1]
    # The head is kept already: its 16 rows are no group. So are most matrices; wqkv stands for what has the most error.
    advice = "try --keep wqkv, with what is kept already, --refine with 2000 steps or more, --weights int8"
    assert lines[0].endswith(advice)


def test_what_is_no_number_is_beyond_every_limit_and_can_be_shown(report: Report, tmp_path: Path) -> None:
    shape, everywhere, given = (1, 2, 64), (slice(None), slice(None)), np.zeros((1, 2, 1), np.int64)
    to = Forced(*(np.zeros((1, 2), np.float64) for _ in range(6)))
    for wrong in (np.nan, np.inf):
        compare_logits(
            np.zeros((2, *shape), np.float32), np.full((2, *shape), wrong, np.float32), 2.0, given, to, everywhere
        )
        assert np.isnan([to.kl, to.kl_guided, to.likelihood_other]).all()
        assert np.isfinite(to.likelihood).all()
    where = {name: np.array([0, 1]) for name in ("prefill", "class", "learnable")}
    assert report.frechet is not None
    broken = replace(
        report,
        agreements=tuple(agreement(to, "both", where)),
        likelihoods={"both": likelihood(to, 0)},
        profiles={"both": tuple(to.kl.mean(0))},
        layers=(LayerError("output", "group", math.nan),),
        frechet=replace(report.frechet, distance=math.nan),
        decoder_psnr=math.nan,
    )
    beyond = broken.exceeded(Budget(dict.fromkeys(LIMITS, 1e9)))
    assert len(beyond) == len(LIMITS)
    assert all("not a finite number" in line for line in beyond[1:])
    broken.write_html(tmp_path / "r.html")
    broken.write_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["measures"]["kl"] is None
    assert any("BEYOND THE BUDGET" in line for line in broken.table())


def test_a_matrix_that_stands_out_is_named() -> None:
    layers = [LayerError(f"layers.{i}.{m}", "group", 0.01) for i in range(4) for m in ("wqkv", "wo", "w13", "w2")]
    assert outliers(layers) == worst_kind([]) == []
    assert worst_kind([*layers, LayerError("layers.2.w13", "group", 0.02), LayerError("output", "group", 1)]) == ["w13"]
    assert outliers([*layers, LayerError("layers.2.w2", "transition", 1.0)]) == ["layers.2.w2"]


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.plots = self.links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.plots += tag == "svg"
        values = dict(attrs)
        self.links += any(not (values.get(key) or "data:").startswith("data:") for key in ("src", "href"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_json_and_pairs_of_images(report: Report, tmp_path: Path) -> None:
    report.write_html(tmp_path / "r.html")
    report.write_json(tmp_path / "r.json")
    report.write_images(tmp_path / "r.png")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert (page.open, page.links, page.plots) == ([], 0, 7)
    assert "nan" not in text.lower().split("<script")[0].replace("finance", "")
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["measures"] == pytest.approx(report.measures())
    assert facts["drawn"]["survival"][0] == [0, 1.0]
    assert len(facts["profiles"]["both"]) == 64
    assert f'"hash": "{report.original.hash}"' in text
    with Image.open(tmp_path / "r.png") as sheet:
        assert sheet.width > sheet.height
    assert report.pairs is not None
    assert report.pairs.shape[:2] == (4, 2)
    summary = json.dumps(report.summary(), allow_nan=False)
    assert len(summary) < 2000


def test_a_report_without_images_says_so(tiny: Bundle, small: Bundle, tmp_path: Path) -> None:
    found = compare(tiny, small, replace(FEW, samples=0, images=1))
    assert (found.drawn, found.frechet, found.pairs) == (None, None, None)
    assert "frechet" not in found.measures()
    found.write_html(tmp_path / "r.html")
    with pytest.raises(CalibrationError, match="this report has no images"):
        found.write_images(tmp_path / "r.png")


def test_large_models_compare_fewer_images(tiny: Bundle) -> None:
    def of(parameters: float, n_tokens: int) -> tuple[int, int]:
        bundle = replace(tiny, n_tokens=n_tokens, model={**tiny.model, "parameters": int(parameters)})
        return Options().images_of(bundle), Options().samples_of(bundle)

    assert of(7.3e6, 256) == (240, 96)
    assert of(113e6, 576) == (122, 96)
    assert of(3.1e9, 2304) == (40, 40)
    assert (Options(images=3).images_of(tiny), Options(samples=0).samples_of(tiny)) == (3, 0)


def test_another_model_is_no_calibration(tiny: Bundle) -> None:
    with pytest.raises(CalibrationError, match="is no calibration of"):
        compare(tiny, Bundle.open(DEMO), FEW)


def test_the_default_budget_has_a_limit_for_each_measure(report: Report) -> None:
    every = replace(report, decoder_psnr=48.0).measures()
    assert every.keys() == LIMITS.keys() == Budget.of("int8").limits.keys()
    assert every.keys() - report.measures().keys() == {"decoder"}  # a decoder in fp32 is that of the original
    assert Budget.of("kept") == Budget.of("int8")
    assert Budget.of("int8").limits["top1"] == 0.98
    assert Budget.of("int4").limits["top1"] == 0.93
    assert Budget.of("int8").limits["likelihood"] == 0.005


def test_a_budget_from_a_text_or_a_file(tmp_path: Path) -> None:
    assert Budget.parse("top1=0.9, kl=none", "int8").limits == {
        key: 0.9 if key == "top1" else value for key, value in Budget.of("int8").limits.items() if key != "kl"
    }
    file = tmp_path / "budget.json"
    file.write_text('{"top1": 0.9, "kl": null}')
    assert Budget.parse(str(file), "int8") == Budget.parse("top1=0.9,kl=none", "int8")
    assert Budget.parse(Budget.of("int4").describe(), "int8") == Budget.of("int4")
    file.write_text("[1]")
    for text, message in (
        ("topp1=0.9", "unknown measure 'topp1'; expected some of top1, kl"),
        ("top1=98", "top1 is 98.0; expected a number from 0 to 1.*0.98 is 98 %"),
        ("top1=a\x1b[2J", "top1 is 'a"),
        ("kl=nan", "kl is nan"),
        ("kl=-1", "kl is -1"),
        ("kl=1,kl=2", "'kl' is given twice"),
        ("kl=1,top1", "'top1' has no '='"),
        (str(file), "no object"),
        (str(tmp_path / "none.json"), "missing"),
        (str(tmp_path), "folder"),
        ("strict", "missing.*top1=0.97"),
    ):
        with pytest.raises(CalibrationError, match=message) as error:
            Budget.parse(text, "int8")
        assert str(error.value).isprintable()


def test_an_arithmetic_that_does_not_run_here_is_not_reported_as_if_it_did(tiny: Bundle) -> None:
    # 16 columns are no panel of the C step, so ONNX Runtime runs it.
    with pytest.raises(CalibrationError, match=r"int8 and a bf16 cache: onnxruntime-cpu .* would prove nothing"):
        compare(tiny, tiny, replace(FEW, samples=0, arithmetic="int8", cache="bf16"))


def test_rounded_activations_are_told_apart_from_weights() -> None:
    """bf16 arithmetic over weights that stay: all of the error is that of rounding."""
    bundle = Bundle.open(DEMO)
    try:
        found = compare(bundle, bundle, replace(FEW, images=2, samples=0, arithmetic="bf16", cache="fp32"))
    except CalibrationError as error:
        pytest.skip(f"bf16 is arithmetic of the C step: {error}")
    assert list(found.likelihoods) == ["weights", "both", "rounding"]
    weights, rounding, both = (found.agreement(cost=cost) for cost in ("weights", "rounding", "both"))
    assert weights is not None
    assert rounding is not None
    assert both is not None
    assert weights.kl == 0
    assert 0 < rounding.kl == both.kl < Budget.of("int8").limits["kl"]
    assert found.candidate.arithmetic == "bf16"
    assert found.exceeded(Budget({"kl": 1e-12}))[0].endswith("rounded activations: try --arithmetic fp32")


def test_logits_that_do_not_fit_on_the_disk_are_refused_before_they_are_computed(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    with pytest.raises(CalibrationError, match=r"the logits of 50000 images take 1638 MB, 1 MB are free"):
        compare(tiny, tiny, replace(FEW, images=50_000))


def test_the_temporary_file_of_logits_has_no_name(tmp_path: Path) -> None:
    """So a process that is killed leaves nothing behind."""
    stream = Stream(tmp_path)
    logits = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    stream.write(logits.transpose(1, 0, 2))
    stream.write(logits)
    assert list(tmp_path.iterdir()) == []
    stream.rewind()
    assert (stream.read((3, 2, 4)) == logits.transpose(1, 0, 2)).all()
    assert (stream.read((2, 3, 4)) == logits).all()
    stream.close()
