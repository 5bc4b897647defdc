"""A PNG that an enemy made: ``redo`` and ``edit`` end in one line, quickly, or do what the file says."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image, PngImagePlugin

from par_runtime import Bundle, Pipeline
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.recipe import check, parse
from par_runtime.system import peak_bytes

MUTATIONS = 4000
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, one of them with given tokens, as the command line writes them."""
    path = tmp_path_factory.mktemp("good") / "good.png"
    pipeline = Pipeline.load(tiny, "cpu", threads=1)
    first = pipeline.generate([0, 1, 2, 3], seed=1)
    keep = np.zeros((4, 8, 8), bool)
    keep[1] = True
    pipeline.generate([0, 1, 2, 3], seed=1, keep=keep, tokens=first.tokens).save(path)
    return path


def parts(path: Path) -> tuple[dict[str, Any], Image.Image]:
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text["parvis"]), image.convert("RGB")  # type: ignore[attr-defined]


def write(path: Path, image: Image.Image, text: str, add: str = "add_itxt", **options: Any) -> Path:
    info = PngImagePlugin.PngInfo()
    getattr(info, add)("parvis", text, **options)
    image.save(path, pnginfo=info, compress_level=1)
    return path


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    255,
    2**31,
    2**64,
    -(2**70),
    10**99,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "O",
    "f8",
    "<u4",
    ">u2",
    "object",
    "%s%n",
    ESCAPE,
    "\ud800",
    "\0",
    "x" * 100_000,
    "AAAA",
    "!!!!",
    "A" * 171,
    [],
    [[]],
    {},
    {"a": 1},
    [0] * 100,
    [None] * 1000,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside ``value``."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutated(entry: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """``entry`` with one to three values replaced, dropped, added, doubled or exchanged."""
    out = copy.deepcopy(entry)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        all_places = list(places(out))
        if not all_places:
            return out
        *path, key = rng.choice(all_places)
        inside = out
        for step in path:
            inside = inside[step]
        kind = rng.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(["kept", "pixels", "pasted", "guidance_interval", "x", ESCAPE])] = rng.choice(VALUES)
        elif kind == 2 and isinstance(inside, list):
            inside.extend(copy.deepcopy(inside[:50]) * rng.choice((1, 3)))
        elif kind == 3 and isinstance(inside[key], str) and inside[key]:
            text = inside[key]
            at = rng.randrange(len(text))
            inside[key] = text[:at] + rng.choice(("", "A", "/", "=", "\n", ESCAPE)) + text[at + rng.randrange(3) :]
        elif kind == 4 and isinstance(inside[key], int | float):
            inside[key] = inside[key] * rng.choice((-1, 2, 10**6, 1e300)) + rng.choice((0, 1, -1))
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
    return out


def harmless(work: Callable[[], object], where: Path) -> bool:
    """Run ``work``; whether it was refused, with one short line that no terminal obeys."""
    try:
        work()
    except RequestError as error:
        message = str(error).removeprefix(str(where))
        assert message.isprintable(), message
        assert len(message) < 500, message
        return True
    return False


def test_mutated_entries_are_refused_or_mean_what_they_say(tiny: Path, good: Path) -> None:
    entry, image = parts(good)
    bundle, rng, pixels = Bundle.open(tiny), random.Random(0), np.asarray(image)
    refused = 0
    for i in range(MUTATIONS):
        text = json.dumps(mutated(entry, rng))
        if i % 10 == 0:  # the text itself too
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(("", "[", "}", '"', "\\", "\0", "9" * 5000)) + text[at + rng.randrange(3) :]

        def work(text: str = text) -> None:
            recipe = parse(text, str(good))
            assert recipe.tokens.dtype == np.int64
            assert recipe.tokens.ndim == 2
            check(recipe, bundle, str(good))
            assert recipe.tokens.max() < bundle.vocab_size
            assert max(recipe.labels) < bundle.n_classes
            png.same_pixels(recipe, pixels, (16, 16))

        refused += harmless(work, good)
    assert MUTATIONS * 0.5 < refused < MUTATIONS  # some change nothing that matters, for instance a name


def test_mutated_files_are_refused_or_read(good: Path, tmp_path: Path) -> None:
    data, rng, path = good.read_bytes(), random.Random(1), tmp_path / "a.png"
    for _ in range(400):
        out = bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            del out[rng.randrange(len(out)) :]
        elif kind == 1:
            at = rng.randrange(len(out))
            out[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            for _ in range(rng.choice((1, 1, 5, 50))):
                out[rng.randrange(len(out))] = rng.randrange(256)
        if kind == 3:
            out = mended(out)
        path.write_bytes(out)
        harmless(lambda: png.read_any(path), path)


def mended(data: bytearray) -> bytearray:
    """A PNG whose checksums are right again, so that what was changed is not noticed by them."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(bytes(data[at + 4 : at + 8 + length])))
        at += 12 + length
    return data


