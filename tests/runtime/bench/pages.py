"""The page of rows, checked: every tag is closed, and nothing is fetched."""

from __future__ import annotations

from html.parser import HTMLParser

from par_runtime.bench.report import page
from par_runtime.bench.rows import Row


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag


def shown_page(rows: list[Row], **more: object) -> str:
    given = {"predictions": [], "paper_rows": [], "compared": None} | more
    out = page.page(rows, **given)  # type: ignore[arg-type]
    checked = Checked()
    checked.feed(out)
    assert checked.open == []
    assert "://" not in out.replace("http://www.w3.org/2000/svg", "")
    return out
