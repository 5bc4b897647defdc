"""The files that several verbs write: their names, checks before any work is spent, and arrays of tokens."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.system import check_writable, write_beside


def check_outputs(out: Path, tokens: Path | None) -> None:
    """Check the names of a PNG and an array of tokens, and that both can be written. Raises RequestError, OSError."""
    if out.suffix.lower() != ".png":
        raise RequestError(f"--out {out}: expected a name that ends in .png")
    check_tokens_name(tokens)
    for path in (out, tokens):
        if path is not None:
            check_writable(path)


def check_tokens_name(tokens: Path | None) -> None:
    """Raise RequestError where ``--tokens`` is given and its name does not end in .npy."""
    if tokens is not None and tokens.suffix != ".npy":
        raise RequestError(f"--tokens {tokens}: expected a name that ends in .npy")


def write_tokens(path: Path, tokens: Int) -> None:
    """Write ``tokens`` [B,N] as .npy, beside ``path`` and renamed. Raises OSError."""

    def save(part: Path) -> None:
        with part.open("wb") as f:  # a file object, because np.save would add .npy to the name
            np.save(f, tokens)

    write_beside(path, save)


def sheet_columns(classes: int, count: int, scales: int) -> int:
    """Images per row of a sheet of ``count`` images per class and guidance scale.

    Several scales get a row each. Several classes share a row until the sheet is about square; one class is laid out
    as a square.
    """
    if scales > 1:
        return classes * count
    if classes == 1:
        return math.ceil(math.sqrt(count))
    # Classes in rows of `count` each would be tall and thin.
    per_row = max(1, round(math.sqrt(classes * count) / count))
    return count * min(per_row, classes)


def class_file_name(bundle: Bundle, label: int) -> str:
    """Class ``label`` as a part of a file name: its first name, or its index where no character of that is allowed."""
    name = "" if bundle.class_names is None else safe_name(bundle.class_names[label].split(", ")[0])
    return name or str(label)


def safe_name(name: str) -> str:
    """``name`` with only those characters that are allowed in the file names of every system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")