def test_the_commands_end_in_one_line(
    tiny: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same through ``redo`` and ``edit``, for some: exit code 2, or what the file says was made."""
    entry, image = parts(good)
    rng, path, out = random.Random(2), tmp_path / "a.png", tmp_path / "out.png"
    for i in range(50):
        try:
            write(path, image, json.dumps(mutated(entry, rng), ensure_ascii=i % 2 == 0))
        except UnicodeEncodeError:  # half a pair of surrogates cannot be written so
            continue
        redo = ("redo", path, "--bundle", tiny, "--quiet", "--threads", 1)
        edit = ("edit", path, "--bundle", tiny, "--which", 0, "--keep", "left", "--out", out, "--quiet", "--threads", 1)
        for arguments in (redo, edit):
            code = run(*arguments)
            printed = capsys.readouterr()
            assert code in (0, 1, 2)
            assert (code == 2) == bool(printed.err), printed
            for text in (printed.out, printed.err):
                assert text.replace("\n", "").isprintable()
                assert text.count("\n") <= 1
                assert len(text) < 600


def change(entry: dict[str, Any], **values: Any) -> str:
    return json.dumps(entry | values)


def change_first(entry: dict[str, Any], **values: Any) -> str:
    first = {**entry["images"][0], **values}
    return json.dumps(entry | {"images": [first, *entry["images"][1:]]})


def change_rounding(entry: dict[str, Any], **values: Any) -> str:
    made_on = entry["made_on"]
    return change(entry, made_on=made_on | {"rounding": made_on["rounding"] | values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda e: change(e, columns="3"), "columns is '3'; expected a whole number 1..65536"),
        (lambda e: change(e, columns=-1), "columns is -1"),
        (lambda e: change(e, columns=0), "columns is 0"),
        (lambda e: change(e, columns=10**60), "columns is an integer of about 61 digits"),
        (lambda e: change(e, token_type="O"), "token_type is 'O'; expected <u2 or <u4"),
        (lambda e: change(e, token_type="f8"), "token_type is 'f8'"),
        (lambda e: change(e, token_type=["<u2", 5]), "token_type is "),
        (lambda e: change(e, images=[]), "images is []; expected a list of one or more"),
        (lambda e: change(e, images={"0": 1}), "images is {'0': 1}; expected a list"),
        (lambda e: change(e, images=[5]), "images[0] is 5; expected an object"),
        (lambda e: change(e, bundle=None), "bundle is None; expected an object"),
        (lambda e: change(e, bundle={"name": "a", "hash": "b" * 2000}), "bundle.hash is 'bbbb"),
        (lambda e: change(e, pasted=1), "pasted is 1; expected true or false"),
        (
            lambda e: change(e, pasted=True, images=[each | {"kept": None} for each in e["images"]]),
            "pasted is true, but no token was given, so there are no pixels to paste",
        ),
        (lambda e: change(e, made_on="a CPU"), "made_on is 'a CPU'; expected an object"),
        (lambda e: change(e, made_on={"backend": "x"}), "made_on has no decoder"),
        (lambda e: change(e, made_on=e["made_on"] | {"backend": "x" * 2000}), "made_on.backend is 'xxxx"),
        (lambda e: change(e, made_on=e["made_on"] | {"rounding": "fp32"}), "made_on.rounding is 'fp32'; expected an"),
        (
            lambda e: change_rounding(e, **{ESCAPE: "fp32"}),
            "made_on.rounding has '\\x1b[2J\\x1b]0;owned\\x07', which this",
        ),
        *[
            (lambda e, name=name: change_rounding(e, **{name: "fp8"}), f"made_on.rounding.{name} is 'fp8'; expected fp")
            for name in ("arithmetic", "cache", "decoder_precision")
        ],
        (lambda e: change_rounding(e, cache=["bf16"]), "made_on.rounding.cache is ['bf16']; expected fp32 or bf16"),
        (lambda e: change_first(e, label="otter"), "images[0].label is 'otter'"),
        (lambda e: change_first(e, label=1.0), "images[0].label is 1.0"),
        (lambda e: change_first(e, label=True), "images[0].label is True"),
        (lambda e: change_first(e, label=6), "it has label 6, the bundle's are 0..5"),
        (lambda e: change_first(e, seed=-1), "images[0].seed is -1; expected a whole number 0..18446744073709551615"),
        (lambda e: change_first(e, seed=2**64), "images[0].seed is 18446744073709551616"),
        (lambda e: change_first(e, name=["a"]), "images[0].name is ['a']; expected a short text"),
        (lambda e: change_first(e, tokens="!"), "images[0].tokens is '!'; expected base64"),
        (lambda e: change_first(e, tokens=""), "images[0].tokens has 0 bytes"),
        (lambda e: change_first(e, tokens="AAAA"), "images[0].tokens has 3 bytes; expected some tokens of 2 each"),
        (lambda e: change_first(e, tokens="AAA="), "images[1] has 64 tokens, images[0] has 1"),
        (lambda e: change_first(e, tokens="AAAAAAA="), "images[0].tokens has 5 bytes"),
        (lambda e: change_first(e, tokens="//8A" * 42 + "//8="), "it has token 65535, the bundle's are 0..63"),
        (lambda e: change_first(e, kept="AA=="), "kept has 8 bits for 64 tokens"),
        (lambda e: change_first(e, kept=None), "kept is there for some images and not for others"),
        (lambda e: change_first(e, pixels=5), "images[0].pixels is 5; expected a short text"),
        (lambda e: change_first(e, settings=[]), "images[0].settings is []; expected an object"),
        (lambda e: change_first(e, settings={}), "images[0].settings has no guidance"),
        *[
            (lambda e, v=values: change_first(e, settings=e["images"][0]["settings"] | v), message)
            for values, message in (
                ({"guidance": "2"}, "images[0].settings.guidance is '2'; expected a number"),
                ({"guidance": -2.0}, "guidance -2.0: expected 0 or more"),
                ({"guidance": float("nan")}, "number NaN; expected a finite one"),
                ({"temperature": float("inf")}, "number Infinity; expected a finite one"),
                ({"temperature": 10**80}, "temperature 1e+80: expected 0 or more"),
                ({"top_k": 1.5}, "images[0].settings.top_k is 1.5; expected a whole number"),
                ({"top_k": 2**80}, "images[0].settings.top_k is 1208925819614629174706176; expected"),
                ({"top_p": 2}, "top_p 2.0: expected 0 to 1"),
                ({"greedy": 1}, "images[0].settings.greedy is 1; expected true or false"),
                ({"guidance_interval": "all"}, "images[0].settings.guidance_interval is 'all'"),
                ({ESCAPE: 1}, "has '\\x1b[2J\\x1b]0;owned\\x07', which this version does not know"),
            )
        ],
        (lambda e: "[" * 10**6, "not valid JSON (nested more than 32 levels deep)"),
        (lambda e: "[" * 10**4 + "]" * 10**4, "not valid JSON (nested more than 32 levels deep)"),
        (lambda e: '{"columns": ' + "9" * 10**5 + "}", "an integer of 100000 digits"),
        (lambda e: "{}", "the entry has no bundle"),
        (lambda e: "5", "the entry is 5; expected an object"),
        (lambda e: "", "not valid JSON"),
        (lambda e: json.dumps("x" * 10**7), "the entry is 'xxxx"),
        (lambda e: json.dumps([1] * 4_000_000), "it is larger than any that parvis writes"),
        (lambda e: change(e, images=e["images"] * 2_500), "its 10000 images had 32x80000"),
        (lambda e: change(e, columns=4), "has 32x32 pixels, its 4 images had 64x16"),
    ],
)
def test_each_fault_has_its_line(
    tiny: Path,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: Callable[[dict[str, Any]], str],
    message: str,
) -> None:
    entry, image = parts(good)
    path = write(tmp_path / "a.png", image, text(entry))
    assert run("redo", path, "--bundle", tiny) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < len(str(path)) + 400
    assert error[:-1].isprintable()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_texts_and_profiles_that_unpack_to_gigabytes(tiny: Path, good: Path, tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    data, path, before = good.read_bytes(), tmp_path / "a.png", peak_bytes()
    for inserted in (
        chunk(b"zTXt", b"parvis\0\0" + packed),
        chunk(b"iTXt", b"parvis\0\1\0\0\0" + packed),
        chunk(b"iCCP", b"x\0\0" + packed),
        chunk(b"zTXt", b"other\0\0" + packed),
    ):
        path.write_bytes(data[:33] + inserted + data[33:])
        harmless(lambda: png.read_any(path), path)
    after = peak_bytes()
    assert before is None or after is None or after - before < 2**28


def test_an_entry_in_another_kind_of_chunk(tiny: Path, good: Path, tmp_path: Path) -> None:
    """tEXt and zTXt hold what iTXt holds."""
    entry, image = parts(good)
    for add, options in (("add_text", {}), ("add_text", {"zip": True}), ("add_itxt", {"zip": True})):
        recipe, _ = png.read(write(tmp_path / "a.png", image, json.dumps(entry), add, **options))
        assert recipe == png.read(good)[0]
