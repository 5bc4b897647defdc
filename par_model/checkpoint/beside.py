"""``config.json`` beside the weights, as folders of the hub have it: what it says about the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from par_model.checkpoint.file import read_json

NAME = "config.json"
#: The name that the published code has for a value -> other common names of it.
NAMES: dict[str, tuple[str, ...]] = {
    "dim": ("hidden_size", "n_embd", "d_model"),
    "n_layer": ("n_layers", "num_layers", "num_hidden_layers"),
    "n_head": ("n_heads", "num_heads", "num_attention_heads"),
    "vocab_size": (),
    "num_classes": ("n_classes",),
    "block_size": (),
    "image_size": (),
    "downsample_size": (),
    "grid": (),
    "cls_token_num": (),
    "gpt_type": ("model_type",),
    "spe_token_num": (),
    "ar_token_num": ("group_size",),
    "rope_base": ("rope_theta",),
    "norm_eps": ("rms_norm_eps",),
}


def read_beside(path: Path) -> dict[str, Any]:
    """The values of ``config.json`` in the folder of the checkpoint ``path``, by the published code's names.

    Empty where there is no such file. Raises CheckpointError where it cannot be read, OSError.
    """
    file = (path if path.is_dir() else path.parent) / NAME
    if not file.exists():
        return {}
    content = read_json(file, f"a JSON object with the numbers of the model beside it; mend it or move {NAME} away")
    inner = content.get("config")
    return by_published_names(content | inner if isinstance(inner, dict) else content)


def by_published_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that :data:`NAMES` lists, under their published names."""
    out = {}
    for name, others in NAMES.items():
        for each in (name, *others):
            if each in values:
                out[name] = values[each]
                break
    return out
