"""``parvis bench --suite paper``: the rows of the paper's Tables 2 and 3 and of its supplement, beside this device.

The paper's seconds are those of an A100 at batch 1; ours are those of the device that the command runs on. So they have
columns of their own and are never divided by each other. Speed-ups can be compared: over n = 1 on the same backend, and
over the same model in eager PyTorch, both from the same run.

Weights are random if no bundle is given, because speed does not depend on them. Every row is marked: *measured* (whole
images), *estimated* (some of an image's calls were measured, spread over it), or *left out* with the reason. The bound
of this device is printed for all. What other GPUs allow is predicted from data sheets, in a table of its own.
``report/paper.py`` prints the tables, ``paper_run.py`` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from par_runtime.bench.limits import Limits
from par_runtime.bench.rows import Row
from par_runtime.cost.architecture import Architecture, named_architecture, phases_of
from par_runtime.cost.bound import bound
from par_runtime.cost.data_sheets import Prediction, predictions
from par_runtime.cost.work import image_work

VIDEO = "PAR-video"
IMAGE_GRID, VIDEO_GRID = (1, 24, 24), (5, 16, 16)
VIDEO_CODES, VIDEO_LAYERS = 64000, 21
#: In the order in which they are tried: images before video, the smallest first.
SIZES = ("PAR-L", "PAR-XL", "PAR-XXL", "PAR-3B", VIDEO)


@dataclass(frozen=True)
class Published:
    """A row of the paper: ``seconds`` per image or video on an A100 at batch 1; None where the paper has none."""

    table: str
    name: str
    model: str
    n: int
    steps: int
    seconds: float | None
    how: str = ""

    @property
    def tokens(self) -> int:
        """N, tokens of one image or video."""
        return 1280 if self.model == VIDEO else 576


TABLE_2, TABLE_3, SUPPLEMENT, OURS = "Table 2", "Table 3", "supplement", "not in the paper"
PUBLISHED = (
    Published(TABLE_2, "LlamaGen-L", "PAR-L", 1, 576, 12.58),
    Published(TABLE_2, "LlamaGen-XL", "PAR-XL", 1, 576, 18.66),
    Published(TABLE_2, "LlamaGen-XXL", "PAR-XXL", 1, 576, 24.91),
    Published(TABLE_2, "LlamaGen-3B", "PAR-3B", 1, 576, 12.41),
    Published(TABLE_2, "PAR-L-4x", "PAR-L", 4, 147, 3.38),
    Published(TABLE_2, "PAR-XL-4x", "PAR-XL", 4, 147, 4.94),
    Published(TABLE_2, "PAR-XXL-4x", "PAR-XXL", 4, 147, 6.84),
    Published(TABLE_2, "PAR-3B-4x", "PAR-3B", 4, 147, 3.46),
    Published(TABLE_2, "PAR-XXL-16x", "PAR-XXL", 16, 51, 2.28),
    Published(TABLE_2, "PAR-3B-16x", "PAR-3B", 16, 51, 1.31),
    Published(TABLE_3, "PAR-1x video", VIDEO, 1, 1280, 43.30),
    Published(TABLE_3, "PAR-4x video", VIDEO, 4, 323, 11.27),
    Published(TABLE_3, "PAR-16x video", VIDEO, 16, 95, 3.44),
    Published(SUPPLEMENT, "AR-3B, vLLM", "PAR-3B", 1, 576, 4.12, "vLLM"),
    Published(SUPPLEMENT, "PAR-3B-4x, compiled", "PAR-3B", 4, 147, 1.15, "compiled"),
    Published(SUPPLEMENT, "PAR-3B-16x, compiled", "PAR-3B", 16, 51, 0.43, "compiled"),
    Published(OURS, "PAR-L-16x", "PAR-L", 16, 51, None),
    Published(OURS, "PAR-XL-16x", "PAR-XL", 16, 51, None),
)


@dataclass(frozen=True)
class PaperRow:
    """A published row with the times of this device. ``status``: "measured", "estimated" or "left out".

    Seconds per image, or None. ``bound_s``: this device's bound, without decoding where the bundle has no decoder.
    ``why``: the reason of a row that was left out, or of an eager side that was. ``over_n1_doubt`` and
    ``over_eager_doubt``: why there is no such ratio although both sides were measured, or "". ``marks``: those of the
    row, and those of its eager side after "eager".
    """

    published: Published
    status: str
    seconds: float | None
    spread_s: float | None
    eager_s: float | None
    eager_status: str
    over_n1: float | None
    over_eager: float | None
    bound_s: float | None
    percent_of_bound: float | None
    device: str
    why: str = ""
    over_n1_doubt: str = ""
    over_eager_doubt: str = ""
    marks: tuple[str, ...] = ()


def video_architecture(n: int) -> Architecture:
    """The video model. The paper gives 792 M parameters and no widths; of its own widths 1536, PAR-XXL's, comes nearest
    with 21 layers, 791.4 M **(ours)**.
    """
    like = named_architecture("PAR-XXL", 1)
    sizes = (like.dim, VIDEO_LAYERS, like.n_heads, like.head_dim, like.ffn_dim)
    return Architecture(*sizes, VIDEO_CODES, phases_of(n, 1280))


def architecture_of(published: Published) -> Architecture:
    """The exact architecture of a row."""
    video = published.model == VIDEO
    return video_architecture(published.n) if video else named_architecture(published.model, published.n)


def paper_rows(
    rows: Sequence[Row], left_out: dict[str, str], limits: Limits | None, device: str, guided: bool = True
) -> list[PaperRow]:
    """Every published row, with the times of those measured ``rows`` (phase "image") that have its model and n.

    ``left_out``: model, or "model n=N" -> why nothing of it was measured.
    """
    ours: dict[tuple[str, int], Row] = {}
    eager: dict[tuple[str, int], Row] = {}
    for image in rows:
        if image.phase == "image":
            (eager if image.pytorch else ours)[name_of(image), image.n] = image
    out = []
    for p in PUBLISHED:
        row, n1, in_pytorch = ours.get((p.model, p.n)), ours.get((p.model, 1)), eager.get((p.model, p.n))
        bound_s = None if row is None or row.bound_ms is None else row.bound_ms / 1e3
        if row is None and limits is not None:
            work = image_work(architecture_of(p), 1, guided, 4.0, 4.0)
            read = limits.read_gb_s(max(call.bytes for call in work))
            bound_s = bound(work, read, limits.matrix_tflop_s).ms / 1e3
        over_n1, over_n1_doubt = times_as_fast(row, None if p.n == 1 else n1)
        over_eager, over_eager_doubt = times_as_fast(row, in_pytorch)
        why = left_out.get(f"{p.model} n={p.n}") or left_out.get(p.model) or "not asked for"
        seconds = None if row is None else row.median_ms / 1e3
        out.append(
            PaperRow(
                published=p,
                status="left out" if row is None else status(row),
                seconds=seconds,
                spread_s=None if row is None else row.spread_ms / 1e3,
                eager_s=None if in_pytorch is None else in_pytorch.median_ms / 1e3,
                eager_status="" if in_pytorch is None else status(in_pytorch),
                over_n1=over_n1,
                over_eager=over_eager,
                bound_s=bound_s,
                percent_of_bound=None if row is None else row.percent_of_bound,
                device=device,
                why=why if row is None else left_out.get(f"{p.model} n={p.n} eager", ""),
                over_n1_doubt=over_n1_doubt,
                over_eager_doubt=over_eager_doubt,
                marks=marks_of(row, in_pytorch),
            )
        )
    return out


def times_as_fast(row: Row | None, other: Row | None) -> tuple[float | None, str]:
    """How many times as fast ``row`` is as ``other``, or None and why the two do not tell it.

    An image that is estimated from disturbed samples is wrong by the whole disturbance times the calls that were not
    made. A spread above the difference, or above half of a side's own time, leaves the ratio open too.
    """
    if row is None or other is None:
        return None, ""
    for side in (row, other):
        disturbed = [mark for mark in ("busy", "throttled") if mark in side.marks]
        if disturbed and "estimated" in side.marks:
            return None, disturbed[0]
    widest = max(row.spread_ms, other.spread_ms)
    if widest > abs(row.median_ms - other.median_ms) or any(s.spread_ms > s.median_ms / 2 for s in (row, other)):
        return None, "spread"
    return other.median_ms / row.median_ms, ""


def marks_of(row: Row | None, eager: Row | None) -> tuple[str, ...]:
    """The marks of a row, each once, and those of its eager side; "estimated" has a place of its own."""
    ours = () if row is None else tuple(row.marks)
    theirs = () if eager is None else tuple(f"eager {mark}" for mark in eager.marks)
    return tuple(dict.fromkeys(mark for mark in (*ours, *theirs) if not mark.endswith("estimated")))


def name_of(row: Row) -> str:
    """The paper's name for a row's model."""
    return VIDEO if row.grid[0] > 1 else row.model


def status(row: Row) -> str:
    """ "estimated" where only some calls of an image were made."""
    return "estimated" if "estimated" in row.marks else "measured"


def predicted(guided: bool = True) -> list[Prediction]:
    """What A100 and H100 allow by data sheet, for every model and n of the paper, once each."""
    out = []
    for p in {(p.model, p.n): p for p in PUBLISHED}.values():
        out += [
            q for q in predictions(architecture_of(p), p.name, p.n, 1, guided) if q.gpu.startswith(("A100", "H100"))
        ]
    return out


def as_dict(row: PaperRow) -> dict[str, object]:
    """The row as a JSON object; its "kind" is "paper"."""
    plain = asdict(row)
    return {"kind": "paper", **plain.pop("published"), **plain}
