"""What a caller asks for, checked before any work starts: labels, seeds, sampling settings, noise."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import FLOAT32_MAX
from par_runtime.errors import RequestError

SEED_LIMIT = 2**64
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Settings:
    """How one image is sampled. The defaults draw from the whole codebook, without guidance.

    ``guidance`` above 1 runs the image with its class and without: ``uncond + (cond - uncond) * guidance``. ``top_k`` 0
    and ``top_p`` 1 keep every code. ``greedy`` takes the most probable token at every position, whatever else is set.

    ``guidance_interval`` (``cfg_interval`` of the published sampler) ends the guidance early: a call is guided while
    its index is at most this number; -1 guides every call. The index starts at 0 twice: with the first sequential
    call, and with the first call that makes a group (the transition). The very first call is always guided. So 0
    guides the first token and one call of each stage. Calls after the last guided one take half the rows.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    guidance_interval: int = -1

    @property
    def guided(self) -> bool:
        """Whether the image takes two rows, at least in its first calls."""
        return self.guidance > 1


def array(name: str, value: ArrayLike) -> NDArray[Any]:
    """``value`` as an array. Raises RequestError, with ``name``, if its rows have different lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise RequestError(f"{name}: not an array, its rows have different lengths; give rows of one length") from error


def class_index(bundle: Bundle, label: int | str) -> int:
    """The class of ``label``: an index, a name, one of several names that a class has ("goldfish, Carassius auratus"),
    or a WordNet synset. Case, spaces, "-", "_", "." and "'" do not matter. Raises RequestError."""
    count, names = bundle.n_classes, bundle.class_names
    if isinstance(label, str) and bundle.class_synsets is not None and label.strip().lower() in bundle.class_synsets:
        return bundle.class_synsets.index(label.strip().lower())
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        if not 0 <= label < count:
            raise RequestError(f"label {label}: this model has classes 0..{count - 1}")
        return int(label)
    if not isinstance(label, str):
        raise RequestError(f"label {label!r}: expected a class index or name, not a {type(label).__name__}")
    if names is not None:
        wanted = _folded(label)
        known = [
            (name, i) for i, several in enumerate(names) for name in dict.fromkeys((several, *several.split(", ")))
        ]
        folded = [_folded(name) for name, _ in known]
        matching = sorted({i for name, (_, i) in zip(folded, known, strict=True) if name == wanted})
        if len(matching) > 1:  # ImageNet has two cranes
            each = " and ".join(f"{i} ({_distinct_name(bundle, i)})" for i in matching)
            or_synset = "" if bundle.class_synsets is None else " or the synset"
            raise RequestError(f"label {label!r} names classes {each}; give the index{or_synset}")
        if matching:
            return matching[0]
    if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", label):
        return class_index(bundle, int(label))
    if names is None:
        raise RequestError(f"label {label!r}: this bundle has no class names; give an index 0..{count - 1}")
    matches = difflib.get_close_matches(wanted, dict.fromkeys(folded), 4, 0.5)  # each once: ImageNet has two cranes
    close = [known[folded.index(match)][0] for match in matches]
    if close:
        raise RequestError(f"unknown label {label!r}; did you mean {', '.join(close)}? (or an index 0..{count - 1})")
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if count > NAMES_SHOWN else "")
    if count <= 2 * NAMES_SHOWN:
        shown = ", ".join(names)
    raise RequestError(f"unknown label {label!r}; this model has {count} classes: {shown} (or an index 0..{count - 1})")


def _distinct_name(bundle: Bundle, index: int) -> str:
    """The name of a class; with its synset where another class has the same name."""
    assert bundle.class_names is not None
    name = bundle.class_names[index]
    unique = bundle.class_names.count(name) == 1
    return name if unique or bundle.class_synsets is None else f"{name}, {bundle.class_synsets[index]}"


def _folded(name: str) -> str:
    """``name`` without what does not matter: case, spaces, and the characters "-", "_", "." and "'"."""
    spaced = re.sub(r"[-_\s]+", " ", re.sub("[.'\u2019]", "", name)).strip()
    return re.sub(r" ?, ?", ", ", spaced).casefold()


def image_settings(
    bundle: Bundle,
    images: int,
    settings: Settings | Sequence[Settings] | None = None,
    *,
    guidance: float | Sequence[float] | None = None,
    temperature: float | Sequence[float] | None = None,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    greedy: bool | Sequence[bool] = False,
    guidance_interval: int | Sequence[int] | None = None,
) -> list[Settings]:
    """One checked Settings per image, from ``settings`` (one for all images, or one each) or from the keywords.

    A keyword is a scalar for all images, or one value per image; None takes the bundle's default. Raises RequestError.
    """
    if settings is not None:
        keywords = {
            "guidance": guidance,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance_interval": guidance_interval,
        }
        both = [name for name, value in keywords.items() if value is not None] + (
            ["greedy"] if greedy is not False else []
        )
        if both:
            raise RequestError(f"both settings and {both[0]} were given; give one of them")
        each = [settings] * images if isinstance(settings, Settings) else settings
        if not isinstance(each, Sequence) or not all(isinstance(s, Settings) for s in each):
            shown = " ".join(repr(settings).split())
            raise RequestError(f"settings {shown}: expected a Settings, or a list of one Settings per image")
        if len(each) != images:
            raise RequestError(
                f"{len(each)} settings for {images} images; give one Settings, or a list of one per image"
            )
        guidance, temperature = [s.guidance for s in each], [s.temperature for s in each]
        top_k, top_p, greedy = [s.top_k for s in each], [s.top_p for s in each], [s.greedy for s in each]
        guidance_interval = [s.guidance_interval for s in each]
    d = bundle.defaults
    g = _each("guidance", guidance, d.guidance, images, _in_fp32, "0 or more (1 or less: unguided), within fp32")
    t = _each("temperature", temperature, d.temperature, images, _in_fp32, "0 or more, within fp32")
    k = _each(
        "top_k", top_k, d.top_k, images, lambda v: v >= 0 and v == int(v), "a whole number, 0 (all codes) or more"
    )
    p = _each("top_p", top_p, d.top_p, images, lambda v: 0 <= v <= 1, "0 to 1")
    most_probable = _each("greedy", greedy, 0, images, lambda v: v in (0, 1), "True or False")
    interval = _each(
        "guidance_interval",
        guidance_interval,
        d.guidance_interval,
        images,
        lambda v: v >= -1 and v == int(v),
        "a whole number, -1 (every call is guided) or more",
    )
    return [Settings(g[i], t[i], int(k[i]), p[i], bool(most_probable[i]), int(interval[i])) for i in range(images)]


def _each(
    name: str, value: object, default: float, images: int, valid: Callable[[float], bool], expected: str
) -> list[float]:
    given = default if value is None else value.tolist() if isinstance(value, np.ndarray) else value
    values: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given] * images
    if len(values) != images:
        raise RequestError(f"{name}: {len(values)} values for {images} images; give one number, or one per image")
    for v in values:
        if not _is_number(v) or not valid(float(v)):
            raise RequestError(f"{name} {v!r}: expected {expected}")
    return [float(v) for v in values]


def _in_fp32(value: float) -> bool:
    """Guidance and temperature reach the graphs in fp32."""
    return 0 <= value <= FLOAT32_MAX


def _is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number."""
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def first_seed(seed: int | None) -> int:
    """The seed of the first image: ``seed``, or a random one."""
    return int(np.random.default_rng().integers(2**32)) if seed is None else seed


def image_seeds(images: int, seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """One seed per image: ``seeds``, or ``seed``, ``seed + 1``, ...; a random first seed if neither is given.

    Raises RequestError.
    """
    if seed is not None and seeds is not None:
        raise RequestError("both seed and seeds were given; give one of them")
    if seeds is None:
        first = first_seed(seed)
        _check_seed(first)
        seeds = [(int(first) + i) % SEED_LIMIT for i in range(images)]
    if not isinstance(seeds, Iterable):
        raise RequestError(f"seeds {seeds!r}: expected one per image; seed= gives that of the first image")
    seeds = list(seeds)
    if len(seeds) != images:
        raise RequestError(f"{len(seeds)} seeds for {images} images; give one per image, or seed= for the first")
    for value in seeds:
        _check_seed(value)
    return [int(value) for value in seeds]


def _check_seed(seed: int) -> None:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < SEED_LIMIT:
        raise RequestError(f"seed {seed!r}: expected a whole number 0 .. 2**64-1")


def check_threads(threads: int | None) -> None:
    """Raise RequestError where ``threads``, a number of CPU threads, is given and below 1."""
    if threads is not None and threads < 1:
        raise RequestError(f"threads {threads}: expected 1 or more")
