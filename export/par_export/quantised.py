"""A bundle with quantised matrices, made of one that was exported: streamed, checked against PyTorch, renamed once.

Which codes and scales a matrix gets is the caller's decision (``par_calibration``); :func:`nearest` is the plain one.
Everything else of the weights file is copied byte for byte. The graphs are written again, since they name the places
of their tensors, and read quantised matrices through ``DequantizeLinear``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from par_export.errors import ExportError, ParityError
from par_export.graphs.decoder import HALF_DECODER
from par_export.graphs.sampling import SamplingVariant
from par_export.parts import SELFTEST_GUIDANCE, Tokenizer, architecture_entries, write_graphs, write_manifest
from par_export.restored import StoredState, StoredWeights, stored_table
from par_export.staging import staging
from par_export.weights import TORCH_DTYPE, WeightsWriter
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig
from par_model.manifest import ManifestError, config_from_manifest, read_manifest, tokenizer_from_manifest
from par_runtime import __version__
from par_runtime.backends.base import image_shape
from par_runtime.bundle import HELDOUT, MANIFEST, WEIGHTS, Bundle, seal
from par_runtime.checked import Mismatch
from par_runtime.dtypes import DTYPE, Float
from par_runtime.errors import BundleError
from par_runtime.manifest import KEPT, check, matrices_of
from par_runtime.manifest_video import FIRST, NEXT
from par_runtime.quantised import LEAST_CODE, MOST_CODE, SCALE, Quantised
from par_runtime.system import naming, utf8_name

#: Entries of the manifest's ``parity`` that are about the tokenizer, which quantising does not change.
TOKENIZER_PARITY = ("decoder", HALF_DECODER, FIRST, NEXT, "encoder")
#: name, matrix [K,N] -> its codes and scales, or None where it stays as it is stored.
Quantise = Callable[[str, NDArray[np.float32]], Quantised | None]


@dataclass(frozen=True)
class Codes:
    """How the matrices of a bundle are quantised: ``dtype`` "int8" or "int4", a scale for each ``group`` rows."""

    dtype: str
    group: int

    def __str__(self) -> str:
        return f"{self.dtype} group {self.group}"

    def calibration(self, kept: Sequence[str], source: str) -> dict[str, Any]:
        """The manifest's ``calibration`` of a bundle that is quantised so and in which nothing else was changed.

        ``kept``: the matrices that are not quantised; ``source``: the hash of the bundle that it was made from.
        """
        return {
            "weights": self.dtype,
            "group": self.group,
            "kept": list(kept),
            "arithmetic": "fp32",
            "cache": "fp32",
            "source": source,
            "report": {},
        }


def nearest(matrix: Float, dtype: str, group: int, stored: str = "float16") -> Quantised:
    """``matrix`` [K,N] rounded to the nearest codes of ``dtype``; a block has the least scale that cuts nothing off.

    ``group`` divides K: see :func:`can_quantise`. Scales are rounded to the dtype ``stored``, and codes are rounded
    against these.
    """
    k, n = matrix.shape
    blocks = matrix.reshape(k // group, group, n)
    scales = stored_scales(full_scale(blocks, dtype, 1), stored)
    return Quantised(dtype, rounded(blocks, scales[:, None], dtype).reshape(k, n), scales)


def full_scale(values: Float, dtype: str, axis: int) -> Float:
    """The least scale along ``axis`` with which the codes of ``dtype`` reach every one of ``values``."""
    highest, lowest = values.max(axis), values.min(axis)
    return np.maximum(highest / np.float32(MOST_CODE[dtype]), lowest / np.float32(LEAST_CODE[dtype]))


def rounded(values: Float, scales: Float, dtype: str) -> NDArray[np.int8]:
    """The codes nearest to ``values`` with ``scales``, which broadcast."""
    return np.clip(np.rint(values / scales), LEAST_CODE[dtype], MOST_CODE[dtype]).astype(np.int8)


def stored_scales(scales: Float, stored: str) -> Float:
    """``scales`` as numbers of the dtype ``stored``, in fp32. They are positive: engines take no scale of zero."""
    dtype = TORCH_DTYPE[stored]
    least = torch.finfo(dtype).smallest_normal if stored != "float16" else 2.0**-24
    rounded = torch.from_numpy(np.asarray(scales, np.float32)).to(dtype).float()
    return rounded.clamp(least, torch.finfo(dtype).max).numpy()


def can_quantise(shape: tuple[int, ...], dtype: str, group: int) -> bool:
    """Whether a matrix of ``shape`` [K,N] has whole groups of rows, and columns that fill whole bytes."""
    return shape[0] % group == 0 and (dtype != "int4" or shape[1] % 2 == 0)


def write_bundle(
    bundle: Bundle,
    out: Path,
    quantise: Quantise,
    calibration: Mapping[str, Any],
    *,
    force: bool = False,
    decide: Callable[[Bundle], Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = print,
    gate: bool = True,
    name: str | None = None,
) -> Path:
    """Write the bundle ``out`` that is ``bundle`` with quantised matrices; returns its path.

    ``quantise(name, matrix)`` is asked for each matrix [K,N] in turn, one is in memory at a time; None keeps it as it
    is stored. ``calibration``: entries of the manifest's ``calibration``, at least ``weights`` and ``group`` ("kept",
    0 where no matrix is quantised). ``gate``: compare with PyTorch over the dequantised weights, and make the
    self-test's tokens; a bundle of random weights has neither. ``decide`` gets the finished bundle before it appears at
    ``out``; it returns more entries of ``calibration``, or raises, and then nothing appears. ``name``: of the bundle
    (default: that of ``bundle``).

    Raises ExportError, OutputError, ParityError, BundleError, ValueError for codes that do not fit ``calibration``,
    OSError, and what ``quantise`` and ``decide`` raise.
    """
    started = time.monotonic()
    check_source(bundle)
    if utf8_name(out.absolute()) is None:
        raise ExportError(
            f"--out {out}: its path is not UTF-8, and ONNX Runtime opens no other files; give another --out"
        )
    manifest, config, vq = _contents(bundle)
    source = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))
    random = not bundle.selftest["labels"]
    with staging(out, force) as folder:
        weights = WeightsWriter(folder / WEIGHTS)
        try:
            kept = _write_weights(weights, source, config, quantise, calibration, DTYPE[bundle.precision])
        finally:
            weights.close()
        sampling = cast(SamplingVariant, bundle.graphs["group"].sampling)
        dtype = DTYPE[bundle.precision]
        graphs = write_graphs(folder, config, vq, weights, dtype, sampling, "encoder" in bundle.graphs)
        if HALF_DECODER in graphs and HALF_DECODER not in bundle.graphs:
            (folder / graphs.pop(HALF_DECODER)["file"]).unlink()
        say(f"graphs and weights written after {time.monotonic() - started:.1f} s")
        if HELDOUT in bundle.files:
            shutil.copyfile(bundle.path / HELDOUT, folder / HELDOUT)
        checked: dict[str, Any] = {
            "parity": {"random_weights": True} if random else {},
            "selftest": {"labels": [], "guidance": SELFTEST_GUIDANCE, "tokens": []},
        }
        if gate and not random:
            checked = _gate(bundle, folder, config, weights)
        own = {"arithmetic": "fp32", "cache": "fp32", "report": {}} | dict(calibration)
        own |= {"kept": [] if calibration["weights"] == KEPT else kept, "source": bundle.hash}
        # Nothing was checked by a library, and none changes what is written: engines that were built on another machine
        # fit then.
        created = {} if gate else {"created": {"parvis": __version__}}
        entries = created | {
            name: manifest.get(name) for name in ("name", "precision", "defaults", "class_names", "class_synsets")
        }
        if name is not None:
            entries["name"] = name
        architecture = architecture_entries(config, vq, graphs, bundle.model["parameters"], weights)
        write_manifest(folder, entries | architecture | checked | {"calibration": own})
        if decide is not None:
            _merge(folder, decide(Bundle.open(folder, verify="none")))
    before, after = ((path / WEIGHTS).stat().st_size / 1e6 for path in (bundle.path, out))
    say(f"{out}: weights of {after:.1f} MB ({before:.1f} MB before)")
    return out


def check_source(bundle: Bundle) -> None:
    """Raise ExportError for a bundle whose matrices are quantised already: rounding twice would only lose more."""
    if bundle.quantised is not None and bundle.calibration is not None:
        raise ExportError(
            f"{bundle.path}: its weights are {bundle.quantised} already; give the bundle that it was made from "
            f"(hash {bundle.calibration.source[:12]})"
        )


def _contents(bundle: Bundle) -> tuple[dict[str, Any], PARConfig, Tokenizer | None]:
    try:
        manifest = read_manifest(bundle.path)
        return manifest, config_from_manifest(manifest), tokenizer_from_manifest(manifest)
    except ManifestError as error:
        raise BundleError(f"{bundle.path}: {error}") from error


def _write_weights(
    weights: WeightsWriter,
    source: StoredWeights,
    config: PARConfig,
    quantise: Quantise,
    calibration: Mapping[str, Any],
    dtype: str,
) -> list[str]:
    """Stream the tensors of ``source`` into ``weights``; returns the names of the matrices that stay as they are."""
    matrices = set(matrices_of(config.n_layers))
    kept = []
    for name, at in source.table.entries.items():
        quantised = quantise(name, source.tensor(name).float().numpy()) if name in matrices else None
        if quantised is None:
            weights.add_bytes(name, at.dtype, at.shape, source.parts(name))
            kept += [name] if name in matrices else []
            continue
        _check_fits(name, quantised, at.shape, calibration, dtype)
        weights.add_bytes(name, quantised.dtype, at.shape, [quantised.code_bytes()])
        weights.add(name + SCALE, [torch.from_numpy(quantised.scales)], dtype)
    return kept


def _check_fits(
    name: str, quantised: Quantised, shape: tuple[int, ...], calibration: Mapping[str, Any], dtype: str
) -> None:
    """Raise ValueError where codes or scales of the matrix ``name`` are not what ``calibration`` says."""
    wanted = (calibration["weights"], shape, (shape[0] // max(1, calibration["group"]), shape[1]))
    got = (quantised.dtype, quantised.codes.shape, quantised.scales.shape)
    if got != wanted or shape[0] % calibration["group"]:
        raise ValueError(f"{name}: dtype, codes and scales are {got}; the calibration needs {wanted}")
    if not np.array_equal(stored_scales(quantised.scales, dtype), quantised.scales):
        raise ValueError(f"{name}: its scales are not positive numbers of {dtype}; round them before the codes")


def _gate(bundle: Bundle, folder: Path, config: PARConfig, weights: WeightsWriter) -> dict[str, Any]:
    """The manifest's ``parity`` and ``selftest``: the step graphs against PyTorch, the others against the source's."""
    from par_export.gate import model  # here: a bundle of random weights, which has no gate, needs no ONNX Runtime

    state = StoredState(config, StoredWeights(weights.path, weights))
    guidance = float(bundle.selftest["guidance"])
    checked = model.gate(folder, config, Checkpoint(bundle.path, state), weights, guidance=guidance, stored=True)
    _compare_tokenizer(bundle, folder, config)
    checked["parity"] |= {name: bundle.parity[name] for name in TOKENIZER_PARITY if name in bundle.parity}
    return checked


def _compare_tokenizer(bundle: Bundle, folder: Path, config: PARConfig) -> None:
    """Decoder and encoder read the same numbers at other places, so their results are the same, bit for bit.

    The graphs of one latent frame read the numbers of the whole decoder. Raises ParityError.
    """
    from par_export.gate.runner import session

    if bundle.image_size is None:
        return
    rng = np.random.default_rng(1)
    inputs = {
        "decoder": ("tokens", rng.integers(0, config.vocab_size, (1, config.n_tokens))),
        "encoder": ("images", rng.integers(0, 256, (1, *image_shape(bundle)), np.uint8)),
    }
    for graph, (name, values) in inputs.items():
        if graph not in bundle.graphs:
            continue
        places = (bundle.path / bundle.graphs[graph].file, folder / f"{graph}.onnx")
        before, after = (session(path).run(None, {name: values})[0] for path in places)
        if not np.array_equal(before, after):
            raise ParityError(
                f"{graph}.onnx: computes something else than the one in {bundle.path}. Nothing was published; this is "
                "a bug in the export, please report it"
            )


def _merge(folder: Path, more: Mapping[str, Any]) -> None:
    """Add entries to the manifest's ``calibration``, and seal it again. Raises ExportError, OSError."""
    with naming(folder / MANIFEST):
        manifest = json.loads((folder / MANIFEST).read_text())
    manifest = seal(manifest | {"calibration": manifest["calibration"] | dict(more)})
    try:
        check(manifest)
    except Mismatch as error:
        raise ExportError(f"{MANIFEST} would not be readable: {error}") from error
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def quantised_with(dtype: str, group: int, stored: str, kept: Collection[str] = ()) -> Quantise:
    """A ``quantise`` of :func:`write_bundle`: :func:`nearest` of every matrix that allows it and is not ``kept``."""

    def quantise(name: str, matrix: Float) -> Quantised | None:
        if name in kept or not can_quantise(matrix.shape, dtype, group):
            return None
        return nearest(matrix, dtype, group, stored)

    return quantise
