"""PNG files with everything that is needed to make them again.

An iTXt chunk "parvis" is JSON: the version of parvis, the name and hash of the bundle, the columns of the sheet, and
per image label, seed, settings and tokens (base64 of little-endian uint16, or uint32 for codebooks beyond 65,536;
sequence order). For an edited image also which tokens were given ("kept": base64 of packed bits), and whether the kept
pixels of the sheet are the original's ("pasted").
"""

from __future__ import annotations

import base64
import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from par_runtime import __version__
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.request import Settings
from par_runtime.system import write_beside

CHUNK = "parvis"


@dataclass(frozen=True)
class Recipe:
    """What the metadata of a PNG contains about its images."""

    bundle_name: str
    bundle_hash: str
    columns: int
    labels: list[int]
    names: list[str | None]  #: of the classes; None where the bundle has none
    seeds: list[int]
    settings: list[Settings]
    tokens: Int  #: [B,N] in sequence order
    kept: NDArray[np.bool_] | None = None  #: [B,N]: tokens that were given, not drawn
    pasted: bool = False  #: kept pixels are those of the original, not decoded ones


def sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay ``images`` [B,H,W,3] out in rows of ``columns``: [rows*H, columns*W, 3], empty places white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, height, width, 3), 255, np.uint8)
    canvas[:count] = images
    return canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def sheet_image(pixels: NDArray[np.uint8], columns: int, count: int, index: int) -> NDArray[np.uint8]:
    """Image ``index`` [H,W,3] of a sheet's ``pixels``, which holds ``count`` images in rows of ``columns``."""
    row, column = divmod(index, columns)
    height, width = pixels.shape[0] // -(-count // columns), pixels.shape[1] // columns
    return pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]


def write(path: Path, recipe: Recipe, images: NDArray[np.uint8]) -> None:
    """Write ``images`` [B,H,W,3] as one PNG with their recipe, in rows of its columns. Raises OSError."""
    chunk = PngImagePlugin.PngInfo()
    # Not compressed: Pillow refuses to read compressed text of more than 1 MB, which is 900 images of 576 tokens.
    chunk.add_itxt(CHUNK, json.dumps(_entry(recipe)))
    write_pixels(path, sheet(images, recipe.columns), chunk)


def write_pixels(path: Path, pixels: NDArray[np.uint8], chunk: PngImagePlugin.PngInfo | None = None) -> None:
    """Write ``pixels`` [H,W,3] as a PNG, beside ``path`` and renamed. Raises OSError."""
    image = Image.fromarray(pixels)
    write_beside(path, lambda part: image.save(part, format="PNG", pnginfo=chunk))


def read(path: Path) -> tuple[Recipe, NDArray[np.uint8]]:
    """The recipe and the pixels [H,W,3] of a PNG that parvis wrote. Raises RequestError, OSError."""
    recipe, pixels = read_any(path)
    if recipe is None:
        raise RequestError(
            f"{path}: has no 'parvis' entry; only a PNG that parvis wrote can be made again, and only while no other "
            "program has saved it"
        )
    return recipe, pixels


def read_any(path: Path) -> tuple[Recipe | None, NDArray[np.uint8]]:
    """The pixels [H,W,3] of any image, and its recipe if parvis wrote it. Raises RequestError, OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a sheet may be large
            with Image.open(path) as image:
                image.load()
                text = getattr(image, "text", {}).get(CHUNK)
                pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RequestError(f"{path}: not a readable PNG ({error})") from error
    except OSError as error:
        if error.filename:
            raise
        raise RequestError(f"{path}: not a readable PNG ({error}); it may be truncated") from error  # Pillow's own
    if text is None:
        return None, pixels
    try:
        return _recipe(json.loads(text)), pixels
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:  # JSON here knows Infinity
        raise RequestError(
            f"{path}: its 'parvis' entry cannot be read ({error}); it may come from another version"
        ) from error


# -- the entry --------------------------------------------------------------------------------------------------------


def _entry(recipe: Recipe) -> dict[str, Any]:
    """The chunk's JSON."""
    token_type = "<u2" if recipe.tokens.max(initial=0) < 65536 else "<u4"
    return {
        "parvis": __version__,
        "bundle": {"name": recipe.bundle_name, "hash": recipe.bundle_hash},
        "columns": recipe.columns,
        "token_type": token_type,
        "images": [
            {
                "label": recipe.labels[i],
                "name": recipe.names[i],
                "seed": recipe.seeds[i],
                "settings": _settings_entry(recipe.settings[i]),
                "tokens": base64.b64encode(recipe.tokens[i].astype(token_type).tobytes()).decode(),
                **({} if recipe.kept is None else {"kept": _pack_bits(recipe.kept[i])}),
            }
            for i in range(len(recipe.labels))
        ],
        **({"pasted": True} if recipe.pasted else {}),
    }


def _recipe(entry: dict[str, Any]) -> Recipe:
    """The recipe of a chunk's JSON. Raises KeyError, IndexError, TypeError or ValueError where something is missing."""
    images = entry["images"]
    tokens = [np.frombuffer(base64.b64decode(i["tokens"]), entry["token_type"]).astype(np.int64) for i in images]
    return Recipe(
        bundle_name=str(entry["bundle"]["name"]),
        bundle_hash=str(entry["bundle"]["hash"]),
        columns=max(1, int(entry["columns"])),
        labels=[int(i["label"]) for i in images],
        names=[i.get("name") for i in images],
        seeds=[int(i["seed"]) for i in images],
        settings=[_settings(i["settings"]) for i in images],
        tokens=np.stack(tokens),
        kept=np.stack([_unpack_bits(i["kept"], len(tokens[0])) for i in images]) if "kept" in images[0] else None,
        pasted=bool(entry.get("pasted", False)),
    )


def _settings_entry(settings: Settings) -> dict[str, Any]:
    """The settings of one image. The guidance interval is left out where there is none, as it was in older files."""
    entry = asdict(settings)
    return {name: value for name, value in entry.items() if name != "guidance_interval" or value != -1}


def _settings(entry: dict[str, Any]) -> Settings:
    """The settings of one image. Raises ValueError where one is missing, or one is there that this version does not
    know.
    """
    names = {field.name for field in fields(Settings)}
    if entry.keys() | {"guidance_interval"} != names:
        raise ValueError(f"settings {', '.join(sorted(entry))}; expected {', '.join(sorted(names))}")
    return Settings(**entry)


def _pack_bits(bits: NDArray[np.bool_]) -> str:
    """``bits`` as base64, eight of them a byte."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _unpack_bits(text: str, count: int) -> NDArray[np.bool_]:
    """The ``count`` bits that _pack_bits wrote. Raises ValueError where there are more or fewer."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    if not count <= len(bits) < count + 8:
        raise ValueError(f"{len(bits)} bits for {count} tokens")
    return bits[:count].astype(bool)
