"""The files that a run of the bench writes: each has a name of its own, and none is lost in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from par_runtime.bench.journal import part_of
from par_runtime.bench.report.output import STANDARD_OUTPUT
from par_runtime.errors import RequestError
from par_runtime.system import check_different, check_writable, same_file


def check_outputs(
    outputs: Mapping[str, Path | None], compare: Path | None, new: Path | None, from_files: Sequence[Path]
) -> None:
    """Check the files of ``outputs``, by option, against each other, against those that a run keeps beside them until
    it ends, and against the files of rows that are read: ``compare``, ``new`` and ``from_files``. Raises RequestError,
    OSError.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    if list(given.values()).count(STANDARD_OUTPUT) > 1:
        raise RequestError(
            "'-' is standard output, and takes one of --json, --csv, --html and --svg; give files for the others"
        )
    files = {option: path for option, path in given.items() if path != STANDARD_OUTPUT}
    read = [("--compare", compare), ("the rows to compare", new), *(("--from", path) for path in from_files)]
    for option, path in files.items():
        for other, taken in files.items():
            if other != option and same_file(path, taken):
                raise RequestError("--json, --csv, --html and --svg name one file twice; give each its own")
            if other != option and same_file(path, part_of(taken)):
                raise RequestError(
                    f"--{option} {path} is where rows for --{other} are kept until the run ends; give another name"
                )
        for what, file in read:
            if file is None:
                continue
            replaced = what == "--compare" and option == "json" and new is None  # new rows take the place of the old
            if same_file(path, file) and not replaced:
                raise RequestError(f"{path} is a file of {what}, and would be lost; give another name")
    check_different(list(files.values()))
    for path in files.values():
        check_writable(path)
