"""The 1000 classes of ImageNet: names and WordNet synsets, in the order that every published model uses.

The names are those of WordNet 3.0, Copyright 2006 by Princeton University, used under its licence.
"""

from __future__ import annotations

from pathlib import Path

from par_model.config import PARConfig

FILE = Path(__file__).with_name("imagenet_classes.tsv")
COUNT, CODES = 1000, 16384


def fits(config: PARConfig) -> bool:
    """Whether a model has the shape of the published ImageNet models: class count, and codes of their tokenizer."""
    return (config.n_classes, config.vocab_size) == (COUNT, CODES)


def classes() -> tuple[list[str], list[str]]:
    """Names and synsets by class index; a class with several names in WordNet has all of them, separated by ", "."""
    rows = [line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [name for _, name in rows], [synset for synset, _ in rows]
