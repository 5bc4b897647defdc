"""What the arguments of several verbs mean: classes, and the bundle loaded on the device that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from par_runtime.backends.engines import has_engines
from par_runtime.bundle import Bundle
from par_runtime.pipeline import Pipeline
from par_runtime.request import class_index

MOST_IMAGES = 100_000  # of one command: all are held in memory until they are written


def class_indices(bundle: Bundle, labels: Sequence[str]) -> list[int]:
    """Class indices of the command line's labels; "all" is every class. Raises RequestError."""
    each = [range(bundle.n_classes) if label == "all" else [class_index(bundle, label)] for label in labels]
    return [index for indices in each for index in indices]


def load_pipeline(args: argparse.Namespace, bundle: Bundle, selftest: bool) -> Pipeline:
    """Load ``bundle``, which is opened already, with the options of ``add_common``. Errors as in ``Pipeline.load``."""
    return Pipeline.load(
        args.bundle,
        args.device,
        threads=args.threads,
        selftest=selftest,
        # Opening the bundle hashed its own files, but not the plans of its engines.
        verify="auto" if has_engines(bundle) else "none",
        capture=args.capture,
    )
