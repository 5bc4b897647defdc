"""Make the committed bundles ``tests/data/tiny`` and ``tests/data/small``: ``python tests/data/make_tiny.py``.

Needs the export extra. ``small`` has widths that the C step takes, multiples of 32; their tokenizer is the same.

Weights come from the golden recipe (a tensor depends on its key and shape alone), so the bundle is reproducible.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from par_export.bundle import ExportRequest, export
from par_model.config import PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel

HERE = Path(__file__).parent
NAMES = ["red fox", "arctic fox", "otter", "sea otter", "grey whale", "tree frog"]
TINY = PARConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, n_classes=len(NAMES), grid=(1, 8, 8), group_size=4)
MODELS = {"tiny": TINY, "small": replace(TINY, dim=32)}
TOKENIZER = VQConfig(
    codebook_size=64, codebook_dim=4, channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8, norm_groups=4
)


def main() -> None:
    spec = importlib.util.spec_from_file_location("recipe", HERE.parent / "golden" / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            key: value if key == "quantize.codebook_used" else torch.from_numpy(recipe.weight(key, tuple(value.shape)))
            for key, value in model.state_dict().items()
        }

    defaults = {"guidance": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = Path(folder) / "model.pt", Path(folder) / "tokenizer.pt"
        torch.save({"model": weights(VQModel(TOKENIZER)), "config": asdict(TOKENIZER)}, tokenizer)
        for name, config in MODELS.items():
            torch.save({"model": weights(PAR(config)), "config": asdict(config), "class_names": NAMES}, model)
            export(ExportRequest(model, tokenizer, HERE / name, "fp16", defaults=defaults, force=True))


if __name__ == "__main__":
    main()
