"""A bundle behind ``parvis serve``: what it is started with, what it is asked, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.servers import ended, started_servers
from kinds import TINY
from PIL import Image
from sharing import until

from par_runtime.bench.measure import Setting
from par_runtime.bench.subjects import served
from par_runtime.bench.subjects.served import NOT_OVER_HTTP, ServedSubject, ServerProcess, check_picture
from par_runtime.bench.suites.http import http
from par_runtime.bundle import Bundle, seal
from par_runtime.dtypes import Rounding
from par_runtime.errors import BundleError, RequestError


def quiet(_: str) -> None:
    pass


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of all servers that a test starts."""
    return started_servers(monkeypatch)


@pytest.fixture(scope="module")
def running() -> Iterator[ServedSubject]:
    subject = ServedSubject(TINY, threads=1, selftest=False)
    try:
        subject.start(60)
        yield subject
    finally:
        subject.close()


def test_a_server_is_what_its_info_says(running: ServedSubject) -> None:
    bundle = Bundle.open(TINY)
    assert (running.info.hash, running.info.image_size) == (bundle.hash, bundle.image_size)
    assert (running.info.clock, running.info.excluded) == ("perf_counter", NOT_OVER_HTTP)
    assert running.max_batch == 8
    assert running.pid is not None
    assert running.pid != os.getpid()
    sample = running.run(3, True)
    assert len(sample.calls_ms["http"]) == 3
    assert max(sample.calls_ms["http"]) <= sample.image_ms
    assert sample.peak_bytes is None or sample.peak_bytes > 10**7


def test_open_loads_are_as_many_requests_as_arrive(running: ServedSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MOST_OPEN", 2)
    sample = running.open_load([0.0] * 5, True)
    assert len(sample.calls_ms["http"]) == 5
    assert max(sample.calls_ms["http"]) == pytest.approx(sample.image_ms)  # it was due when the first one was


def test_a_bad_request_ends_a_load_with_what_the_server_says(
    running: ServedSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_classes", 10**6)
    running._seed = 0  # so the sixth label is none
    with pytest.raises(RequestError, match=rf"^{TINY}: GET /v1/images\?label=\d+&.*: answered with 400: .*label \d+"):
        running.closed_load(1, 20, True)
    monkeypatch.undo()
    assert len(running.run(1, True).calls_ms["http"]) == 1


def test_what_a_server_is_started_with() -> None:
    rounding = Rounding("fp32", "auto", "fp32")
    subject = ServedSubject(TINY, "b", device="cpu-ort", threads=1, selftest=False, rounding=rounding)
    assert subject.pid is None
    assert subject._arguments == [
        *(str(TINY), "--device", "cpu-ort", "--threads", "1", "--arithmetic", "fp32", "--cache", "auto"),
        *("--decoder-precision", "fp32", "--no-selftest"),
    ]
    more = ServedSubject(TINY, "b", device="cpu")._arguments
    assert "--threads" not in more
    assert "--no-selftest" not in more


def test_a_server_that_does_not_end_as_it_should_is_an_error() -> None:
    server = ServerProcess("parvis", [str(TINY), "--threads", "1", "--no-selftest"])
    try:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(MemoryError, match=rf"^the process of 'parvis serve {TINY}' \(parvis\) was killed; "):
            server.stop()
    finally:
        server.close()


def test_a_server_that_ends_by_itself_is_an_error(pids: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    subject = ServedSubject(TINY, threads=1, selftest=False)
    try:
        subject.start(60)
        os.kill(pids[0], signal.SIGTERM)
        until(lambda: ended(pids[0]))
        with pytest.raises(RequestError) as error:
            subject.run(2, True)
        assert re.fullmatch(
            rf"{TINY}: its server ended by itself \(exit code 0\), and printed stopped after 1 images in 1 calls",
            str(error.value),
        )
    finally:
        subject.close()
    assert capfd.readouterr().err == ""


def test_a_bundle_that_is_replaced_meanwhile_is_not_measured(tmp_path: Path, pids: list[int]) -> None:
    path, other = (shutil.copytree(TINY, tmp_path / name) for name in ("tiny", "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["defaults"]["guidance"] += 1.0
    (other / "manifest.json").write_text(json.dumps(seal(manifest)))
    subject = ServedSubject(path, threads=1, selftest=False)
    path.rename(tmp_path / "old")
    other.rename(path)
    was, now = (Bundle.open(folder, "none").hash for folder in (tmp_path / "old", path))
    with pytest.raises(BundleError) as error:
        http([subject], Setting("http", repetitions=1), quiet, (1,), 1)
    assert str(error.value) == (
        f"{path}: was replaced by another bundle while its server was started: at first {was[:12]}, then {now[:12]}; "
        "leave it alone, and measure again"
    )
    (pid,) = pids
    assert ended(pid)


def test_a_server_that_computes_otherwise_is_not_measured(running: ServedSubject) -> None:
    now = f"{running.info.backend} {running.info.version}"
    with pytest.raises(
        BundleError, match=rf"is computed otherwise while .* at first {re.escape(now)}, then kernels 1; "
    ):
        running._check(running.info.hash, "kernels 1")


def test_a_clip_is_an_answer_too(tiny_video: Path) -> None:
    subject = ServedSubject(tiny_video, threads=1, selftest=False)
    try:
        assert subject.start(60)
        assert subject.stop()
    finally:
        subject.close()


def _png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_png((8, 16)), "the first image has 8x16 pixels; expected 16x8, as the bundle has"),
        (_png((16, 8))[:-30], r"the first answer, of \d+ bytes, is no image that can be read"),
        (b'{"data": []}', "the first answer, of 12 bytes, is no image that can be read"),
    ],
)
def test_the_first_answer_is_looked_at(content: bytes, said: str) -> None:
    check_picture(_png((16, 8)), (8, 16))
    with pytest.raises(RequestError, match=rf"^{said}$"):
        check_picture(content, (8, 16))


def test_a_time_that_is_over_ends_a_load(running: ServedSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warming up, and what has begun, is made; the row says that there is less than was asked for."""
    monkeypatch.setattr(ServedSubject, "start", lambda *_: True)
    monkeypatch.setattr(ServedSubject, "stop", lambda *_: True)
    monkeypatch.setattr(ServedSubject, "close", lambda *_: None)
    rows = http([running], Setting("http", repetitions=3), quiet, (2,), 10**6, seconds=0.05)
    assert [row.clients for row in rows] == [2, None, None, None]
    assert "incomplete: 1 of 3 repetitions were made before it ended" in rows[0].flags
    assert all(0 < len(row.samples_ms) < 10**5 for row in rows)
