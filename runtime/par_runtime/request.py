"""What a caller asks for, checked before any work starts: labels, seeds, sampling settings, noise."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.random import default_rng
from numpy.typing import ArrayLike, NDArray

from par_runtime.arguments import MOST_OF_A_REQUEST as MOST_OF_A_REQUEST
from par_runtime.arguments import as_index, check_unmasked, entries_of, given, number, plain, truth, whole
from par_runtime.bundle import Bundle
from par_runtime.checked import shown
from par_runtime.dtypes import FLOAT32_MAX, MOST_GUIDANCE, ByValue
from par_runtime.errors import RequestError

SEED_LIMIT = 2**64
NAMES_SHOWN, NAME_SHOWN = 8, 100  #: of classes in a message, and characters of each
NAMES_COMPARED = 50_000  #: with an unknown label, which takes a second
CLOSE = 0.7  #: difflib's ratio of two names from which on one may be a misspelling of the other: oter and otter
MOST_CODES = 2**63 - 1  #: top_k reaches the graphs as int64
MOST_OF_A_COMMAND = 100_000  #: images, of the command line: all are held in memory until they are written


@dataclass(frozen=True, eq=False)
class Settings(ByValue):
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


def in_words(settings: Settings) -> str:
    """For instance "guidance 1.5, temperature 1, top-k 0, top-p 0.8"."""
    s = settings
    drawn = "greedy" if s.greedy else f"temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}"
    interval = "" if s.guidance_interval < 0 else f" to call {s.guidance_interval}"
    return f"guidance {s.guidance:g}{interval}, {drawn}"


def array(name: str, value: ArrayLike) -> NDArray[Any]:
    """``value`` as an array. Raises RequestError, with ``name``, where it is none: rows of different lengths, or an
    object that numpy cannot read. A series that is longer than any request is not read: a range takes no memory, nor
    does an array that repeats one number, but what is made of them does.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    first, *_ = (len(value),) if is_list else (*getattr(value, "shape", ()), 0)  # type: ignore[arg-type]
    if first > MOST_OF_A_REQUEST:
        raise RequestError(f"{name}: {first} entries; expected at most {MOST_OF_A_REQUEST}")
    check_unmasked(name, value)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise RequestError(f"{name}: not an array, its rows have different lengths; give rows of one length") from error
    except (TypeError, OverflowError, RuntimeError) as error:
        raise RequestError(f"{name}: cannot be read as an array ({shown(str(error), 200)[1:-1]})") from error


def several(name: str, value: object, most: int = MOST_OF_A_REQUEST) -> list[Any] | None:
    """The entries of a list, an array or any other series of values; None where ``value`` is a single one.

    Raises RequestError where there are more than ``most``, or where they have no order (a set, a mapping).
    """
    if isinstance(value, (Mapping, Set)):
        raise RequestError(f"{name} {given(value)}: expected a list, not a {type(value).__name__}: it has no order")
    if isinstance(value, (str, bytes, bytearray)):
        return None
    check_unmasked(name, value)
    if entries_of(value) > most:  # before a list is made of it
        shape = tuple(value.shape)  # type: ignore[attr-defined]
        raise RequestError(f"{name}: an array of shape {shape}; expected at most one value for each image, and {most}")
    value = plain(value)
    if not isinstance(value, Iterable) or getattr(value, "ndim", None) == 0:
        return None
    entries = list(islice(value, most + 1))
    if len(entries) > most:
        raise RequestError(f"{name}: more than {most} values; expected at most one for each image, and {most} images")
    return entries


def classes(bundle: Bundle) -> list[dict[str, int | str | None]]:
    """Index, name and WordNet synset of every class; None where the bundle has no names or no synsets."""
    names, synsets = bundle.class_names, bundle.class_synsets
    return [
        {
            "index": i,
            "name": None if names is None else names[i],
            "synset": None if synsets is None else synsets[i],
        }
        for i in range(bundle.n_classes)
    ]


def class_indices(bundle: Bundle, labels: Any) -> list[int]:
    """The classes of ``labels``, which is one label or a list of one per image. Raises RequestError."""
    entries = several("labels", labels)
    return [class_index(bundle, label) for label in ([plain(labels)] if entries is None else entries)]


def class_index(bundle: Bundle, label: int | str) -> int:
    """The class of ``label``: an index, a name, one of several names that a class has ("goldfish, Carassius auratus"),
    or a WordNet synset. Case, spaces, "-", "_", "." and "'" do not matter. Raises RequestError."""
    count, names = bundle.n_classes, bundle.class_names
    if isinstance(label, str) and bundle.class_synsets is not None and label.strip().lower() in bundle.class_synsets:
        return bundle.class_synsets.index(label.strip().lower())
    index = as_index(label)
    if index is not None:
        if not 0 <= index < count:
            raise RequestError(f"label {given(label)}: this model has classes 0..{count - 1}")
        return index
    if not isinstance(label, str):
        raise RequestError(f"label {given(label)}: expected a class index or name, not a {type(label).__name__}")
    if names is not None:
        wanted = _folded(label)
        known = [
            (name, i) for i, several in enumerate(names) for name in dict.fromkeys((several, *several.split(", ")))
        ]
        folded = [_folded(name) for name, _ in known]
        matching = sorted({i for name, (_, i) in zip(folded, known, strict=True) if name == wanted})
        if len(matching) > 1:  # ImageNet has two cranes
            more = f" and {len(matching) - NAMES_SHOWN} more" if len(matching) > NAMES_SHOWN else ""
            each = " and ".join(f"{i} ({_distinct_name(bundle, i)})" for i in matching[:NAMES_SHOWN]) + more
            or_synset = "" if bundle.class_synsets is None else " or the synset"
            raise RequestError(f"label {given(label)} names classes {each}; give the index{or_synset}")
        if matching:
            return matching[0]
    if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", label):
        return class_index(bundle, int(label))
    if names is None:
        raise RequestError(f"label {given(label)}: this bundle has no class names; give an index 0..{count - 1}")
    several = dict.fromkeys(folded[:NAMES_COMPARED])  # each once: ImageNet has two cranes
    close = [_cut(known[folded.index(match)][0]) for match in difflib.get_close_matches(wanted, several, 4, CLOSE)]
    if close:
        raise RequestError(
            f"unknown label {given(label)}; did you mean {', '.join(close)}? (or an index 0..{count - 1})"
        )
    most = count if count <= 2 * NAMES_SHOWN else NAMES_SHOWN
    first = ", ".join(map(_cut, names[:most])) + (", ..." if count > most else "")
    raise RequestError(
        f"unknown label {given(label)}; this model has {count} classes: {first} (or an index 0..{count - 1})"
    )


