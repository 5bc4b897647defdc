"""What a PNG of parvis says about its images: the entry, checked against one schema before anything uses it.

The entry is JSON: the version of parvis, the name and hash of the bundle, the columns of the sheet, and per image
label, seed, settings, tokens (base64 of little-endian uint16, or uint32 for codebooks beyond 65,536; sequence order)
and the hash of its pixels. For an edited image also which tokens were given ("kept": base64 of packed bits), and
whether the kept pixels of the sheet are the original's ("pasted"); "scale" where the sheet was enlarged. Files of clips
have "clip" too: frames per second, and frames of each clip. "made_on" is what computed it: backend, decoder, and on a
CPU what they rounded to. It may come from anybody, so nothing in it is believed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.bundle import Bundle
from par_runtime.checked import load_json, shown
from par_runtime.dtypes import ARITHMETICS, CACHES, DECODER_PRECISIONS, ByValue, Int
from par_runtime.errors import RequestError
from par_runtime.request import SEED_LIMIT, Settings, image_settings

TOKEN_TYPES = ("<u2", "<u4")
#: Pillow reads no longer texts. One image takes about 1 kB.
MOST_TEXT_BYTES = 64 * 2**20
MOST_VALUES = 3_000_000  #: in the whole entry; an image has about 12
MOST_TOKENS = 2**24  #: of one image
MOST_COLUMNS = 2**16
MOST_SCALE = 64  #: of a sheet that is enlarged
MOST_FRAMES = 2**16  #: of a clip
MOST_FPS = 60
#: Settings of the first version. Later ones are written only where they differ from their default, so that older and
#: newer files of the same request are the same.
FIRST_SETTINGS = ("guidance", "temperature", "top_k", "top_p", "greedy")


@dataclass(frozen=True)
class MadeOn:
    """What computed images, as far as it has a name: two CPUs may be one to ONNX Runtime, and so may two GPUs."""

    backend: str  #: runtime, version, variant
    decoder: str  #: the same of what made the pixels; "" where a bundle ends at tokens
    rounding: Mapping[str, str] = field(default_factory=dict)  #: of a CPU, by names of ``dtypes.Rounding``


@dataclass(frozen=True, eq=False)
class Recipe(ByValue):
    """What the metadata of a PNG contains about its images."""

    bundle_name: str
    bundle_hash: str
    columns: int
    labels: list[int]
    names: list[str | None]  #: of the classes; None where the bundle has none
    seeds: list[int]
    settings: list[Settings]
    tokens: Int  #: [B,N] in sequence order
    kept: NDArray[np.bool_] | None = None  #: [B,N]: tokens that were given, not drawn
    pasted: bool = False  #: kept pixels are those of the original, not decoded ones
    pixel_hashes: list[str] | None = None  #: of the images' pixels as they were written; None in older files

    scale: int = 1  #: by which the sheet was enlarged when it was written, each pixel as a square
    fps: float | None = None  #: of clips, frames per second; None for images
    frames: int = 1  #: of each clip
    made_on: MadeOn | None = None  #: None in older files

    def __len__(self) -> int:
        return len(self.labels)

    def class_of(self, i: int, bundle: Bundle) -> int | None:
        """The class of image ``i`` in ``bundle``: of another bundle than its own the one class of the same name, if
        there is one."""
        if bundle.hash == self.bundle_hash:
            return self.labels[i]
        same = [index for index, name in enumerate(bundle.class_names or ()) if name == self.names[i]]
        return same[0] if len(same) == 1 else None

    @property
    def given(self) -> int:
        """How many tokens of all images were given."""
        return 0 if self.kept is None else int(self.kept.sum())


def pixel_hash(pixels: NDArray[np.uint8]) -> str:
    """What tells the pixels [H,W,3] of one image, or [T,H,W,3] of one clip, from others: 32 hexadecimal digits."""
    *frames, height, width, _ = pixels.shape
    size = "x".join(map(str, (*frames, width, height)))
    return hashlib.sha256(size.encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:32]


def entry(recipe: Recipe) -> dict[str, Any]:
    """The JSON of ``recipe``."""
    token_type = "<u2" if recipe.tokens.max(initial=0) < 65536 else "<u4"
    return {
        "parvis": __version__,
        "bundle": {"name": recipe.bundle_name, "hash": recipe.bundle_hash},
        "columns": recipe.columns,
        "token_type": token_type,
        "images": [
            {
                "label": recipe.labels[i],
                "name": recipe.names[i],
                "seed": recipe.seeds[i],
                "settings": _settings_entry(recipe.settings[i]),
                "tokens": base64.b64encode(recipe.tokens[i].astype(token_type).tobytes()).decode(),
                **({} if recipe.kept is None else {"kept": _pack_bits(recipe.kept[i])}),
                **({} if recipe.pixel_hashes is None else {"pixels": recipe.pixel_hashes[i]}),
            }
            for i in range(len(recipe))
        ],
        **({"pasted": True} if recipe.pasted else {}),
        **({"scale": recipe.scale} if recipe.scale != 1 else {}),
        **({} if recipe.fps is None else {"clip": {"fps": recipe.fps, "frames": recipe.frames}}),
        **({} if recipe.made_on is None else {"made_on": _made_on_entry(recipe.made_on)}),
    }


def parse(text: str, where: str) -> Recipe:
    """The recipe of an entry. ``where`` names the file. Raises RequestError where anything in it is not of the schema.

    What only a bundle can tell is left to :func:`check`.
    """
    fault = f"{where}: its 'parvis' entry cannot be read"
    if len(text) > MOST_TEXT_BYTES or sum(map(text.count, ",[{")) > MOST_VALUES:
        raise RequestError(f"{fault} (it is larger than any that parvis writes); give an undamaged copy")
    value = load_json(text, fault, RequestError)
    try:
        return _recipe(value)
    except _DamageError as error:
        raise RequestError(
            f"{fault} ({error}); it is damaged, or comes from another version: give an undamaged copy"
        ) from None


def check(recipe: Recipe, bundle: Bundle, where: str) -> None:
    """Raise RequestError where ``bundle``, which has the recipe's hash, cannot have made it."""
    damaged = f"{where}: its 'parvis' entry is damaged"
    if recipe.tokens.shape[1] != bundle.n_tokens:
        raise RequestError(
            f"{damaged}: it has {recipe.tokens.shape[1]} tokens per image, the bundle makes {bundle.n_tokens}; give an "
            "undamaged copy"
        )
    made = (bundle.frames if bundle.video else 1, bundle.video)
    if (recipe.frames, recipe.fps is not None) != made:
        kinds = [
            f"clips of {frames} frames" if clips else "images"
            for frames, clips in ((recipe.frames, recipe.fps is not None), made)
        ]
        raise RequestError(f"{damaged}: it is of {kinds[0]}, the bundle makes {kinds[1]}; give an undamaged copy")
    for what, most, limit in (
        ("token", int(recipe.tokens.max(initial=0)), bundle.vocab_size),
        ("label", max(recipe.labels), bundle.n_classes),
    ):
        if most >= limit:
            raise RequestError(
                f"{damaged}: it has {what} {most}, the bundle's are 0..{limit - 1}; give an undamaged copy"
            )
    try:
        image_settings(bundle, len(recipe), recipe.settings)
    except RequestError as error:
        raise RequestError(f"{damaged}: {error}; give an undamaged copy") from None


