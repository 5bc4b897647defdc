"""The report as lines for a terminal, in plain words."""

from __future__ import annotations

from par_calibration.report.budget import LIMITS
from par_calibration.report.layers import worst
from par_calibration.report.result import BOTH, COSTS, Report, Side


def table(report: Report) -> list[str]:
    """Every measure with its limit, then what each part costs."""
    like = report.likelihoods[BOTH]
    lines = [
        f"original   {side_text(report.original)}",
        f"candidate  {side_text(report.candidate)}",
        f"images     {report.images} {'real images' if report.real else 'images, none of them real'}: "
        f"{report.images_from}",
        "",
    ]
    limits = report.budget.limits
    for key, value in report.measures().items():
        limit = LIMITS[key]
        allowed = limits.get(key)
        verdict = "no limit"
        if allowed is not None:
            bound = f"{'at least' if limit.least else 'at most'} {limit.text(allowed)}"
            verdict = f"{bound:<18}{'ok' if limit.within(value, allowed) else 'BEYOND THE BUDGET'}"
        lines.append(f"{limit.name:<48}{limit.text(value):>10}   {verdict}")
    lines += [
        "",
        f"{'nats per token of the images':<48}{like.original:>10.4f} -> {like.candidate:.4f}{_interval(report)}",
    ]
    for cost, name in COSTS.items():
        one = report.agreement(cost=cost)
        if one is not None:
            lines.append(
                f"{name:<48}{100 * one.top1:>9.2f} %   same code, KL {one.kl:.3g} nats, worst {one.kl_worst:.3g}"
            )
    layer = worst(report.layers)
    if layer is not None:
        lines.append(f"{'worst layer':<48}{100 * layer.relative_error:>9.2f} %   {layer.name}, {layer.phase}")
    if report.drawn is not None:
        d = report.drawn
        lines.append(
            f"{'tokens until the first that differs':<48}{d.median:>10g}   median of {d.images} images of {d.n_tokens} "
            f"tokens, {d.identical} identical"
        )
    if report.frechet is not None:
        f = report.frechet
        lines.append(
            f"{'distance of generated sets':<48}{f.distance:>10.3g}   the original's own: {f.other_seeds:.3g}, "
            f"halves up to {f.floor_p95:.3g}"
        )
    return lines + [""] * bool(report.notes) + [f"note: {note}" for note in report.notes]


def side_text(side: Side) -> str:
    """A bundle in one line: how it is stored, and in what it ran."""
    kept = f", kept {', '.join(side.kept)}" if side.kept else ""
    group = f", group {side.group}" if side.group else ""
    return (
        f"{side.name}: {side.weights}{group}{kept}, {side.megabytes:.1f} MB; {side.arithmetic} arithmetic, "
        f"{side.cache} cache{'' if side.decoder_precision == 'fp32' else f', decoder in {side.decoder_precision}'} "
        f"({side.backend})"
    )


def _interval(report: Report) -> str:
    like = report.likelihoods[BOTH]
    if like.low is None or like.high is None:
        return ""
    return f" (change of the log-likelihood {like.change:+.5f}, 95 % interval {like.low:+.5f} to {like.high:+.5f})"
