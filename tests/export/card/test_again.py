"""A GPU's report made again from its files of rows, several of them as one page, and the figures in docs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench.subjects import one_row

from par_export.card import docs
from par_export.card.again import again
from par_export.card.findings import Findings
from par_export.card.plan import label_of
from par_runtime.bench.machine import Machine
from par_runtime.bench.rows import Row, to_json
from par_runtime.cli import dispatch as cli

SVG = "{http://www.w3.org/2000/svg}"
DOCS = Path(__file__).parents[3] / "docs"
EARLY, LATE = "2026-02-01T10:05:00Z", "2026-02-03T12:00:00Z"
LIMIT = {"kind": "limit", "name": "copy bandwidth", "unit": "GB/s", "value": 2950.0, "spread": 1.5, "how": "copies"}
CHECKS = [
    {"kind": "check", "name": "demo: logits", "passed": True, "text": "ok", "error": 1e-3, "allowed": 4e-3},
    {"kind": "check", "name": "demo: memory", "passed": False, "text": "it grows"},
]


def machine(gpu: str = "H100", driver: str = "580.1") -> Machine:
    return Machine("a CPU", 16, None, None, "Linux", None, gpu, driver, 80 * 10**9, 1980.0, None)


def subject(
    label: str, seconds: float, on: Machine, date: str = EARLY, commit: str = "aaaa", least: float = 0.25
) -> list[Row]:
    """The rows of a subject: the group phase is nine tenths of an image, which takes ``least`` seconds at least."""
    rows = []
    for phase, part in (("group", 0.9), ("image", 1.0)):
        samples = [1e3 * part * seconds * (1 + 0.001 * i) for i in range(-2, 3)]
        n = int(label.partition(" n=")[2].split()[0])
        row = one_row(samples, label, phase, n=n, precision="fp16", computes="fp16", threads=None)
        bound = 1e3 * part * least
        row = replace(row, suite="gpu", machine=on, date=date, commit=commit, bound_ms=bound)
        rows.append(replace(row, percent_of_bound=100 * bound / row.median_ms, calls=10, call_ms=row.median_ms / 10))
    return rows


def report(
    path: Path, rows: Sequence[Row], date: str = "2026-02-01 10:00 UTC", on: Machine | None = None, commit: str = "aaaa"
) -> Path:
    """The file of a report with these rows."""
    found = Findings(on or machine(), commit, date, 7.5, rows, [*CHECKS, LIMIT], ["tensorrt-rtx: time"], ("kernels",))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in (*map(to_json, rows), *map(json.dumps, found.others))))
    return path


def line_of(page: str, *texts: str) -> list[str]:
    """The cells of the only line of the page's tables that begins so."""
    (line,) = (line for line in page.splitlines() if line.startswith("| " + " | ".join(texts) + " |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(page: str, title: str) -> str:
    return page.partition(f"### {title}\n")[2].partition("\n### ")[0]


def test_the_page_begins_with_what_ran(tmp_path: Path) -> None:
    page = again([report(tmp_path / "a.jsonl", subject("PAR-3B n=4", 0.4, machine()))]).page
    assert page.startswith("## GPU report\n\n### Runs\n\n| file | card |")
    assert line_of(page, "a.jsonl") == [
        "a.jsonl", "H100", "580.1", "2026-02-01 10:00 UTC", "aaaa", "kernels", "1 of 2", "2", "1, see below"
    ]  # fmt: skip
    assert "- a.jsonl: H100 (80 GB, 1980 MHz at the start); a CPU, 16 cores; 7.5 minutes." in page
    assert "| demo | 1 of 2 | 25 % of the allowed |\n| demo: memory | WRONG | it grows |" in page


def test_of_what_two_files_hold_the_later_counts_whatever_their_order(tmp_path: Path) -> None:
    old = report(tmp_path / "z.jsonl", [*subject("PAR-3B n=4", 0.5, machine()), *subject("PAR-3B n=1", 2.0, machine())])
    rows = subject("PAR-3B n=4", 0.4, machine(), LATE, "bbbb")
    new = report(tmp_path / "a.jsonl", rows, "2026-02-03 11:00 UTC", commit="bbbb")
    outcome = again([new, old])
    assert outcome.page == again([old, new]).page
    assert [row.median_ms for row in outcome.rows if row.phase == "image"] == pytest.approx([400, 2000])
    page = section(outcome.page, "Rows")
    assert line_of(page, "a.jsonl", "PAR-3B n=4")[3:5] == ["400 ms", "0.8 ms"]
    assert "5.00 x (other commit)" in line_of(page, "a.jsonl", "PAR-3B n=4")
    assert (
        "- PAR-3B n=4, batch 1 (group, image): measured twice; the later counts, "
        f"a.jsonl of {LATE}, commit bbbb, not z.jsonl of {EARLY}, commit aaaa." in page
    )
    assert "| PAR-3B n=4 | times as fast as n = 1 | at least 3.6 | 5.00 (other commit) | reached |" in outcome.page
    assert "1.25" not in section(outcome.page, "Seconds per image")


def test_rows_of_different_drivers_are_not_compared(tmp_path: Path) -> None:
    ours = report(tmp_path / "ours.jsonl", subject("PAR-L n=4", 0.05, machine()))
    other = machine(driver="590.7")
    torch = report(tmp_path / "torch.jsonl", subject("PAR-L n=4 eager", 0.5, other), on=other)
    outcome = again([ours, torch])
    assert line_of(section(outcome.page, "Seconds per image"), "PAR-L n=4")[5:7] == ["not run", "other driver"]
    assert "| at least 5 | not compared: other driver |  |" in outcome.page
    assert "10.00 x" not in outcome.page
    assert "10.00 x" not in outcome.figure()


def test_cards_stand_apart_and_the_figure_is_of_one(tmp_path: Path) -> None:
    files = []
    for name, factor in (("H100", 1.0), ("H200", 0.5)):
        labels = ("PAR-3B n=4", "PAR-3B n=16", "PAR-3B n=4 eager")[: 3 if name == "H100" else 1]
        rows = [row for label in labels for row in subject(label, factor, machine(name), LATE)]
        files.append(report(tmp_path / f"{name}.jsonl", rows, on=machine(name)))
    outcome = again(files)
    assert "1000 ms" in section(outcome.page, "Rows: H100")
    assert "500 ms" in section(outcome.page, "Rows: H200")
    assert "2.00 x" not in outcome.page
    svg = outcome.figure()
    assert "Seconds per image on H100" in svg
    assert "Measured too, not shown: H200." in svg
    assert "0.5" not in ElementTree.fromstring(svg).findtext(f"{SVG}desc", "")


@pytest.mark.parametrize("cut", [0, 30])
def test_what_was_left_of_a_run_is_taken_as_far_as_it_goes(tmp_path: Path, cut: int) -> None:
    file = report(tmp_path / "rows.jsonl.part", subject("PAR-3B n=4", 0.4, machine()))
    stopped = json.dumps({"kind": "stopped", "why": "the run had not ended when this was written"}) + "\n"
    text = file.read_text() + stopped
    file.write_text(text[: len(text) - cut])
    page = again([file]).page
    assert line_of(page, "rows.jsonl.part")[7] == "2"
    if cut:
        assert "- rows.jsonl.part breaks off in its last line, which is left out." in page
        assert "- rows.jsonl.part is what was left when its run ended." in page
    else:
        assert "holds a part of a report: the run had not ended when this was written." in page


def test_a_file_of_before_there_was_a_line_of_the_run(tmp_path: Path) -> None:
    file = report(tmp_path / "a.jsonl", [])
    lines = [line for line in file.read_text().splitlines() if '"kind": "run"' not in line]
    file.write_text("\n".join(lines))  # the last line is whole without a line feed too
    page = again([file]).page
    assert line_of(page, "a.jsonl")[1:5] == ["H100", "580.1", "2026-02-01 10:00 UTC", "aaaa"]
    assert "breaks off" not in page


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [report(tmp_path / day / "rows.jsonl", subject("PAR-L n=4", 0.1, machine())) for day in ("mon", "tue")]
    page = again(files).page
    assert "| mon/rows.jsonl | H100" in page
    assert "| tue/rows.jsonl | H100" in page
    assert str(tmp_path) not in page


GOOD = to_json(subject("PAR-L n=4", 0.1, machine())[0])
CHECK = json.dumps(CHECKS[1] | {"gpu": "H100", "driver": "580.1", "commit": "aaaa", "date": "2026-02-01 10:00 UTC"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "bad.jsonl: missing"),
        ("", "bad.jsonl: holds no line of a GPU's report"),
        ('{"kind": "predicted"}\n', "bad.jsonl: holds no line of a GPU's report"),
        ("no\n" + GOOD + "\n", "bad.jsonl, line 1: not valid JSON"),
        ("[1]\n", "bad.jsonl, line 1: not a line of a GPU's report (the file is [1]; expected an object)"),
        (GOOD.replace('"gpu", "phase"', '"batch", "phase"') + "\n", "suite is 'batch'; expected 'gpu'"),
        (
            re.sub(r'"median_ms": [\d.]+', '"median_ms": 1.0', GOOD) + "\n",
            "median_ms is 1.0; expected that of samples_ms",
        ),
        (
            GOOD + "\n" + CHECK.replace("aaaa", "bbbb") + "\n",
            "lines of two runs (H100, driver 580.1, commit aaaa; H100",
        ),
        (CHECK.replace("false", '"no"') + "\n", "passed is 'no'; expected true or false"),
        (CHECK.replace('"text"', '"words"') + "\n", "no entry 'text'"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_code_2(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    if text is not None:
        file.write_text(text)
    assert cli.main(["bench", "--suite", "gpu", "--from", str(file)]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    (line,) = out.err.splitlines()
    assert str(file) in line
    assert message in line
    assert "expected lines of 'parvis bench --suite gpu --json FILE'" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json", "x.jsonl"], "--from measures nothing, so --json means nothing to it"),
        (["--minutes", "3"], "--from measures nothing, so --minutes means nothing to it"),
        (["--batches", "1"], "--from measures nothing, so --batches means nothing to it"),
        (["--svg", "FILE"], "is a file of --from, and would be lost"),
        (["--from", "FILE"], "given twice; give each file once"),
        (["--suite", "phases"], "--from is for --suite gpu"),
    ],
)
def test_what_means_nothing_to_it_is_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = report(tmp_path / "a.jsonl", subject("PAR-L n=4", 0.1, machine()))
    before = file.read_bytes()
    given = [str(file) if word == "FILE" else word for word in more]
    demo = [str(DOCS.parent / "models/demo")] if "phases" in more else []
    assert cli.main(["bench", *demo, "--suite", "gpu", "--from", str(file), *given]) == 2
    assert message in capsys.readouterr().err
    assert file.read_bytes() == before


# -- the figure -------------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}text"))


@pytest.mark.parametrize(
    "seconds", [(2.2, 0.55, 0.39, 0.31), (0.4, 0.4, 0.4, 0.4), (9.0, 1.0, 0.99, 0.98), (0.3, 0.31, 0.32, 0.33)]
)
def test_names_beside_marks_do_not_cover_each_other(tmp_path: Path, seconds: tuple[float, ...]) -> None:
    *kinds, least = seconds
    rows = []
    for model, factor in (("PAR-3B", 1.0), ("PAR-XL", 0.3), ("PAR-L", 0.02)):
        for n in (1, 4, 16):
            for kind, value in zip(("eager", "compiled", ""), kinds, strict=True):
                rows += subject(label_of(model, n, kind), factor * value / n, machine(), least=factor * least / n)
    svg = again([report(tmp_path / "a.jsonl", rows)]).figure()
    columns = [each for each in texts(svg) if each.attrib["x"] in ("700", "780", "852") and not each.get("class")]
    assert len(columns) == 9 * 3
    assert all(len(each.text or "") < 13 for each in columns)
    marks = [each for each in texts(svg) if each.get("class", "").startswith("of-")]
    assert len(marks) == 9 * 4
    lanes: dict[str, list[tuple[float, float]]] = {}
    for each in marks:
        half = 6.0 * len(each.text or "") / 2
        lanes.setdefault(each.attrib["y"], []).append((float(each.attrib["x"]) - half, float(each.attrib["x"]) + half))
    for boxes in lanes.values():
        (_, end), (begin, _) = sorted(boxes)
        assert end < begin
        assert min(min(boxes)) > 100
        assert max(max(boxes)) < 620


def test_what_was_not_measured_is_said_in_the_figure_and_in_its_table(tmp_path: Path) -> None:
    rows = [*subject("PAR-3B n=4", 0.4, machine()), *subject("PAR-L n=1 compiled", 0.2, machine())]
    rows = [
        replace(row, flags=(*row.flags, "estimated: from 9 calls")) if "L n=1" in row.label else row for row in rows
    ]
    outcome = again([report(tmp_path / "a.jsonl", rows)])
    described = ElementTree.fromstring(outcome.figure()).findtext(f"{SVG}desc", "").split("; ")
    assert described[1] == "PAR-3B n = 4: ours 0.4, bound 0.25"
    assert described[6] == "PAR-L n = 1: compiled 0.2 (estimated), bound 0.25"
    assert [line.partition(": ")[2] for line in described].count("not run") == 7
    shown = [each.text for each in texts(outcome.figure())]
    assert shown.count("not run") == 7 + 2
    assert "ours not run" in shown
    assert "H100, driver 580.1; 2026-02-01; commit aaaa; 5 repetitions." in shown
    table = section(outcome.page, "Seconds per image")
    assert line_of(table, "PAR-3B n=4")[1:] == ["not run", "not run", "0.4", "0.25", "not run", "not run", "62 %", ""]
    assert line_of(table, "PAR-XL n=16")[1:5] == ["not run"] * 4


def test_the_figure_needs_nothing_else_and_has_its_own_dark_colours(tmp_path: Path) -> None:
    svg = again([report(tmp_path / "a.jsonl", [])]).figure()
    assert "prefers-color-scheme:dark" in svg
    assert "script" not in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert [each.text for each in texts(svg)].count("not run") == 9


# -- the figures in docs ----------------------------------------------------------------------------------------------


def test_no_figure_in_docs_differs_from_its_rows() -> None:
    assert docs.differences(DOCS) == []


def test_figures_in_docs_that_no_row_says_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figure = tmp_path / "gpu.md", tmp_path / "gpu.svg"
    around = f"# A GPU\n\n{docs.BEGIN}\n\n{{}}\n\n{docs.END}\n\nMore.\n"
    page.write_text(around.format("ours takes 0.1 s"))
    assert len(docs.differences(tmp_path)) == 1  # no row at all
    assert docs.main([str(tmp_path)]) == 0
    assert page.read_text() == around.format(docs.NOTHING)
    assert docs.differences(tmp_path) == []
    rows = report(tmp_path / "gpu" / "a.jsonl", subject("PAR-3B n=4", 0.4, machine()))
    assert len(docs.differences(tmp_path)) == 2
    assert docs.main([str(tmp_path)]) == 0
    assert docs.differences(tmp_path) == []
    assert cli.main(["bench", "--suite", "gpu", "--from", str(rows)]) == 0
    assert page.read_text() == around.format(capsys.readouterr().out.rstrip("\n"))
    page.write_text(page.read_text().replace("400 ms", "399 ms"))
    assert [text.partition(":")[0] for text in docs.differences(tmp_path)] == ["gpu.md"]
    assert docs.main([str(tmp_path)]) == 0
    figure.write_text(figure.read_text().replace("ours 0.4", "ours 0.3"))
    assert [text.partition(":")[0] for text in docs.differences(tmp_path)] == ["gpu.svg"]
    rows.unlink()
    assert len(docs.differences(tmp_path)) == 2


def test_a_page_without_a_place_for_the_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu.md").write_text("# A GPU\n")
    assert docs.differences(tmp_path) == []
    report(tmp_path / "gpu" / "a.jsonl", subject("PAR-3B n=4", 0.4, machine()))
    assert docs.main([str(tmp_path)]) == 2
    assert "gpu.md: expected <!-- rows:begin --> once" in capsys.readouterr().err
    (tmp_path / "gpu.svg").write_text("a figure")
    with pytest.raises(Exception, match="expected <!-- rows:begin --> once"):
        docs.differences(tmp_path)


HOSTILE = "x |\n# H\n<!-- rows:end --> \x1b[31m \u202e <script>"


def test_texts_of_a_file_end_nothing_and_move_no_terminal(tmp_path: Path) -> None:
    """Twice: what they would have put into the page once would be refused the second time."""
    rows = subject("PAR-3B n=4", 0.4, machine())
    path = report(tmp_path / "docs" / "gpu" / "a.jsonl", rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in ("text", "name", "how", "unit", "date"):
            if line.get("kind") in ("check", "limit", "left_out", "note") and name in line:
                line[name] = HOSTILE
    lines.append(
        {key: lines[-1][key] for key in ("gpu", "driver", "commit", "date")} | {"kind": "note", "text": HOSTILE}
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "docs" / "gpu.md"
    page.write_bytes(b"# A\r\n<!-- rows:begin --><!-- rows:end -->\r\nz\r\n")
    for _ in range(2):
        assert docs.main([str(tmp_path / "docs")]) == 0
    made = page.read_bytes().decode()
    assert docs.differences(tmp_path / "docs") == []
    assert made.endswith("\r\nz\r\n")
    assert made.count(docs.END) == made.count(docs.BEGIN) == 1
    assert not set(made) & {"\x1b", "\u202e"}
    assert "- x | # H <! -- rows:end -- > \\x1b[31m \\u202e <script>" in made


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "0 folders"), (["a", "b"], "2 folders"), (["none"], "none has no gpu.md")]
)
def test_the_docs_need_one_folder(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_page_that_is_no_text_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "gpu.md"
    page.write_bytes(b"ab\xff")
    assert docs.main([str(tmp_path)]) == 2
    assert "is no text in UTF-8 (byte 2)" in capsys.readouterr().err
    assert page.read_bytes() == b"ab\xff"


def test_figures_to_reach_judge_no_other_card(tmp_path: Path) -> None:
    for card, reached in (("NVIDIA H100 80GB HBM3", "reached"), ("NVIDIA H200", "")):
        on = machine(card)
        page = again([report(tmp_path / f"{reached}.jsonl", subject("PAR-3B n=4", 0.4, on), on=on)]).page
        assert f"| PAR-3B n=4 | a whole image | at most 0.42 s | 400 ms | {reached} |" in page


def test_a_hard_link_of_a_file_of_rows_is_that_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = report(tmp_path / "a.jsonl", subject("PAR-3B n=4", 0.4, machine())), tmp_path / "b.svg"
    link.hardlink_to(path)
    before = path.read_bytes()
    assert cli.main(["bench", "--suite", "gpu", "--from", str(path), "--svg", str(link)]) == 2
    assert "is a file of --from, and would be lost" in capsys.readouterr().err
    assert link.read_bytes() == before


def test_the_page_says_that_ours_and_pytorch_took_no_turns_with_each_other(tmp_path: Path) -> None:
    ours, eager = (subject(f"PAR-L n=4{kind}", seconds, machine()) for kind, seconds in (("", 0.1), (" eager", 0.7)))
    said = "- over eager, over compiled: the two sides took no turns with each other. PyTorch's rows are measured some"
    rows = section(again([report(tmp_path / "a.jsonl", [*ours, *eager])]).page, "Rows")
    assert said in rows
    assert "7.00 x" in rows
    for alone in (ours, eager):
        assert said not in again([report(tmp_path / "b.jsonl", alone)]).page
