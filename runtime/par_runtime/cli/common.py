"""What the verbs of ``parvis`` share: errors as one line, common options, the progress bar, names of files."""

from __future__ import annotations

import argparse
import errno
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.engines import has_engines
from par_runtime.bundle import Bundle, Verify
from par_runtime.errors import BundleError, CudaError, RequestError
from par_runtime.request import class_index

MOST_IMAGES = 100_000  # of one command: all are held in memory until they are written


def guarded(work: Callable[[], int]) -> int:
    """Run ``work``; every expected failure becomes one line and exit code 2."""
    try:
        return work()
    except (BundleError, RequestError) as error:
        message = str(error)
    except PermissionError as error:
        message = f"no permission for {error.filename}; choose another place or change its permissions"
    except BrokenPipeError:  # who reads the output has enough of it: no error, see cli.main
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"no space left on the disk{f' of {error.filename}' if error.filename else ''}; nothing was half-written"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            message = str(error)
    except MemoryError as error:
        message = f"not enough memory for this batch; give a smaller --batch{f' ({error})' if str(error) else ''}"
    except CudaError as error:
        message = str(error)
    print(f"parvis: error: {message}", file=sys.stderr)
    return 2


class Bar:
    """A progress bar over model calls on stderr, as an ``on_step`` callback; silent when asked or not on a terminal."""

    def __init__(self, silent: bool) -> None:
        self._bar: Any = None
        self._silent = silent or not sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._silent:
            return
        if self._bar is None:
            from tqdm import tqdm  # 20 ms, for terminals only

            self._bar = tqdm(total=total, unit="call", leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def classes_of(bundle: Bundle, labels: list[str]) -> list[int]:
    """Class indices of the command line's labels; "all" is every class."""
    each = [range(bundle.n_classes) if label == "all" else [class_index(bundle, label)] for label in labels]
    return [index for indices in each for index in indices]


def columns_of(classes: int, count: int, scales: int) -> int:
    """Images per row: a row per guidance scale; else several labels side by side, or a near-square of one."""
    if scales > 1:
        return classes * count
    if classes == 1:
        return math.ceil(math.sqrt(count))
    # Labels in rows of `count` each would be tall and thin; two or three labels share a row until it is about square.
    per_row = max(1, round(math.sqrt(classes * count) / count))
    return count * min(per_row, classes)


def unchecked(bundle: Bundle) -> Verify:
    """What is still to be checked of an opened bundle: its engines' plans, if it has any."""
    return "auto" if has_engines(bundle) else "none"


def file_name(bundle: Bundle, label: int) -> str:
    """The class as a part of a file name on any system."""
    return safe_name(str(label) if bundle.class_names is None else bundle.class_names[label].split(", ")[0]) or str(
        label
    )


def safe_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def save_tokens(path: Path, tokens: NDArray[np.int64]) -> None:
    with path.open("wb") as f:  # a file object, because np.save would add .npy to the name
        np.save(f, tokens)


def add_sampling(p: argparse.ArgumentParser) -> None:
    """How tokens are drawn, but for guidance, of which some verbs take several."""
    p.add_argument("--temperature", type=float, help="default: the bundle's")
    p.add_argument("--top-k", type=int, help="keep the k most probable codes, 0 keeps all (default: the bundle's)")
    p.add_argument(
        "--top-p", type=float, help="keep the most probable codes up to this mass, 1 keeps all (default: the bundle's)"
    )
    p.add_argument("--greedy", action="store_true", help="always the most probable code; no noise")


def add_common(p: argparse.ArgumentParser) -> None:
    """Where it runs, and how much it says."""
    p.add_argument(
        "--device",
        default="auto",
        help="'auto': TensorRT if the bundle holds an engine for this GPU, else the CPU (default); 'cpu'; 'cpu-ort': "
        "ONNX Runtime there even where the C kernels could run; 'cuda' or 'cuda:1': "
        "TensorRT on that GPU; 'cuda-ort': ONNX Runtime on it",
    )
    p.add_argument(
        "--capture",
        choices=["image", "call", "none"],
        default="image",
        help="how a GPU is fed: one graph launch per image (default), one per call, or plain launches",
    )
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="no progress bar, no text")
