"""The sizes of a model that decide what a call costs: of a bundle, a checkpoint, or a published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from par_runtime.bundle import Bundle, Phase
from par_runtime.cost.decoder import count_decoder, count_video_decoder

#: name -> width, layers, heads, FFN width of the published models (V = 16384, 1000 classes).
NAMED = {
    "PAR-B": (768, 12, 12, 2048),
    "PAR-L": (1024, 24, 16, 2816),
    "PAR-XL": (1280, 36, 20, 3584),
    "PAR-XXL": (1536, 48, 24, 4096),
    "PAR-3B": (3200, 24, 32, 8704),
}


@dataclass(frozen=True)
class Architecture:
    """The sizes that bytes and operations follow from. ``head_dim`` is the padded one, as engines and kernels store it.

    ``decoder_operations`` are those of one image; both decoder numbers are 0 where there is no decoder.
    """

    dim: int
    n_layers: int
    n_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    phases: tuple[Phase, ...]
    decoder_parameters: int = 0
    decoder_operations: int = 0

    @property
    def calls(self) -> int:
        """Model calls per image."""
        return sum(phase.repeat for phase in self.phases)

    @property
    def n_tokens(self) -> int:
        """N, tokens per image."""
        return sum(phase.repeat * phase.query for phase in self.phases)

    @property
    def step_parameters(self) -> int:
        """Parameters that a call reads: all but the embedding table, of which it reads a few rows."""
        inner = self.n_heads * self.head_dim
        layer = self.dim * 3 * inner + inner * self.dim + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.n_layers * layer + self.dim + self.dim * self.vocab_size

    @property
    def cache_numbers(self) -> int:
        """Numbers of the key-value cache that one token of one row takes: a key and a value in every layer."""
        return 2 * self.n_layers * self.n_heads * self.head_dim

    @staticmethod
    def of(bundle: Bundle) -> Architecture:
        """The bundle's model and its decoder, where it has one."""
        architecture = Architecture.of_model(bundle.model, bundle.phases)
        if bundle.tokenizer is None:
            return architecture
        count = count_video_decoder if bundle.video else count_decoder
        parameters, operations = count(bundle.tokenizer, bundle.grid)
        return replace(architecture, decoder_parameters=parameters, decoder_operations=operations)

    @staticmethod
    def of_model(m: Mapping[str, int], phases: Sequence[Phase]) -> Architecture:
        """From the manifest's entry ``model``; without a decoder."""
        sizes = (m["dim"], m["n_layers"], m["n_heads"], m["head_dim_padded"], m["ffn_dim"], m["vocab_size"])
        return Architecture(*sizes, tuple(phases))


def phases_of(n: int, n_tokens: int) -> tuple[Phase, ...]:
    """The phases of a model that no bundle describes: n + N/n - 1 calls. ``inputs`` are left empty."""
    each = [("prefill", 1, 1), ("sequential", 1, n - 1), ("transition", n, 1), ("group", n, n_tokens // n - 2)]
    phases, position = [], 0
    for name, query, repeat in each:
        phases.append(Phase(name, query, repeat, position, ()))
        position += query * repeat
    return tuple(phases)


def named_architecture(
    name: str, n: int, n_tokens: int = 576, vocab_size: int = 16384, pad_heads_to: int = 8
) -> Architecture:
    """A published model ("PAR-XL") with n tokens per group, its heads padded as bundles pad them. Raises KeyError."""
    dim, layers, heads, ffn = NAMED[name]
    head_dim = -(-(dim // heads) // pad_heads_to) * pad_heads_to
    return Architecture(dim, layers, heads, head_dim, ffn, vocab_size, phases_of(n, n_tokens))


def model_name(architecture: Architecture) -> str:
    """ "PAR-L" if the architecture is a published one, else its width and number of layers."""
    for name, (dim, layers, heads, _) in NAMED.items():
        if (architecture.dim, architecture.n_layers, architecture.n_heads) == (dim, layers, heads):
            return name
    return f"width {architecture.dim}, {architecture.n_layers} layers"
