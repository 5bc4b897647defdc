"""The configurations that the manifest of a bundle describes. No torch here.

A manifest holds what an architecture results in (the order of the tokens, the calls of every phase), not the options
of :class:`PARConfig` that it results from. ``order`` and ``sequential_initial`` are therefore searched for: the first
combination, defaults first, that results in exactly this manifest. ``causal_groups`` is not searched for, because no
bundle is exported with it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from par_model.config import ORDERS, PARConfig, VideoTokenizerConfig, VQConfig
from par_model.objects import unique
from par_model.ordering import CLASS, TOKEN, input_kinds, phases, token_order

MANIFEST = "manifest.json"
MOST_BYTES = 8 * 2**20  #: of a manifest
MOST = 2**24  #: of any size in it; a table of that many rows can still be made

MOST_BLOCKS, MOST_LEVELS = 2**8, 24  #: residual units of a level, and levels, of a video tokenizer
VIDEO = "video"  #: the kind of a video tokenizer; an image tokenizer has none


class ManifestError(ValueError):
    """A manifest that describes no model of this package.

    The message does not name the bundle; callers put it in front.
    """


def read_manifest(bundle: str | Path) -> dict[str, Any]:
    """The manifest of the bundle folder ``bundle``, parsed; its hash is not checked. Raises ManifestError."""
    path = Path(bundle) / MANIFEST
    try:
        status = path.stat()  # before opening it: a pipe would be waited for
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"it is no file of at most {MOST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"no {MANIFEST} that can be read ({_short(error)}); give the folder of a bundle") from error
    if not isinstance(manifest, dict):
        raise ManifestError(f"{MANIFEST} holds no JSON object; give the folder of a bundle")
    return manifest


def _refuse(text: str) -> float:
    raise ValueError(f"number {text}; expected a finite one")


def config_from_manifest(manifest: Mapping[str, Any]) -> PARConfig:
    """The configuration of the transformer that ``manifest`` describes, checked against its order, phases and ffn_dim.

    Raises ManifestError where no configuration results in this manifest.
    """
    try:
        return _config(manifest)
    except ManifestError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(_malformed(error)) from error
    except ValueError as error:  # of PARConfig
        raise ManifestError(f"{error}; export the bundle again") from error


def tokenizer_from_manifest(manifest: Mapping[str, Any]) -> VQConfig | VideoTokenizerConfig | None:
    """The configuration of the tokenizer; None for a bundle that ends at tokens. Raises ManifestError."""
    try:
        entry = manifest["tokenizer"]
        if entry is None:
            return None
        if entry.get("kind") is not None:
            return video_tokenizer_from_manifest(manifest)
        config = entry["config"]
        _check_sizes([value for name, value in config.items() if name != "channel_multipliers"])
        _check_sizes(config.get("channel_multipliers", ()))
        return VQConfig(**config)
    except ManifestError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(_malformed(error)) from error
    except ValueError as error:  # of the configuration
        raise ManifestError(f"{error}; export the bundle again") from error


def video_tokenizer_from_manifest(manifest: Mapping[str, Any]) -> VideoTokenizerConfig | None:
    """The configuration of the video tokenizer; None for a bundle of images, or one that ends at tokens.

    Raises ManifestError, also where the entry's other numbers are not those of its configuration.
    """
    try:
        entry = manifest["tokenizer"]
        if entry is None or entry.get("kind") is None:
            return None
        if entry["kind"] != VIDEO:
            raise ManifestError(
                f"a tokenizer of the kind {_short(entry['kind'])}; expected {VIDEO!r}, or none for images"
            )
        given = dict(entry["config"])
        names = {field.name for field in fields(VideoTokenizerConfig)}
        if given.keys() != names:
            raise TypeError(f"the numbers {_short(sorted(given.keys() ^ names))} too many or too few")
        _check_sizes([given["norm_groups"], *given["levels"], *given["widths"]])
        for stride in given["strides"]:
            _check_sizes(stride)
        for name in ("res_blocks", "last_blocks"):
            _check_sizes([given[name]], MOST_BLOCKS)
        _check_sizes([len(given["levels"]), len(given["widths"])], MOST_LEVELS)
        config = VideoTokenizerConfig(**given)
        time, side = config.downsampling
        frames = config.frames(manifest["grid"][0])
    except ManifestError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ManifestError(_malformed(error)) from error
    except ValueError as error:  # of VideoTokenizerConfig
        raise ManifestError(f"{_short(error)}; export the bundle again") from error
    for name, value in (
        ("downsampling", side),
        ("time_downsampling", time),
        ("codebook_size", config.codebook_size),
        ("frames", frames),
    ):
        if entry.get(name) != value:
            raise ManifestError(
                f"tokenizer.{name} is {_short(entry.get(name))}, its configuration has {value}; export the bundle again"
            )
    return config


def phase_entries(config: PARConfig) -> list[dict[str, Any]]:
    """The manifest's ``phases`` of a model of ``config``; phases without calls are left out.

    ``inputs`` are what the positions of a phase's first call are fed: "class", "token", or the id of a learnable
    token.
    """
    kind, index = input_kinds(config)
    learnable = config.vocab_size + config.n_classes + 1  # the first id after the codes, the classes and "no class"
    entries = []
    for phase in phases(config):
        if phase.repeat:
            positions = range(phase.start, phase.start + phase.query)
            inputs = [
                "class" if kind[p] == CLASS else "token" if kind[p] == TOKEN else int(learnable + index[p])
                for p in positions
            ]
            entries.append(
                {
                    "name": phase.name,
                    "query": phase.query,
                    "repeat": phase.repeat,
                    "start": phase.start,
                    "inputs": inputs,
                }
            )
    return entries


def _config(manifest: Mapping[str, Any]) -> PARConfig:
    model, order, entries = manifest["model"], list(manifest["order"]), list(manifest["phases"])
    _check_sizes([model[name] for name in ("dim", "n_layers", "n_heads", "vocab_size", "n_classes", "ffn_dim")])
    _check_sizes([*manifest["grid"], manifest["group_size"]])
    if len(manifest["grid"]) != 3:
        raise TypeError(f"a grid of {len(manifest['grid'])} numbers")
    base = PARConfig(
        dim=model["dim"],
        n_layers=model["n_layers"],
        n_heads=model["n_heads"],
        vocab_size=model["vocab_size"],
        n_classes=model["n_classes"],
        grid=tuple(manifest["grid"]),
        group_size=manifest["group_size"],
    )
    if model["ffn_dim"] != base.ffn_dim:
        raise ManifestError(
            f"ffn_dim {model['ffn_dim']}: a model of width {base.dim} has {base.ffn_dim}; export the bundle again"
        )
    if len(order) != base.n_tokens:  # before tables of that length are made
        raise ManifestError(
            f"order has {len(order)} tokens, grid {'x'.join(map(str, base.grid))} has {base.n_tokens}; export the "
            "bundle again"
        )
    by_order = [replace(base, order=name) for name in ORDERS]
    by_order = [config for config in by_order if token_order(config).tolist() == order]
    if not by_order:
        raise ManifestError(
            f"order is none of {', '.join(ORDERS)} for grid {'x'.join(map(str, base.grid))} and "
            f"group_size={base.group_size}; export the bundle again"
        )
    for initial in (True, False):
        config = replace(by_order[0], sequential_initial=initial)
        wanted = phase_entries(config)
        if len(entries) == len(wanted) and all(
            entry[key] == value
            for entry, expected in zip(entries, wanted, strict=True)
            for key, value in expected.items()
        ):
            return config
    raise ManifestError(
        f"phases ({_calls(entries)}) are those of no model with {base.n_tokens} tokens and "
        f"group_size={base.group_size}; expected {_calls(phase_entries(by_order[0]))}; export the bundle again"
    )


def _check_sizes(sizes: Iterable[object], most: int = MOST) -> None:
    for size in sizes:
        if type(size) is not int or not 1 <= size <= most:
            raise TypeError(f"{_short(size)} where a whole number from 1 to {most} is expected")


def _calls(entries: list[dict[str, Any]]) -> str:
    calls = (f"{e['name']} {e['repeat']}x{e['query']} from {e['start']}" for e in entries[:8])
    return _short(", ".join(calls) or "none")


def _short(value: object) -> str:
    """``value`` for a message: at most 200 characters, those that a terminal obeys escaped."""
    text = str(value)[:201]
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= 200 else text[:197] + "..."


def _malformed(error: Exception) -> str:
    missing = f"no entry {error}" if isinstance(error, KeyError) else f"an entry of another form ({_short(error)})"
    return f"{MANIFEST} has {missing}; export the bundle again"
