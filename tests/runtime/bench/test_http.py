"""The suite ``http``: real servers, what is asked of them, and that none outlives the bench."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from bench.pages import shown_page
from bench.servers import ended, started_servers
from bench.subjects import MACHINE, one_row, subject_info
from kinds import SMALL, TINY
from sharing import until

from conftest import child
from par_runtime.bench.measure import Repetitions, Setting
from par_runtime.bench.report import text
from par_runtime.bench.report.compare import compare
from par_runtime.bench.report.compare import text as compared
from par_runtime.bench.rows import Row, from_plain, read, to_json
from par_runtime.bench.subjects.base import Sample
from par_runtime.bench.subjects.clients import Client
from par_runtime.bench.subjects.served import NEEDS, NOT_OVER_HTTP, ServedSubject
from par_runtime.bench.suites.http import load_rows
from par_runtime.bench.suites.serve import SHARES
from par_runtime.cli.dispatch import EXTRAS, main
from par_runtime.errors import how_to_install

on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads states of processes in /proc")


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of all servers that a test starts."""
    return started_servers(monkeypatch)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What clients ask for."""
    real, found = Client.get, list[str]()

    def get(self: Client, path: str) -> bytes:
        content = real(self, path)
        found.append(path)
        return content

    monkeypatch.setattr(Client, "get", get)
    return found


# -- the command ------------------------------------------------------------------------------------------------------


ARGUMENTS = ["--suite", "http", "--device", "cpu", "--threads", "1"]


def test_the_command_with_every_file_and_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pids: list[int], paths: list[str]
) -> None:
    """The precision that is asked for is the server's too, or it would be refused."""
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    more = ["--cache", "bf16", "--batches", "3", "1", "--requests", "4", "--repetitions", "2"]
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["bench", str(SMALL), *ARGUMENTS, *more, *outputs]) == 0
    rows = read(files["json"])
    assert [(row.suite, row.phase, row.clients) for row in rows] == [
        ("http", "http", count) for count in (1, 3, None, None, None)
    ]
    assert [len(row.samples_ms) for row in rows] == [8, 8, 4, 4, 4]
    most = max(row.images_per_s or 0.0 for row in rows[:2])
    assert [row.offered_per_s for row in rows[2:]] == pytest.approx([share * most for share in SHARES])
    assert {(row.images, row.threads, row.guided, row.excluded) for row in rows} == {(8, 1, True, NOT_OVER_HTTP)}
    assert all("few repetitions" in row.marks for row in rows[:2])
    assert all(row.bound_ms is None for row in rows)
    assert all(row.peak_bytes is None or row.peak_bytes > 10**7 for row in rows)
    assert all("bf16 cache" in row.version for row in rows if row.backend == "native-cpu")
    assert [line["clients"] for line in csv.DictReader(files["csv"].read_text().splitlines())] == ["1", "3", "", "", ""]
    assert "<h2>Over HTTP: latency under load</h2>" in files["html"].read_text()
    out = capsys.readouterr().out
    assert re.search(r"^parvis +http, 3 clients +8 ", out, re.MULTILINE)
    assert re.search(r"^parvis +http at [\d.]+/s +8 ", out, re.MULTILINE)
    assert "not included: a network (the clients share the server's cores), starting the server\n" in out
    assert "predicted" not in out
    images = [parse_qs(urlsplit(path).query) for path in paths if path.startswith("/v1/images?")]
    assert len(images) == 1 + (1 + 8) + (3 + 8) + 3 * 4  # the one that is checked, each client's first, what counts
    assert len({image["seed"][0] for image in images}) == len(images)
    assert {image["label"][0] for image in images} == set("012345")
    assert {(image["guidance"][0], image["guidance_interval"][0]) for image in images} == {("1.5", "-1")}
    more[-1] = "1"
    assert main(["bench", str(SMALL), *ARGUMENTS, *more, "--unguided", "--json", "-"]) == 0
    capsys.readouterr()
    last = parse_qs(urlsplit(paths[-1]).query)
    assert last["guidance"] == ["1.0"]
    assert main(["bench", "--compare", str(files["json"]), str(files["json"])]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^parvis +http, 3 clients +8 .* 1\.000 ", out, re.MULTILINE)
    assert "only old" not in out
    assert len(pids) == 2
    assert all(map(ended, pids))


def test_one_server_that_fails_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one does not start, the second is killed in its second load, the third has all of its rows."""
    broken, killed = (shutil.copytree(TINY, tmp_path / name) for name in ("broken", "killed"))
    real_start, real_load = ServedSubject.start, ServedSubject.closed_load

    def start(self: ServedSubject, seconds: float) -> bool:
        if self.info.label == "broken":
            (broken / "manifest.json").unlink()
        return real_start(self, seconds)

    def load(self: ServedSubject, count: int, requests: int, *more: Any) -> Sample:
        if self.info.label == "killed" and (count, requests) == (2, 4):
            assert self.pid is not None
            os.kill(self.pid, signal.SIGKILL)
        return real_load(self, count, requests, *more)

    monkeypatch.setattr(ServedSubject, "start", start)
    monkeypatch.setattr(ServedSubject, "closed_load", load)
    file = tmp_path / "rows.jsonl"
    more = ["--batches", "1", "2", "--requests", "4", "--repetitions", "1", "--quiet", "--json", str(file)]
    assert main(["bench", str(broken), str(killed), str(TINY), *ARGUMENTS, *more]) == 2
    assert [(row.label, row.clients) for row in read(file)] == [
        ("killed", 1),
        *(("tiny", count) for count in (1, 2, None, None, None)),
    ]
    assert json.loads(file.read_text().splitlines()[-1])["why"] == "broken, killed failed"
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"parvis: error: broken: {broken}: its server did not start (exit code 2), and printed {broken}: holds no "
        "manifest.json, so it is not a bundle; make one with 'parvis export'"
    )
    assert second.startswith(f"parvis: error: killed: the process of 'parvis serve {killed}' (killed) was killed; ")
    assert len(pids) == 2
    assert all(map(ended, pids))


def test_ctrl_c_keeps_the_rows_and_ends_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loads = ServedSubject.closed_load, list[int]()

    def load(self: ServedSubject, *given: Any) -> Sample:
        loads.append(given[0])
        if len(loads) == 4:  # one that is not counted, two that are
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(ServedSubject, "closed_load", load)
    file = tmp_path / "rows.jsonl"
    more = ["--batches", "2", "--requests", "4", "--repetitions", "3", "--json", str(file)]
    assert main(["bench", str(TINY), *ARGUMENTS, *more]) == 130
    assert capsys.readouterr().out.startswith("not complete: the run was stopped\n")
    (row,) = read(file)
    assert (row.clients, len(row.samples_ms)) == (2, 8)
    assert "incomplete: 2 of 3 repetitions were made before it ended" in row.flags
    (pid,) = pids
    assert ended(pid)


@on_linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_a_bench_that_is_ended(number: signal.Signals) -> None:
    """Also where the bench cannot end it, and in the middle of requests."""
    more = ["--batches", "2", "--requests", "1000000", "--repetitions", "1", "--quiet"]
    command = [sys.executable, "-m", "par_runtime", "bench", str(TINY), *ARGUMENTS, *more]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        found: list[int] = []
        until(lambda: bool(process.poll() is not None or found.extend(_servers_of(process.pid)) or found))
        until(lambda: process.poll() is not None or _sockets(process.pid) > 1)  # two clients ask
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (143 if number == signal.SIGTERM else -number), errors
        assert found
        until(lambda: ended(found[0]))


def _servers_of(bench: int) -> list[int]:
    """The processes that ``bench`` has started, of those that serve."""
    out = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            words = folder.joinpath("cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == bench and b"par_runtime.bench.subjects.leash" in words:
            out.append(int(folder.name))
    return out


def _sockets(pid: int) -> int:
    """How many connections a process has open."""
    links = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            links.append(os.readlink(link))
        except OSError:
            continue
    return sum(link.startswith("socket:") for link in links)


# -- what is refused before anything is started -----------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("name", NEEDS)
def test_a_package_that_is_missing_is_one_line_with_what_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else real(each))
    assert main(["bench", str(TINY), "--suite", "http"]) == 2
    assert capsys.readouterr().err == (
        f"parvis: error: --suite http needs {name}, which is not installed; {how_to_install('cpu,serve')}\n"
    )


def test_what_it_needs_is_what_the_extra_brings() -> None:
    assert set(NEEDS) == set(EXTRAS["cpu,serve"])


@pytest.mark.usefixtures("nothing_starts")
def test_a_bundle_that_ends_at_tokens_is_refused(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(TINY), str(bundles["n16"]), "--suite", "http"]) == 2
    assert capsys.readouterr().err == (
        f"parvis: error: {bundles['n16']}: this bundle ends at tokens and makes no images, so --suite http has nothing "
        "to ask for\n"
    )


@pytest.mark.usefixtures("nothing_starts")
def test_baselines_that_no_server_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(TINY), "--suite", "http", "--against", "ort,eager", "compiled"]) == 2
    assert capsys.readouterr().err == (
        "parvis: error: --against eager compiled: --suite http takes n1 and ort, which are bundles; 'parvis serve' "
        "runs no PyTorch\n"
    )


# -- what people see --------------------------------------------------------------------------------------------------


class Named:
    """A subject of which only rows are made."""

    max_batch = 8

    def __init__(self, **changes: Any) -> None:
        self.info = subject_info(**changes)


def load(latencies: list[list[float]], took_ms: float, **asked: Any) -> Row:
    """The row of a load with these repetitions."""
    samples = [Sample({"http": each}, took_ms) for each in latencies]
    (row,) = load_rows(
        Named(),  # type: ignore[arg-type]
        Repetitions(samples, [()] * len(samples)),
        Setting("http", repetitions=len(samples)),
        this_machine=MACHINE,
        **asked,
    )
    return row


def test_images_a_second_are_those_of_the_middle_repetition() -> None:
    row = load([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0, 70.0, 80.0]], 100.0, clients=2)
    assert row.images_per_s == pytest.approx(20.0)
    assert row.samples_ms == (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0)
    assert (row.median_ms, row.images, row.clients, row.offered_per_s) == (45.0, 8, 2, None)


def test_requests_of_one_repetition_are_no_repetitions() -> None:
    assert load([[10.0] * 64] * 4, 100.0, clients=2).marks == ("few repetitions",)
    assert load([[10.0] * 64] * 5, 100.0, clients=2).marks == ()
    assert load([[10.0] * 2] * 2, 100.0, clients=2).marks == ("few repetitions",)
    assert load([[10.0] * 64], 100.0, offered=3.0).marks == ()


def test_loads_are_paired_by_their_clients_and_open_ones_by_place() -> None:
    def rows(slower: float, *counts: int) -> list[Row]:
        closed = [load([[slower * count] * 5] * 5, 100.0, clients=count) for count in counts]
        return [*closed, *(load([[100 * slower * i] * 5] * 5, 100.0, offered=i * slower) for i in (1, 2, 3))]

    found = compare(rows(1.0, 1, 32), rows(2.0, 1, 8, 32))
    assert [pair.new.clients for pair in found.pairs] == [1, 32, None, None, None]
    assert [pair.ratio for pair in found.pairs] == [2.0] * 5
    assert [line.split(", L-n4")[0] for line in found.only_new] == ["http parvis http of 8 clients, 8 images"]
    shown = compared(found)
    assert re.search(r"^parvis  http, 1 client +8 ", shown, re.MULTILINE)
    assert re.search(r"^parvis  http, 32 clients +8 ", shown, re.MULTILINE)


def test_the_page_has_a_plot_of_each_kind_of_load() -> None:
    rows = [replace(load([[10.0 * n] * 5] * 5, 100.0, clients=n), images_per_s=10.0 + n) for n in (1, 8)]
    rows += [load([[10.0, 20.0, 40.0]], 100.0, offered=each) for each in (1.0, 2.0)]
    out = shown_page(rows)
    assert out.count("<svg") == 2
    assert "<h2>Over HTTP: throughput against latency, by clients</h2>" in out
    assert "<h2>Over HTTP: latency under load</h2>" in out
    assert "<title>parvis, 8 clients: 80 ms, 18 a second</title>" in out
    assert "<title>parvis, 2 requests a second offered: 38 ms, 30 a second</title>" in out
    assert "<h2>Latency under load" not in out
    shown = text.table(rows)
    assert re.search(r"^parvis  http, 1 client +8 +10 ms +0 ms +10 ms +11$", shown, re.MULTILINE)


def test_rows_of_an_older_version_have_no_clients() -> None:
    plain = json.loads(to_json(replace(one_row([1.0]), clients=8)))
    assert from_plain(plain).clients == 8
    del plain["clients"]
    assert from_plain(plain).clients is None
