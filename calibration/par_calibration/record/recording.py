"""A recording on disk: a folder with ``recording.json`` and one file of rows for each image.

A file appears when its image is complete, so a recording that was stopped goes on with the next image. What the
recording is of (the bundle, seeds, labels, counts) stands in ``recording.json``; a folder of another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_calibration.record.arrays import Form, read_arrays
from par_calibration.record.rows import Kept, Positions, compact, widened
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.checked import load_json, read_regular, shown
from par_runtime.dtypes import Float, Int
from par_runtime.reading import advised
from par_runtime.system import write_beside

ABOUT = "recording.json"
MOST_ABOUT_BYTES = 2**26  #: a class and a seed for each image
FORMAT = 1
#: What else may lie in the folder: rows of images, and what ``refine`` keeps there.
FILES = ("image-*.npz", "tokens-*.npz", "refine.npz")
ABOUT_ROWS = ("row", "position", "phase", "kind")  #: the arrays that say what each row is


@dataclass(frozen=True)
class Plan:
    """What is recorded."""

    bundle: str  #: its hash
    labels: tuple[int, ...]  #: the class of each image
    seeds: tuple[int, ...]  #: the seed of each image
    guidance: float
    rows_per_image: int
    format: int = FORMAT

    @property
    def images(self) -> int:
        """How many images are made."""
        return len(self.labels)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """What makes the recording that ``found`` (its ``recording.json``) describes another one, for a message."""
        own = self.as_json()
        differ = [key for key in own if found.get(key) != own[key]]
        if "seeds" in differ:  # both follow from it and from the number of images
            count = len(found["seeds"]) if isinstance(found.get("seeds"), list) else 0
            differ = [key for key in differ if key not in ("seeds", "labels")]
            differ.insert(0, "another seed" if count == self.images else f"{count} images, not {self.images},")
        names = {"labels": "other labels", "format": "another version of parvis"}
        return [
            key
            if " " in key
            else names.get(key, f"another {key.replace('_', ' ').replace('rows per', 'number of rows per')}")
            for key in differ
        ]

    def as_json(self) -> dict[str, Any]:
        """As ``recording.json`` holds it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


@dataclass(frozen=True, eq=False)
class About:
    """What each of a recording's rows [n] is."""

    image: Int
    row: Int  #: of the batch: 0 with the class, 1 without
    position: Int
    phase: Int  #: an index into ``bundle.phases``
    kind: Int  #: an index into ``KINDS``


