"""What a calibration may cost: a limit for each measure, its default, and its reason.

The defaults lie between what careful calibrations of the demo cost and what planted faults cost; docs/calibration.md
has both. A measure that could not be taken (no generated images, a bundle without encoder) has no limit to exceed; a
measure that is not a number exceeds every limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from par_calibration.errors import CalibrationError
from par_runtime.checked import load_json, read_regular, shown, shown_path
from par_runtime.reading import advised

MOST_BYTES = 2**16


@dataclass(frozen=True)
class Limit:
    """One measure that is limited: ``least`` where more is better, else the limit is the most."""

    name: str  #: in plain words
    what: str  #: what it says, one sentence
    int8: float
    int4: float
    least: bool = False
    percent: bool = False  #: shown as a percentage
    unit: str = ""  #: of the value, with a space in front

    def within(self, value: float, limit: float) -> bool:
        """Whether ``value`` is on the right side of ``limit``; False for what is not a number."""
        return value >= limit if self.least else value <= limit

    def text(self, value: float) -> str:
        """``value`` as the report shows it."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.{4 if self.unit else 3}g}{self.unit}"


LIMITS = {
    "top1": Limit(
        "top-1 agreement",
        "share of positions at which both models give the same code the highest probability; the lower share of guided "
        "and unguided logits",
        0.98,
        0.93,
        least=True,
        percent=True,
    ),
    "kl": Limit(
        "mean KL divergence",
        "of the original's distribution of codes from the candidate's, in nats per position; the larger of guided and "
        "unguided",
        0.0015,
        0.02,
    ),
    "kl_p95": Limit("95th percentile of the KL divergence", "of all positions, in nats", 0.005, 0.07),
    "kl_inputs": Limit(
        "KL divergence at class and learnable inputs",
        "the mean over the positions whose inputs are attention sinks: they are so few that all others would hide them",
        0.003,
        0.04,
    ),
    "likelihood": Limit(
        "held-out log-likelihood",
        "change of the nats per token, as a share of them: the end of the 95 % interval that is farther from zero",
        0.005,
        0.015,
        percent=True,
    ),
    "layer": Limit(
        "worst layer",
        "largest relative error of a matrix's outputs on recorded activations, in any phase",
        0.02,
        0.2,
    ),
    "frechet": Limit(
        "Frechet distance of generated sets",
        "in multiples of the 95th percentile of what two halves of the original's own images are apart",
        1.25,
        1.5,
    ),
    "decoder": Limit(
        "PSNR of the decoder",
        "of the worst image, or frame of a clip, of up to 32 held-out ones, decoded in bf16 and in fp32 from the same "
        "tokens; 100 at most",
        40.0,
        40.0,
        least=True,
        unit=" dB",
    ),
}


@dataclass(frozen=True)
class Budget:
    """A limit for each measure by its key in :data:`LIMITS`; a measure without one is shown and not judged."""

    limits: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(weights: str) -> Budget:
        """The defaults for "int8" or "int4" weights; "kept" ones are held to what int8 is."""
        return Budget({key: limit.int4 if weights == "int4" else limit.int8 for key, limit in LIMITS.items()})

    @staticmethod
    def file_of(text: str) -> Path | None:
        """The file that :meth:`parse` reads for ``text``; None where that is a list of limits."""
        return None if "=" in text and not _is_file(text) else Path(text)

    @staticmethod
    def parse(text: str, weights: str) -> Budget:
        """The defaults for ``weights``, changed by ``text``: ``top1=0.97,kl=0.01``, or the name of a JSON file with an
        object of such entries. null, or "none" in a list, takes a limit away. Raises CalibrationError.
        """
        if not text.strip():
            raise CalibrationError("--budget '': is empty; give limits as top1=0.97,kl=0.01, or leave it out")
        file = Budget.file_of(text)
        given = _pairs(text) if file is None else _file(file)
        limits = dict(Budget.of(weights).limits)
        for key, value in given.items():
            if key not in LIMITS:
                raise CalibrationError(
                    f"--budget: unknown measure {shown(key)}; expected some of {', '.join(LIMITS)}, for instance "
                    "top1=0.97,kl=0.01"
                )
            if value is None:
                limits.pop(key, None)
                continue
            most = 1.0 if LIMITS[key].percent and LIMITS[key].least else 1e9
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise CalibrationError(
                    f"--budget: {key} is {shown(value)}; expected a number from 0 to {most:g}, or none for no limit"
                    + (" (a share: 0.98 is 98 %)" if LIMITS[key].percent else "")
                )
            limits[key] = float(value)
        return Budget(limits)

    def describe(self) -> str:
        """The limits in the form that :meth:`parse` takes."""
        return ",".join(f"{key}={value:g}" for key, value in self.limits.items())


MOST_NAME = 1000  #: characters of a file's name


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than any name, for instance
        return False


def _pairs(text: str) -> dict[str, object]:
    out: dict[str, object] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise CalibrationError(
                f"--budget: {shown(part)} has no '='; expected NAME=NUMBER with commas between, for instance "
                "top1=0.97,kl=0.01, or the name of a JSON file"
            )
        key, value = key.strip(), value.strip()
        if key in out:
            raise CalibrationError(f"--budget: {shown(key)} is given twice; give it once")
        try:
            out[key] = None if value.lower() == "none" else float(value)
        except ValueError:
            out[key] = value
    return out


def _file(path: Path) -> dict[str, object]:
    def fault(message: str) -> CalibrationError:
        expected = (
            "expected NAME=NUMBER with commas between, for instance top1=0.97,kl=0.01, or the name of a JSON file"
        )
        return CalibrationError(advised(f"--budget {message}", f'{expected} such as {{"top1": 0.97, "kl": 0.01}}'))

    if len(str(path)) > MOST_NAME:
        raise fault(f"{shown(str(path))}: no file has such a name")
    value = load_json(read_regular(path, MOST_BYTES, fault), shown_path(path), fault)
    if not isinstance(value, dict):
        raise fault(f"{shown_path(path)}: holds {shown(json.dumps(value))}, no object")
    return value
