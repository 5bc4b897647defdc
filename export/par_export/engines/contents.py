"""What a builder must know of a bundle: the configurations in its manifest, and where the weights of its graphs lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import WeightTable
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.manifest import ManifestError, config_from_manifest, read_manifest, tokenizer_from_manifest
from par_runtime.bundle import Bundle
from par_runtime.checked import shown
from par_runtime.errors import BundleError
from par_runtime.loaded import check_scales
from par_runtime.manifest import step_shapes
from par_runtime.quantised import MOST_CODE, SCALE
from par_runtime.video_shapes import CODEBOOK, decoder_shapes


def step_weights(bundle: Bundle) -> WeightTable:
    """Where the weights of the step network lie.

    Raises BundleError where one is missing or of another shape, or a scale is not positive.
    """
    table = WeightTable.read(bundle.path / bundle.graphs["group"].file)
    embed = table.entries.get("embed")
    rows = embed.shape[0] if embed is not None and len(embed.shape) == 2 else 0
    ids = [entry for phase in bundle.phases for entry in phase.inputs if isinstance(entry, int)]
    if rows <= max(bundle.vocab_size - 1, bundle.no_class, bundle.class_base + bundle.n_classes - 1, *ids):
        raise BundleError(f"{bundle.path}: its graphs have {rows} embeddings, too few; export the bundle again")
    shapes = {**step_shapes(bundle.model, bundle.n_tokens), "embed": (rows, bundle.model["dim"])}
    _check_shapes(bundle, table, shapes | _scale_shapes(bundle, table, shapes))
    check_scales(bundle, table.entries)
    return table


def _scale_shapes(
    bundle: Bundle, table: WeightTable, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of the scales of each quantised matrix. Raises BundleError for one that the manifest does not have."""
    scales: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        dtype = table.entries[name].dtype if name in table.entries else ""
        if dtype not in MOST_CODE:
            continue
        stored = bundle.weights.get(name)
        if bundle.calibration is None or stored is None or stored.dtype != dtype:
            raise BundleError(
                f"{bundle.path}: {name} is {dtype} in its graphs and "
                f"{'nowhere' if stored is None else stored.dtype} in its manifest; make the bundle again"
            )
        scales[name + SCALE] = (shape[0] // bundle.calibration.group, shape[1])
    return scales


def decoder_weights(bundle: Bundle, vq: VQConfig | VideoTokenizerConfig) -> WeightTable:
    """Where the weights of the decoder lie. Raises BundleError where its codebook is another, or a tensor of a video
    tokenizer.
    """
    table = WeightTable.read(bundle.path / bundle.graphs["decoder"].file)
    if isinstance(vq, VideoTokenizerConfig):
        shapes = decoder_shapes(asdict(vq))
    else:
        shapes = {CODEBOOK: (bundle.vocab_size, vq.codebook_dim)}
    _check_shapes(bundle, table, {PREFIX + name: shape for name, shape in shapes.items()})
    return table


def _check_shapes(bundle: Bundle, table: WeightTable, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        stored = table.entries.get(name)
        if stored is None or stored.shape != shape:
            raise BundleError(
                f"{bundle.path}: {name} has shape {shown(None if stored is None else stored.shape)} in its graphs, "
                f"expected {shape}; export the bundle again"
            )


def step_config(bundle: Bundle) -> PARConfig:
    """The configuration of the step network and of the order of its tokens, from the manifest. Raises BundleError."""
    try:
        return config_from_manifest(read_manifest(bundle.path))
    except ManifestError as error:
        raise BundleError(f"{bundle.path}: {error}") from error


def tokenizer_config(bundle: Bundle) -> VQConfig | VideoTokenizerConfig:
    """The configuration of the tokenizer, from the manifest. Raises BundleError where the bundle has none."""
    try:
        vq = tokenizer_from_manifest(read_manifest(bundle.path))
    except ManifestError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    if vq is None:
        raise BundleError(f"{bundle.path}: its manifest names no tokenizer; export the bundle again")
    return vq
