"""Real pictures, or clips, in a folder, with their classes: what a bundle's images are compared with.

Two forms: a folder with one folder of files for each class, and the raw form that the trainers take (``images.u8`` or
``clips.u8`` with ``labels.u8`` and ``meta.json``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_runtime.bundle import Bundle
from par_runtime.checked import shown_path
from par_runtime.clips.formats import FORMATS
from par_runtime.errors import RequestError
from par_runtime.images.photo import fit_image, to_pixels
from par_runtime.request import class_index
from par_runtime.system import naming
from par_runtime.tokenizer import fitted_clip, pixels, read_clips

Pixels = NDArray[np.uint8]
AT_ONCE = 64  #: pictures in memory
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
RAW = ("images.u8", "clips.u8")

HOW = (
    "expected a folder with one folder of pictures for each class (named as the class, or by its number), a folder of "
    "the trainers' raw form, or a .npz of 'parvis encode'"
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a folder, fitted to a bundle's size; the classes take turns."""

    source: str  #: the folder, for a message
    labels: tuple[int, ...]
    read: Callable[[slice], Pixels]  #: of some of them: [m,H,W,3], of clips [m,T,H,W,3]

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self) -> Iterator[Pixels]:
        """All of them, some at a time, for memory's sake. Raises CalibrationError, RequestError, OSError."""
        for first in range(0, len(self), AT_ONCE):
            yield self.read(slice(first, first + AT_ONCE))


def find_pictures(bundle: Bundle, folder: Path, most: int, only: Collection[int] = ()) -> Pictures:
    """At most ``most`` pictures of ``folder``, the same number of each class where there are as many; ``only`` of these
    classes, where any is named.

    Raises CalibrationError, RequestError, OSError.
    """
    if any((folder / name).is_file() for name in RAW):
        return _raw(bundle, folder, most, only)
    folders = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not folders:
        raise CalibrationError(f"--real {shown_path(folder)}: holds no folders; {HOW}")
    files: list[tuple[int, int, Path]] = []
    for one in folders:
        label = _class(bundle, one.name, folder)
        if only and label not in only:
            continue
        endings = FORMATS if bundle.video else ENDINGS
        found = sorted(p for p in one.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))
        files += [(turn, label, picture) for turn, picture in enumerate(found)]
    chosen = sorted(files)[:most]
    if not chosen:
        what = "pictures of these classes; give others with --label, or" if only else "pictures;"
        raise CalibrationError(f"--real {shown_path(folder)}: its folders hold no {what} {HOW}")
    paths = [path for _, _, path in chosen]

    def read(part: slice) -> Pixels:
        if not bundle.video:
            return to_pixels(list(paths[part]), pixels(bundle))
        return np.stack([_clip(bundle, path) for path in paths[part]])

    return Pictures(shown_path(folder), tuple(label for _, label, _ in chosen), read)


def turns(labels: Sequence[int]) -> NDArray[np.intp]:
    """The order in which the classes of ``labels`` take turns; those of one class stay in their order."""
    seen: dict[int, int] = {}
    each = []
    for label in labels:
        seen[label] = seen.get(label, -1) + 1
        each.append(seen[label])
    return np.argsort(np.array(each), kind="stable")


def _class(bundle: Bundle, name: str, folder: Path) -> int:
    try:
        return class_index(bundle, name)
    except RequestError as error:
        raise CalibrationError(f"--real {shown_path(folder)}: {error}; {HOW}") from None


def _clip(bundle: Bundle, path: Path) -> Pixels:
    """The one clip in a file, [T,H,W,3]. Raises CalibrationError, RequestError, OSError."""
    clips = read_clips(bundle, path)
    if len(clips) != 1:
        raise CalibrationError(f"{shown_path(path)}: holds {len(clips)} clips; give a file for each (--out-dir)")
    return fitted_clip(bundle, clips[0], "crop", str(path))


def _raw(bundle: Bundle, folder: Path, most: int, only: Collection[int]) -> Pictures:
    """Those of a folder of the raw form. Raises CalibrationError, OSError."""
    from par_model.training.files import InputError

    try:
        if (folder / RAW[1]).is_file():
            from par_model.training.clips import ClipFolder

            clips, file = ClipFolder.open(folder), folder / RAW[1]
            data, labels, names = clips.clips, clips.labels, clips.class_names
        else:
            from par_model.training.raw import RawImages

            raw, file = RawImages.open(folder), folder / RAW[0]
            data, labels, names = raw.images, raw.labels, raw.meta["styles"]
    except InputError as error:
        raise CalibrationError(f"--real {error}") from error
    if (data.ndim == 5) != bundle.video:
        holds, makes = ("clips", "images") if data.ndim == 5 else ("images", "clips")
        raise CalibrationError(f"--real {shown_path(folder)}: holds {holds}, {bundle.path} makes {makes}; give {makes}")
    used = {label: _class(bundle, names[label], folder) for label in sorted(set(labels.tolist()))}
    classes = np.array([used[label] for label in labels.tolist()])
    wanted = np.flatnonzero(np.isin(classes, list(only))) if only else np.arange(len(classes))
    if not len(wanted):
        raise CalibrationError(f"--real {shown_path(folder)}: holds none of these classes; give others with --label")
    chosen, shape = wanted[turns(classes[wanted].tolist())][:most], data.shape[1:]

    def read(part: slice) -> Pixels:
        found = _items(file, chosen[part].tolist(), shape)
        if found.shape[-1] == 1:  # grey
            found = found.repeat(3, axis=-1)
        if bundle.video:
            return np.stack([fitted_clip(bundle, clip, "crop", shown_path(folder)) for clip in found])
        if found.shape[1:3] == pixels(bundle):
            return np.ascontiguousarray(found)
        from PIL import Image

        return np.stack([fit_image(Image.fromarray(one), pixels(bundle)) for one in found])

    return Pictures(shown_path(folder), tuple(classes[chosen].tolist()), read)


def _items(path: Path, which: Sequence[int], shape: tuple[int, ...]) -> Pixels:
    """Those items ``which`` of a raw file, each of ``shape``: read and not mapped, since what is cut off behind a map
    ends the process. Raises CalibrationError, OSError.
    """
    size, found = math.prod(shape), []
    with naming(path), path.open("rb") as file:
        for index in which:
            file.seek(index * size)
            found.append(file.read(size))
    if any(len(item) != size for item in found):
        raise CalibrationError(f"--real {shown_path(path)}: became shorter while it was read; give a folder that stays")
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, *shape)
