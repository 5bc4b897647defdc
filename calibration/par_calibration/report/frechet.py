"""How far two sets of generated images are apart, in features of the bundle's own encoder.

The features are not those of the published FID (Inception's): they are what the encoder gives before it takes the
nearest code, a unit vector of ``codebook_dim`` numbers for each token, averaged over each quarter of the image: 32
numbers for codes of 8. So colours, layout and what a region is made of count; what an object is, hardly. Few numbers,
because the covariance of some hundred images is known no better. Of clips they are the numbers that the encoder rounds,
averaged over each quarter of the first and of the last latent frame, so that where something moves to counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_runtime.arguments import cpu_threads
from par_runtime.bundle import WEIGHTS, Bundle
from par_runtime.dtypes import Float
from par_runtime.system import naming
from par_runtime.tokenizer import chunk_images

Double = NDArray[np.float64]
FEATURES = "the bundle's own encoder: the mean, over each quarter of the image, of the unit vectors before quantisation"
CLIP_FEATURES = (
    "the bundle's own encoder: the mean, over each quarter of the first and of the last latent frame, of what is "
    "rounded to levels"
)
SPLITS = 200  #: random halves for the noise floor


class Features:
    """The encoder of a bundle with the vectors before quantisation as its output.

    Raises CalibrationError where the graph is not as an export writes it.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        import onnx
        import onnxruntime as ort

        from par_runtime.backends.ort.sessions import session_options

        self.bundle = bundle
        threads = cpu_threads(threads)
        path = bundle.path / bundle.graphs["encoder"].file
        model = onnx.load(str(path), load_external_data=False)
        vectors = _rounded(model, path) if bundle.video else _vectors(model, path)
        self.name = CLIP_FEATURES if bundle.video else FEATURES
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(vectors, onnx.TensorProto.FLOAT, None))
        options = session_options(threads)
        with naming(bundle.path / WEIGHTS):
            weights = np.memmap(bundle.path / WEIGHTS, np.uint8, mode="r")
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        del options  # it points into the mapping

    def of(self, images: NDArray[np.uint8]) -> Double:
        """The features [M,F] of ``images`` [M,H,W,3], or of clips [M,T,H,W,3]."""
        size = chunk_images(self.bundle, encoder=True)
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        return np.concatenate([self._pooled(self._session.run(None, {"images": part})[0]) for part in parts])

    def _pooled(self, vectors: Float) -> Double:
        """The mean over each quarter of vectors [B,h*w,c]: [B,4c]; of those of clips, [B*t,c,h,w], [B,8c]."""
        t, h, w = self.bundle.grid
        if self.bundle.video:
            assert self.bundle.tokenizer is not None
            levels = np.array(self.bundle.tokenizer["levels"])
            numbers = vectors.astype(np.float64) / (levels // 2).reshape(-1, 1, 1)
            ends = numbers.reshape(-1, t, *numbers.shape[1:])[:, [0, -1]]
            return _quarters(ends.transpose(0, 1, 3, 4, 2).reshape(-1, h, w, len(levels))).reshape(len(ends), -1)
        return _quarters(vectors.astype(np.float64).reshape(len(vectors), h, w, -1))


def _vectors(model: Any, path: Path) -> str:
    """The name of the unit vectors in an encoder of images. Raises CalibrationError."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    nearest = next((node for node in model.graph.node if node.op_type == "ArgMax"), None)
    product = None if nearest is None else made_by.get(nearest.input[0])
    if product is None or product.op_type != "MatMul":
        raise CalibrationError(f"{path}: has no product with the codebook before its ArgMax; export the bundle again")
    return str(product.input[0])


def _rounded(model: Any, path: Path) -> str:
    """The name of the numbers that an encoder of clips rounds. Raises CalibrationError."""
    rounds = [node.input[0] for node in model.graph.node if node.op_type == "Round"]
    if len(rounds) != 1:
        raise CalibrationError(f"{path}: has {len(rounds)} nodes Round, expected 1; export the bundle again")
    return str(rounds[0])


def _quarters(grid: Double) -> Double:
    """The mean over each quarter of vectors [B,h,w,c]: [B,4c]."""
    halves = [(slice(None, size // 2), slice(size // 2, None)) for size in grid.shape[1:3]]
    return np.concatenate([grid[:, a, b].mean((1, 2)) for a in halves[0] for b in halves[1]], axis=1)


def distance(one: Double, other: Double) -> float:
    """The Frechet distance of two sets of features [M,F], taken as normal: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("nan")
    means = one.mean(0) - other.mean(0)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = _root(first)
    # The trace of (C C')^(1/2) is that of the symmetric matrix (C^(1/2) C' C^(1/2))^(1/2): no complex numbers.
    middle = np.linalg.eigvalsh(root @ second @ root)
    trace = np.sqrt(np.clip(middle, 0, None)).sum()
    return float(max(0.0, means @ means + np.trace(first) + np.trace(second) - 2 * trace))


def floor(one: Double, other: Double, labels: Sequence[int], seed: int) -> tuple[float, float]:
    """Mean and 95th percentile of the distance between random halves of both sets [M,F], which are of one model.

    ``labels`` [M]: the classes, the same in both sets. Halves have as many images of each class as the sets do.
    """
    both = np.concatenate([one, other])
    classes = np.concatenate([labels, labels])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SPLITS):
        first = np.zeros(len(both), bool)
        for label in set(labels):
            mine = rng.permutation(np.flatnonzero(classes == label))
            first[mine[: len(mine) // 2]] = True
        found.append(distance(both[first], both[~first]))
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def _root(matrix: Double) -> Double:
    values, vectors = np.linalg.eigh(matrix)
    root: Double = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
