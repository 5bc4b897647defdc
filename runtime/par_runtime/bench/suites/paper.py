"""``parvis bench --suite paper``: the rows of the paper's Tables 2 and 3 and of its supplement, beside this device.

The paper's seconds are of an A100, batch 1; ours are of the device that the command runs on, so they stand in columns of
their own and are never divided by each other. What can be compared is a speed-up: over n = 1 on our engine, and over the
same model in eager PyTorch, both from the same run.

Weights are random where no bundle is given: speed does not depend on them. Every row is marked: *measured* (whole images),
*estimated* (some of an image's calls were measured, spread over it), or *left out* with the reason; the bound of this
device is printed for all. What other GPUs allow is predicted from data sheets, in a table of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from par_runtime.bench.limits import Limits
from par_runtime.bench.report.text import aligned, ms
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Shape
from par_runtime.cost import bound
from par_runtime.cost.bound import Prediction, named_shape, phases_of, predictions

VIDEO = "PAR-video"
IMAGE_GRID, VIDEO_GRID = (1, 24, 24), (5, 16, 16)
VIDEO_CODES, VIDEO_CLASSES = 64000, 101
#: From the smallest up, which is the order in which they are tried.
SIZES = ("PAR-L", "PAR-XL", VIDEO, "PAR-XXL", "PAR-3B")


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
    """A published row with what this device made of it. ``status``: "measured", "estimated" or "left out".

    ``why`` of a row that was left out. Seconds per image; ``bound_s`` of this device, without decoding where the bundle
    has no decoder; None where there is nothing to say.
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


def video_shape(n: int) -> Shape:
    """The video model's calls. The paper gives 792 M parameters and no widths; these are XL's blocks **(ours)**."""
    like = named_shape("PAR-XL", 1)
    sizes = (like.dim, like.n_layers, like.n_heads, like.head_dim, like.ffn_dim)
    return Shape(*sizes, VIDEO_CODES, phases_of(n, 1280))


def shape_of(published: Published) -> Shape:
    """The exact architecture of a row."""
    return video_shape(published.n) if published.model == VIDEO else named_shape(published.model, published.n)


def placed(
    rows: Sequence[Row], left_out: dict[str, str], limits: Limits | None, device: str, guided: bool = True
) -> list[PaperRow]:
    """Every published row, with the measured ``rows`` (phase "image") put where they belong.

    A row belongs to the published row of its model and n; its label says whose it is ("eager" or "compiled" in it is the
    baseline). ``left_out``: model, or "model n=N" -> why nothing of it was measured.
    """
    ours: dict[tuple[str, int], Row] = {}
    eager: dict[tuple[str, int], Row] = {}
    for image in rows:
        if image.phase == "image":
            (eager if "torch" in image.backend else ours)[name_of(image), image.n] = image
    out = []
    for p in PUBLISHED:
        row, base, twin = ours.get((p.model, p.n)), ours.get((p.model, 1)), eager.get((p.model, p.n))
        bound_s = None if row is None or row.bound_ms is None else row.bound_ms / 1e3
        if row is None and limits is not None:
            calls = bound.all_calls(shape_of(p), 1, guided, 4.0, 4.0)
            read = limits.read_gb_s(max(call.bytes for call in calls))
            bound_s = bound.bound(calls, read, limits.matrix_tflop_s).ms / 1e3
        why = left_out.get(f"{p.model} n={p.n}") or left_out.get(p.model) or "not asked for"
        seconds = None if row is None else row.median_ms / 1e3
        out.append(
            PaperRow(
                published=p,
                status="left out" if row is None else status(row),
                seconds=seconds,
                spread_s=None if row is None else row.spread_ms / 1e3,
                eager_s=None if twin is None else twin.median_ms / 1e3,
                eager_status="" if twin is None else status(twin),
                over_n1=None if row is None or base is None or p.n == 1 else base.median_ms / row.median_ms,
                over_eager=None if row is None or twin is None else twin.median_ms / row.median_ms,
                bound_s=bound_s,
                percent_of_bound=None if row is None else row.percent_of_bound,
                device=device,
                why=why if row is None else "",
            )
        )
    return out


def name_of(row: Row) -> str:
    """The paper's name for a row's model."""
    return VIDEO if row.grid[0] > 1 else row.model


def status(row: Row) -> str:
    """ "estimated" where only some calls of an image were made."""
    return "estimated" if "estimated" in row.marks else "measured"


def predicted(guided: bool = True) -> list[Prediction]:
    """What GPUs that are not here allow, for every model and n of the paper; once each."""
    out = []
    for p in {(p.model, p.n): p for p in PUBLISHED}.values():
        out += [q for q in predictions(shape_of(p), p.name, p.n, 1, guided) if q.gpu.startswith(("A100", "H100"))]
    return out


def as_dict(row: PaperRow) -> dict[str, object]:
    """For JSON lines; "kind" tells it from measured rows."""
    plain = asdict(row)
    return {"kind": "paper", **plain.pop("published"), **plain}


HEAD = (
    "table", "model", "n", "steps", "paper, A100", "here", "", "spread", "over n=1", "eager", "over eager", "bound", "of bound",
    "why left out",
)  # fmt: skip


def cells(rows: Sequence[PaperRow]) -> list[tuple[str, ...]]:
    """The table as text, the paper's columns left of ours; ``HEAD`` names the columns."""
    return [
        (
            row.published.table,
            row.published.name,
            str(row.published.n),
            str(row.published.steps),
            seconds(row.published.seconds),
            seconds(row.seconds),
            row.status,
            seconds(row.spread_s),
            times(row.over_n1),
            seconds(row.eager_s) + (" est." if row.eager_status == "estimated" else ""),
            times(row.over_eager),
            seconds(row.bound_s),
            "" if row.percent_of_bound is None else f"{row.percent_of_bound:.0f} %",
            row.why,
        )
        for row in rows
    ]


def paper_table(rows: Sequence[PaperRow]) -> str:
    """All rows as lines of text."""
    return "\n".join(aligned(HEAD, cells(rows)))


def notes(rows: Sequence[PaperRow]) -> list[str]:
    """What the table's columns are."""
    return [
        f"here is {rows[0].device}: seconds per guided image at batch 1, decoding included (video: to tokens).",
        "measured: whole images; estimated: from calls spread over an image; left out: not run, the last column says why.",
        "bound: the least that reading weights and keys, or multiplying, takes on this device by its measured limits "
        "(of rows left out: without decoding).",
        "The paper's seconds are another machine's and are not compared with ours; its compiled rows are the same models as "
        "those of Table 2, so they stand beside the same measurement.",
        "The video model's widths are not published; ours are XL's blocks with 64,000 codes, 896 M parameters for the paper's 792 M.",
    ]


def predicted_table(found: Sequence[Prediction]) -> str:
    """A line per model, a column per GPU."""
    gpus = list(dict.fromkeys(p.gpu for p in found))
    names = list(dict.fromkeys(p.bundle for p in found))
    by = {(p.bundle, p.gpu): p for p in found}
    body = [(name, "predicted", *(ms(by[name, gpu].bound_ms) for gpu in gpus), "") for name in names]
    title = "At least, by data sheet, fp16, guided, without decoding. No GPU was here: predicted, not measured."
    return "\n".join([title, *aligned(("model", "", *gpus, ""), body)])


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"