def _distinct_name(bundle: Bundle, index: int) -> str:
    """The name of a class; with its synset where another class has the same name."""
    assert bundle.class_names is not None
    name = bundle.class_names[index]
    unique = bundle.class_names.count(name) == 1
    return _cut(name) if unique or bundle.class_synsets is None else f"{_cut(name)}, {bundle.class_synsets[index]}"


def _cut(name: str) -> str:
    """The name of a class for a message."""
    return name if len(name) <= NAME_SHOWN else name[: NAME_SHOWN - 3] + "..."


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
        keywords: dict[str, object] = {
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
        each = [settings] * images if isinstance(settings, Settings) else several("settings", settings)
        if each is None or not all(isinstance(s, Settings) for s in each):
            raise RequestError(f"settings {given(settings)}: expected a Settings, or a list of one Settings per image")
        if len(each) != images:
            raise RequestError(
                f"{len(each)} settings for {images} images; give one Settings, or a list of one per image"
            )
        guidance, temperature = [s.guidance for s in each], [s.temperature for s in each]
        top_k, top_p, greedy = [s.top_k for s in each], [s.top_p for s in each], [s.greedy for s in each]
        guidance_interval = [s.guidance_interval for s in each]
    d = bundle.defaults
    g = _each("guidance", guidance, d.guidance, images, _guidance)
    t = _each("temperature", temperature, d.temperature, images, _temperature)
    k = _each("top_k", top_k, d.top_k, images, _top_k)
    p = _each("top_p", top_p, d.top_p, images, lambda name, v: number(name, v, 0, 1, "0 to 1"))
    most_probable = _each("greedy", greedy, False, images, truth)
    interval = _each("guidance_interval", guidance_interval, d.guidance_interval, images, _interval)
    return [Settings(*each) for each in zip(g, t, k, p, most_probable, interval, strict=True)]


def _each(name: str, value: object, default: object, images: int, checked: Callable[[str, Any], Any]) -> list[Any]:
    """One value per image, each as ``checked(name, value)`` returns it."""
    check_unmasked(name, value)
    value = plain(default if value is None else value)
    values = several(name, value)
    if values is None:
        return [checked(name, value)] * images
    if len(values) != images:
        raise RequestError(f"{name}: {len(values)} values for {images} images; give one number, or one per image")
    return [checked(name, each) for each in values]


def _guidance(name: str, value: Any) -> float:
    return number(name, value, 0, MOST_GUIDANCE, f"0 or more (1 or less: unguided), up to {MOST_GUIDANCE:g}")


def _temperature(name: str, value: Any) -> float:
    return number(name, value, 0, FLOAT32_MAX, "0 or more, within fp32")


def _top_k(name: str, value: Any) -> int:
    return _integral(name, value, 0, MOST_CODES, f"a whole number, 0 (all codes) or more, up to {MOST_CODES}")


def _interval(name: str, value: Any) -> int:
    return _integral(name, value, -1, MOST_CODES, "a whole number, -1 (every call is guided) or more")


def _integral(name: str, value: Any, least: int, most: int, expected: str) -> int:
    """A whole number, which may also be given as a float."""
    shown_value = value
    if not hasattr(type(value), "__index__"):
        as_float = number(name, value, least, most, expected)
        value = int(as_float) if as_float.is_integer() else None
    try:
        return whole(name, value, least, most)
    except RequestError:
        raise RequestError(f"{name} {given(shown_value)}: expected {expected}") from None


def first_seed(seed: int | None) -> int:
    """The seed of the first image: ``seed``, or a random one. Raises RequestError."""
    return int(default_rng().integers(2**32)) if seed is None else _seed(seed)


def image_seeds(images: int, seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """One seed per image: ``seeds``, or ``seed``, ``seed + 1``, ... (0 follows the largest, 2**64-1).

    If neither is given, the first one is random. Raises RequestError.
    """
    if seed is not None and seeds is not None:
        raise RequestError("both seed and seeds were given; give one of them")
    if seeds is None:
        first = first_seed(seed)
        return [(first + i) % SEED_LIMIT for i in range(images)]
    entries = several("seeds", seeds)
    if entries is None:
        raise RequestError(f"seeds {given(seeds)}: expected one per image; seed= gives that of the first image")
    if len(entries) != images:
        raise RequestError(f"{len(entries)} seeds for {images} images; give one per image, or seed= for the first")
    return [_seed(value) for value in entries]


def _seed(seed: Any) -> int:
    try:
        return whole("seed", seed, 0, SEED_LIMIT - 1)
    except RequestError:
        raise RequestError(f"seed {given(seed)}: expected a whole number 0 .. 2**64-1") from None
