"""Which tensors of a file are the weights: trained or averaged ones, where they lie, and what was put before keys.

Trainers save the weights under a name, beside the optimizer and other things, and many save an average of the weights
(EMA) beside them. The published sampler takes ``model`` of a transformer, and the published scripts of the tokenizer
take ``ema`` where there is one; so does this module, unless the caller says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import Parameter

from par_model.checkpoint.errors import CheckpointError, some
from par_model.checkpoint.pickle import in_parts, plain
from par_model.checkpoint.recognise import content_problem

Kind = Literal["model", "ema"]
MODEL: Kind = "model"
EMA: Kind = "ema"
KINDS: tuple[Kind, ...] = (MODEL, EMA)
#: Names under which files hold their weights, in the order in which they are looked for. The first three are those of
#: the published code, which reads them in this order; the others are common elsewhere.
UNDER: dict[Kind, tuple[str, ...]] = {
    MODEL: ("model", "module", "state_dict", "model_state_dict", "net", "network", "params", "weights"),
    EMA: (
        "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "ema_params",
        "params_ema",
    ),
}  # fmt: skip
#: Parts of keys that wrappers of a model add: DDP in front; torch.compile, FSDP and activation checkpointing anywhere.
WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTER = "n_averaged"  #: of torch's AveragedModel: how many updates were averaged
#: A key of every transformer, and those of tokenizers; what stands in front of it is the name of a module around it.
TOKENIZERS = ("quantize.embedding.weight", "encoder_layers.0.conv.weight")  # of images, of videos
ANCHORS = ("tok_embeddings.weight", *TOKENIZERS)


@dataclass(frozen=True)
class Weights:
    """The weights of one model in a file."""

    kind: Kind
    under: str  #: where they lie, in words
    tensors: dict[str, Tensor]  #: by the keys of the model


def choose(path: Path, content: Mapping[Any, Any], wanted: Kind | None) -> tuple[Weights, list[Kind], list[str]]:
    """The weights in the ``content`` of the file at ``path``, the kinds of the others, and lines that say it.

    ``wanted`` None: the trained weights of a transformer, the averaged ones of a tokenizer, or the only ones. Raises
    CheckpointError where the file does not hold them, holds none or more than one model, or other things among them.
    """
    found = _candidates(path, content)
    kinds = {weights.kind: weights for weights in found}
    if len(kinds) < len(found):
        names = " and ".join(weights.under for weights in found if weights.kind == found[0].kind)
        raise CheckpointError(f"{path}: holds more than one model: {names}; save one state dict alone")
    if wanted is not None and wanted not in kinds:
        have = found[0]
        asked = "averaged weights (ema)" if wanted == EMA else "weights other than averaged ones"
        raise CheckpointError(f"{path}: holds no {asked}, only those {have.under}; give --weights {have.kind}")
    tokenizer = any(key in weights.tensors for weights in found for key in TOKENIZERS)
    default = EMA if tokenizer and EMA in kinds else MODEL if MODEL in kinds else EMA
    chosen = kinds[wanted or default]
    notes = []
    if others := [weights for kind, weights in kinds.items() if kind != chosen.kind]:
        other = others[0]
        notes.append(f"weights {chosen.under}; the file also holds some {other.under} (--weights {other.kind})")
    elif chosen.kind == EMA and wanted is None:
        notes.append(f"weights {chosen.under}, averaged ones: the file holds no others")
    elif "whose keys begin" in chosen.under:
        notes.append(f"weights {chosen.under}")
    return chosen, [kind for kind in kinds if kind != chosen.kind], notes


def named(content: Mapping[Any, Any]) -> bool:
    """Whether the weights lie under a name; otherwise they are the whole file."""
    return any(isinstance(content.get(name), dict) for names in UNDER.values() for name in names)


def _candidates(path: Path, content: Mapping[Any, Any]) -> list[Weights]:
    """All weights in a file, at least one."""
    found: list[Weights] = []
    dicts = []
    for kind, names in UNDER.items():
        here = [(name, plain(content[name])) for name in names if isinstance(content.get(name), dict)]
        dicts += [each for _, each in here]
        usable = [(name, each) for name, each in here if not _not_tensors(each)]
        for name, each in usable[:1]:
            found += _by_module(path, kind, f"under {name!r}", each)
    if found:
        return found
    whole = dicts[0] if dicts else plain(content)
    if wrong := _not_tensors(whole):
        if (why := content_problem(whole) or content_problem(content)) is not None:
            raise CheckpointError(f"{path}: {why}")
        raise CheckpointError(
            f"{path}: expected tensors by name, at the top or under {', '.join((*UNDER[MODEL][:3], EMA))}; found "
            f"{some(wrong, 5)}"
        )
    return _by_module(path, MODEL, "at the top of the file", whole)


def _not_tensors(weights: Mapping[Any, Any]) -> list[str]:
    """The names of what are no tensors by name in ``weights``; an empty dict has one too."""
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    named = [key if isinstance(key, str) else f"a key of type {type(key).__name__}" for key in wrong]
    return named or ([] if weights else ["nothing"])


def _by_module(path: Path, kind: Kind, under: str, weights: Mapping[str, Tensor]) -> list[Weights]:
    """The models in one state dict: usually it is one; a trainer's module may hold one, or one and its average.

    Lightning saves the state dict of a module that holds the model as an attribute, so all keys begin with its name.
    """
    keys = _plain_keys(path, {key: value for key, value in weights.items() if key != COUNTER})
    for key in keys:
        if type(weights[key]) not in (
            Tensor,
            Parameter,
        ):  # a class of its own: its numbers are elsewhere
            raise CheckpointError(f"{path}: {in_parts(type(weights[key]).__name__)} ({key[:80]})")
    # A view of each tensor, without the attributes that a pickle may have set on it.
    tensors = {short: Tensor.detach(weights[key]) for key, short in keys.items()}
    prefixes = sorted({key.removesuffix(a) for key in tensors for a in ANCHORS if key == a or key.endswith(f".{a}")})
    if not prefixes or "" in prefixes:
        return [Weights(kind, under, tensors)]
    beside = [key for key in tensors if not key.startswith(tuple(prefixes))]
    trained = [prefix for prefix in prefixes if "ema" not in prefix.lower()]
    if beside or len(trained) > 1 or len(prefixes) - len(trained) > 1:
        what = (
            f"holds more than one model, with keys that begin with {some(map(repr, prefixes))}"
            if not beside
            else f"holds {len(beside)} tensors ({some(beside)}) beside those whose keys begin with {prefixes[0]!r}"
        )
        first = (trained or prefixes)[0]
        raise CheckpointError(
            f"{path}: {what}; save one model alone: torch.save({{k.removeprefix({first!r}): v for k, v in "
            f"state_dict.items() if k.startswith({first!r})}}, path)"
        )
    return [
        Weights(
            kind if prefix in trained else EMA,
            f"{under} whose keys begin with {prefix!r}",
            {
                WRAPPERS.sub("", key.removeprefix(prefix)): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            },
        )
        for prefix in prefixes
    ]


def _plain_keys(path: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Key of the file -> key without wrappers. Raises CheckpointError where two keys become the same one."""
    keys = {key: WRAPPERS.sub("", WRAPPERS.sub("", key)) for key in weights}
    taken: dict[str, str] = {}
    for key, short in keys.items():
        if short in taken:
            raise CheckpointError(
                f"{path}: keys {taken[short]!r} and {key!r} are both {short!r} without what wrappers added; save the "
                "state dict of one model"
            )
        taken[short] = key
    return keys
