"""Bundles whose kernels are checked one by one: the shapes of the published models, one layer each, and odd ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from par_export.quantised import Codes
from par_export.random_bundle import VariedTensors, write_family
from par_model.config import PARConfig, VQConfig, named


@dataclass(frozen=True)
class Sample:
    """A bundle of varied random weights with n tokens per group, its engine's precision, and batches of ``images``.

    ``codes``: its matrices are quantised, as far as they have whole groups of rows.
    """

    name: str
    config: PARConfig
    vq: VQConfig | None
    n: int
    precision: str = "fp16"
    images: Sequence[int] = (1, 3)
    codes: Codes | None = None

    def write(self, folder: Path) -> Path:
        """Write the bundle; returns its path."""
        return write_family(
            self.config,
            [self.n],
            folder,
            name=self.name,
            precision=self.precision,
            vq=self.vq,
            tensors=VariedTensors,
            codes=self.codes,
        )[self.n]


ODD_VQ = VQConfig(codebook_size=1000, channels=96, channel_multipliers=(1, 2), res_blocks=1, z_channels=48)
#: Heads of 100, widths and codes that no tile divides; a codebook that does not fit into a block's registers.
ODD = PARConfig(dim=400, n_layers=2, n_heads=4, vocab_size=1000, n_classes=7, grid=(1, 12, 12))
#: Heads of 100 again, which a quantised wo takes padded to 104. Of groups of 128 rows only w2 has whole ones.
ODD_CODES = PARConfig(dim=800, n_layers=2, n_heads=8, vocab_size=1000, n_classes=7, grid=(1, 12, 12))
VIDEO = PARConfig(dim=128, n_layers=1, n_heads=2, vocab_size=64000, n_classes=5, grid=(1, 8, 8))
#: Some batches have 64 rows and more, for blocks of many rows: 64 and 256, and 90 and 192, which do not fill theirs.
SAMPLES = (
    Sample("odd", ODD, ODD_VQ, 4),
    Sample("odd-bf16", ODD, None, 9, "bf16", images=(1, 5)),
    Sample("L-layer", replace(named("L"), n_layers=1), VQConfig(), 4, images=(1,)),
    Sample("L-layer-16", replace(named("L"), n_layers=1), None, 16, images=(6,)),
    Sample("3B-layer", replace(named("3B"), n_layers=1), None, 16, images=(1, 8)),
    Sample("video-codes", VIDEO, None, 1),
    Sample("odd-int4", ODD_CODES, None, 4, codes=Codes("int4", 32)),
    Sample("odd-int8", ODD_CODES, None, 9, "bf16", codes=Codes("int8", 128)),
    Sample("3B-layer-int8", replace(named("3B"), n_layers=1), None, 4, images=(1, 8), codes=Codes("int8", 64)),
    Sample("3B-layer-int4", replace(named("3B"), n_layers=1), None, 4, images=(1, 8), codes=Codes("int4", 64)),
)
