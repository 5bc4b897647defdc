"""Arguments of the Python API: a bad one is one RequestError before any work, and every number of numpy is a number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_values import Broken, Huge
from sharing import SMALL, TINY, params

from par_runtime import Bundle, Pipeline, RequestError, Schedule, Settings
from par_runtime.cli.dispatch import main

Get = Callable[[str], Pipeline]


@pytest.fixture
def pipeline(shared_pipelines: Get) -> Pipeline:
    return shared_pipelines("ONNX Runtime")


def refuses(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


async def nobody_awaits(*_: object) -> None: ...


class Awaited:
    async def __call__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": None}, r"^path None: expected the path of a folder, a str or a Path$"),
        ({"path": 5}, "^path 5: expected the path"),
        ({"path": b"tiny"}, "^path b'tiny': expected the path"),
        ({"path": [TINY]}, r"^path \[PosixPath"),
        ({"device": 0}, "^device 0: expected auto, cpu, cuda"),
        ({"device": None}, "^device None: expected auto"),
        ({"device": "CPU"}, "^device 'CPU': expected auto"),
        ({"device": b"cpu"}, "^device b'cpu': expected auto"),
        ({"device": ["cpu"]}, r"^device \['cpu'\]: expected auto"),
        ({"device": Huge()}, r"^device x+\.\.\.: expected auto"),
        ({"device": "cuda:99999999999999999999"}, "^device 'cuda:9+': expected auto"),
        ({"threads": "2"}, "^threads '2': expected 1 or more, a whole number$"),
        ({"threads": True}, "^threads True: expected 1 or more, a whole number$"),
        ({"threads": 1.0}, r"^threads 1\.0: expected 1 or more, a whole number$"),
        ({"threads": 0}, "^threads 0: expected 1 or more"),
        ({"threads": -(10**400)}, "^threads an integer of about 401 digits: expected 1 or more"),
        ({"threads": np.array([1, 2])}, r"^threads array\(\[1, 2\]\): expected 1 or more"),
        ({"verify": "nope"}, "^verify 'nope': expected auto, full or none$"),
        ({"verify": None}, "^verify None: expected auto, full or none$"),
        ({"verify": True}, "^verify True: expected auto"),
        ({"capture": "nope"}, "^capture 'nope': expected image, call or none$"),
        ({"capture": 1}, "^capture 1: expected image"),
        ({"selftest": "no"}, "^selftest 'no': expected True or False$"),
        ({"selftest": None}, "^selftest None: expected True or False$"),
        ({"selftest": 2}, "^selftest 2: expected True or False$"),
        ({"threads": Broken()}, "^threads a Broken: expected 1 or more, a whole number$"),
        ({"threads": np.timedelta64(1, "s")}, "^threads .*: expected 1 or more, a whole number$"),
        ({"path": Broken()}, "^path a Broken: expected the path"),
    ],
)
def test_bad_arguments_of_load(arguments: dict[str, Any], text: str) -> None:
    refuses(text, lambda: Pipeline.load(**{"path": TINY, "device": "cpu"} | arguments))


def test_load_takes_what_is_a_path_a_number_or_a_truth() -> None:
    class Here:
        def __fspath__(self) -> str:
            return str(TINY)

    for path in (str(TINY), TINY, Here()):
        with Pipeline.load(path, "cpu", threads=np.int64(1), selftest=np.True_) as pipeline:  # type: ignore[arg-type]
            assert pipeline.threads == 1
    refuses("^path None: expected", lambda: Bundle.open(None))  # type: ignore[arg-type]
    refuses("^verify 'some': expected", lambda: Bundle.open(TINY, "some"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"labels": None}, "^label None: expected a class index or name, not a NoneType$"),
        ({"labels": 1.5}, r"^label 1\.5: expected a class index or name, not a float$"),
        ({"labels": True}, "^label True: expected"),
        ({"labels": [np.True_]}, "expected a class index or name, not a bool"),
        ({"labels": b"otter"}, "^label b'otter': expected a class index or name, not a bytes$"),
        ({"labels": [[0, 1]]}, r"^label \[0, 1\]: expected a class index or name, not a list$"),
        ({"labels": np.zeros((2, 2), int)}, r"^label \[0, 0\]: expected"),
        ({"labels": np.array([1.0])}, r"^label 1\.0: expected"),
        ({"labels": {0, 1}}, r"^labels .*: expected a list, not a set"),
        ({"labels": {"otter": 1}}, r"^labels \{'otter': 1\}: expected a list, not a dict"),
        ({"labels": ()}, "^no labels were given"),
        ({"labels": (label for label in "")}, "^no labels were given"),
        ({"labels": np.array([], int)}, "^no labels were given"),
        ({"labels": itertools.repeat(0)}, "^labels: more than 1048576 values"),
        ({"labels": 10**30}, "^label .*: this model has classes"),
        ({"labels": Huge()}, r"^label x+\.\.\.: expected"),
        ({"labels": np.float32}, "^label <class 'numpy.float32'>: expected a class index or name, not a type$"),
        ({"labels": [np.timedelta64(1, "s")]}, "^label .*: expected a class index or name, not a timedelta64$"),
        ({"labels": Broken()}, "^label a Broken: expected a class index"),
        ({"labels": "x" * 10**6}, r"^unknown label 'x+\.\.\.; this model has 6 classes"),
        ({"labels": "a\n\x1b[2J"}, r"^unknown label 'a\\n\\x1b\[2J'; this model"),
        ({"guidance": np.float32}, "^guidance <class 'numpy.float32'>: expected 0 or more .*; not a type$"),
        ({"guidance": Broken()}, "^guidance a Broken: expected 0 or more"),
        ({"guidance": np.timedelta64(2, "s")}, "^guidance .*: expected 0 or more"),
        ({"guidance": [np.timedelta64(2, "s")]}, "^guidance .*: expected 0 or more .*; not a timedelta$"),
        ({"guidance": np.ma.array([1.0], mask=[True])}, "^guidance: a masked array"),
        ({"guidance": Decimal("1.5")}, r"^guidance Decimal\('1\.5'\): expected 0 or more .*; not a Decimal$"),
        ({"guidance": "2"}, "^guidance '2': expected 0 or more"),
        ({"guidance": True}, "^guidance True: expected 0 or more .*; not a bool$"),
        ({"guidance": np.bool_(True)}, "; not a bool"),
        ({"guidance": 1j}, r"^guidance 1j: .*; not a complex$"),
        ({"guidance": 3e38}, r"^guidance 3e\+38: expected 0 or more .* up to 1e\+20$"),
        ({"guidance": 10**400}, "^guidance an integer of about 401 digits: expected"),
        ({"guidance": float("inf")}, "^guidance inf"),
        ({"guidance": {1.0}}, "^guidance .*: expected a list, not a set"),
        ({"guidance": itertools.repeat(1.0)}, "^guidance: more than"),
        ({"guidance": [[1.0]]}, r"^guidance \[1\.0\]: expected"),
        ({"temperature": 1e39}, r"^temperature 1e\+39: expected 0 or more, within fp32$"),
        ({"temperature": -1e-45}, "^temperature -1e-45"),
        ({"temperature": False}, "^temperature False"),
        ({"top_p": True}, "^top_p True"),
        ({"top_p": 1 + 1e-9}, "^top_p 1.000000001: expected 0 to 1$"),
        ({"top_k": 2**63}, "^top_k 9223372036854775808: expected a whole number, 0"),
        ({"top_k": True}, "^top_k True"),
        ({"top_k": float("nan")}, "^top_k nan"),
        ({"greedy": "yes"}, "^greedy 'yes': expected True or False$"),
        ({"guidance_interval": 1.5}, r"^guidance_interval 1\.5: expected a whole number"),
        ({"settings": Settings(top_k="5")}, "^top_k '5'"),  # type: ignore[arg-type]
        ({"settings": Settings(guidance=[1.0])}, r"^guidance \[1\.0\]: expected"),  # type: ignore[arg-type]
        ({"seed": 7.0}, r"^seed 7\.0: expected a whole number 0 \.\. 2\*\*64-1$"),
        ({"seed": "7"}, "^seed '7'"),
        ({"seed": True}, "^seed True"),
        ({"seeds": 7}, "^seeds 7: expected one per image"),
        ({"seeds": "7"}, "^seeds '7': expected one per image"),
        ({"seeds": [1.0]}, r"^seed 1\.0"),
        ({"seeds": np.array([[1]])}, r"^seed \[1\]"),
        ({"seeds": {1}}, "^seeds .*: expected a list, not a set"),
        ({"seeds": itertools.count()}, "^seeds: more than"),
        ({"max_batch": 1.5}, r"^max_batch 1\.5: expected 1 to 4096 on onnxruntime-cpu.*, a whole number$"),
        ({"max_batch": True}, "^max_batch True: expected 1 to"),
        ({"max_batch": "2"}, "^max_batch '2': expected 1 to"),
        ({"preview_every": 2.5, "on_preview": print}, r"^preview_every 2\.5: expected 1 or more, a number of calls"),
        ({"preview_every": 0, "on_preview": print}, "^preview_every 0: expected 1 or more"),
        ({"preview_every": 2, "on_preview": "show"}, "^on_preview 'show': expected a function, not a str$"),
        ({"on_preview": print}, "^on_preview needs preview_every, the number of calls"),
        ({"on_step": 5}, "^on_step 5: expected a function, not a int$"),
        ({"on_step": nobody_awaits}, "^on_step <function nobody_awaits.*: expected a plain function, not an async one"),
        ({"on_step": Awaited()}, "^on_step .*: expected a plain function, not an async one"),
        ({"on_preview": nobody_awaits, "preview_every": 1}, "^on_preview .*: expected a plain function, not an async"),
        ({"decode": "yes"}, "^decode 'yes': expected True or False$"),
        ({"decode": None}, "^decode None: expected"),
        ({"images_per_label": 0}, "^images_per_label 0: expected 1 to 1048576"),
        ({"images_per_label": 1.0}, r"^images_per_label 1\.0: expected"),
        (
            {"images_per_label": 10**30, "labels": [0, 1]},
            "^images_per_label 10+: expected 1 to 524288 for 1048576 imag",
        ),
        ({"keep": 5, "tokens": 5}, r"^keep has shape \(\) and type int64; expected bool"),
        ({"keep": object(), "tokens": [0]}, "^keep has shape"),
        ({"keep": range(10**11), "tokens": [0]}, "^keep: 100000000000 entries; expected at most 1048576$"),
        ({"keep": np.ones((8, 8), bool), "tokens": range(10**11)}, "^tokens: 100000000000 entries"),
        ({"settings": {Settings()}}, "^settings .*: expected a list, not a set"),
        (
            {"settings": np.zeros((9, 9))},
            r"^settings array.*: expected a Settings, or a list of one Settings per image$",
        ),
        ({"keep": np.ones((8, 8), bool)}, "^keep and tokens belong together"),
        ({"keep": np.ones((8, 8), bool), "tokens": "abc"}, "^tokens have shape"),
        ({"keep": np.ones((8, 8), bool), "tokens": [[0], [0, 1]]}, "^tokens: not an array, its rows have different"),
        ({"keep": np.ones((8, 8), bool), "tokens": np.zeros(64)}, "^tokens have shape .* type float64"),
    ],
)
def test_bad_arguments_of_generate(pipeline: Pipeline, arguments: dict[str, Any], text: str) -> None:
    stop = {"on_step": lambda *_: pytest.fail("work was started")}
    refuses(text, lambda: pipeline.generate(**{"labels": 0, "seed": None} | stop | arguments))


def test_bad_arguments_of_the_other_methods(pipeline: Pipeline) -> None:
    tokens = pipeline.generate(0, seed=1).tokens
    for done in (0, 65, 1.5, "a", None, True):
        text = "^done .*: expected 1 to 64, the number of tokens, a whole number$"
        refuses(text, lambda d=done: pipeline.preview(tokens, d))
    for bad in (None, 5, "abc", [], [[0]], tokens[0], tokens.astype(float), tokens + 64, object(), [[1], [2, 3]]):
        refuses("^tokens", lambda b=bad: pipeline.decode(b))
        refuses("^tokens", lambda b=bad: pipeline.preview(b, 5))
    refuses("^tokens have shape", lambda: pipeline.grid_tokens([1, 2]))  # type: ignore[arg-type]
    for bad in (None, 5, "abc", np.zeros((2, 3)), np.zeros((16, 16, 3)), object()):
        with pytest.raises(RequestError, match="^abc: no such file or folder" if isinstance(bad, str) else None):
            pipeline.encode(bad)
        with pytest.raises(RequestError):
            pipeline.score(bad, 0)
    refuses("^tokens have shape", lambda: pipeline.score(tokens, []))
    assert pipeline.score(tokens[:0], []).shape == (0, 64)
    refuses("^label None", lambda: pipeline.score(tokens, None))  # type: ignore[arg-type]
    refuses("^more than 1048576 pictures", lambda: pipeline.encode(itertools.repeat(np.zeros((16, 16, 3), np.uint8))))
    for bad in (None, 5, "nope", np.array(["crop", "stretch"]), np.ma.array([1], mask=[True])):
        refuses("^fit .*: expected crop or stretch$", lambda b=bad: pipeline.encode(np.zeros((16, 16, 3), np.uint8), b))
        refuses("^fit .*: expected crop or", lambda b=bad: pipeline.keep_mask(keep="left", fit=b))
        refuses("^mask_from .*: expected one of auto", lambda b=bad: pipeline.keep_mask(keep="left", mask_from=b))
    refuses("^picture: a masked array", lambda: pipeline.keep_mask(keep="left", photo=np.ma.array([1], mask=[True])))
    for seconds in ("a", None, -1, float("nan"), True, np.timedelta64(5, "D"), Broken()):
        refuses("^seconds .*: expected a number of seconds, 0 or more", lambda s=seconds: pipeline.selftest(s))
    pipeline.selftest(np.array(0))  # type: ignore[arg-type]
    assert (pipeline.decode(tokens.tolist()) == pipeline.decode(tokens)).all()
    assert (pipeline.preview(tokens.tolist(), np.int64(64)) == pipeline.decode(tokens)).all()
    assert pipeline.decode(tokens[:0]).shape == (0, 16, 16, 3)
    assert pipeline.score(tokens.tolist(), np.array([0])).shape == (1, 64)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_integers_of_numpy_are_integers(pipeline: Pipeline, kind: type[np.integer]) -> None:
    shown: list[int] = []
    options: dict[str, Any] = {"preview_every": 10, "on_preview": lambda _, done, total: shown.append(done)}
    wanted = pipeline.generate(
        [1, 1, 2, 2], seed=7, top_k=5, max_batch=2, images_per_label=1, guidance_interval=3, guidance=2, **options
    )
    options["preview_every"] = kind(10)
    made = pipeline.generate(
        np.array([1, 2], kind), seed=kind(7), top_k=kind(5), max_batch=kind(2), images_per_label=kind(2),
        guidance_interval=kind(3), guidance=kind(2), **options,
    )  # fmt: skip
    assert (made.tokens == wanted.tokens).all()
    assert (made.images == wanted.images).all()
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    assert made.seeds == [7, 8, 9, 10]
    assert all(type(seed) is int for seed in made.seeds)
    each = pipeline.generate([1, 1, 2, 2], seeds=np.arange(7, 11).astype(kind), settings=wanted.settings)
    assert (each.tokens == wanted.tokens).all()
    noise = Schedule.of(pipeline.bundle, [kind(1)], [Settings()], [kind(7)]).noise
    assert (noise == Schedule.of(pipeline.bundle, [1], [Settings()], [7]).noise).all()


def test_other_forms_of_the_same_values(pipeline: Pipeline) -> None:
    wanted = pipeline.generate(["otter", 3], seed=7, guidance=1.5)
    forms: list[dict[str, Any]] = [
        {"labels": np.array(["otter", "3"]), "guidance": Fraction(3, 2)},
        {"labels": ("otter", np.str_("3")), "guidance": np.array(1.5)},
        {"labels": iter(["otter", np.int64(3)]), "guidance": np.float16(1.5)},
        {"labels": (label for label in ["otter", 3]), "guidance": (g for g in [1.5, 1.5])},
        {"labels": ["otter", np.array(3)[()]], "guidance": np.array([1.5, 1.5], np.float32)},
        {"labels": ["otter", 3], "seed": np.array(7), "guidance": (1.5, 1.5)},
        {"labels": ["otter", 3], "seed": None, "seeds": (s for s in (7, 8)), "guidance": 1.5},
    ]
    for form in forms:
        assert pipeline.generate(**{"seed": 7} | form).tokens.tolist() == wanted.tokens.tolist(), form
    assert pipeline.generate(np.array(3), seed=8, guidance=1.5).tokens.tolist() == wanted.tokens[1:].tolist()
    zero = pipeline.generate(0, seed=1, guidance=-0.0, temperature=-0.0).settings[0]
    assert (str(zero.guidance), str(zero.temperature)) == ("0.0", "0.0")
    largest = pipeline.generate(0, seed=1, top_k=2**63 - 1)
    assert largest.settings[0].top_k == 2**63 - 1
    assert (largest.tokens == pipeline.generate(0, seed=1, top_k=0).tokens).all()


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime"))
def test_numbers_at_the_edges_draw_what_is_documented(kind: str) -> None:
    """Nothing overflows (warnings are errors): extreme settings have their limits' meaning."""
    path, device = {"C step": (SMALL, "cpu"), "ONNX Runtime": (TINY, "cpu-ort")}[kind]
    pipeline = Pipeline.load(path, device, threads=1, selftest=False)

    def tokens(**settings: Any) -> list[list[int]]:
        plain = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "guidance": 1.0}
        return pipeline.generate([1], seed=3, decode=False, **plain | settings).tokens.tolist()  # type: ignore[no-any-return]

    least = tokens(temperature=1e-5)
    assert tokens(temperature=1e-45) == least
    assert tokens(temperature=3.4e38) == tokens(temperature=1e30)  # every code alike
    if kind != "C step":  # it draws with the same numbers, and takes longer
        assert tokens(temperature=0) == tokens(temperature=1e-39) == tokens(temperature=1e-6) == least
        greedy = tokens(greedy=True)
        assert tokens(top_p=0) == tokens(top_p=1e-50) == tokens(top_p=1e-39) == tokens(top_k=1) == greedy
    # Above some scale only the difference counts; up to the largest one, its arithmetic stays in fp32.
    largest = tokens(guidance=1e20, temperature=0)
    assert largest == tokens(guidance=1e19, temperature=0)
    assert largest != tokens(guidance=1.5, temperature=0)
    assert len(set(largest[0])) > 1  # what overflows draws the first or the last code everywhere


