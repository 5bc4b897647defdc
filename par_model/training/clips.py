"""The clips that a video tokenizer is trained on, or that are encoded: one file of raw pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from par_model.system import naming
from par_model.training.files import InputError, regular, text_of
from par_model.training.raw import read_meta, read_pixels

RAW = ("clips.u8", "labels.u8", "meta.json")
EXPECTED = (
    f"expected a folder with {RAW[0]} (uint8 [count,frames,size,size,channels]), {RAW[1]} (uint8 [count]) and {RAW[2]} "
    "(count, frames, size, channels, class_names)"
)


def holds_clips(path: Path) -> bool:
    """Whether the folder ``path`` has the raw form of clips."""
    return (path / RAW[0]).is_file()


@dataclass(frozen=True)
class ClipFolder:
    """Clips of one size with their classes; ``clips`` is uint8 [count,T,size,size,channels], memory-mapped."""

    clips: np.ndarray
    labels: np.ndarray  #: [count] int
    class_names: list[str]

    @staticmethod
    def open(path: Path) -> ClipFolder:
        """Find the clips in the folder ``path``. Raises InputError, OSError."""
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; {EXPECTED}")
        try:
            meta = read_meta(path, "count", "frames", "size", "channels", names="class_names")
            count, frames, size, channels = (meta[key] for key in ("count", "frames", "size", "channels"))
            names = meta["class_names"]
            clips = read_pixels(path / "clips.u8", (count, frames, size, size, channels))
            with naming(path / "labels.u8"):
                labels = np.fromfile(regular(path / "labels.u8"), dtype=np.uint8)
        except (InputError, FileNotFoundError) as error:
            raise InputError(f"{path}: not the raw form of clips ({text_of(error)}); {EXPECTED}") from error
        if channels not in (1, 3):
            raise InputError(f"{path}: clips of {channels} channels; expected 3 (RGB) or 1 (grey)")
        if len(labels) != count or labels.max(initial=0) >= len(names):
            raise InputError(
                f"{path}: {count} clips, {len(labels)} labels up to {labels.max(initial=0)} and {len(names)} class "
                "names; make it again"
            )
        return ClipFolder(clips, labels, names)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def frames(self) -> int:
        """T, the frames of a clip."""
        return int(self.clips.shape[1])

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return int(self.clips.shape[2])

    @property
    def raw(self) -> np.ndarray:
        """The clips as one array."""
        return self.clips

    def pixels(self, index: np.ndarray) -> Tensor:
        """The clips at ``index`` [B]: [B,T,size,size,channels] uint8."""
        return torch.from_numpy(np.ascontiguousarray(self.clips[index]))

    def scaled(self, pixels: Tensor) -> Tensor:
        """[B,3,T,H,W] float32 in [0,1] of ``pixels`` [B,T,H,W,channels] uint8, on their device."""
        return pixels.float().div_(255).permute(0, 4, 1, 2, 3).expand(-1, 3, -1, -1, -1).contiguous()

    def batch(self, index: np.ndarray) -> Tensor:
        """The clips at ``index`` [B]: [B,3,T,H,W] float32 in [0,1]."""
        return self.scaled(self.pixels(index))
