"""Where a calibration writes, and what must not be lost there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from par_calibration.errors import CalibrationError
from par_calibration.report.page import TITLE
from par_model.training.files import followed
from par_runtime.checked import load_json, read_regular, shown_path
from par_runtime.system import same_file

MOST_BYTES = 2**28  #: of a report


@dataclass(frozen=True)
class Places:
    """Where everything goes."""

    out: Path
    work: Path
    html: Path
    json: Path
    images: Path | None
    own_work: bool  #: the folder of the recording was not named, so it is removed at the end
    own_files: tuple[Path, ...] = ()  #: those of ``files`` that nobody named; they lie beside ``out``

    @property
    def files(self) -> list[Path]:
        """The files of the report."""
        return [path for path in (self.html, self.json, self.images) if path is not None]

    def check(self, source: Path, inputs: Sequence[Path]) -> None:
        """Raise CalibrationError where one of them would be lost in another, or in ``source`` or ``inputs``."""
        source, out, work = followed(source), followed(self.out), followed(self.work)
        if out == source:
            raise CalibrationError(f"--out {shown_path(self.out)}: is the bundle that is read; give another --out")
        for option, path in (("--out", out), ("--work", work)):
            if path.is_relative_to(source):
                raise CalibrationError(
                    f"{option} {shown_path(path)}: lies in the bundle that is read; give another folder"
                )
        if source.is_relative_to(out):
            raise CalibrationError(f"--out {shown_path(self.out)}: holds the bundle that is read; give another --out")
        for path in (work, *(followed(file) for file in self.files)):
            if path.is_relative_to(out):
                raise CalibrationError(
                    f"{shown_path(path)}: lies in --out, which is made at the end; give another place"
                )
        for path in self.files:
            for read in inputs:
                if same_file(path, read):
                    raise CalibrationError(
                        f"{shown_path(path)}: is read by this command; write the report to another file"
                    )
                if os.path.isdir(read) and followed(path).is_relative_to(followed(read)):
                    raise CalibrationError(
                        f"{shown_path(path)}: lies in {shown_path(read)}, which is read by this command; write the "
                        "report to another folder"
                    )
        if len({followed(path) for path in self.files}) < len(self.files):
            raise CalibrationError("--html, --json and --show-images name the same file; give different ones")

    def check_own_files(self) -> None:
        """Raise CalibrationError where a file is in the place of a report that nobody named, and is no report."""
        for path in self.own_files:
            if os.path.lexists(path) and not is_report(path):
                raise CalibrationError(
                    f"{shown_path(path)}: exists and is no report of 'parvis calibrate', and that of --out "
                    f"{shown_path(self.out)} is written there; move it away, or give --{path.suffix[1:]} another name"
                )


def is_report(path: Path) -> bool:
    """Whether the file ``path`` is the page or the figures of an earlier calibration."""
    try:
        text = read_regular(path, MOST_BYTES, CalibrationError).decode("utf-8")
        if path.suffix == ".html":
            return text.startswith("<!doctype html>") and TITLE in text[:400]
        found = load_json(text, shown_path(path), CalibrationError)
    except (CalibrationError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and found.keys() >= {"measures", "budget", "exceeded", "likelihoods"}
