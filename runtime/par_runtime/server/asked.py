"""What a request over HTTP asks for, checked before any work: in the address, or as JSON in OpenAI's form."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from par_runtime.arguments import either, given, whole
from par_runtime.bundle import Bundle
from par_runtime.checked import load_json, shown
from par_runtime.clips import mp4
from par_runtime.clips.formats import DEFAULT_FPS, check_clips, check_fps
from par_runtime.errors import RequestError, how_to_install
from par_runtime.images import png
from par_runtime.images.recipe import MOST_SCALE
from par_runtime.request import Settings, class_index, image_seeds, image_settings

MOST_IMAGES = 32  #: of a request; its images lie in memory until the last one is made
MOST_PIXELS = 2**23  #: of all of them, as they are sent: 32 images of 512x512; as an MP4 they take seconds
SAMPLING = tuple(field.name for field in fields(Settings))
OF_A_FILE = ("format", "scale", "fps")
#: ending -> content type
TYPES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".apng": "image/apng",
    ".mp4": "video/mp4",
}
OPENAI = ("model", "prompt", "n", "size", "response_format", "output_format", "user")
#: Entries of OpenAI's form that say nothing here, and the values with which they ask for nothing.
WITHOUT_MEANING: Mapping[str, tuple[Any, ...]] = {
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_compression": (100,),
    "partial_images": (0,),
    "quality": ("auto", "standard"),
    "stream": (False,),
    "style": ("vivid", "natural"),
}


@dataclass(frozen=True)
class Asked:
    """Images of one class, image i with the seed ``seeds[i]``, each as a file of the kind ``kind`` (".png").

    ``again``: the seed was given, so the same request gives the same images.
    """

    label: int
    settings: Settings
    seeds: tuple[int, ...]
    again: bool
    kind: str
    scale: int = 1
    fps: float | None = None

    @property
    def content_type(self) -> str:
        """Of a file, as HTTP names it."""
        return TYPES[self.kind]

    def file_name(self, bundle: Bundle) -> str:
        """A name for the first image: "micah-7.png"."""
        names = bundle.class_names
        name = str(self.label) if names is None else names[self.label].partition(",")[0]
        safe = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or str(self.label)
        return f"{safe[:60]}-{self.seeds[0]}{self.kind}"

    def tag(self, made_on: object) -> str:
        """A name for the bytes of the answer, for a browser's cache. ``made_on``: the bundle, and what computes."""
        about = json.dumps([repr(made_on), asdict(self)], sort_keys=True)
        return f'"{hashlib.sha256(about.encode()).hexdigest()[:32]}"'


def of_query(bundle: Bundle, pairs: Sequence[tuple[str, str]]) -> Asked:
    """One image, of the names and values of an address: "label=micah&seed=7". Raises RequestError."""
    _check_names([name for name, _ in pairs], ("label", "seed", *SAMPLING, *OF_A_FILE), "the address")
    values: dict[str, Any] = {name: text if name in ("label", "format") else _value(text) for name, text in pairs}
    if values.get("greedy", 0) not in (0, 1):
        raise RequestError(f"greedy {given(values['greedy'])}: expected true or false")
    if "label" not in values:
        raise RequestError("no label; expected one, for instance ?label=0 (/v1/labels lists them)")
    values["format"] = _format(bundle, "format", values.get("format"))
    return _asked(bundle, values, values["label"], 1)


def of_json(bundle: Bundle, name: str, body: bytes) -> Asked:
    """Images of a request in the form of OpenAI's /v1/images/generations. ``name``: of the model that is served.

    Raises RequestError.
    """
    entries = load_json(body, "the body", RequestError)
    if not isinstance(entries, dict):
        raise RequestError(f'the body is {shown(entries)}; expected an object, for instance {{"prompt": "0"}}')
    known = (*OPENAI, "label", "seed", "fps", *SAMPLING)
    _check_names(list(entries), (*known, *WITHOUT_MEANING), "the body")
    values = {entry: value for entry, value in entries.items() if value is not None}
    for entry, allowed in WITHOUT_MEANING.items():
        if entry in values and not any(values[entry] == each and type(values[entry]) is type(each) for each in allowed):
            raise RequestError(f"{entry} {shown_json(values[entry])}: not supported here; leave it out")
    if values.get("model", name) != name:
        raise RequestError(f"model {given(values['model'])}: this server has {shown(name)} alone")
    if ("label" in values) == ("prompt" in values):
        both = "both prompt and label were given; give one of them" if "label" in values else "no prompt"
        raise RequestError(f'{both}: a class, for instance "0" (/v1/labels lists them)')
    if values.get("response_format", "b64_json") != "b64_json":
        raise RequestError(f"response_format {given(values['response_format'])}: expected b64_json, the only one here")
    if "greedy" in values and type(values["greedy"]) is not bool:
        raise RequestError(f"greedy {shown_json(values['greedy'])}: expected true or false")
    for entry in (*SAMPLING, "prompt", "label", "n", "seed", "fps"):
        if isinstance(values.get(entry), list | dict):
            raise RequestError(f"{entry} {given(values[entry])}: expected one value")
    values["scale"] = _scale(bundle, values.pop("size", "auto"))
    values["format"] = _format(bundle, "output_format", values.get("output_format"))
    count = whole("n", values.get("n", 1), 1, MOST_IMAGES)
    return _asked(bundle, values, values.get("label", values.get("prompt")), count)


