"""What the report of a GPU measures, the most valuable first, and the figures that are to be reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from par_export.quantised import Codes
from par_model.config import PARConfig, VQConfig, named

EAGER, COMPILED = "eager", "compiled"
TWINS = (COMPILED, EAGER)  #: of a model in PyTorch, the more valuable first
CODES = (Codes("int8", 64), Codes("int4", 64))
CODES_N = 4  #: the n at which quantised weights are measured


@dataclass(frozen=True)
class Model:
    """A model of random weights. ``twins``: the n that are measured in PyTorch too.

    ``codes``: with quantised weights too, at n = :data:`CODES_N`. ``ours``: on our engines; else in PyTorch alone.
    ``shaped``: shapes of tiles are tried on it.
    """

    name: str
    config: PARConfig
    vq: VQConfig | None
    twins: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = (1, 4, 16)
    codes: tuple[Codes, ...] = ()
    ours: bool = True
    shaped: bool = True

    @property
    def labels(self) -> list[str]:
        """Its subjects on our kernels, the most valuable first."""
        plain = [label_of(self.name, n) for n in valuable_first(self.group_sizes)]
        return plain + [label_of(self.name, CODES_N, str(codes)) for codes in self.codes]

    def family(self, codes: Codes | None = None) -> str:
        """What the names of its bundles begin with, before "-n4": "PAR-L", "PAR-L-int8-g64" with quantised weights."""
        return self.name if codes is None else f"{self.name}-{codes.dtype}-g{codes.group}"


@dataclass(frozen=True)
class Block:
    """Subjects of one model that are measured in turns, in batches of ``images``. ``weight``: its part of the time.

    They are all of ours, or ``twins``: n and kind of those in PyTorch; ``last``: of the blocks that these are in.
    """

    model: Model
    images: int
    weight: float
    twins: tuple[tuple[int, str], ...] = ()
    last: bool = True

    @property
    def loads(self) -> bool:
        """Whether loading is timed, of n = 4 alone and after the others, which takes longer."""
        return self.model.ours and bool(self.model.twins) and self.images == 1

    @property
    def name(self) -> str:
        """For people: "PAR-L, batch 8", "PAR-L n=4 in PyTorch, batch 8"."""
        what = self.model.name if self.model.ours else f"{label_of(self.model.name, self.twins[0][0])} in PyTorch"
        return f"{what}, batch {self.images}"


@dataclass(frozen=True)
class Figure:
    """A figure to reach on an H100, batch 1, guided, fp16: ``what`` of the model at ``n`` compared with ``wanted``.

    "step": the share of the bound that a call reaches, at least; "image": seconds of a whole image, at most; "n=1",
    "eager", "compiled": how many times as fast as that, at least.
    """

    model: str
    n: int
    what: str
    wanted: float


MODELS = (
    Model("PAR-3B", named("3B"), VQConfig(), twins=(1, 4, 16), codes=CODES),
    Model("PAR-L", named("L"), VQConfig(), twins=(1, 4, 16), codes=CODES),
    Model("PAR-XL", named("XL"), VQConfig(), twins=(1, 4, 16)),
    Model("PAR-XXL", named("XXL"), VQConfig()),
    Model("PAR-L-256", named("L", grid=(1, 16, 16)), VQConfig(), shaped=False),  # its matrices are those of PAR-L
)
#: PyTorch alone, what every claim of speed is measured by.
BASELINES = (
    Model("PAR-3B", named("3B"), VQConfig(), twins=(1, 4, 16), ours=False),
    Model("PAR-L", named("L"), VQConfig(), twins=(1, 4, 16), ours=False),
    Model("PAR-XL", named("XL"), VQConfig(), twins=(1, 4, 16), ours=False),
)
#: Parts of the time that a model takes, roughly.
WEIGHTS = {"PAR-3B": 3.0, "PAR-L": 1.5, "PAR-XL": 1.5, "PAR-XXL": 2.5, "PAR-L-256": 0.7}
CODES_WEIGHT = 0.1  #: what one form with quantised weights adds to that, as a part of it
TWINS_WEIGHT = 1.0  #: of a model in PyTorch at one n: long images are estimated, so all n take about as long
BATCHES = (1, 8)
FIGURES = (
    Figure("PAR-3B", 4, "step", 0.78),
    Figure("PAR-3B", 16, "step", 0.78),
    Figure("PAR-XL", 4, "step", 0.65),
    Figure("PAR-L", 4, "step", 0.50),
    Figure("PAR-3B", 4, "image", 0.42),
    Figure("PAR-3B", 16, "image", 0.16),
    Figure("PAR-XL", 4, "image", 0.14),
    Figure("PAR-L", 4, "image", 0.075),
    Figure("PAR-3B", 4, "n=1", 3.6),
    Figure("PAR-3B", 16, "n=1", 9.5),
    Figure("PAR-L", 4, EAGER, 5.0),
    Figure("PAR-L", 4, COMPILED, 1.5),
    Figure("PAR-3B", 4, COMPILED, 1.3),
)


def blocks(models: Sequence[Model], batches: Sequence[int] = BATCHES) -> list[Block]:
    """All blocks in their order: every model on our engines in the first batch; then PyTorch, every model at one n,
    before the next n; then our engines in larger batches.

    PyTorch is measured in batches of 1 beside ours, alone in all.
    """
    ours = [[_of_ours(model, images) for model in models if model.ours] for images in batches]
    pytorch = []
    for n in valuable_first({n for model in models for n in model.twins}):
        twins = tuple((n, twin) for twin in TWINS)
        for model in (model for model in models if n in model.twins):
            own = [images for images in batches if images == 1 or not model.ours]
            alone = replace(model, ours=False)
            pytorch += [Block(alone, images, TWINS_WEIGHT, twins, images == own[-1]) for images in own]
    return [*ours[0], *pytorch, *(block for later in ours[1:] for block in later)]


def _of_ours(model: Model, images: int) -> Block:
    return Block(model, images, WEIGHTS.get(model.name, 1.0) * (1 + CODES_WEIGHT * len(model.codes)))


def shaped(models: Sequence[Model]) -> list[tuple[Model, int, Codes | None]]:
    """Model, n and weights of what shapes of tiles are tried on, the most valuable first.

    n = 1 is left out beside others: the two rows of a guided image are padded to 8, which n = 4 has.
    """
    plain: list[tuple[Model, int, Codes | None]] = []
    for model in (model for model in models if model.shaped):
        plain += [(model, n, None) for n in model.group_sizes if n != 1 or len(model.group_sizes) == 1]
    plain.sort(key=lambda one: one[1])  # n = 4 of all models before n = 16
    return plain + [(model, CODES_N, codes) for model in models if model.shaped for codes in model.codes]


def label_of(model: str, n: int, kind: str = "") -> str:
    """The name of a subject: "PAR-L n=4", "PAR-L n=4 eager", "PAR-L n=4 int8 group 64"."""
    return f"{model} n={n}{f' {kind}' if kind else ''}"


def parts_of(label: str) -> tuple[str, str, str]:
    """Model, n, and kind ("" for ours in fp16) of a label: what :func:`label_of` was given."""
    model, _, rest = label.partition(" n=")
    n, _, kind = rest.partition(" ")
    return model, n, kind


def valuable_first(group_sizes: Iterable[int]) -> list[int]:
    """n = 4 before 16 before 1, as the figures ask."""
    return sorted(group_sizes, key=lambda n: (n == 1, n))
