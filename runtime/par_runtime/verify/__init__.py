"""Two backends on one bundle, compared with each other.

``devices.py`` loads both sides, ``compare.py`` measures their differences, ``judge.py`` has the floors and decides
whether rounding explains a different token, ``report.py`` runs and prints the whole comparison.
"""

from par_runtime.verify.compare import (
    Divergence,
    Images,
    PhaseLogits,
    Tokens,
    Trial,
    compare_images,
    compare_logits,
    compare_tokens,
    start_both,
)
from par_runtime.verify.devices import OPSET23, default_reference, load
from par_runtime.verify.judge import FLOORS, Floors
from par_runtime.verify.report import Check, Report, as_json, checks, run, table

__all__ = [
    "FLOORS",
    "OPSET23",
    "Check",
    "Divergence",
    "Floors",
    "Images",
    "PhaseLogits",
    "Report",
    "Tokens",
    "Trial",
    "as_json",
    "checks",
    "compare_images",
    "compare_logits",
    "compare_tokens",
    "default_reference",
    "load",
    "run",
    "start_both",
    "table",
]
