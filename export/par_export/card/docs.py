"""The figures in ``docs``: made of the rows in ``docs/gpu/*.jsonl``, never written by hand.

``python -m par_export.card.docs docs`` (``make gpu-docs``) writes them; a test compares them byte by byte.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from par_export.card.again import again
from par_runtime.bench.report.output import write_text
from par_runtime.errors import RequestError
from par_runtime.system import explain, write_beside

PAGE, FIGURE, ROWS = "gpu.md", "gpu.svg", "gpu/*.jsonl"
BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"
NOTHING = "Not run yet: no card, no driver, no date, no commit."


def made(docs: Path) -> tuple[str, str]:
    """The page and the SVG of the rows in the folder ``docs``; :data:`NOTHING` and "" without any.

    Raises RequestError.
    """
    files = sorted(docs.glob(ROWS))
    if not files:
        return NOTHING, ""
    outcome = again(files)
    return outcome.page, outcome.figure()


def with_page(text: str, page: str) -> str:
    """``text`` with ``page`` between its two marks. Raises RequestError where it has not each of them once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RequestError(
            f"{PAGE}: expected {BEGIN} once, and below it {END} once; write them where the page is to be"
        )
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{page}\n\n{END}{rest.partition(END)[2]}"


def differences(docs: Path) -> list[str]:
    """What in ``docs`` is not what its rows say, a sentence each."""
    page, svg = made(docs)
    text, drawn = _text_of(docs / PAGE), docs / FIGURE
    found = []
    if text.count(BEGIN) + text.count(END) == 0 and page == NOTHING:
        pass  # no rows, and no place for them
    elif with_page(text, page) != text:
        found.append(f"{PAGE}: what stands between {BEGIN} and {END} is not what the rows say; run 'make gpu-docs'")
    if (drawn.read_bytes().decode() if drawn.exists() else "") != svg:
        found.append(f"{FIGURE}: not what the rows say; run 'make gpu-docs'")
    return found


def _text_of(page: Path) -> str:
    """The text of the page, its ends of lines as they are. Raises RequestError, OSError."""
    try:
        return page.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{page}: is no text in UTF-8 (byte {error.start}); save it in UTF-8") from error


def write(docs: Path) -> None:
    """Write the page and the figure of the rows in ``docs``. Raises RequestError, OSError."""
    page, svg = made(docs)
    text = with_page(_text_of(docs / PAGE), page)
    write_beside(docs / PAGE, partial(write_text, text))
    if svg:
        write_beside(docs / FIGURE, partial(write_text, svg))
    else:
        (docs / FIGURE).unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    """Write the figures of the folder ``argv[0]``; exit code 2 where its rows or its page are no good."""
    if len(argv) != 1 or not (Path(argv[0]) / PAGE).is_file():
        given = f"{argv[0]} has no {PAGE}" if len(argv) == 1 else f"{len(argv)} folders were given"
        print(f"parvis: error: {given}; expected one folder with {PAGE}: docs", file=sys.stderr)
        return 2
    try:
        write(Path(argv[0]))
    except RequestError as error:
        print(f"parvis: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"parvis: error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