class Recording:
    """The folder of a recording."""

    def __init__(self, folder: Path, plan: Plan, bundle: Bundle) -> None:
        """Of ``plan``, in ``folder``, which need not exist. Nothing is read or written."""
        self.folder, self.plan, self.bundle = folder, plan, bundle
        self.positions = Positions.of(bundle)

    def begin(self, resume: bool, again: bool = False) -> None:
        """Make the folder, or with ``resume`` go on with what it holds; with ``again``, drop that.

        Raises CalibrationError where the folder holds something else; OSError.
        """
        about = self.folder / ABOUT
        if about.exists():
            found = self._found(about)
            differ = [] if found is None else self.plan.differences(found)
            if found is None:
                raise CalibrationError(f"{about}: is not a recording's; give another --work, or remove that folder")
            again = again or not any(self.folder.glob("image-*.npz"))  # nothing would be lost
            if not resume and not again:
                done = f"{len(self.done())} of its images" if not differ else "another recording"
                raise CalibrationError(
                    f"{self.folder}: holds {done} already; --resume goes on with a recording of the same settings, "
                    "--force begins again, and another --work leaves it as it is"
                )
            if differ and not again:
                raise CalibrationError(
                    f"{self.folder}: holds a recording of {' and '.join(differ)}; give the "
                    "same settings, another --work, or --force to begin again"
                )
            if again and not (resume and not differ):
                self._clear()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise CalibrationError(f"--work {self.folder}: holds other files; give a new or empty folder")
        if not about.exists():
            text = json.dumps(self.plan.as_json(), indent=1)
            write_beside(about, lambda part: part.write_text(text))

    def _found(self, about: Path) -> Mapping[str, Any] | None:
        def fault(message: str) -> CalibrationError:
            return CalibrationError(advised(message, "give another --work, or remove that folder"))

        found = load_json(read_regular(about, MOST_ABOUT_BYTES, fault), str(about), fault)
        return found if isinstance(found, dict) and "rows_per_image" in found else None

    def file(self, image: int) -> Path:
        """Where the rows of an image lie."""
        return self.folder / f"image-{image:06}.npz"

    def done(self) -> list[int]:
        """The images whose files are there."""
        return [image for image in range(self.plan.images) if self.file(image).is_file()]

    def write(self, image: int, kept: Kept, rows: Mapping[str, Float]) -> None:
        """Write the rows of an image: name of a matrix -> [n,K], in the order of ``kept``. Raises OSError."""
        arrays: dict[str, NDArray[Any]] = {
            "row": kept.row,
            "position": kept.position,
            "kind": self.positions.kind[kept.position],
            "phase": self.positions.phase[kept.position],
        }
        arrays = {name: array.astype(np.int64) for name, array in arrays.items()}
        for name, values in rows.items():
            arrays[name], arrays[f"{name}.scale"] = compact(values)

        def save(part: Path) -> None:
            with part.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]

        write_beside(self.file(image), save)

    def is_whole(self, image: int) -> bool:
        """Whether the file of an image is there, can be read to its end, and holds what :meth:`write` writes: a disk
        may have lost a part of it, and the folder may come from anybody.
        """
        try:
            return self._fits(read_arrays(self.file(image), self._forms()))
        except (ValueError, OSError):
            return False

    def _forms(self) -> dict[str, Form]:
        """The arrays of a file."""
        n = self.plan.rows_per_image
        forms: dict[str, Form] = dict.fromkeys(ABOUT_ROWS, ("int64", (n,)))
        for name in matrix_names(self.bundle):
            forms[name] = ("float16", (n, self.bundle.weights[name].shape[0]))
            forms[f"{name}.scale"] = ("float32", (n,))
        return forms

    def _fits(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Whether ``arrays``, those of one file, are rows of this recording's plan."""
        about = {name: arrays[name] for name in ABOUT_ROWS}
        position = about["position"]
        if position.min() < 0 or position.max() >= self.bundle.n_tokens or not np.isin(about["row"], (0, 1)).all():
            return False
        if not all(np.array_equal(about[name], getattr(self.positions, name)[position]) for name in ("phase", "kind")):
            return False
        numbers = (arrays[key] for name in matrix_names(self.bundle) for key in (name, f"{name}.scale"))
        return all(np.isfinite(array).all() for array in numbers)

    def holds_work(self) -> bool:
        """Whether the folder holds anything that took time: images, or a training of them."""
        return any(True for pattern in FILES for _ in self.folder.glob(pattern))

    def remove(self) -> None:
        """Remove what a recording and a training wrote, and the folder if nothing else is in it. Raises OSError."""
        self._clear()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _clear(self) -> None:
        """Remove the files, but not the folder, whose lock would go with it."""
        for pattern in (*FILES, ABOUT):
            for path in (*self.folder.glob(pattern), *self.folder.glob(f".{pattern}*.part")):
                path.unlink(missing_ok=True)

    # -- reading --------------------------------------------------------------------------------------------------

    def _each(self, *names: str) -> Iterator[list[NDArray[Any]]]:
        for image in range(self.plan.images):
            try:
                arrays = read_arrays(self.file(image), {name: self._forms()[name] for name in names})
                yield [arrays[name] for name in names]
            except ValueError as error:
                raise CalibrationError(
                    f"{self.file(image)}: cannot be read ({shown(str(error), 100)[1:-1]}); --resume makes it again"
                ) from error

    @cached_property
    def about(self) -> About:
        """What each row is. Raises CalibrationError, OSError."""
        each = list(self._each("row", "position", "phase", "kind"))
        image = np.concatenate([np.full(len(part[0]), i) for i, part in enumerate(each)])
        return About(image, *(np.concatenate(column) for column in zip(*each, strict=True)))

    def rows(self, name: str) -> Float:
        """What the matrix ``name`` was multiplied with: [n,K], in the order of :attr:`about`. Raises as it."""
        return np.concatenate([widened(rows, scale) for rows, scale in self._each(name, f"{name}.scale")])

    def bytes_needed(self) -> int:
        """Bytes of the whole recording on disk."""
        rows = self.plan.images * self.plan.rows_per_image
        return rows * sum(2 * self.bundle.weights[name].shape[0] + 4 for name in matrix_names(self.bundle))
