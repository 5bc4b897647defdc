"""What a request over HTTP asks for: every name and value is checked, and each fault is one line."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from par_runtime import Bundle, RequestError, Settings
from par_runtime.server.asked import MOST_IMAGES, Asked, formats, of_json, of_query


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Bundle:
    return replace(Bundle.open(tiny), class_names=("tench", "goldfish, Carassius auratus", *"cdef"))


def query(bundle: Bundle, text: str) -> Asked:
    return of_query(bundle, [tuple(each.split("=")) for each in text.split("&") if each])  # type: ignore[misc]


def posted(bundle: Bundle, **entries: Any) -> Asked:
    return of_json(bundle, "tiny", json.dumps(entries).encode())


def test_an_address_says_what_a_call_of_generate_would(bundle: Bundle) -> None:
    asked = query(
        bundle,
        "label=goldfish&seed=18446744073709551615&guidance=2&temperature=0.5&top_k=7&top_p=.9&greedy=true"
        "&guidance_interval=3&scale=3&format=png",
    )
    assert asked == Asked(1, Settings(2.0, 0.5, 7, 0.9, True, 3), (2**64 - 1,), True, ".png", 3)
    assert query(bundle, "label=0&seed=7&greedy=0").settings == Settings(
        bundle.defaults.guidance, bundle.defaults.temperature, bundle.defaults.top_k, bundle.defaults.top_p
    )


def test_without_a_seed_each_request_has_its_own(bundle: Bundle) -> None:
    some = [query(bundle, "label=0") for _ in range(4)]
    assert not any(each.again for each in some)
    assert len({each.seeds for each in some}) == 4


def test_json_says_the_same(bundle: Bundle) -> None:
    asked = posted(bundle, label=1, seed=2**64 - 1, n=3, guidance=2, top_k=7, greedy=True, size="auto")
    assert asked.seeds == (2**64 - 1, 0, 1)
    assert asked.settings == query(bundle, "label=1&seed=0&guidance=2&top_k=7&greedy=1").settings
    assert posted(bundle, prompt="tench", seed=4, n=1) == query(bundle, "label=tench&seed=4")
    height, width = bundle.image_size or (0, 0)
    assert posted(bundle, prompt="0", size=f"{5 * width}x{5 * height}").scale == 5


def test_entries_that_openai_has_and_that_ask_for_nothing_are_taken(bundle: Bundle) -> None:
    entries = {"quality": "auto", "style": None, "background": "auto", "moderation": "low", "stream": False}
    more = {"user": "somebody", "response_format": "b64_json", "output_format": "png", "model": "tiny"}
    assert posted(bundle, prompt="0", seed=1, **entries, **more) == posted(bundle, label=0, seed=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no label; expected one, for instance ?label=0"),
        ("seed=1", "no label"),
        ("label=goldfsh", "did you mean goldfish?"),
        ("label=99", "label 99: this model has classes 0..5"),
        ("label=0&label=1", "the address has label 2 times; give it once"),
        ("label=0&sed=1", "'sed', which means nothing here; did you mean seed?"),
        ("label=0&xyz=1", "expected format, fps, greedy, guidance"),
        ("label=0&seed=x", "seed 'x': expected a whole number 0 .. 2**64-1"),
        ("label=0&seed=", "seed '': expected a whole number"),
        ("label=0&seed=1.5", "seed 1.5: expected a whole number"),
        ("label=0&seed=1_0", "seed '1_0': expected a whole number"),
        ("label=0&seed=\u0663", "seed '\u0663': expected a whole number"),
        ("label=0&guidance=1_0", "guidance '1_0': expected 0 or more"),
        ("label=0&guidance= 7", "guidance ' 7': expected 0 or more"),
        ("label=0&seed=-1", "seed -1: expected a whole number"),
        ("label=0&seed=" + "9" * 21, "seed 999999999999999999999: expected a whole number"),
        ("label=0&seed=" + "9" * 5000, "expected a whole number 0 .. 2**64-1"),
        ("label=0&guidance=nan", "guidance nan: expected 0 or more"),
        ("label=0&guidance=much", "guidance 'much': expected 0 or more"),
        ("label=0&guidance=true", "guidance True: expected 0 or more"),
        ("label=0&top_p=2", "top_p 2: expected 0 to 1"),
        ("label=0&top_k=1.5", "top_k 1.5: expected a whole number"),
        ("label=0&greedy=maybe", "greedy 'maybe': expected true or false"),
        ("label=0&format=gif", "format 'gif': expected png"),
        ("label=0&fps=8", "fps 8: this model makes images, not clips"),
        ("label=0&scale=0", "scale 0"),
        ("label=0&scale=x", "scale 'x'"),
        ("label=0&scale=1000", "scale 1000: expected a whole number from 1 to"),
    ],
)
def test_a_bad_address_is_refused_with_what_is_expected(bundle: Bundle, text: str, expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        query(bundle, text)
    assert expected in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, "no prompt: a class, for instance "),
        ({"prompt": "0", "label": 0}, "both prompt and label were given; give one of them"),
        ({"prompt": ["0"]}, "prompt ['0']: expected one value"),
        ({"prompt": "0", "guidance": [2]}, "guidance [2]: expected one value"),
        ({"prompt": "0", "seed": {}}, "seed {}: expected one value"),
        ({"prompt": "0", "n": 0}, f"n 0: expected 1 to {MOST_IMAGES}"),
        ({"prompt": "0", "n": MOST_IMAGES + 1}, f"n {MOST_IMAGES + 1}: expected 1 to {MOST_IMAGES}"),
        ({"prompt": "0", "n": "2"}, "n '2': expected 1 to"),
        ({"prompt": "0", "model": "gpt-image-1"}, "model 'gpt-image-1': this server has 'tiny' alone"),
        ({"prompt": "0", "response_format": "url"}, "response_format 'url': expected b64_json"),
        ({"prompt": "0", "output_format": "jpeg"}, "output_format 'jpeg': expected png"),
        ({"prompt": "0", "size": "1024x1024x"}, "size '1024x1024x': expected auto or"),
        ({"prompt": "0", "size": "17x17"}, "size '17x17': expected auto or"),
        ({"prompt": "0", "size": "1040x1040"}, "the size of this model, or a whole multiple of it, up to 1024x1024"),
        ({"prompt": "0", "size": 64}, "size 64: expected auto or"),
        ({"prompt": "0", "quality": "hd"}, "quality 'hd': not supported here"),
        ({"prompt": "0", "stream": True}, "stream true: not supported here"),
        ({"prompt": "0", "stream": 0}, "stream 0: not supported here"),
        ({"prompt": "0", "greedy": "true"}, "greedy 'true': expected true or false"),
        ({"prompt": "0", "greedy": 1}, "greedy 1: expected true or false"),
        ({"prompt": "0", "guidance": "2"}, "guidance '2': expected 0 or more"),
        ({"prompt": "0", "seeds": [1, 2]}, "'seeds', which means nothing here; did you mean seed?"),
    ],
)
def test_a_bad_body_is_refused_with_what_is_expected(bundle: Bundle, entries: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        posted(bundle, **entries)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "the body: not valid JSON"),
        (b"label=0", "the body: not valid JSON"),
        (b"\xff", "the body: not valid JSON (not UTF-8"),
        (b"[1]", "the body is [1]; expected an object"),
        (b'{"prompt": "0", "prompt": "1"}', "'prompt' twice; give it once"),
        (b"[" * 1000, "not valid JSON"),
        (b'{"guidance": 1e999, "prompt": "0"}', "expected a finite one"),
    ],
)
def test_a_body_that_is_no_json_is_refused(bundle: Bundle, body: bytes, expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        of_json(bundle, "tiny", body)
    assert expected in str(refused.value)


def test_a_request_for_too_many_pixels_is_refused(bundle: Bundle) -> None:
    large = replace(bundle, image_size=(1024, 1024))
    assert len(posted(large, prompt="0", n=8).seeds) == 8
    with pytest.raises(RequestError, match="9 x 1 x 1024 x 1024 is 9437184 pixels; expected at most 8388608"):
        posted(large, prompt="0", n=9)


def test_whatever_is_sent_is_taken_or_refused_in_one_line(bundle: Bundle) -> None:
    names = ["prompt", "label", "n", "seed", "size", "guidance", "top_k", "top_p", "greedy", "fps", "model", "user"]
    names += ["output_format", "response_format", "temperature", "guidance_interval", "stream", "\n", "scale"]
    values: list[Any] = [
        None,
        True,
        0,
        1,
        -1,
        0.5,
        1e300,
        2**70,
        "",
        "0",
        "auto",
        "png",
        "1e3",
        "\x1b",
        [],
        [1],
        {},
        {"a": 1},
    ]
    chance = random.Random(7)
    taken, refused = 0, list[str]()
    for _ in range(4000):
        entries = {chance.choice(names): chance.choice(values) for _ in range(chance.randrange(5))}
        if chance.random() < 0.7:
            entries["prompt"] = "0"
        body = json.dumps(entries).encode()
        pairs = [("label" if name == "prompt" else name, str(value)) for name, value in entries.items()]
        for way in (partial(of_json, bundle, "tiny", body), partial(of_query, bundle, pairs)):
            try:
                taken += isinstance(way(), Asked)
            except RequestError as error:
                refused.append(str(error))
    assert taken > 100
    assert not [text for text in refused if "\n" in text or len(text) > 1000]


def test_a_video_model_makes_files_of_clips(bundle: Bundle, tiny_video: Path) -> None:
    video = Bundle.open(tiny_video)
    assert formats(bundle) == ["png"]
    assert formats(video)[:3] == ["gif", "webp", "apng"]
    asked = query(video, "label=0&seed=1")
    assert (asked.kind, asked.fps, asked.content_type) == (".gif", 8.0, "image/gif")
    assert query(video, "label=0&fps=12&format=webp").fps == 12
    with pytest.raises(RequestError, match="format 'png': expected gif, webp"):
        query(video, "label=0&format=png")
    with pytest.raises(RequestError, match="expected 1 to 50 frames per second of a GIF"):
        query(video, "label=0&fps=60")


def test_the_tag_changes_with_everything_that_the_bytes_depend_on(bundle: Bundle) -> None:
    first = query(bundle, "label=0&seed=1")
    others = ["label=1&seed=1", "label=0&seed=2", "label=0&seed=1&guidance=9", "label=0&seed=1&scale=2"]
    tags = {first.tag("a"), first.tag("b"), *(query(bundle, each).tag("a") for each in others)}
    assert len(tags) == 6
    assert first.tag("a") == query(bundle, "seed=1&label=0").tag("a")


def test_the_name_of_a_file_has_nothing_of_a_class_that_a_header_cannot_hold(bundle: Bundle) -> None:
    assert query(bundle, "label=1&seed=3").file_name(bundle) == "goldfish-3.png"
    odd = replace(bundle, class_names=('a"b\r\nc', "\u732b", *"cdef"))
    assert query(odd, "label=0&seed=3").file_name(odd) == "a-b-c-3.png"
    assert query(odd, "label=1&seed=3").file_name(odd) == "1-3.png"
