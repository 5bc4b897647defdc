"""The paper's tables beside this device's times, as text; the paper's columns are left of ours."""

from __future__ import annotations

from collections.abc import Sequence

from par_runtime.bench.report.text import aligned
from par_runtime.bench.report.words import ms, number, percent
from par_runtime.bench.suites.paper import PaperRow
from par_runtime.cost.data_sheets import Prediction

HEAD = (
    "table", "model", "n", "steps", "paper, A100", "here", "", "spread", "over n=1", "eager", "over eager", "bound",
    "of bound", "marks", "why left out",
)  # fmt: skip


def cells(rows: Sequence[PaperRow]) -> list[tuple[str, ...]]:
    """The cells of the table as text; ``HEAD`` names the columns."""
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
            times(row.over_n1) or doubt(row.over_n1_doubt),
            seconds(row.eager_s) + (" est." if row.eager_status == "estimated" else ""),
            times(row.over_eager) or doubt(row.over_eager_doubt),
            seconds(row.bound_s),
            percent(row.percent_of_bound),
            ", ".join(row.marks),
            row.why if row.status == "left out" or not row.why else f"eager: {row.why}",
        )
        for row in rows
    ]


def paper_table(rows: Sequence[PaperRow]) -> str:
    """All rows as lines of text."""
    return "\n".join(aligned(HEAD, cells(rows)))


def notes(rows: Sequence[PaperRow]) -> list[str]:
    """What the columns of the table are, a sentence each."""
    return [
        f"here is {rows[0].device}: seconds per guided image at batch 1, decoding included (video: to tokens).",
        "measured: whole images; estimated: from calls spread over an image; left out: not run, the last column says "
        "why.",
        "over n=1, over eager: how many times as fast as n = 1 on the same backend, and as the same model in eager "
        "PyTorch. 'in doubt': no ratio, because a side is estimated from samples of a busy or throttled machine, or "
        "because the spread is larger than the difference or than half of a side.",
        "bound: the least that reading weights and keys, or multiplying, takes on this device by its measured limits "
        "(of rows left out: without decoding).",
        "The paper's seconds are another machine's and are not compared with ours; its compiled rows are the same "
        "models as those of Table 2, so they stand beside the same measurement.",
        "The video model's widths are not published; ours is of width 1536 with 21 layers, 791 M parameters for the "
        "paper's 792 M.",
    ]


def predicted_table(predictions: Sequence[Prediction]) -> str:
    """The predictions as a table with a line per model and a column per GPU."""
    gpus = list(dict.fromkeys(p.gpu for p in predictions))
    names = list(dict.fromkeys(p.bundle for p in predictions))
    by = {(p.bundle, p.gpu): p for p in predictions}
    body = [(name, "predicted", *(ms(by[name, gpu].bound_ms) for gpu in gpus), "") for name in names]
    title = "At least, by data sheet, fp16, guided, without decoding. No GPU was here: predicted, not measured."
    return "\n".join([title, *aligned(("model", "", *gpus, ""), body)])


def seconds(value: float | None) -> str:
    """Seconds in three digits; "" for None."""
    return "" if value is None else f"{number(value)} s"


def doubt(why: str) -> str:
    """The cell of a ratio that is not printed; "" for no reason."""
    return f"in doubt: {why}" if why else ""


def times(value: float | None) -> str:
    """How many times as fast, in two decimals; turned round and said where it is slower; "" for None."""
    if value is None:
        return ""
    return f"{value:.2f} x" if round(value, 2) >= 1 else f"{1 / value:.2f} x slower"