# -- the schema -------------------------------------------------------------------------------------------------------


class _DamageError(Exception):
    """What is wrong with an entry."""


def _recipe(value: Any) -> Recipe:
    top = _object(value, "the entry")
    bundle = _object(_get(top, "bundle", "the entry"), "bundle")
    token_type = _get(top, "token_type", "the entry")
    if token_type not in TOKEN_TYPES:
        raise _DamageError(f"token_type is {shown(token_type)}; expected {' or '.join(TOKEN_TYPES)}")
    clip = None if top.get("clip") is None else _object(top["clip"], "clip")
    images = _get(top, "images", "the entry")
    if not isinstance(images, list) or not images:
        raise _DamageError(f"images is {shown(images)}; expected a list of one or more")
    made = [_image(each, f"images[{i}]", token_type) for i, each in enumerate(images)]
    n = len(made[0]["tokens"])
    for i, each in enumerate(made):
        if len(each["tokens"]) != n:
            raise _DamageError(f"images[{i}] has {len(each['tokens'])} tokens, images[0] has {n}; expected as many")
        for key in ("kept", "pixels"):
            if (each[key] is None) != (made[0][key] is None):
                raise _DamageError(f"{key} is there for some images and not for others")
    kept = None if made[0]["kept"] is None else np.stack([_unpack_bits(each["kept"], n) for each in made])
    pasted = _truth(top.get("pasted", False), "pasted")
    if pasted and (kept is None or not kept.any()):
        raise _DamageError("pasted is true, but no token was given, so there are no pixels to paste")
    return Recipe(
        bundle_name=_text(_get(bundle, "name", "bundle"), "bundle.name"),
        bundle_hash=_text(_get(bundle, "hash", "bundle"), "bundle.hash"),
        columns=_whole(_get(top, "columns", "the entry"), "columns", 1, MOST_COLUMNS),
        labels=[each["label"] for each in made],
        names=[each["name"] for each in made],
        seeds=[each["seed"] for each in made],
        settings=[each["settings"] for each in made],
        tokens=np.stack([each["tokens"] for each in made]).astype(np.int64),
        kept=kept,
        pasted=pasted,
        scale=_whole(top.get("scale", 1), "scale", 1, MOST_SCALE),
        pixel_hashes=None if made[0]["pixels"] is None else [each["pixels"] for each in made],
        fps=None if clip is None else _fps(_get(clip, "fps", "clip")),
        frames=1 if clip is None else _whole(_get(clip, "frames", "clip"), "clip.frames", 1, MOST_FRAMES),
        made_on=None if top.get("made_on") is None else _made_on(_object(top["made_on"], "made_on")),
    )