def _check_names(names: Sequence[str], known: Collection[str], where: str) -> None:
    """Raise RequestError for a name that is not ``known``, or is there twice."""
    for name, count in Counter(names).items():
        if name not in known:
            close = difflib.get_close_matches(name[:100], known, 1, 0.7)
            mean = f"did you mean {close[0]}?" if close else f"expected {', '.join(sorted(known))}"
            raise RequestError(f"{where} has {shown(name, 60)}, which means nothing here; {mean}")
        if count > 1:
            raise RequestError(f"{where} has {name} {count} times; give it once")


def _value(text: str) -> Any:
    """The number or truth value that ``text`` is, else the text, which the check of its name then refuses."""
    if re.fullmatch(r"-?[0-9]{1,40}", text, re.ASCII):
        return int(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = len(text) <= 60 and re.fullmatch(
        r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|-?inf", text.lower(), re.ASCII
    )
    return float(text) if number else text


def _scale(bundle: Bundle, size: Any) -> int:
    """How many times as large as the bundle's images those of ``size`` ("128x128", "auto") are. Raises RequestError."""
    if size == "auto":
        return 1
    height, width = bundle.image_size or (1, 1)
    match = re.fullmatch("([0-9]{1,6})x([0-9]{1,6})", size, re.ASCII) if isinstance(size, str) else None
    scale = int(match[1]) // width if match else 0
    if (
        match is None
        or not 1 <= scale <= MOST_SCALE
        or (int(match[1]), int(match[2])) != (scale * width, scale * height)
    ):
        raise RequestError(
            f"size {given(size)}: expected auto or {width}x{height}, the size of this model, or a whole multiple of "
            f"it, up to {MOST_SCALE * width}x{MOST_SCALE * height}"
        )
    return scale


def _asked(bundle: Bundle, values: Mapping[str, Any], label: Any, count: int) -> Asked:
    """What checked names and their values ask for. Raises RequestError."""
    index = class_index(bundle, label)
    (settings,) = image_settings(bundle, 1, **{name: values[name] for name in SAMPLING if name in values})
    seed = values.get("seed")
    seeds = image_seeds(count, seed, None)
    kind, scale, fps = _file(bundle, values)
    height, width = (scale * side for side in bundle.image_size or (1, 1))
    if (pixels := count * bundle.frames * height * width) > MOST_PIXELS:
        raise RequestError(
            f"{count} x {bundle.frames} x {height} x {width} is {pixels} pixels; expected at most {MOST_PIXELS} of a "
            "request: ask for fewer or smaller images"
        )
    return Asked(index, settings, tuple(seeds), seed is not None, kind, scale, fps)


def _file(bundle: Bundle, values: Mapping[str, Any]) -> tuple[str, int, float | None]:
    """The ending, the scale and the frames per second of a file. Raises RequestError."""
    kind, scale = f".{values['format']}", values.get("scale", 1)
    png.check_scale(scale)
    size = bundle.image_size or (1, 1)
    if not bundle.video:
        if "fps" in values:
            raise RequestError(f"fps {given(values['fps'])}: this model makes images, not clips; leave it out")
        png.check_sheet(1, 1, (size[0] * scale, size[1] * scale))
        return kind, scale, None
    path = Path(f"x{kind}")
    fps = check_fps(values.get("fps", DEFAULT_FPS), path)
    check_clips(path, 1, 1, bundle.frames, size, scale)
    return kind, scale, fps


def _format(bundle: Bundle, name: str, value: Any) -> str:
    """The kind of file that ``value`` of the entry ``name`` says, or the default. Raises RequestError."""
    kinds = formats(bundle)
    if value is not None and value not in kinds:
        install = (
            "" if value != "mp4" or not bundle.video else f" (mp4 needs PyAV on the server; {how_to_install('video')})"
        )
        raise RequestError(f"{name} {given(value)}: expected {either(kinds)}{install}")
    return value or kinds[0]


def shown_json(value: Any) -> str:
    """A value of the body for a message, as JSON writes it."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else given(value)


def formats(bundle: Bundle) -> list[str]:
    """The kinds of file that images or clips of ``bundle`` can be here; the first one is the default."""
    if not bundle.video:
        return ["png"]
    return ["gif", "webp", "apng", *(["mp4"] if _has_mp4() else [])]


@cache
def _has_mp4() -> bool:
    """Whether MP4 can be written. It is asked once: the import takes long, and looking for what is not there too."""
    try:
        mp4.library()
    except RequestError:
        return False
    return True