def test_a_schedule_checks_what_it_is_given() -> None:
    bundle = Bundle.open(TINY)
    refuses("^guidance 1e", lambda: Schedule.of(bundle, [0], [Settings(guidance=1e39)]))
    refuses("^label 9: this model has classes", lambda: Schedule.of(bundle, [9], [Settings()]))
    refuses("^seed -1", lambda: Schedule.of(bundle, [0], [Settings()], [-1]))
    refuses("^1 settings for 2 images", lambda: Schedule.of(bundle, [0, 1], [Settings()]))
    refuses("^settings 5: expected a Settings", lambda: Schedule.of(bundle, [0], 5))  # type: ignore[arg-type]
    refuses("^label None: expected", lambda: Schedule.of(bundle, None, [Settings()]))  # type: ignore[arg-type]
    assert Schedule.of(bundle, ["otter", 0], [Settings()] * 2).class_ids.tolist() == [
        bundle.class_base + 2,
        bundle.class_base,
    ]


def test_images_per_label(pipeline: Pipeline) -> None:
    wanted = pipeline.generate(["otter", "otter", "otter", 0, 0, 0], seed=5, guidance=[1, 2, 3, 1, 2, 3])
    steps: list[int] = []
    made = pipeline.generate(
        ["otter", 0], images_per_label=3, seed=5, guidance=[1, 2, 3, 1, 2, 3], on_step=lambda *at: steps.append(at[1])
    )
    assert made.labels == [2, 2, 2, 0, 0, 0]
    assert made.seeds == [5, 6, 7, 8, 9, 10]
    assert (made.tokens == wanted.tokens).all()
    assert (pipeline.generate("otter", images_per_label=3, seed=5, guidance=[1, 2, 3]).tokens == made.tokens[:3]).all()
    refuses("^2 seeds for 6 images", lambda: pipeline.generate(["otter", 0], images_per_label=3, seeds=[1, 2]))


def test_the_seed_after_the_largest_is_zero(pipeline: Pipeline, tmp_path: Path) -> None:
    wanted = pipeline.generate([0, 0], seeds=[2**64 - 1, 0])
    assert (pipeline.generate([0, 0], seed=2**64 - 1).tokens == wanted.tokens).all()
    saved = tmp_path / "tokens.npy"
    options = ["--label", "0", "--count", "2", "--seed", str(2**64 - 1), "--tokens", str(saved), "--quiet"]
    assert main(["generate", str(TINY), *options, "--out", str(tmp_path / "out.png")]) == 0
    assert (np.load(saved) == wanted.tokens).all()