def _made_on_entry(made_on: MadeOn) -> dict[str, Any]:
    rounding = {"rounding": dict(made_on.rounding)} if made_on.rounding else {}
    return {"backend": made_on.backend, "decoder": made_on.decoder} | rounding


def _made_on(value: dict[str, Any]) -> MadeOn:
    backend, decoder = (_text(_get(value, name, "made_on"), f"made_on.{name}") for name in ("backend", "decoder"))
    where = "made_on.rounding"
    given = _object(value.get("rounding", {}), where)
    known = {"arithmetic": ARITHMETICS, "cache": CACHES, "decoder_precision": DECODER_PRECISIONS}
    for name, each in given.items():
        if name not in known:
            raise _DamageError(f"{where} has {shown(name, 40)}, which this version does not know")
        if each not in known[name]:
            raise _DamageError(f"{where}.{name} is {shown(each)}; expected {' or '.join(known[name])}")
    return MadeOn(backend, decoder, given)


def _fps(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value <= MOST_FPS:
        raise _DamageError(f"clip.fps is {shown(value)}; expected a number 1..{MOST_FPS}")
    return float(value)


def _image(value: Any, where: str, token_type: str) -> dict[str, Any]:
    """One of the images, its values checked and of their own types."""
    image = _object(value, where)
    data = _base64(_get(image, "tokens", where), f"{where}.tokens")
    size = np.dtype(token_type).itemsize
    if not 0 < len(data) // size <= MOST_TOKENS or len(data) % size:
        raise _DamageError(f"{where}.tokens has {len(data)} bytes; expected some tokens of {size} each")
    name, kept, pixels = image.get("name"), image.get("kept"), image.get("pixels")
    return {
        "label": _whole(_get(image, "label", where), f"{where}.label", 0, 2**31 - 1),
        "name": None if name is None else _text(name, f"{where}.name"),
        "seed": _whole(_get(image, "seed", where), f"{where}.seed", 0, SEED_LIMIT - 1),
        "settings": _settings(_get(image, "settings", where), f"{where}.settings"),
        "tokens": np.frombuffer(data, token_type),
        "kept": None if kept is None else _base64(kept, f"{where}.kept"),
        "pixels": None if pixels is None else _text(pixels, f"{where}.pixels"),
    }


def _settings(value: Any, where: str) -> Settings:
    """The settings of one image."""
    given = _object(value, where)
    known = {field.name: field.default for field in fields(Settings)}
    for name in given:
        if name not in known:
            raise _DamageError(f"{where} has {shown(name, 40)}, which this version does not know")
    for name in FIRST_SETTINGS:
        _get(given, name, where)
    for name, each in given.items():
        default = known[name]
        if default is MISSING or isinstance(default, bool):
            _truth(each, f"{where}.{name}")
        elif isinstance(default, int):
            _whole(each, f"{where}.{name}", -(2**63), 2**63 - 1)
        elif isinstance(each, bool) or not isinstance(each, int | float):
            raise _DamageError(f"{where}.{name} is {shown(each)}; expected a number")
    values: dict[str, Any] = {name: float(v) if isinstance(known[name], float) else v for name, v in given.items()}
    return Settings(**values)


def _settings_entry(settings: Settings) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(Settings)}
    return {k: v for k, v in asdict(settings).items() if k in FIRST_SETTINGS or v != defaults[k]}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _DamageError(f"{where} is {shown(value)}; expected an object")
    return value


def _get(values: dict[str, Any], key: str, where: str) -> Any:
    if key not in values:
        raise _DamageError(f"{where} has no {key}")
    return values[key]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise _DamageError(f"{where} is {shown(value)}; expected a short text")
    return value


def _whole(value: Any, where: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _DamageError(f"{where} is {shown(value)}; expected a whole number {least}..{most}")
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _DamageError(f"{where} is {shown(value)}; expected true or false")
    return value


def _base64(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise _DamageError(f"{where} is {shown(value)}; expected base64")
    try:
        return base64.b64decode(value.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _DamageError(f"{where} is {shown(value, 40)}; expected base64") from None


def _pack_bits(bits: NDArray[np.bool_]) -> str:
    """``bits`` as base64, eight of them a byte."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _unpack_bits(data: bytes, count: int) -> NDArray[np.bool_]:
    """The ``count`` bits that _pack_bits wrote."""
    if len(data) != -(-count // 8):
        raise _DamageError(f"kept has {8 * len(data)} bits for {count} tokens")
    return np.unpackbits(np.frombuffer(data, np.uint8))[:count].astype(bool)
